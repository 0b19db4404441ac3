"""When estimators' parameters are there, optimisers that lack some, and whole ELBOs in files."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_sparse.estimators import (
    VIMCO,
    LeaveOneOut,
    MovingAverage,
    NeuralBaseline,
    RaoBlackwell,
    Scaled,
    ScoreFunction,
    Sum,
    TrainableConstant,
)
from pyro_sparse.infer import BaselineELBO, EstimatorELBO, SparseEnumELBO

X = torch.tensor([[0.3, -1.0], [1.0, 0.2], [-0.4, 0.1]], dtype=torch.float64)


class Model(PyroModule):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.5)))
            y = pyro.sample("y", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(z + y, 1.0), obs=x[:, 0])


class Guide(PyroModule):
    def __init__(self, infer: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.infer = infer or {}

    def forward(self, x: Tensor) -> None:
        logits = self.net(x)
        with pyro.plate("data", len(x)):
            for i, name in enumerate("zy"):
                pyro.sample(name, dist.Bernoulli(logits=logits[:, i]), infer=self.infer)


def network() -> nn.Linear:
    return nn.Linear(2, 1)


def train(loss: Any, optimiser: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimiser.zero_grad()
        loss(X).backward()
        optimiser.step()


def moved(loss: Any, act: Callable[[], None]) -> dict[str, bool]:
    before = {name: p.detach().clone() for name, p in loss.elbo.named_parameters()}
    act()
    return {name: not torch.equal(before[name], p) for name, p in loss.elbo.named_parameters()}


@pytest.mark.parametrize(
    "entries",
    [
        lambda b: {"z": b, "y": None},
        lambda b: {"z": b, "y": b},  # the second is a copy
        lambda b: {"z": None, "*": b},
    ],
)
def test_an_optimiser_made_before_the_first_run(entries: Any) -> None:
    loss = BaselineELBO(entries(NeuralBaseline(network())))(Model(), Guide())
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.1)
    held = {id(p) for p in loss.parameters()}
    before = [p.detach().clone() for p in loss.elbo.parameters()]
    assert before
    train(loss, optimiser)
    assert {id(p) for p in loss.parameters()} == held
    assert not any(torch.equal(old, p) for old, p in zip(before, loss.elbo.parameters(), strict=True))


LATE: dict[str, Callable[[], tuple[EstimatorELBO, Guide]]] = {
    "*": lambda: (BaselineELBO(NeuralBaseline(network())), Guide()),
    "infer": lambda: (EstimatorELBO({}), Guide({"estimator": ScoreFunction(NeuralBaseline(network()))})),
}


@pytest.mark.parametrize("name", LATE)
def test_an_optimiser_that_lacks_some_is_an_error_once(name: str) -> None:
    elbo, guide = LATE[name]()
    loss = elbo(Model(), guide)
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.1)
    train(loss, optimiser, 1)
    with pytest.raises(ValueError, match=r"a step without .*y.*net\.weight.*Call elbo\(model, guide\) once before"):
        loss(X)
    train(loss, optimiser)


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize("grad", [True, False])
def test_a_run_makes_them(name: str, grad: bool) -> None:
    """Also one without gradients, such as Lightning's check of the validation data."""
    elbo, guide = LATE[name]()
    loss = elbo(Model(), guide)
    with torch.set_grad_enabled(grad):
        loss(X)
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.1)
    assert all(moved(loss, lambda: train(loss, optimiser)).values())


def early(net: nn.Module | None = None, sites: str = "zy") -> Any:
    """Baselines whose parameters are there from the beginning."""
    pyro.clear_param_store()
    return BaselineELBO({name: NeuralBaseline(net or network()) for name in sites} | {"*": None})(Model(), Guide())


def of_guide(loss: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(loss.guide.parameters(), lr=0.1)


def of_estimators(loss: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(loss.elbo.parameters(), lr=0.1)


def step(loss: Any, *optimisers: torch.optim.Optimizer) -> None:
    loss(X).backward()
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("zero", [True, False])
def test_an_optimiser_without_parameters_that_were_there_is_an_error_once(zero: bool) -> None:
    loss = early()
    optimiser = of_guide(loss)
    step(loss, optimiser)
    if zero:
        loss.zero_grad()
    message = r"a step without .*\$z.*\$y.*Make it of elbo\(model, guide\)\.parameters\(\).*requires_grad_\(False\)"
    with pytest.raises(ValueError, match=message):
        loss(X)
    for _ in range(3):
        step(loss, optimiser)


def test_only_those_that_are_left_out_are_named() -> None:
    loss = early()
    own = torch.optim.Adam([*loss.guide.parameters(), *loss.elbo.assignment.sites["$z"].parameters()])
    step(loss, own)
    with pytest.raises(ValueError, match=r"a step without .*\$y") as info:
        loss(X)
    assert "$z" not in str(info.value)


def test_no_false_alarms() -> None:
    frozen = early(network().requires_grad_(False))
    optimiser = of_guide(frozen)
    for _ in range(3):
        step(frozen, optimiser)

    loss = early()  # each optimiser in its turn
    turns = [of_guide(loss), of_estimators(loss)]
    for i in range(5):
        step(loss, turns[i % 2])

    loss = early()  # the second accumulates
    turns = [of_guide(loss), of_estimators(loss)]
    for i in range(5):
        step(loss, *turns[: 1 + i // 3])

    loss = early()  # one that accumulates both
    optimiser = torch.optim.SGD(loss.parameters(), lr=0.1)
    for i in range(6):
        step(loss, *[optimiser][: i % 3 // 2])

    loss = early()  # by hand
    for _ in range(3):
        loss(X).backward()
        with torch.no_grad():
            for p in loss.parameters():
                p -= 0.1 * p.grad

    loss = early(Zero())
    optimiser = of_guide(loss)
    for _ in range(3):
        step(loss, optimiser)


class Zero(nn.Linear):
    """Whose parameters get gradients of zero."""

    def __init__(self) -> None:
        super().__init__(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 0.0 * super().forward(x)


def test_accumulated_gradients_and_a_pickle_are_no_step() -> None:
    elbo, guide = LATE["*"]()
    loss = elbo(Model(), guide)
    for _ in range(3):
        loss(X).backward()
    twin = copy.deepcopy(loss)
    train(twin, torch.optim.Adam(twin.parameters(), lr=0.1))
    train(loss, torch.optim.Adam(loss.parameters(), lr=0.1))


def test_a_copy_is_what_the_object_was_at_first() -> None:
    """A site that only a later batch has does not begin with what another site has learned."""

    def model(deep: bool) -> None:
        for name in ("z", "y")[: 1 + deep]:
            pyro.sample(name, dist.Bernoulli(0.5))
        pyro.factor("f", torch.tensor(3.0))

    def guide(deep: bool) -> None:
        for name in ("z", "y")[: 1 + deep]:
            pyro.sample(name, dist.Bernoulli(logits=pyro.param(f"logit of {name}", torch.tensor(0.0))))

    baseline = Sum(MovingAverage(), TrainableConstant())
    elbo = BaselineELBO(baseline)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    for _ in range(5):
        svi.step(False)
    assert baseline.first.weight > 1 and baseline.second.constant != 0
    elbo.loss(model, guide, True)
    late: Any = elbo.assignment["y"]
    assert elbo.assignment["z"].baseline is baseline
    assert late.baseline.first.weight == 0 and late.baseline.second.constant == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: BaselineELBO(Sum(MovingAverage(), NeuralBaseline(network()))),
        lambda: BaselineELBO({"z": TrainableConstant(), "*": Scaled(TrainableConstant())}),
        lambda: EstimatorELBO(LeaveOneOut(2)),
        lambda: EstimatorELBO(VIMCO(2)),
        lambda: EstimatorELBO({"z": RaoBlackwell(), "y": ScoreFunction(MovingAverage())}, costs="graph"),
        lambda: SparseEnumELBO(strict_enumeration_warning=False),
    ],
)
def test_a_whole_elbo_in_a_file(make: Callable[[], Any]) -> None:
    """After steps of SVI, which leaves weak references at parameters; it goes on with the same numbers."""
    model, guide, elbo = Model(), Guide(), make()
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), elbo)
    svi.step(X)
    loaded = pickle.loads(pickle.dumps(elbo))
    torch.save(elbo, io.BytesIO())
    weight = guide.net.weight.detach().clone()
    results = []
    for one in (elbo, loaded):
        with torch.no_grad():
            guide.net.weight.copy_(weight)
        pyro.set_rng_seed(3)
        results.append(one.loss_and_grads(model, guide, X))
    assert results[0] == results[1]


def test_the_module_of_a_loss_in_a_file() -> None:
    loss = BaselineELBO(NeuralBaseline(network()))(Model(), Guide())
    optimiser = torch.optim.SGD(loss.parameters(), lr=0.1)
    loss(X).backward()
    loaded = pickle.loads(pickle.dumps(loss))
    assert loaded.state_dict().keys() == loss.state_dict().keys()
    optimiser.step()


def test_what_estimators_print() -> None:
    assert repr(LeaveOneOut(4)) == "LeaveOneOut(4)"
    assert repr(LeaveOneOut(4, vectorized=False)) == "LeaveOneOut(4, vectorized=False)"
    assert repr(VIMCO(3)) == "VIMCO(3)"
    assert repr(RaoBlackwell(k=2)) == "RaoBlackwell(k=2)"
    assert repr(MovingAverage(num_data=8)) == "MovingAverage(num_data=8)"
    assert repr(TrainableConstant()) == "TrainableConstant()"


def test_a_state_from_before_a_site_came_puts_it_back_to_its_beginning() -> None:
    def model(deep: bool) -> None:
        for name in ("z", "y")[: 1 + deep]:
            pyro.sample(name, dist.Bernoulli(0.5))
        pyro.factor("f", torch.tensor(3.0))

    def guide(deep: bool) -> None:
        for name in ("z", "y")[: 1 + deep]:
            pyro.sample(name, dist.Bernoulli(logits=pyro.param(f"logit of {name}", torch.tensor(0.0))))

    elbo = BaselineELBO(Sum(MovingAverage(), TrainableConstant()))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    svi.step(False)
    state = copy.deepcopy(elbo.state_dict())
    for _ in range(3):
        svi.step(True)
    elbo.load_state_dict(state)
    late: Any = elbo.assignment["y"]
    assert late.baseline.first.weight == 0 and late.baseline.second.constant == 0
    svi.step(True)
    with pytest.raises(RuntimeError, match="Missing key"):  # of a site that is named here it would be a mistake
        BaselineELBO({"z": MovingAverage()}).load_state_dict({})


@pytest.mark.parametrize(
    "make", [lambda: NeuralBaseline(network()), MovingAverage, lambda: Sum(MovingAverage(), TrainableConstant())]
)
def test_the_state_of_before_the_first_run(make: Any) -> None:
    """As learning rate finders do: trained for a while, and put back."""
    loss = BaselineELBO(make())(Model(), Guide())
    before = copy.deepcopy(loss.state_dict())
    loss(X).backward()
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(1.0)
    loss(X).backward()
    loss.load_state_dict(before)
    found = loss.state_dict()
    for name, value in before.items():
        for site in ("z", "y"):
            torch.testing.assert_close(found[name.replace("$*", f"${site}")], value)
