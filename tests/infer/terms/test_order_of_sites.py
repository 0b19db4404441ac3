"""Closed-form divergences where guide and model draw their sites in another order."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor

from pyro_sparse.estimators import Exact, StraightThrough
from pyro_sparse.infer import EstimatorELBO
from pyro_sparse.infer.terms import reading

X = torch.tensor([0.3, -1.0], dtype=torch.float64)


def param(name: str, *value: float) -> Tensor:
    return pyro.param(name, torch.tensor(value))


def model(order: str, chained: bool) -> Any:
    """``chained``: the prior of b depends on a."""

    def run() -> None:
        drawn: dict[str, Any] = {}
        with pyro.plate("N", 2):
            for name in order:
                probs = param(f"p.{name}", 0.3, 0.6)
                if name == "b" and chained:
                    probs = probs * (0.5 + 0.5 * drawn["a"])
                drawn[name] = pyro.sample(name, dist.Bernoulli(probs))
            pyro.sample("x", dist.Normal(drawn["a"] + 2 * drawn["b"], 1.0), obs=X)

    return run


def guide(order: str, chained: bool) -> Any:
    """``chained``: what is drawn second depends on the first."""

    def run() -> None:
        first: Any = 0.0
        with pyro.plate("N", 2):
            for name in order:
                value = pyro.sample(name, dist.Bernoulli(logits=param(f"q.{name}", 0.2, -0.5) + first))
                first = value if chained else 0.0

    return run


def step(elbo: Any, *program: Any) -> tuple[float, dict[str, Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    loss = elbo.loss_and_grads(*program)
    return loss, {name: p.grad for name, p in pyro.get_param_store().named_parameters()}


def assert_same(first: tuple[float, dict[str, Tensor]], second: tuple[float, dict[str, Tensor]]) -> None:
    assert first[0] == pytest.approx(second[0], abs=1e-12)
    for name, value in first[1].items():
        torch.testing.assert_close(value, second[1][name], rtol=0, atol=1e-12)


CASES = [("ab", True, "ba", True), ("ab", True, "ba", False), ("ab", False, "ba", True), ("ab", True, "ab", True)]


@pytest.mark.parametrize("costs", ["plates", "graph"])
@pytest.mark.parametrize("in_model, model_chained, in_guide, guide_chained", CASES)
def test_the_exact_gradient(in_model: str, model_chained: bool, in_guide: str, guide_chained: bool, costs: str) -> None:
    """Whichever divergences are taken in closed form: none where the prior sees its own draw."""
    program = model(in_model, model_chained), guide(in_guide, guide_chained)
    expected = step(TraceEnum_ELBO(max_plate_nesting=1), program[0], config_enumerate(program[1]))
    assert_same(step(EstimatorELBO(Exact(), analytic_kl=True, costs=costs), *program), expected)


def test_the_check_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: with every divergence in closed form, the first of these is wrong."""
    monkeypatch.setattr(reading, "priors_that_see_their_draws", lambda *args: frozenset())
    program = model("ab", True), guide("ba", True)
    expected = step(TraceEnum_ELBO(max_plate_nesting=1), program[0], config_enumerate(program[1]))
    assert abs(step(EstimatorELBO(Exact(), analytic_kl=True), *program)[0] - expected[0]) > 1e-3


def test_the_same_numbers_as_in_the_guides_order() -> None:
    """Independent priors: their order in the model does not matter."""
    own, elbo = guide("ba", True), EstimatorELBO(StraightThrough())
    assert_same(*(step(elbo, model(order, False), own) for order in ("ab", "ba")))


def test_in_one_order_no_further_run_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "priors_that_see_their_draws", None)
    step(EstimatorELBO(StraightThrough()), model("ab", True), guide("ab", True))
