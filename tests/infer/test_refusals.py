"""Effect-based guides are refused wherever a trace of the guide would be taken for its draws alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormalMessenger
from pyro.infer.autoguide.effect import AutoMessenger, GuideMessenger

from pyro_sparse.diagnostics import gradient_report
from pyro_sparse.estimators import Exact
from pyro_sparse.infer import EstimatorELBO, SparseEnumELBO, config_estimators
from pyro_sparse.infer.exact import EnumeratedELBO, exact_gradient
from pyro_sparse.infer.score_function import ScoreFunctionELBO


def model() -> None:
    u = pyro.sample("u", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(u, 1.0), obs=torch.tensor(1.0))


class Effect(AutoMessenger):
    def get_posterior(self, name: str, prior: Any) -> Any:
        return dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0)


class Own(GuideMessenger):
    def get_posterior(self, name: str, prior: Any) -> Any:
        return dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0)


ENTRIES: dict[str, Callable[[Any], Any]] = {
    "SparseEnumELBO": lambda guide: SparseEnumELBO().loss(model, guide),
    "EnumeratedELBO": lambda guide: EnumeratedELBO().loss(model, guide),
    "ScoreFunctionELBO": lambda guide: ScoreFunctionELBO().loss_and_grads(model, guide),
    "exact_gradient": lambda guide: exact_gradient(model, guide, parameters=[torch.zeros(1, requires_grad=True)]),
    "EstimatorELBO": lambda guide: EstimatorELBO(Exact()).loss(model, guide),
    "config_estimators": lambda guide: config_estimators(guide, Exact()),
    "gradient_report": lambda guide: gradient_report(model, guide, estimators={"enum": EnumeratedELBO()}),
}


@pytest.mark.parametrize("make", [AutoNormalMessenger, Effect, Own])
@pytest.mark.parametrize("entry", ENTRIES)
def test_guide_messengers_are_refused(entry: str, make: Any) -> None:
    with pytest.raises(NotImplementedError, match=f"{entry}: expected .* got a GuideMessenger, {make.__name__}. Write"):
        ENTRIES[entry](make(model))
