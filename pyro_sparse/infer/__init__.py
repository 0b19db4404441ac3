"""ELBOs for Pyro models and guides: the only room that knows about traces."""

from __future__ import annotations

from pyro_sparse.infer.assignment import config_estimators
from pyro_sparse.infer.autoguide import AutoSparseParallel
from pyro_sparse.infer.baseline_elbo import BaselineELBO
from pyro_sparse.infer.checkpoint import Checkpoint
from pyro_sparse.infer.discrete import infer_discrete
from pyro_sparse.infer.estimator_elbo import EstimatorELBO
from pyro_sparse.infer.expansion.stats import SupportStats
from pyro_sparse.infer.sparse_enum import SparseEnumELBO

__all__ = [
    # exact, over the non-zero support
    "SparseEnumELBO",
    "SupportStats",
    "AutoSparseParallel",
    # discrete sites of the model alone
    "infer_discrete",
    # by draws, with a baseline or better
    "BaselineELBO",
    "EstimatorELBO",
    "config_estimators",
    # a training that goes on where it was
    "Checkpoint",
]
