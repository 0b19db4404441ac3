"""Which estimator serves which site: precedence, copies, names, Pyro's own baselines, and all that is refused."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_sparse.distributions import SparseCategorical
from pyro_sparse.estimators import (
    ARMS,
    VIMCO,
    Baseline,
    DisARM,
    Enumeration,
    Estimator,
    Exact,
    LeaveOneOut,
    MovingAverage,
    NeuralBaseline,
    RaoBlackwell,
    SampleBaseline,
    ScoreFunction,
    Site,
    TrainableConstant,
    UnorderedSet,
)
from pyro_sparse.infer import BaselineELBO, EstimatorELBO, config_estimators

B, K = 4, 3
DATA = torch.tensor([-1.0, 0.3, 1.1, 2.5], dtype=torch.float64)
PREFIX = "pyro_sparse.estimators"
# <object>: expected <what>, got <value>. <fix>. (Where a program's run fails, Pyro adds its shapes.)
HOUSE_FORM = r"(?s)^[^:]+: expected .+, got .+\. [A-Z].+\.(\nTrace Shapes:.*)?$"

Infer = Mapping[str, Any]
Program = tuple[Callable[..., Any], Callable[..., Any]]


def program(infer: Infer | None = None, names: tuple[str, str] = ("z", "b")) -> Program:
    """A categorical, a Bernoulli and a reparameterised site in one plate; ``infer`` by site."""
    z_name, b_name = names

    def model(x: Tensor = DATA) -> None:
        weight = pyro.param("weight", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample(z_name, dist.Categorical(torch.full((K,), 1 / K)))
            b = pyro.sample(b_name, dist.Bernoulli(0.4))
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(weight * z + b + w, 1.0), obs=x)

    def guide(x: Tensor = DATA) -> None:
        options = infer or {}
        with pyro.plate("data", len(x)):
            z_logits = pyro.param("z_logits", lambda: torch.randn(B, K), event_dim=1)
            pyro.sample(z_name, dist.Categorical(logits=z_logits), infer=dict(options.get("z", {})))
            b_logits = pyro.param("b_logits", lambda: torch.randn(B), event_dim=0)
            pyro.sample(b_name, dist.Bernoulli(logits=b_logits), infer=dict(options.get("b", {})))
            pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0), infer=dict(options.get("w", {})))

    return model, guide


def step(elbo: EstimatorELBO, model: Any, guide: Any) -> EstimatorELBO:
    elbo.loss_and_grads(model, guide)
    return elbo


def gradients() -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in pyro.get_param_store()._params.items() if p.grad is not None}


# Precedence.


def test_the_sites_own_estimator_comes_first() -> None:
    own, entry = ScoreFunction(MovingAverage()), TrainableConstant()
    elbo = step(BaselineELBO({"z": entry, "*": MovingAverage()}), *program({"z": {"estimator": own}}))
    assert elbo.assignment["z"] is own
    elbo.loss_and_grads(*program({"z": {"estimator": own}}))
    assert own.baseline is not None and int(torch.count_nonzero(own.baseline.weight)) == 1  # it is what moves


def test_a_baseline_may_stand_for_the_score_function_with_it() -> None:
    own = MovingAverage()
    elbo = step(EstimatorELBO(LeaveOneOut(2)), *program({"z": {"estimator": own}}))
    assert isinstance(elbo.assignment["z"], ScoreFunction) and elbo.assignment["z"].baseline is own
    assert isinstance(elbo.assignment["b"], LeaveOneOut)


def test_then_the_entry_then_pyros_baseline_then_the_star() -> None:
    decaying = {"baseline": {"use_decaying_avg_baseline": True}}
    entry, star = TrainableConstant(), TrainableConstant()
    elbo = step(BaselineELBO({"z": entry, "*": star}), *program({"z": decaying, "b": decaying}))
    assert elbo.assignment["z"].baseline is entry
    assert isinstance(elbo.assignment["b"].baseline.average, MovingAverage)
    elbo = step(BaselineELBO({"z": TrainableConstant(), "*": star}), *program())
    assert elbo.assignment["b"].baseline is star


def test_last_the_plain_score_function() -> None:
    elbo = step(EstimatorELBO({}), *program())
    for name in ("z", "b"):
        assert isinstance(elbo.assignment[name], ScoreFunction) and elbo.assignment[name].baseline is None
    assert set(elbo.assignment.sources) == {"z", "b"}  # the reparameterised site needs none


def test_enumeration_is_exact_and_beats_the_star() -> None:
    elbo = step(BaselineELBO(MovingAverage()), *program({"z": {"enumerate": "parallel"}}))
    assert isinstance(elbo.assignment["z"], Exact) and isinstance(elbo.assignment["b"], ScoreFunction)
    step(EstimatorELBO({"z": Exact()}), *program({"z": {"enumerate": "parallel"}}))  # says the same twice


# config_estimators.


def estimators_of(guide: Any) -> dict[str, Any]:
    trace = pyro.poutine.trace(guide).get_trace()
    return {name: trace.nodes[name]["infer"].get("estimator") for name in ("z", "b", "w")}


def test_config_estimators() -> None:
    z, default, own = LeaveOneOut(2), ScoreFunction(MovingAverage()), Exact()
    _, guide = program()
    assert estimators_of(config_estimators(guide, z=z)) == {"z": z, "b": None, "w": None}
    assert estimators_of(config_estimators(guide, default)) == {"z": default, "b": default, "w": None}
    assert estimators_of(config_estimators(guide, default, z=z)) == {"z": z, "b": default, "w": None}
    _, says = program({"z": {"estimator": own}})
    assert estimators_of(config_estimators(says, default, z=z)) == {"z": own, "b": default, "w": None}
    assert estimators_of(guide) == {"z": None, "b": None, "w": None}


def test_config_estimators_as_a_decorator() -> None:
    z = RaoBlackwell(2)
    model, plain = program()

    @config_estimators(default=MovingAverage(), z=z)
    def guide() -> None:
        plain()

    elbo = step(EstimatorELBO(LeaveOneOut(3)), model, guide)
    assert elbo.assignment["z"] is z and isinstance(elbo.assignment["b"].baseline, MovingAverage)


# One object, several sites.


def test_an_object_for_one_site_is_used_as_it_is() -> None:
    for given in (lambda b: {"z": b}, lambda b: {"z": b, "*": None}):
        baseline = MovingAverage()
        elbo = BaselineELBO(given(baseline))
        assert [*elbo.buffers()] == [*baseline.buffers()]  # held, and seen by .to(), before the first run
        step(elbo, *program())
        assert elbo.assignment["z"].baseline is baseline and baseline.weight > 0
    star = MovingAverage()
    elbo = step(BaselineELBO({"z": None, "*": star}), *program())
    assert elbo.assignment["b"].baseline is star and star.weight > 0


@pytest.mark.parametrize(
    "make",
    [
        BaselineELBO,
        lambda b: BaselineELBO({"z": b, "b": b}),
        lambda b: BaselineELBO({"z": b, "*": b}),
        lambda b: EstimatorELBO({"z": ScoreFunction(b), "b": ScoreFunction(b)}),
        lambda b: EstimatorELBO(ScoreFunction(b)),
    ],
)
def test_an_object_for_several_sites_is_copied(make: Any) -> None:
    """But for the first, which it serves itself."""
    baseline = MovingAverage()
    elbo = step(make(baseline), *program())
    z, b = elbo.assignment["z"].baseline, elbo.assignment["b"].baseline
    assert z is not b and baseline in (z, b)
    assert z.weight > 0 and b.weight > 0 and z.mean != 0
    assert len([*elbo.buffers()]) == 4


def test_an_object_that_the_guide_names_at_several_sites_is_copied() -> None:
    baseline = MovingAverage()
    infer = {"estimator": ScoreFunction(baseline)}
    elbo = step(EstimatorELBO({}), *program({"z": infer, "b": infer}))
    assert elbo.assignment["z"] is not elbo.assignment["b"]
    assert len({id(elbo.assignment[name].baseline) for name in "zb"} | {id(baseline)}) == 2


def test_what_has_no_state_may_be_new_at_each_step() -> None:
    options: dict[str, Any] = {"z": {"estimator": RaoBlackwell(1)}}
    model, guide = program(options)
    elbo = step(EstimatorELBO({}), model, guide)
    options["z"] = {"estimator": RaoBlackwell(2)}
    step(elbo, model, guide)
    assert elbo.assignment["z"] is options["z"]["estimator"]


# Names in the param store.


@pytest.mark.parametrize(
    "names", [("z", "b"), ("net.z", "net.b"), ("scope/z", "scope.z"), ("type", "values"), ("%", ".")]
)
def test_names_in_the_param_store(names: tuple[str, str]) -> None:
    model, guide = program(names=names)
    elbo = step(BaselineELBO({names[0]: TrainableConstant(), "*": TrainableConstant()}), model, guide)
    own = {name for name in pyro.get_param_store() if name.startswith(PREFIX)}
    assert own == {f"{PREFIX}${name}$baseline.constant" for name in names}
    for name in names:
        parameter = elbo.assignment[name].baseline.constant
        assert pyro.get_param_store()._params[f"{PREFIX}${name}$baseline.constant"] is parameter
        assert parameter.grad is not None


def test_frozen_parameters_stay_frozen() -> None:
    net = nn.Linear(1, 1)
    net.bias.requires_grad_(False)
    bias = net.bias.clone()
    elbo = BaselineELBO({"z": NeuralBaseline(net, inputs=lambda x=DATA: x[:, None])})
    svi = SVI(*program(), pyro.optim.Adam({"lr": 0.1}), loss=elbo)
    svi.step()
    svi.step()
    assert torch.equal(net.bias, bias) and not net.bias.requires_grad
    assert f"{PREFIX}$z$baseline.net.weight" in pyro.get_param_store()


def test_each_parameter_may_have_its_own_learning_rate() -> None:
    elbo = BaselineELBO({"z": TrainableConstant()})
    asked = []

    def rates(name: str) -> dict[str, float]:
        asked.append(name)
        return {"lr": 10.0 if name.startswith(PREFIX) else 0.0}

    svi = SVI(*program(), pyro.optim.Adam(rates), loss=elbo)
    svi.step()
    assert elbo.assignment["z"].baseline.constant.abs().item() == pytest.approx(10.0)
    assert any(name.startswith(PREFIX) for name in asked)


def test_two_elbos_cannot_share_a_site() -> None:
    model, guide = program()
    first = BaselineELBO({"z": TrainableConstant()})
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=first).step()
    with pytest.raises(ValueError, match=HOUSE_FORM) as error:
        BaselineELBO({"z": TrainableConstant()}).loss_and_grads(model, guide)
    assert f"{PREFIX}$z$baseline.constant" in str(error.value)
    pyro.clear_param_store()
    step(BaselineELBO({"z": TrainableConstant()}), model, guide)


# Pyro's own baselines.


def train(elbo: Any, model: Any, guide: Any, steps: int = 4) -> dict[str, Tensor]:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=elbo)
    for _ in range(steps):
        svi.step()
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def test_pyros_decaying_average_is_our_moving_average() -> None:
    options = {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.8}}
    theirs = train(BaselineELBO(None), *program({"z": options}))
    ours = train(BaselineELBO({"z": MovingAverage(0.8)}), *program())
    plain = train(BaselineELBO(None), *program())
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert not torch.equal(theirs["z_logits"], plain["z_logits"])
    options = {"baseline": {"use_decaying_avg_baseline": True}}
    elbo = step(BaselineELBO(None), *program({"z": options}))
    assert elbo.assignment["z"].baseline.average.beta == 0.9


def network_program(option: str, average: bool = False) -> tuple[Program, nn.Module]:
    """The guide as a Pyro user writes it: the network is the guide's module and its input is attached."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Flatten(0))
    baseline: dict[str, Any] = {"use_decaying_avg_baseline": average}
    model, plain = program({"z": {"baseline": baseline}})

    def guide(x: Tensor = DATA) -> None:
        pyro.module("net", net)
        features = x[:, None] * pyro.param("z_logits", lambda: torch.randn(B, K), event_dim=1).sum(-1, keepdim=True)
        if option == "nn_baseline":
            baseline.update(nn_baseline=net, nn_baseline_input=features)
        else:
            baseline.update(baseline_value=net(features.detach()))
        plain(x)

    return (model, guide), net


@pytest.mark.parametrize("option", ["nn_baseline", "baseline_value"])
@pytest.mark.parametrize("average", [False, True])
def test_pyros_network_and_value(option: str, average: bool) -> None:
    """Two steps: the value is subtracted; the network is trained by its squared error and nothing leaks."""
    (model, guide), net = network_program(option, average)

    class Same(Baseline):  # the same number, from outside
        def __init__(self) -> None:
            super().__init__()
            self.average = MovingAverage()
            self.losses: list[Tensor] = []

        def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, float]:
            features = DATA[:, None] * pyro.param("z_logits").detach().sum(-1, keepdim=True)
            value = net(features) + (self.average.mean.clone() if average else 0.0)
            self.losses.append((cost - value).square().sum())
            return value.detach(), 0.0

        def update(self, cost: Tensor, site: Site) -> None:
            self.average.update(cost, site)

    same = Same()
    plain_model, plain_guide = program()
    one, other = BaselineELBO(None), BaselineELBO({"z": same})
    Trace_ELBO().loss(plain_model, plain_guide)  # draws the parameters
    for _ in range(2):
        pyro.set_rng_seed(2)
        net.zero_grad()
        one.loss_and_grads(model, guide)
        theirs = gradients()
        for parameter in pyro.get_param_store()._params.values():
            parameter.grad = None
        pyro.set_rng_seed(2)
        other.loss_and_grads(plain_model, plain_guide)
        ours = gradients()
        for parameter, own in zip(
            net.parameters(), torch.autograd.grad(same.losses[-1], [*net.parameters()]), strict=True
        ):
            name = pyro.get_param_store()._param_to_name[parameter]
            torch.testing.assert_close(theirs.pop(name), own)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)
        for parameter in pyro.get_param_store()._params.values():
            parameter.grad = None


def test_pyros_baselines_survive_a_smaller_batch_and_vectorised_particles() -> None:
    options = {"baseline": {"use_decaying_avg_baseline": True, "baseline_value": torch.tensor(0.3)}}

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            probs = pyro.param("probs", torch.tensor(0.3))
            pyro.sample("z", dist.Bernoulli(probs), infer=options)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Bernoulli(0.5)), 1.0), obs=x)

    for kwargs in ({}, {"num_particles": 3, "vectorize_particles": True}):
        elbo = BaselineELBO(None, **kwargs)
        for size in (4, 3, 1):
            elbo.loss_and_grads(model, guide, DATA[:size])
    names = len(pyro.get_param_store())
    assert names == 1  # the average is a buffer


# Bad input: the message has the house form and the site's name, and nothing has changed.


def snapshot(elbo: EstimatorELBO, optimizer: Any) -> dict[str, Any]:
    """All state that a step changes: parameters, gradients, running means, the optimiser's state."""
    store = pyro.get_param_store()
    state = {
        "params": {name: p.detach() for name, p in store._params.items()},
        "grads": {name: p.grad for name, p in store._params.items()},
        "running means": dict(elbo.named_buffers()),
        "baselines": {name: (p.detach(), p.grad) for name, p in elbo.named_parameters()},
        "optimizer": {name: own["state"] for name, own in optimizer.get_state().items()},
    }
    return copy.deepcopy(state)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def refuse(elbo: EstimatorELBO, model: Any, guide: Any, site: str, kind: type[Exception] = ValueError) -> str:
    """The message of a step that must raise, after steps by another ELBO that left state to damage."""
    optimizer = pyro.optim.Adam({"lr": 0.1})
    good_model, good_guide = program()
    SVI(good_model, good_guide, optimizer, loss=Trace_ELBO()).step()
    for parameter in pyro.get_param_store()._params.values():
        parameter.grad = torch.full_like(parameter, 0.25)
    for buffer in elbo.buffers():
        buffer.fill_(0.5)
    before = snapshot(elbo, optimizer)
    with pytest.raises(kind, match=HOUSE_FORM) as error:
        SVI(model, guide, optimizer, loss=elbo).step()
    assert f"'{site}'" in str(error.value)
    after = snapshot(elbo, optimizer)
    after["running means"] = {name: after["running means"][name] for name in before["running means"]}  # not new ones
    assert _equal(after, before)
    return str(error.value)


def moving() -> dict[str, Any]:
    """A baseline on the other site, whose means must not move."""
    return {"b": MovingAverage()}


@pytest.mark.parametrize("entry", [MovingAverage(), None, LeaveOneOut(3)])
def test_an_entry_for_a_site_that_does_not_exist(entry: Any) -> None:
    assert "the sites ['b', 'z'] or '*'" in refuse(EstimatorELBO({**moving(), "zz": entry}), *program(), site="zz")


@pytest.mark.parametrize("name", ["x", "penalty", "twice"])
def test_an_entry_for_what_never_is_latent_and_discrete(name: str) -> None:
    """A likelihood, a factor and a deterministic of the model."""
    model, guide = program()

    def with_others() -> None:
        model()
        pyro.factor("penalty", torch.tensor(-0.3))
        pyro.deterministic("twice", torch.tensor(2.0))

    message = refuse(EstimatorELBO({**moving(), name: Exact()}), with_others, guide, site=name)
    assert "the sites ['b', 'z'] or '*'" in message


def test_an_entry_for_a_site_that_the_first_batch_observes() -> None:
    """Whether that is the labelled one must not matter."""

    def model(y: Tensor | None) -> None:
        z = pyro.sample("y", dist.Bernoulli(0.5), obs=y)
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    def guide(y: Tensor | None) -> None:
        if y is None:
            pyro.sample("y", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.3))))

    batches = [torch.tensor(1.0), None]
    losses = []
    for order in (batches, batches[::-1]):
        elbo = EstimatorELBO({"y": LeaveOneOut(2)})
        for y in order:
            pyro.set_rng_seed(0)
            if y is not None and order is batches:
                with pytest.warns(UserWarning, match=r"got \['y'\], observed in the first batch"):
                    losses.append(elbo.loss_and_grads(model, guide, y))
            else:
                losses.append(elbo.loss_and_grads(model, guide, y))
    assert losses[:2] == losses[:1:-1]


@pytest.mark.parametrize(
    "entries, infer",
    [
        ({"w": MovingAverage()}, {}),
        ({"w": LeaveOneOut(2)}, {}),
        ({"w": Exact()}, {}),
        ({}, {"w": {"estimator": ScoreFunction()}}),
        ({}, {"w": {"baseline": {"use_decaying_avg_baseline": True}}}),
    ],
)
def test_a_reparameterised_site_needs_none(entries: Any, infer: Infer) -> None:
    assert "reparameterised" in refuse(EstimatorELBO({**moving(), **entries}), *program(infer), site="w")


@pytest.mark.parametrize(
    "entries, options",
    [
        ({"z": MovingAverage()}, {"enumerate": "parallel"}),
        ({"z": LeaveOneOut(2)}, {"enumerate": "sequential"}),
        ({}, {"enumerate": "parallel", "estimator": RaoBlackwell()}),
        ({}, {"enumerate": "parallel", "baseline": {"use_decaying_avg_baseline": True}}),
        ({}, {"enumerate": "sequential", "baseline": {"use_decaying_avg_baseline": True}}),
        ({}, {"estimator": ScoreFunction(), "baseline": {"use_decaying_avg_baseline": True}}),
    ],
)
def test_two_mechanisms_at_one_site(entries: Any, options: Any) -> None:
    assert "one mechanism" in refuse(EstimatorELBO({**moving(), **entries}), *program({"z": options}), site="z")


def test_different_numbers_of_particles() -> None:
    with pytest.raises(ValueError, match=HOUSE_FORM) as error:
        EstimatorELBO({"z": LeaveOneOut(3), "b": LeaveOneOut(4)})
    assert "'z': 3" in str(error.value) and "'b': 4" in str(error.value)
    refuse(EstimatorELBO({"z": LeaveOneOut(3)}), *program({"b": {"estimator": LeaveOneOut(2)}}), site="b")
    refuse(EstimatorELBO(moving(), num_particles=5), *program({"z": {"estimator": LeaveOneOut(3)}}), site="z")
    with pytest.raises(ValueError, match=HOUSE_FORM):
        EstimatorELBO(LeaveOneOut(3), num_particles=5)
    with pytest.raises(ValueError, match=HOUSE_FORM):
        EstimatorELBO({"z": LeaveOneOut(3), "b": LeaveOneOut(3, vectorized=False)})
    step(EstimatorELBO({"z": LeaveOneOut(3), "b": LeaveOneOut(3)}), *program())


def branching() -> Program:
    """Outside of plates, with a Python branch on the draw."""

    def model() -> None:
        b = pyro.sample("b", dist.Bernoulli(0.5))
        z = pyro.sample("z", dist.Bernoulli(0.5))
        loc = pyro.param("weight", torch.tensor(0.5)) if z else b
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("b", dist.Bernoulli(logits=pyro.param("b_logit", torch.tensor(0.3))))
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("z_logit", torch.tensor(-0.3))))

    return model, guide


@pytest.mark.parametrize("estimator", [LeaveOneOut(2), RaoBlackwell(), DisARM(), ARMS(3), Exact()])
def test_python_branches_that_an_estimator_cannot_serve(estimator: Estimator) -> None:
    pyro.set_rng_seed(3)
    model, guide = branching()
    for parameter in ("b_logit", "z_logit"):  # there already: a run creates what it meets
        pyro.param(parameter, torch.tensor(0.3))
    message = refuse(EstimatorELBO({**moving(), "z": estimator}), model, guide, site="z")
    assert type(estimator).__name__ in message and "Python branch" in message


@pytest.mark.parametrize("estimator", [ScoreFunction(SampleBaseline()), LeaveOneOut(3, vectorized=False)])
def test_python_branches_that_it_can(estimator: Estimator) -> None:
    assert math.isfinite(EstimatorELBO(estimator).loss_and_grads(*branching()))


@pytest.mark.parametrize("estimator", [DisARM(), ARMS(3)])
def test_estimators_of_bernoullis(estimator: Estimator) -> None:
    message = refuse(EstimatorELBO({**moving(), "z": estimator}), *program(), site="z")
    assert type(estimator).__name__ in message and "Bernoulli" in message and "Categorical" in message


@pytest.mark.parametrize("estimator", [RaoBlackwell(), Exact()])
@pytest.mark.parametrize("fn", [dist.Poisson(1.0), dist.Bernoulli(torch.full((2,), 0.4)).to_event(1)])
def test_estimators_of_finite_supports(estimator: Estimator, fn: Any) -> None:
    def model() -> None:
        pyro.sample("b", dist.Bernoulli(0.4))
        pyro.sample("z", fn)

    message = refuse(EstimatorELBO({**moving(), "z": estimator}), model, model, site="z")
    assert type(estimator).__name__ in message and "lists its outcomes" in message


@pytest.mark.parametrize("make", [LeaveOneOut, ARMS, VIMCO])
@pytest.mark.parametrize("n", [1, 0, -2, 2.5])
def test_one_draw_has_no_other(make: Any, n: Any) -> None:
    with pytest.raises(ValueError, match=HOUSE_FORM) as error:
        make(n)
    assert make.__name__ in str(error.value) and f"got {n}" in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda c=c: RaoBlackwell(coverage=c) for c in (0.0, -0.1, 1.01, math.nan)),
        lambda: RaoBlackwell(k=2, coverage=0.9),
        lambda: RaoBlackwell(k=0),
        lambda: RaoBlackwell(tail_samples=0),
        lambda: MovingAverage(1.0),
        lambda: MovingAverage(-0.1),
        lambda: EstimatorELBO({"z": VIMCO(2)}),
        lambda: EstimatorELBO(VIMCO(2), analytic_kl=True),
        lambda: EstimatorELBO({}, costs="tracegraph"),
        lambda: EstimatorELBO({}, jit_options={"check_trace": True}),
    ],
)
def test_arguments_out_of_range(make: Any) -> None:
    with pytest.raises(ValueError, match=HOUSE_FORM):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: EstimatorELBO("z"),
        lambda: EstimatorELBO({"z": 3}),
        lambda: EstimatorELBO(Exact),
        lambda: BaselineELBO(LeaveOneOut(3)),
        lambda: BaselineELBO({"z": nn.Linear(1, 1)}),
        lambda: NeuralBaseline(lambda x: x),
        lambda: ScoreFunction(nn.Linear(1, 1)),
    ],
)
def test_arguments_of_another_type(make: Any) -> None:
    with pytest.raises(TypeError, match=HOUSE_FORM):
        make()


@pytest.mark.parametrize("given, named", [(LeaveOneOut(2), VIMCO(2)), (VIMCO(2), LeaveOneOut(2)), ({}, VIMCO(2))])
def test_a_bound_stands_alone(given: Any, named: Estimator) -> None:
    """Else its weights would be taken from one site's cost, or what the guide names would not act."""
    message = refuse(EstimatorELBO(given), *program({"z": {"estimator": named}}), site="z")
    assert "expected VIMCO alone" in message


def test_an_estimator_that_lists_its_outcomes_needs_not_be_exact() -> None:
    """What it says of itself counts, in the ELBO and in what is refused."""

    class Listed(Estimator):
        enumeration = Enumeration("union")

        def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
            return site.log_prob.detach().exp() * cost * site.log_prob, 0.0

    found = []
    for estimator in (Exact(), Listed()):
        torch.manual_seed(0)
        pyro.clear_param_store()
        model, guide = program({"z": {"enumerate": "parallel"}})
        step(EstimatorELBO({"z": estimator, "b": estimator}), model, guide)
        found.append(gradients())
    assert found[0]
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-12, atol=1e-12)


def test_a_bound_needs_not_be_vimco() -> None:
    """One of a user's own, the sum of log-weights over particles, is the mean of ELBOs."""

    class MeanOfLogs(Estimator):
        objective = "bound"
        num_particles = 3

        def bound(self, log_weights: Tensor) -> Tensor:
            return log_weights.mean(0)

        def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
            return self.bound(cost + (cost.detach() + 1) * site.log_prob), 0.0  # cost has its -log q attached

    found = []
    for elbo in (EstimatorELBO(MeanOfLogs()), Trace_ELBO(num_particles=3, vectorize_particles=True)):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide = program()
        poutine.block(guide)()  # makes the parameters
        elbo.loss(model, guide)  # counts the plates
        torch.manual_seed(1)
        found.append((elbo.loss_and_grads(model, guide), gradients()))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-12)
    for name, expected in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="expected MeanOfLogs alone"):
        EstimatorELBO({"z": MeanOfLogs()})


def test_a_guide_that_names_something_else() -> None:
    refuse(EstimatorELBO(moving()), *program({"z": {"estimator": "rloo"}}), site="z", kind=TypeError)
    refuse(EstimatorELBO(moving()), *program({"z": {"estimator": LeaveOneOut}}), site="z", kind=TypeError)


class Answer(nn.Module):
    """A network that gives back what it is told to, multiplied by a parameter."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.answer(x)


@pytest.mark.parametrize(
    "answer, expected",
    [
        (lambda x: x[:2], r"\(4,\), got \(2,\)"),
        (lambda x: x[:, None].expand(B, 2), r"\(4,\), got \(4, 2\)"),
        (lambda x: x.sum(), r"\(4,\), got \(\)"),
        (lambda x: x[None], r"\(4,\), got \(1, 4\)"),
        (lambda x: torch.where(x > 1, math.nan, x), "got NaN"),
        (lambda x: x * pyro.param("loc"), "attached to another"),
        (lambda x: pyro.param("z_logits")[:, :1], "attached to another"),
    ],
)
def test_outputs_of_a_baseline_network(answer: Any, expected: str) -> None:
    net = Answer(answer)
    elbo = BaselineELBO({**moving(), "z": NeuralBaseline(net, inputs=lambda x=DATA: x)})
    message = refuse(elbo, *program(), site="z")
    assert re.search(expected, message)
    assert net.weight.grad is None


def test_a_baseline_table_for_other_data() -> None:
    refuse(BaselineELBO({**moving(), "z": MovingAverage(num_data=5)}), *program(), site="z")


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"use_decaying_average": True}, "use_decaying_average"),
        ({"nn_baseline": nn.Linear(1, 1), "nn_baseline_input": DATA, "baseline_value": DATA}, "got both"),
        ({"baseline_value": DATA[:3]}, r"(3,)"),
        ({"baseline_value": torch.zeros(B, 1)}, r"(4, 1)"),
    ],
)
def test_pyros_baselines_misspelt(options: Any, expected: str) -> None:
    message = refuse(EstimatorELBO(moving()), *program({"z": {"baseline": options}}), site="z")
    assert expected in message


def test_a_new_object_with_state_at_every_step() -> None:
    model, plain = program()

    def guide() -> None:
        config_estimators(plain, z=MovingAverage())()

    assert "Make it once" in refuse(EstimatorELBO(moving()), model, guide, site="z")


def test_what_a_refused_first_run_met_is_forgotten() -> None:
    """Parameters that the probe initialised, and the random numbers that it took, leave no trace."""
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError):
        BaselineELBO({"zz": None}).loss_and_grads(*program())
    assert len(pyro.get_param_store()) == 0
    assert torch.equal(torch.random.get_rng_state(), state)


# Options that another ELBO reads.


@pytest.mark.parametrize(
    "options, option, reader",
    [
        ({"num_samples": 3}, "num_samples", "TraceEnum_ELBO"),
        ({"tmc": "mixture"}, "tmc", "TraceTMC_ELBO"),
        ({"enumerate_support": "sparse"}, "enumerate_support", "SparseEnumELBO"),
    ],
)
def test_unread_options_warn_once(options: Any, option: str, reader: str) -> None:
    model, guide = program({"z": options})
    elbo = BaselineELBO(MovingAverage())
    with pytest.warns(UserWarning, match=rf"site 'z': infer\['{option}'\] is not read here, but by {reader}") as record:
        elbo.loss_and_grads(model, guide)
    assert len(record) == 1
    elbo.loss_and_grads(model, guide)  # a second warning would be an error


def test_what_is_not_read_does_not_act() -> None:
    """``num_samples`` would make Pyro's enumeration sample."""
    exact = gradients_of(EstimatorELBO({"z": Exact()}), *program())
    with pytest.warns(UserWarning, match="num_samples"):
        same = gradients_of(EstimatorELBO({"z": Exact()}), *program({"z": {"num_samples": 2}}))
    assert all(torch.equal(same[name], exact[name]) for name in exact)


def test_an_option_that_exact_reads_is_silent() -> None:
    def model() -> None:
        pyro.sample("z", dist.Categorical(torch.ones(3)))

    def guide() -> None:
        scores = pyro.param("scores", torch.tensor([0.0, 1.0, 2.0]))
        pyro.sample("z", SparseCategorical(scores), infer={"enumerate_support": "dense"})

    EstimatorELBO(Exact()).loss_and_grads(model, guide)


def gradients_of(elbo: EstimatorELBO, model: Any, guide: Any) -> dict[str, Tensor]:
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    elbo.loss_and_grads(model, guide)
    return gradients()


# Sites that not every run reaches.


def reaching(estimator: Estimator) -> Program:
    """The guide names an estimator at a site of a Python branch."""

    def model() -> None:
        if pyro.sample("b", dist.Bernoulli(0.5)):
            pyro.sample("z", dist.Bernoulli(0.2))

    def guide() -> None:
        if pyro.sample("b", dist.Bernoulli(logits=pyro.param("b_logit", torch.tensor(0.3)))):
            logits = pyro.param("z_logit", torch.tensor(-0.3))
            pyro.sample("z", dist.Bernoulli(logits=logits), infer={"estimator": estimator})

    return model, guide


def seed_of_branch(taken: bool) -> int:
    _, guide = reaching(ScoreFunction())
    for seed in itertools.count():
        pyro.set_rng_seed(seed)
        if ("z" in pyro.poutine.trace(guide).get_trace().nodes) == taken:
            return seed
    raise AssertionError


@pytest.mark.parametrize("estimator", [LeaveOneOut(2), LeaveOneOut(2, vectorized=False)])
def test_particles_for_a_branch_that_the_first_run_did_not_take(estimator: Estimator) -> None:
    """There are none: its gradient would be wrong."""
    model, guide = reaching(estimator)
    elbo = EstimatorELBO({})
    pyro.set_rng_seed(seed_of_branch(False))
    elbo.loss_and_grads(model, guide)
    pyro.set_rng_seed(seed_of_branch(True))
    with pytest.raises(ValueError, match=HOUSE_FORM) as error:
        elbo.loss_and_grads(model, guide)
    assert "site 'z'" in str(error.value) and type(estimator).__name__ in str(error.value)


@pytest.mark.parametrize("estimator", [Exact(), RaoBlackwell(2), UnorderedSet(2)], ids=lambda e: type(e).__name__)
def test_slots_for_a_branch_that_the_first_run_did_not_take(estimator: Estimator) -> None:
    """The plates are counted then, and the run goes on: it keeps the branch, which would else be drawn less often."""
    model, guide = reaching(estimator)
    elbo = EstimatorELBO({})
    pyro.set_rng_seed(seed_of_branch(False))
    elbo.loss_and_grads(model, guide)
    assert elbo.max_plate_nesting == float("inf")
    pyro.set_rng_seed(seed_of_branch(True))
    elbo.loss_and_grads(model, guide)
    assert elbo.max_plate_nesting == 0
    logit = pyro.get_param_store()._params["z_logit"]
    q = logit.detach().sigmoid().requires_grad_()
    [by_q] = torch.autograd.grad(q * (q / 0.2).log() + (1 - q) * ((1 - q) / 0.8).log(), [q])
    assert logit.grad is not None
    torch.testing.assert_close(logit.grad, by_q * q.detach() * (1 - q.detach()))


def test_deeper_plates_than_at_the_first_step() -> None:
    """Their dims would be those of the slots."""

    def model(deep: bool) -> None:
        with pyro.plate("a", 2, dim=-2 if deep else -1):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2, 1) if deep else torch.zeros(2))

    def guide(deep: bool) -> None:
        with pyro.plate("a", 2, dim=-2 if deep else -1):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("a_logit", torch.tensor(0.3))))

    elbo = EstimatorELBO(Exact())
    elbo.loss_and_grads(model, guide, False)
    with pytest.raises(ValueError, match=r"site 'z'.*at most 1 plates.*'a' at dim -2. Pass max_plate_nesting=2"):
        elbo.loss_and_grads(model, guide, True)


@pytest.mark.parametrize("first", [False, True])
def test_a_branch_with_slots(first: bool) -> None:
    """With the plates said, the order of the branches does not matter."""
    model, guide = reaching(Exact())
    elbo = EstimatorELBO({}, max_plate_nesting=0)
    pyro.set_rng_seed(seed_of_branch(first))
    elbo.loss_and_grads(model, guide)
    pyro.set_rng_seed(seed_of_branch(True))
    elbo.loss_and_grads(model, guide)
    logit = pyro.get_param_store()._params["z_logit"]
    q = logit.detach().sigmoid().requires_grad_()
    [by_q] = torch.autograd.grad(q * (q / 0.2).log() + (1 - q) * ((1 - q) / 0.8).log(), [q])
    assert logit.grad is not None
    torch.testing.assert_close(logit.grad, (1 + first) * by_q * q.detach() * (1 - q.detach()))
