"""Public conformance checks: prove your own projection, distribution or ELBO by one call."""

from __future__ import annotations

from pyro_sparse.testing.distributions import check_distribution
from pyro_sparse.testing.elbo import check_elbo
from pyro_sparse.testing.estimator import check_estimator
from pyro_sparse.testing.host_waits import count_host_waits
from pyro_sparse.testing.projections import check_projection
from pyro_sparse.testing.random_check import check_random_programs

__all__ = [
    "check_distribution",
    "check_elbo",
    "check_estimator",
    "check_projection",
    "check_random_programs",
    "count_host_waits",
]
