"""The state of the estimator ELBOs: resuming, what moves when, what leaks nowhere, what does not grow."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_sparse.estimators import (
    Baseline,
    Exact,
    LeaveOneOut,
    MovingAverage,
    NeuralBaseline,
    SampleBaseline,
    Scaled,
    SelfCritic,
    Site,
    Sum,
    TrainableConstant,
)
from pyro_sparse.infer import BaselineELBO, EstimatorELBO

B, K = 4, 3
DATA = torch.tensor([-1.0, 0.3, 1.1, 2.5], dtype=torch.float64)
PREFIX = "pyro_sparse.estimators"


def model(x: Tensor) -> None:
    weight = pyro.param("weight", lambda: torch.randn(()))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.full((K,), 1 / K)))
        b = pyro.sample("b.c", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(weight * z + b, 1.0), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        slope = pyro.param("slope", lambda: torch.randn(K))
        pyro.sample("z", dist.Categorical(logits=x[:, None] * slope))
        scale = pyro.param("scale", lambda: torch.rand(()), constraint=dist.constraints.positive)
        pyro.sample("b.c", dist.Bernoulli(logits=scale * x))


def network() -> nn.Module:
    return nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))


def stateful_elbo() -> EstimatorELBO:
    """Every kind of state: parameters and running means, given for one site and copied for several."""
    return BaselineELBO({"z": Sum(MovingAverage(), NeuralBaseline(network())), "*": Scaled(TrainableConstant())})


def shared_elbo() -> EstimatorELBO:
    return BaselineELBO(Sum(MovingAverage(), NeuralBaseline(network())))


def gradients(elbo: Any, model: Any = model, guide: Any = guide, seed: int = 7) -> dict[str, Tensor]:
    """Of the program's parameters, which are left with none."""
    pyro.set_rng_seed(seed)
    elbo.loss_and_grads(model, guide, DATA)
    found = {}
    for name, parameter in pyro.get_param_store()._params.items():
        if parameter.grad is not None and not name.startswith(PREFIX):
            found[name] = parameter.grad
        parameter.grad = None
    return found


# Save, load, resume.


class SVIRun:
    """A training under SVI, with everything that it keeps."""

    def __init__(self, elbo: EstimatorELBO) -> None:
        self.elbo = elbo
        self.optimizer = pyro.optim.Adam({"lr": 0.05})
        self.svi = SVI(model, guide, self.optimizer, loss=elbo)

    def steps(self, number: int = 4) -> list[float]:
        return [self.svi.step(DATA) for _ in range(number)]

    def state(self) -> dict[str, Tensor]:
        store = pyro.get_param_store()._params
        return {name: p.detach().clone() for name, p in [*store.items(), *self.elbo.state_dict().items()]}


@pytest.mark.parametrize("make", [stateful_elbo, shared_elbo])
def test_svi_resumes_with_the_same_numbers(make: Callable[[], EstimatorELBO], tmp_path: Path) -> None:
    """From the param store, the ELBO's state_dict and the optimiser's state, in new objects."""
    run = SVIRun(make())
    run.steps()
    pyro.get_param_store().save(str(tmp_path / "params"))
    run.optimizer.save(str(tmp_path / "optimizer"))
    torch.save(run.elbo.state_dict(), tmp_path / "elbo")
    random = pyro.util.get_rng_state()
    expected, state = run.steps(), run.state()

    pyro.clear_param_store()
    resumed = SVIRun(make())
    pyro.get_param_store().load(str(tmp_path / "params"))
    resumed.optimizer.load(str(tmp_path / "optimizer"))
    resumed.elbo.load_state_dict(torch.load(tmp_path / "elbo"))
    pyro.util.set_rng_state(random)
    assert resumed.steps() == expected
    after = resumed.state()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert len(resumed.optimizer.optim_objs) == len(pyro.get_param_store())


def test_a_param_store_without_the_elbos_state_is_refused() -> None:
    SVIRun(stateful_elbo()).steps()
    with pytest.raises(ValueError, match=r"(?s)elbo\.load_state_dict.*same step"):
        SVIRun(stateful_elbo()).steps()


class Model(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.full((K,), 1 / K)))
            b = pyro.sample("b.c", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(self.weight * z + b, 1.0), obs=x)


class Guide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = PyroModule[nn.Linear](1, K)
        self.scale = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=self.net(x[:, None])))
            pyro.sample("b.c", dist.Bernoulli(logits=self.scale * x))


class TorchRun:
    """The same under a torch optimiser: a module of modules."""

    def __init__(self, elbo: EstimatorELBO) -> None:
        self.module = elbo(Model(), Guide())
        self.optimizer: torch.optim.Optimizer | None = None

    def make_optimizer(self) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=0.05)
        return self.optimizer

    def steps(self, number: int = 4) -> list[float]:
        assert self.optimizer is not None
        losses = []
        for _ in range(number):
            self.optimizer.zero_grad()
            loss = self.module(DATA)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("make", [stateful_elbo, shared_elbo])
@pytest.mark.parametrize("local", [True, False])
def test_torch_resumes_with_the_same_numbers(make: Callable[[], EstimatorELBO], local: bool) -> None:
    """From the state_dict of the module and of the optimiser alone, loaded before the first run."""
    with pyro.settings.context(module_local_params=local):
        run = TorchRun(make())
        run.module(DATA)  # makes the copies
        run.make_optimizer()
        run.steps()
        saved = copy.deepcopy((run.module.state_dict(), run.optimizer.state_dict()))
        random = pyro.util.get_rng_state()
        expected = run.steps()
        state = run.module.state_dict()

        pyro.clear_param_store()
        resumed = TorchRun(make())
        resumed.module.load_state_dict(saved[0])
        resumed.make_optimizer().load_state_dict(saved[1])
        pyro.util.set_rng_state(random)
        assert resumed.steps() == expected
        after = resumed.module.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_loading_makes_the_copies_that_a_run_would_make() -> None:
    ran, loaded = shared_elbo(), shared_elbo()
    ran.loss_and_grads(model, guide, DATA)
    loaded.load_state_dict(ran.state_dict())
    assert len([*loaded.parameters()]) == len([*ran.parameters()]) == 8
    for name in ("z", "b.c"):
        assert loaded.assignment[name] is not ran.assignment[name]
        assert torch.equal(loaded.assignment[name].baseline.first.mean, ran.assignment[name].baseline.first.mean)
    pyro.clear_param_store()
    made = {name: loaded.assignment[name] for name in ("z", "b.c")}
    loaded.loss_and_grads(model, guide, DATA)
    assert all(loaded.assignment[name] is made[name] for name in made)


def test_loading_for_one_site_of_several_keeps_the_object() -> None:
    def make(baseline: Baseline) -> EstimatorELBO:
        return BaselineELBO({"z": None, "*": baseline})

    ran, own = make(MovingAverage()), MovingAverage()
    ran.loss_and_grads(model, guide, DATA)
    loaded = make(own)
    loaded.load_state_dict(ran.state_dict())
    assert loaded.assignment["b.c"].baseline is own and own.mean != 0


def test_state_that_belongs_to_no_entry_is_refused() -> None:
    def named(x: Tensor) -> None:
        with pyro.poutine.infer_config(config_fn=lambda msg: {"estimator": own} if msg["name"] == "z" else {}):
            guide(x)

    own = MovingAverage()
    ran = EstimatorELBO({})
    ran.loss_and_grads(model, named, DATA)
    with pytest.raises(ValueError, match=r"site 'z': expected an entry or '\*', got none .* run the ELBO once before"):
        EstimatorELBO({}).load_state_dict(ran.state_dict())
    # Its state would be lost if the guide's object took the place of the one that it was loaded into.
    elsewhere = BaselineELBO(MovingAverage())
    elsewhere.load_state_dict(ran.state_dict())
    with pytest.raises(ValueError, match=r"site 'z': .*run the ELBO once before"):
        elsewhere.loss(model, named, DATA)
    resumed = EstimatorELBO({})
    resumed.loss(model, named, DATA)
    resumed.load_state_dict(ran.state_dict())
    assert resumed.assignment["z"].baseline is own


def test_copies_of_an_elbo_are_independent() -> None:
    elbo = stateful_elbo()
    elbo.loss_and_grads(model, guide, DATA)
    twin = copy.deepcopy(elbo)
    before = {name: value.clone() for name, value in elbo.state_dict().items()}
    pyro.clear_param_store()
    twin.loss_and_grads(model, guide, DATA)
    assert all(torch.equal(elbo.state_dict()[name], before[name]) for name in before)
    assert not torch.equal(twin.assignment["z"].baseline.first.mean, elbo.assignment["z"].baseline.first.mean)


# What an ELBO and a module of one hold.


def test_functions_warn_of_parameters_that_the_module_lacks() -> None:
    module = BaselineELBO(NeuralBaseline(network()))(model, guide)
    with pytest.warns(UserWarning, match=r"param store.*optimiser") as record:
        module(DATA)
    assert len(record) == 1
    message = str(record[0].message)
    assert all(f"'{name}'" in message for name in ("weight", "slope", "scale")) and PREFIX not in message
    module(DATA)  # a second warning would be an error
    assert len([*module.parameters()]) == 8  # the two networks'


@pytest.mark.parametrize("local", [True, False])
def test_modules_do_not_warn(local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        module = BaselineELBO(TrainableConstant())(Model(), Guide())
        module(DATA).backward()
    names = {name for name, p in module.named_parameters() if p.grad is not None}
    assert len(names) == len([*module.parameters()]) == 6


# When running means move.


def test_running_means_move_in_training_only() -> None:
    average = MovingAverage()
    elbo = BaselineELBO({"z": average})

    def moved(act: Callable[[], Any]) -> bool:
        before = average.mean.clone()
        act()
        return not torch.equal(average.mean, before)

    def without_grad() -> None:
        with torch.no_grad():
            elbo.differentiable_loss(model, guide, DATA)

    assert not moved(lambda: elbo.loss(model, guide, DATA))
    assert not moved(without_grad)
    assert moved(lambda: elbo.loss_and_grads(model, guide, DATA))
    assert moved(lambda: elbo.differentiable_loss(model, guide, DATA))
    elbo.eval()
    assert not moved(lambda: elbo.differentiable_loss(model, guide, DATA))
    elbo.train()
    assert moved(lambda: elbo.differentiable_loss(model, guide, DATA))


def test_the_mean_moves_once_a_step_after_its_use() -> None:
    """Once for each particle that is run alone, in one go at the end; its dtype and place stay."""
    average = MovingAverage(0.5)
    seen: list[tuple[float, float]] = []

    class Watched(Baseline):
        def __init__(self) -> None:
            super().__init__()
            self.average = average

        def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
            value, loss = self.average(cost, site)
            seen.append((float(value), float(cost.mean())))
            return value, loss

        def update(self, cost: Tensor, site: Site) -> None:
            self.average.update(cost, site)

    elbo = BaselineELBO({"z": Watched()}, num_particles=2)
    mean = weight = 0.0
    for _ in range(3):
        elbo.loss_and_grads(model, guide, DATA)
        [(first, one), (second, two)] = seen[-2:]
        assert first == second == pytest.approx(mean, abs=1e-12)
        for cost in (one, two):
            weight = 0.5 * weight + 0.5
            mean += 0.5 / weight * (cost - mean)
    assert float(average.mean) == pytest.approx(mean, abs=1e-12)


# What leaks nowhere.


class Fixed(Baseline):
    """A number, and no loss."""

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        return cost.new_tensor(0.7), 0.0


def constant_network() -> nn.Linear:
    net = nn.Linear(1, 1)
    nn.init.zeros_(net.weight)
    nn.init.constant_(net.bias, 0.7)
    return net


class Recorded(NeuralBaseline):
    """Keeps the costs that it saw."""

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        self.cost = cost
        return super().forward(cost, site)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_baselines_loss_reaches_its_own_parameters_only(scale: float) -> None:
    """Model and guide get the gradients of the same number without a loss; the network those of its loss alone."""
    net = constant_network()
    baseline = Recorded(net, inputs=lambda x: x[:, None])
    scaled_model, scaled_guide = (pyro.poutine.scale(program, scale=scale) for program in (model, guide))
    Trace_ELBO().loss(model, guide, DATA)  # draws the parameters
    with_loss = gradients(BaselineELBO({"z": baseline}), scaled_model, scaled_guide)
    without = gradients(BaselineELBO({"z": Fixed()}), scaled_model, scaled_guide)
    assert with_loss.keys() == without.keys() == {"weight", "slope", "scale"}
    assert all(torch.equal(with_loss[name], without[name]) for name in without)

    pyro.clear_param_store()
    net.zero_grad()
    pyro.set_rng_seed(8)
    elbo = BaselineELBO({"z": baseline})
    elbo.loss_and_grads(scaled_model, scaled_guide, DATA)
    assert not baseline.cost.requires_grad
    own = torch.autograd.grad((baseline.cost - net(DATA[:, None])[:, 0]).square().mean(), [*net.parameters()])
    for parameter, gradient in zip(net.parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_an_undetached_value_changes_nothing() -> None:
    """The engine detaches what a baseline returns: else it would train model and guide."""

    class Attached(Fixed):
        def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
            return 0.7 + 0.0 * pyro.param("weight") + 5.0 * (site.log_prob - site.log_prob.detach()), 0.0

    Trace_ELBO().loss(model, guide, DATA)
    attached, fixed = gradients(BaselineELBO(Attached())), gradients(BaselineELBO(Fixed()))
    assert all(torch.equal(attached[name], fixed[name]) for name in fixed)


@pytest.mark.parametrize("baseline", [SampleBaseline(), SelfCritic()])
def test_extra_runs_train_nothing(baseline: Baseline) -> None:
    """The model's gradient is that of the draws in the plain step."""
    Trace_ELBO().loss(model, guide, DATA)
    plain, ours = gradients(BaselineELBO(None)), gradients(BaselineELBO(baseline))
    assert torch.equal(ours["weight"], plain["weight"])
    assert not torch.equal(ours["slope"], plain["slope"])


# Random numbers.


def test_the_same_random_numbers_as_trace_elbo() -> None:
    """The probing run puts them back, and forgets the parameters that it initialised by them."""
    results = []
    for elbo in (Trace_ELBO(), BaselineELBO(None), BaselineELBO(MovingAverage())):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        losses = [SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), loss=elbo).step(DATA) for _ in range(3)]
        results.append((losses, torch.random.get_rng_state(), dict(pyro.get_param_store().items())))
    theirs = results[0]
    for ours in results[1:]:
        assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
        assert torch.equal(ours[1], theirs[1])
        assert all(torch.equal(ours[2][name], theirs[2][name]) for name in theirs[2])


# What does not grow.


def tensors() -> int:
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize(
    "make",
    [
        stateful_elbo,
        lambda: BaselineELBO(SampleBaseline()),
        lambda: EstimatorELBO({"z": Exact(), "*": LeaveOneOut(2)}, costs="graph"),
        lambda: EstimatorELBO(LeaveOneOut(2, vectorized=False)),
    ],
)
def test_a_step_leaves_nothing_to_collect(make: Callable[[], EstimatorELBO]) -> None:
    """Without the garbage collector: a cycle would keep a step's graph, on a GPU until memory runs out."""
    run = SVIRun(make())
    run.steps(2)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        run.steps(3)
        assert tensors() == before
    finally:
        gc.enable()


def test_a_thousand_steps_leave_a_constant_number_of_things() -> None:
    def small_model() -> None:
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Bernoulli(0.5)), 1.0), obs=torch.tensor(1.0))

    def small_guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))

    optimizer = pyro.optim.SGD({"lr": 1e-3})
    elbo = BaselineELBO(Sum(MovingAverage(), TrainableConstant()))
    svi = SVI(small_model, small_guide, optimizer, loss=elbo)

    def things() -> tuple[int, ...]:
        gc.collect()
        store = pyro.get_param_store()
        return len(store), len(store._param_to_name), len(optimizer.optim_objs), len(elbo.state_dict()), tensors()

    for _ in range(3):
        svi.step()
    before = things()
    assert before[:4] == (2, 2, 2, 3)
    for _ in range(1000):
        loss = svi.step()
    assert math.isfinite(loss) and things() == before
