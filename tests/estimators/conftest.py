"""What the proofs of all estimators on one model share is worked out once."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from pyro_sparse.testing import estimator
from pyro_sparse.testing.estimator_models import EstimatorModel

first_runs, objective = estimator._first_runs, estimator._objective
BRANCHES: dict[Any, bool] = {}
OBJECTIVES: dict[Any, dict[str, Tensor]] = {}
KEPT: list[Any] = []  # so that no two arguments have one id


def program(model: EstimatorModel) -> tuple[Any, ...]:
    KEPT.append(model.args)
    return model.model, model.guide, model.max_plate_nesting, *map(id, model.args)


def first_runs_once(model: EstimatorModel, count: int) -> bool:
    """A guide that has no branch makes its parameters in one run."""
    key = program(model)
    if BRANCHES.get(key, True):
        BRANCHES[key] = first_runs(model, count)
    else:
        first_runs(model, 1)
    return BRANCHES[key]


def objective_once(model: EstimatorModel, n: int, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The enumerated objective depends on model and guide and on the values of their parameters alone."""
    values = tuple((name, p.detach().numpy().tobytes()) for name, p in parameters.items())
    key = (*program(model), n, values)
    if key not in OBJECTIVES:
        OBJECTIVES[key] = objective(model, n, parameters)
    return OBJECTIVES[key]


@pytest.fixture(autouse=True)
def objectives_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimator, "_first_runs", first_runs_once)
    monkeypatch.setattr(estimator, "_objective", objective_once)
