"""Sites of a sequential plate, ``z_0``, ``z_1``, ..., share an estimator; those of layers and time steps do not."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_sparse.estimators import (
    LeaveOneOut,
    MovingAverage,
    RaoBlackwell,
    Scaled,
    ScoreFunction,
    TrainableConstant,
)
from pyro_sparse.infer import BaselineELBO, EstimatorELBO
from pyro_sparse.infer.assignment import PARAM_PREFIX
from pyro_sparse.infer.names import group

N = 12
X = torch.linspace(-1.0, 1.0, N, dtype=torch.float64)


class Frame:
    def __init__(self, vectorized: bool) -> None:
        self.vectorized = vectorized


@pytest.mark.parametrize(
    "name, sequential, expected",
    [
        ("z_3", 0, "z_3"),
        ("z_3", 1, "z_*"),
        ("z3", 1, "z*"),
        ("z_12_3", 1, "z_12_*"),
        ("z_12_3", 2, "z_*_*"),
        ("z[3]", 1, "z[3]"),
        ("z", 1, "z"),
        ("z_1", 2, "z_*"),
        ("layer1.z_3", 1, "layer1.z_*"),
    ],
)
def test_what_they_are_called_together(name: str, sequential: int, expected: str) -> None:
    assert group(name, [Frame(True), *[Frame(False)] * sequential]) == expected


def program(infer: Any = lambda i: None) -> tuple[Any, Any]:
    def model() -> None:
        for i in pyro.plate("data", N, subsample_size=2):
            z = pyro.sample(f"z_{i}", dist.Bernoulli(0.5))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=X[i])

    def guide() -> None:
        logit = pyro.param("logit", torch.tensor(0.3))
        for i in pyro.plate("data", N, subsample_size=2):
            pyro.sample(f"z_{i}", dist.Bernoulli(logits=logit), infer=infer(int(i)))

    return model, guide


@pytest.mark.parametrize("entries", [lambda b: b, lambda b: {"z_*": b}])
def test_one_running_mean_for_all(entries: Any) -> None:
    """It is warm after the first step, and what is kept does not grow with the data."""
    average = MovingAverage()
    elbo = BaselineELBO(entries(average))
    model, guide = program()
    for _ in range(20):
        elbo.loss_and_grads(model, guide)
    assert list(elbo.assignment.sites) == ["$z_*"] and list(elbo.assignment.sources) == ["z_*"]
    assert elbo.assignment["z_*"].baseline is average
    assert float(average.weight) == pytest.approx(10 * (1 - 0.9**40))  # it saw each of 40 costs


def test_the_gradient_is_that_of_one_running_mean() -> None:
    """Two elements a step: the costs less the mean that earlier steps have left, then both move it."""
    average = MovingAverage()
    average.mean.fill_(-0.7)
    average.weight.fill_(1.0)
    model, guide = program()
    results = []
    for elbo in (BaselineELBO(average), BaselineELBO(None)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        elbo.loss_and_grads(model, guide)
        results.append(pyro.param("logit").grad)
    pyro.set_rng_seed(0)
    trace = pyro.poutine.trace(guide).get_trace()
    bits = [trace.nodes[name]["value"] for name in trace.stochastic_nodes if name != "data"]
    score = sum(N / 2 * (bit - torch.tensor(0.3).sigmoid()) for bit in bits)
    assert results[0].item() == pytest.approx(results[1].item() + float(score) * -0.7, abs=1e-12)


def test_names_of_parameters_and_state() -> None:
    elbo = BaselineELBO({"*": TrainableConstant()})
    model, guide = program()
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo).step()
    assert f"{PARAM_PREFIX}$z_*$baseline.constant" in pyro.get_param_store()
    assert list(elbo.state_dict()) == ["assignment.sites.$z_*.baseline.constant"]
    loaded = BaselineELBO({"*": TrainableConstant()})
    loaded.load_state_dict(elbo.state_dict())
    pyro.clear_param_store()
    loaded.loss_and_grads(model, guide)
    assert len([*loaded.parameters()]) == 1


def test_an_entry_for_one_of_them_is_its_own() -> None:
    """Where the first run reaches it."""

    def model(size: int) -> None:
        for i in pyro.plate("data", size):
            pyro.sample(f"z_{i}", dist.Bernoulli(0.5))

    def guide(size: int) -> None:
        for i in pyro.plate("data", size):
            pyro.sample(f"z_{i}", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.3))))

    elbo = BaselineELBO({"z_0": Scaled(TrainableConstant()), "z_*": MovingAverage()})
    for size in (1, 3):
        elbo.loss_and_grads(model, guide, size)
    assert isinstance(elbo.assignment["z_0"].baseline, Scaled) and len(elbo.assignment.sites) == 2


def test_what_the_guide_gives() -> None:
    """One object is one for all; objects of their own stay that."""
    one = ScoreFunction(MovingAverage())
    elbo = EstimatorELBO({})
    model, guide = program(lambda i: {"estimator": one})
    for _ in range(3):
        elbo.loss_and_grads(model, guide)
    assert elbo.assignment["z_*"] is one and len(elbo.assignment.sites) == 1
    pyro.clear_param_store()
    several = [ScoreFunction(MovingAverage()) for _ in range(N)]
    elbo = EstimatorELBO({})
    model, guide = program(lambda i: {"estimator": several[i]})
    for _ in range(20):
        elbo.loss_and_grads(model, guide)
    served = list(elbo.assignment.sites.values())
    assert len({id(e) for e in served}) == len(served) and all(any(e is own for own in several) for e in served)
    pyro.clear_param_store()
    EstimatorELBO({}).loss_and_grads(*program(lambda i: {"estimator": RaoBlackwell()}))


def test_pyros_own_baselines() -> None:
    elbo = EstimatorELBO({})
    model, guide = program(lambda i: {"baseline": {"use_decaying_avg_baseline": True}})
    for _ in range(5):
        elbo.loss_and_grads(model, guide)
    assert list(elbo.assignment.sites) == ["$z_*"]


def test_layers_do_not_share() -> None:
    def model() -> None:
        for i in range(2):
            pyro.sample(f"z_{i}", dist.Bernoulli(0.5))

    def guide() -> None:
        for i in range(2):
            pyro.sample(f"z_{i}", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.3))))

    elbo = BaselineELBO(MovingAverage())
    elbo.loss_and_grads(model, guide)
    assert list(elbo.assignment.sites) == ["$z_0", "$z_1"]


@pytest.mark.parametrize("estimator", [LeaveOneOut(2), LeaveOneOut(2, vectorized=False), RaoBlackwell()])
def test_other_estimators(estimator: Any) -> None:
    elbo = EstimatorELBO(estimator)
    model, guide = program()
    for _ in range(3):
        elbo.loss_and_grads(model, guide)
    assert len(elbo.assignment.sites) == 1
