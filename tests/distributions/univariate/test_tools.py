"""The mixed families in the hands of Pyro and torch: effect handlers, HMC and autoguides, compile, vmap, pickle."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS, Predictive
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor, nn
from torch.distributions import biject_to, transform_to

from pyro_sparse.distributions import HardConcrete, SpikeAndSlab, mixed_unit_interval
from tests.distributions.univariate.mixed_zoo import MILD, leaves, mild

each = pytest.mark.parametrize("name", MILD)


def facts(d: Any) -> list[Tensor]:
    return [d.log_prob(torch.tensor([0.0, 0.3])), d.mean, d.variance]


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# The constraint.


def test_the_constraint_checks_atoms() -> None:
    values = torch.tensor([-1e-9, 0.0, 0.3, 1.0, 1.0 + 1e-9, torch.nan])
    assert mixed_unit_interval.check(values).tolist() == [False, True, True, True, False, False]
    assert not mixed_unit_interval.is_discrete and mixed_unit_interval.event_dim == 0
    # An atom belongs to the support where the slab does not reach it.
    support = SpikeAndSlab(dist.LogNormal(0.0, 1.0), probs=0.5).support
    assert support.check(values).tolist() == [False, True, True, True, True, False]
    assert pickle.loads(pickle.dumps(mixed_unit_interval)).atoms == (0.0, 1.0)


@each
def test_no_bijection_leads_to_the_support(name: str) -> None:
    for registry in (biject_to, transform_to):
        with pytest.raises(NotImplementedError, match=r"expected a domain without atoms, got mixed\(.*HardConcrete"):
            registry(mild(name).support)
        with pytest.raises(NotImplementedError, match=r"expected a domain without atoms, got mixed\(.*HardConcrete"):
            registry(mild(name).to_event(1).support)


ALTERNATIVE = "(?s)expected a domain without atoms.*Write a guide that samples a mixed distribution.*SVI"


@pytest.mark.parametrize("name", ["HardConcrete", "Rectified", "SpikeAndSlab", "ZeroOneInflated"])
def test_hmc_and_autoguides_say_what_to_do(name: str) -> None:
    def model() -> None:
        z = pyro.sample("z", mild(name).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(2))

    for kernel in (HMC, NUTS):
        with pytest.raises(NotImplementedError, match=ALTERNATIVE):
            MCMC(kernel(model), num_samples=1, warmup_steps=1, disable_progbar=True).run()
    for guide in (AutoNormal, AutoMultivariateNormal, AutoDelta):
        with pytest.raises(NotImplementedError, match=ALTERNATIVE):
            guide(model)()


# Copies.


@pytest.mark.parametrize("name", ["HardConcrete", "StretchedRectified of a mixture", "ZeroOneInflated"])
@pytest.mark.parametrize("wrap", ["", "expand", "to_event", "mask", "mask.to_event", "has_rsample_"])
def test_pickle_and_deepcopy(name: str, wrap: str) -> None:
    d = {
        "": lambda d: d,
        "expand": lambda d: d.expand((3, 2)),
        "to_event": lambda d: d.to_event(1),
        "mask": lambda d: d.mask(torch.tensor([True, False])),
        "mask.to_event": lambda d: d.mask(torch.tensor([True, False])).to_event(1),
        "has_rsample_": lambda d: d if name == "ZeroOneInflated" else d.has_rsample_(True),
    }[wrap](mild(name))
    pickled = pickle.loads(pickle.dumps(d))
    for twin in (pickled, copy.deepcopy(pickled), copy.copy(d)):
        assert type(twin) is type(d)
        assert twin.has_rsample == d.has_rsample
        assert (twin.batch_shape, twin.event_shape) == (d.batch_shape, d.event_shape)
        same(facts(twin), facts(d))
        pyro.set_rng_seed(1)
        z = twin()
        pyro.set_rng_seed(1)
        assert torch.equal(z, d())


def test_a_flag_set_on_a_copy_stays_there() -> None:
    d = HardConcrete(0.5, torch.zeros(2))
    for other in (copy.copy(d), d.expand((3, 2)), d.mask(True), d.to_event(1)):
        other.has_rsample_(True)
        assert not d.has_rsample
    assert not HardConcrete(0.5, 0.0).has_rsample


def test_parameters_of_a_module_stay_its_own() -> None:
    logits = nn.Parameter(torch.zeros(2))
    d = copy.deepcopy(HardConcrete(0.5, logits))
    d.log_prob(torch.tensor(0.0)).sum().backward()
    assert logits.grad is None


# Effect handlers.


def model(data: Tensor | None = None) -> Tensor:
    logits = pyro.param("logits", torch.tensor(0.5))
    with pyro.plate("rows", 4):
        z = pyro.sample("z", HardConcrete(0.5, logits))
        y = pyro.deterministic("y", 2 * z)
        pyro.sample("x", dist.Normal(y, 1.0), obs=data)
    return y


def test_deterministic_and_predictive() -> None:
    draws = Predictive(model, num_samples=500)(None)
    assert draws["z"].shape == draws["y"].shape == draws["x"].shape == (500, 4)
    assert torch.equal(draws["y"], 2 * draws["z"])
    assert (draws["z"] == 0).any() and (draws["z"] == 1).any() and ((draws["z"] > 0) & (draws["z"] < 1)).any()
    parallel = Predictive(model, num_samples=500, parallel=True)(None)
    assert parallel["z"].shape == (500, 4)

    def guide(data: Tensor | None = None) -> None:
        with pyro.plate("rows", 4):
            pyro.sample("z", HardConcrete(0.5, -40.0))

    closed = Predictive(model, guide=guide, num_samples=20)(None)
    assert (closed["y"] == 0).all()


def test_handlers() -> None:
    data = torch.zeros(4)
    trace = poutine.trace(model).get_trace(data)
    value = trace.nodes["z"]["value"]
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace(data)
    assert torch.equal(replayed.nodes["z"]["value"], value)
    assert torch.equal(replayed.log_prob_sum(), trace.log_prob_sum())
    conditioned = poutine.condition(model, {"z": torch.tensor([0.0, 1.0, 0.5, 0.0])})
    assert poutine.trace(conditioned).get_trace(data).nodes["z"]["is_observed"]
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="within the support"):
        poutine.trace(poutine.condition(model, {"z": torch.full((4,), 1.5)})).get_trace(data).log_prob_sum()
    assert (poutine.do(model, {"z": torch.zeros(4)})(data) == 0).all()
    scaled = poutine.trace(poutine.scale(model, 3.0)).get_trace(data)
    unscaled = poutine.trace(poutine.replay(model, scaled)).get_trace(data)
    torch.testing.assert_close(scaled.log_prob_sum(), 3 * unscaled.log_prob_sum())
    uncond = poutine.trace(poutine.uncondition(poutine.condition(model, {"z": torch.zeros(4)}))).get_trace(data)
    assert not uncond.nodes["z"]["is_observed"]


def test_reparam_of_a_neighbour() -> None:
    """A reparameterisation of the mean of gates leaves the gates as they are."""

    def hierarchical() -> Tensor:
        mean = pyro.sample("mean", dist.Normal(torch.tensor(1.0), 2.0))
        return pyro.sample("z", HardConcrete(0.5, mean).expand([5]).to_event(1))

    with poutine.reparam(config={"mean": LocScaleReparam(0.0)}):
        trace = poutine.trace(hierarchical).get_trace()
    assert {"mean", "mean_decentered", "z"} <= set(trace.nodes)
    assert trace.nodes["mean"]["is_observed"] and not trace.nodes["z"]["is_observed"]
    assert type(trace.nodes["z"]["fn"]).__name__ == "IndependentMixed"
    assert trace.nodes["z"]["value"].requires_grad is False


def test_reparam_of_a_gate_is_refused() -> None:
    with poutine.reparam(config={"z": LocScaleReparam(0.0)}), pytest.raises((AttributeError, ValueError, TypeError)):
        poutine.trace(model).get_trace(torch.zeros(4))


# torch's transformations.


class Gated(nn.Module):
    """A layer whose inputs pass gates, and the price of the gates."""

    def __init__(self, pathwise: bool) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([-0.5, 0.5]))
        self.linear = nn.Linear(2, 3)
        self.pathwise = pathwise

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = HardConcrete(0.5, self.logits, validate_args=False)
        z = gate.has_rsample_(self.pathwise)(x.shape[:1])
        return self.linear(x * z), gate.prob_nonzero.sum() + gate.log_prob(z).sum()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.autograd.function.Function:DeprecationWarning")  # by dynamo, of its own
@pytest.mark.parametrize("pathwise", [False, True])
def test_compile_of_a_forward_pass(pathwise: bool) -> None:
    module, x = Gated(pathwise), torch.randn(64, 2)
    results = []
    for forward in (module, torch.compile(module, backend="aot_eager")):
        pyro.set_rng_seed(0)
        y, price = forward(x)
        results.append((y, price, *torch.autograd.grad(y.cos().sum() + price, list(module.parameters()))))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@each
def test_vmap_of_log_prob(name: str) -> None:
    d = mild(name)
    with pyro.validation_enabled(False):
        d = MILD[name][0](*leaves(name))
        values = torch.tensor([[0.0, 0.2], [0.7, 0.0], [0.0, 0.0]])
        got = torch.func.vmap(d.log_prob)(values)
    torch.testing.assert_close(got, mild(name).log_prob(values))


@pytest.mark.parametrize("name", [name for name in MILD if "mixture" not in name and "Inflated" not in name])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch has no batching rule of log_ndtr
def test_vmap_and_jacrev_over_parameters(name: str) -> None:
    make, parameters = MILD[name][0], [x.detach() for x in leaves(name)]
    value = torch.tensor(0.2)
    with pyro.validation_enabled(False):
        got = torch.func.vmap(lambda *p: make(*p).log_prob(value))(*parameters)
        jacobian = torch.func.jacrev(lambda p: make(p, *parameters[1:]).log_prob(value))(parameters[0])
    torch.testing.assert_close(got, make(*parameters).log_prob(value))
    x = leaves(name)
    (gradient,) = torch.autograd.grad(make(*x).log_prob(value).sum(), x[0])
    torch.testing.assert_close(jacobian.diagonal(), gradient)


@each
def test_other_dtypes_follow_the_parameters(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        d = mild(name, dtype)
        assert d().dtype == d.sample((3,)).dtype == d.mean.dtype == d.prob_zero.dtype == dtype
        if name != "ZeroOneInflated":
            assert d.point_estimate("median").dtype == dtype


@pytest.mark.parametrize("name", [name for name in MILD if "mixture" not in name])
def test_scalars_in_a_plate(name: str) -> None:
    d = MILD[name][0](*(x[0] for x in leaves(name)))
    assert d.batch_shape == ()
    with pyro.plate("rows", 7):
        assert pyro.sample("z", d).shape == (7,)
