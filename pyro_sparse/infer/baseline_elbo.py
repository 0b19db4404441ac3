"""The score function with a baseline at every site, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_sparse.estimators import Baseline, ScoreFunction
from pyro_sparse.infer.estimator_elbo import EstimatorELBO


class BaselineELBO(EstimatorELBO):
    r"""
    :class:`EstimatorELBO` with the score function and a baseline b, a one-line upgrade of
    :class:`~pyro.infer.Trace_ELBO`, which it is where b is None.

    Args:
        baseline: a :class:`~pyro_sparse.estimators.Baseline` for all sites, None, or ``{"site": b, "*": b}``.
        kwargs: those of :class:`EstimatorELBO`.
    """

    def __init__(self, baseline: Baseline | Mapping[str, Baseline | None] | None = None, **kwargs: Any) -> None:
        entries = baseline if isinstance(baseline, Mapping) else {"*": baseline}
        super().__init__({name: ScoreFunction(b) for name, b in entries.items()}, **kwargs)
