"""EstimatorELBO and BaselineELBO against Pyro's own ELBOs, on every kind of program that they serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from torch import Tensor

import pyro_sparse.distributions as sdist
from pyro_sparse.estimators import (
    ARMS,
    VIMCO,
    DisARM,
    Exact,
    LeaveOneOut,
    MovingAverage,
    RaoBlackwell,
    SampleBaseline,
    ScoreFunction,
    SelfCritic,
    TrainableConstant,
)
from pyro_sparse.infer import BaselineELBO, EstimatorELBO, SparseEnumELBO

X = torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=torch.float64)  # the default dtype is set per test


def param(name: str, *values: float) -> Tensor:
    return pyro.param(name, lambda: torch.tensor(values))


class Program:
    """A model and a guide: a discrete z, a bit y that depends on it, a normal h after them, x observed."""

    def __init__(self, *, scale: float = 1.0, mask: bool = False, subsample: bool = False, global_site: bool = False):
        self.scale, self.mask, self.subsample, self.global_site = scale, mask, subsample, global_site

    def plate(self) -> Any:
        return pyro.plate("data", 9, subsample=torch.tensor([8, 0, 3, 5])) if self.subsample else pyro.plate("data", 4)

    def model(self, x: Tensor) -> None:
        w = param("w", 0.4)
        g = pyro.sample("g", dist.Bernoulli(0.4)) if self.global_site else torch.zeros(())
        with poutine.scale(scale=self.scale), poutine.mask(mask=x < 1.5 if self.mask else True), self.plate():
            z = pyro.sample("z", dist.Categorical(logits=torch.tensor([0.1, 0.2, -0.3])))
            y = pyro.sample("y", dist.Bernoulli(torch.where(z == 1, 0.3, 0.6)))
            h = pyro.sample("h", dist.Normal(z * w + g, 1.0))
            pyro.sample("x", dist.Normal(h + y * w, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        a, c = param("a", 0.1, -0.5, 0.7), param("c", 0.4, -0.2, 0.3)
        if self.global_site:
            pyro.sample("g", dist.Bernoulli(logits=param("e", 0.5)[0]))
        with poutine.scale(scale=self.scale), poutine.mask(mask=x < 1.5 if self.mask else True), self.plate():
            z = pyro.sample("z", dist.Categorical(logits=a + x[:, None]))
            y = pyro.sample("y", dist.Bernoulli(logits=c[z]))
            pyro.sample("h", dist.Normal(c[z] * y, 1.0))


PROGRAMS = {
    "plain": Program(),
    "scale": Program(scale=0.25),
    "mask": Program(mask=True),
    "subsample": Program(subsample=True),
    "global": Program(global_site=True, subsample=True, scale=2.0, mask=True),
}


def gradients(elbo: Any, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, steps: int = 1) -> dict:
    """Loss and gradient of every parameter of model and guide, averaged over steps."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    loss = sum(elbo.loss_and_grads(model, guide, *args) for _ in range(steps)) / steps
    found = {"loss": torch.as_tensor(loss)}
    for name, p in pyro.get_param_store().named_parameters():
        if "$" not in name:
            found[name] = torch.zeros_like(p) if p.grad is None else p.grad / steps
    return found


def assert_equal(got: dict, expected: dict, tol: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=tol, atol=tol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("particles", [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}])
@pytest.mark.parametrize("name", PROGRAMS)
def test_without_baseline_it_is_trace_elbo(name: str, particles: dict) -> None:
    program = PROGRAMS[name]
    options = {**particles, "max_plate_nesting": 1}
    expected = gradients(Trace_ELBO(**options), program.model, program.guide, X, steps=3)
    assert_equal(gradients(BaselineELBO(None, **options), program.model, program.guide, X, steps=3), expected, 1e-12)


def test_without_baseline_the_loss_is_trace_elbos() -> None:
    program = PROGRAMS["global"]
    losses = []
    for elbo in (Trace_ELBO(num_particles=2), BaselineELBO(num_particles=2)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        losses.append(elbo.loss(program.model, program.guide, X))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_differentiable_loss_has_the_gradient_of_loss_and_grads() -> None:
    program = PROGRAMS["global"]
    expected = gradients(BaselineELBO(MovingAverage()), program.model, program.guide, X)
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    loss = BaselineELBO(MovingAverage()).differentiable_loss(program.model, program.guide, X)
    loss.backward()
    got = {name: p.grad for name, p in pyro.get_param_store().named_parameters()}
    assert_equal({"loss": loss.detach(), **got}, expected, 1e-12)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("vectorized", [False, True])
def test_analytic_kl_is_trace_mean_field(name: str, vectorized: bool) -> None:
    program = PROGRAMS[name]

    def model(x: Tensor) -> None:
        with poutine.scale(scale=program.scale), poutine.mask(mask=x < 1.5 if program.mask else True), program.plate():
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Gamma(1.0 + h**2, 1.0))
            pyro.sample("x", dist.Normal(h + k * param("w", 0.4), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with poutine.scale(scale=program.scale), poutine.mask(mask=x < 1.5 if program.mask else True), program.plate():
            h = pyro.sample("h", dist.Normal(param("a", 0.3) * x, 1.1))
            pyro.sample("k", dist.Gamma(1.5 + h**2, 2.0))

    options = {"num_particles": 2, "vectorize_particles": vectorized, "max_plate_nesting": 1}
    expected = gradients(TraceMeanField_ELBO(**options), model, guide, X)
    assert_equal(gradients(BaselineELBO(None, analytic_kl=True, **options), model, guide, X), expected, 1e-12)


def test_analytic_kl_keeps_the_kl_of_later_sites_in_the_cost_of_earlier_ones() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Categorical(logits=torch.tensor([0.1, 0.2, -0.3])))
            h = pyro.sample("h", dist.Normal(z * param("w", 0.4), 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Categorical(logits=param("a", 0.1, -0.5, 0.7) + x[:, None]))
            # No noise: what is compared is exact.
            pyro.sample("h", dist.Delta(param("c", 0.4, -0.2, 0.3)[z]))

    expected = gradients(TraceEnum_ELBO(max_plate_nesting=1), model, config_enumerate(guide), X)
    got = gradients(EstimatorELBO(Exact(), analytic_kl=True, max_plate_nesting=1), model, guide, X)
    assert_equal(got, expected, 1e-12)


@pytest.mark.parametrize("costs", ["plates", "graph"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_exact_is_trace_enum_elbo(name: str, costs: str) -> None:
    program = PROGRAMS[name]

    def guide(x: Tensor) -> None:  # no noise after the enumerated sites
        with poutine.block(hide=["h"]):
            return program.guide(x)

    model = poutine.condition(program.model, data={"h": torch.tensor([0.1, 0.2, 0.3, 0.4])})
    expected = gradients(TraceEnum_ELBO(max_plate_nesting=1), model, config_enumerate(guide), X)
    got = gradients(EstimatorELBO(Exact(), costs=costs, max_plate_nesting=1), model, guide, X)
    assert_equal(got, expected, 1e-10)


def sparse_model(x: Tensor) -> None:
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Categorical(logits=torch.tensor([0.1, 0.2, -0.3, 0.5])))
        y = pyro.sample("y", dist.Categorical(logits=torch.tensor([0.3, 0.2, -0.3])))
        pyro.sample("x", dist.Normal(param("m", 0.1, 0.5, -0.4, 1.0)[z] * (1.0 + y), 1.0), obs=x)


def sparse_guide(x: Tensor) -> None:
    with pyro.plate("data", 4):
        z = pyro.sample("z", sdist.SparseCategorical(param("a", 0.1, -0.5, 0.7, -3.0) + x[:, None] * torch.arange(4)))
        pyro.sample("y", sdist.SparseCategorical(param("c", 0.4, -0.2, 0.3) * (1.0 + z[..., None])))


def test_exact_visits_the_sparse_support_only() -> None:
    expected = gradients(SparseEnumELBO(max_plate_nesting=1), sparse_model, sparse_guide, X)
    shapes = []

    def model(x: Tensor) -> None:
        with poutine.trace() as trace:
            sparse_model(x)
        shapes.append([trace.trace.nodes[name]["value"].shape[0] for name in "zy"])

    got = gradients(EstimatorELBO(Exact(), max_plate_nesting=1), model, sparse_guide, X)
    assert_equal(got, expected, 1e-10)
    assert shapes[-1][0] < 4 and shapes[-1][1] < 3


def test_sparse_sites_are_sampled_where_nobody_says_exact() -> None:
    expected = gradients(Trace_ELBO(), sparse_model, sparse_guide, X)
    assert_equal(gradients(BaselineELBO(), sparse_model, sparse_guide, X), expected, 1e-12)


def test_rao_blackwell_degrades_to_exact() -> None:
    expected = gradients(SparseEnumELBO(max_plate_nesting=1), sparse_model, sparse_guide, X)
    got = gradients(EstimatorELBO(RaoBlackwell(k=4)), sparse_model, sparse_guide, X)
    assert_equal(got, expected, 1e-10)


def branching_model(x: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.4))
    if z.item() == 1.0:
        y = pyro.sample("y", dist.Categorical(logits=torch.tensor([0.1, 0.2, -0.3])))
        loc = param("w", 0.4)[0] * y
    else:
        loc = param("v", 0.8)[0]
    with pyro.plate("data", 4):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def branching_guide(x: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(logits=param("e", 0.5)[0]), infer={"enumerate": "sequential"})
    if z.item() == 1.0:
        pyro.sample("y", dist.Categorical(logits=param("a", 0.1, -0.5, 0.7)), infer={"enumerate": "sequential"})


def test_sequential_enumeration_serves_python_branches() -> None:
    expected = gradients(TraceEnum_ELBO(max_plate_nesting=1), branching_model, branching_guide, X)
    got = gradients(EstimatorELBO(Exact()), branching_model, branching_guide, X)
    assert_equal(got, expected, 1e-12)


def sampled_branching_guide(x: Tensor) -> None:
    with poutine.infer_config(config_fn=lambda site: {"enumerate": None}):
        branching_guide(x)


@pytest.mark.parametrize(
    "elbo",
    [
        BaselineELBO(),
        BaselineELBO(SelfCritic()),
        BaselineELBO(SampleBaseline()),
        EstimatorELBO(LeaveOneOut(3, vectorized=False)),
    ],
    ids=["none", "self-critic", "sample", "leave-one-out"],
)
@pytest.mark.slow
def test_estimators_that_serve_python_branches(elbo: EstimatorELBO) -> None:
    """z-tests, |z| < 5 for 7 numbers each: fails once in 10^5 runs where all is well."""
    expected = gradients(TraceEnum_ELBO(max_plate_nesting=1), branching_model, branching_guide, X)
    pyro.clear_param_store()
    draws: dict[str, list[Tensor]] = {name: [] for name in expected}
    for _ in range(500):
        for p in dict(pyro.get_param_store().named_parameters()).values():
            p.grad = None
        draws["loss"].append(torch.as_tensor(elbo.loss_and_grads(branching_model, sampled_branching_guide, X)))
        store = dict(pyro.get_param_store().named_parameters())
        for name, value in expected.items():
            if name != "loss":
                grad = store[name].grad if name in store else None
                draws[name].append(torch.zeros_like(value) if grad is None else grad)
    for name, values in draws.items():
        stacked = torch.stack(values)
        error = stacked.std(0) / len(values) ** 0.5
        assert ((stacked.mean(0) - expected[name]).abs() <= 5 * error + 1e-12).all(), name


@pytest.mark.parametrize("estimator", [Exact(), RaoBlackwell(1), DisARM(), LeaveOneOut(2), VIMCO(2)])
def test_python_branches_are_refused_by_name(estimator: Any) -> None:
    guide = sampled_branching_guide if not isinstance(estimator, Exact) else config_enumerate(sampled_branching_guide)
    with pytest.raises(ValueError, match=r"site.*'z'.*single one.*Use torch.where"):
        EstimatorELBO(estimator).loss_and_grads(branching_model, guide, X)


@pytest.mark.parametrize(
    "estimator",
    [
        ScoreFunction(MovingAverage()),
        ScoreFunction(SelfCritic()),
        LeaveOneOut(2),
        LeaveOneOut(3, vectorized=False),
        {"z": RaoBlackwell(2, 2), "y": DisARM()},
        {"z": RaoBlackwell(coverage=0.7), "y": ARMS(3)},
        {"z": Exact(), "y": ScoreFunction(TrainableConstant())},
        {"z": LeaveOneOut(3), "y": DisARM()},
        {"z": RaoBlackwell(1), "y": LeaveOneOut(2)},
        {"y": Exact(), "*": ScoreFunction(SampleBaseline())},
    ],
    ids=lambda e: str(e).replace("\n", ""),
)
@pytest.mark.slow
def test_mixed_estimators_are_unbiased(estimator: Any) -> None:
    """z-tests, |z| < 5 for 11 numbers each: fails once in 10^5 runs where all is well."""
    program = PROGRAMS["global"]
    exact = TraceEnum_ELBO(max_plate_nesting=1)
    elbo = EstimatorELBO(estimator, costs="graph", max_plate_nesting=1)
    runs: dict[str, list[Tensor]] = {}
    pyro.set_rng_seed(0)
    for step in range(150):
        for sign, (tested, guide) in ((1, (elbo, program.guide)), (-1, (exact, config_enumerate(program.guide)))):
            for p in dict(pyro.get_param_store().named_parameters()).values():
                p.grad = None
            tested.loss_and_grads(program.model, guide, X)
            for name, p in pyro.get_param_store().named_parameters():
                if "$" not in name:
                    runs.setdefault(name, [torch.zeros_like(p)] * step)
                    if sign == 1:
                        runs[name].append(p.grad.clone())
                    else:
                        runs[name][-1] = runs[name][-1] - p.grad
    for name, values in runs.items():
        stacked = torch.stack(values)
        error = stacked.std(0) / len(values) ** 0.5
        assert (stacked.mean(0).abs() <= 5 * error + 1e-12).all(), (name, stacked.mean(0) / error)


def test_one_by_one_beside_sequential_enumeration_is_refused() -> None:
    guide = poutine.infer_config(branching_guide, config_fn=lambda s: {"enumerate": None} if s["name"] == "y" else {})
    with pytest.raises(ValueError, match=r"site 'y'.*vectorized=False\) without sequential enumeration"):
        for _ in range(20):  # y is in one of the branches
            EstimatorELBO({"*": LeaveOneOut(2, vectorized=False)}).loss_and_grads(branching_model, guide, X)


def test_particles_run_one_by_one_share_a_subsample() -> None:
    """Else leave-one-out would compare the costs of different data."""
    seen = []

    def model() -> None:
        with pyro.plate("data", 100, subsample_size=5) as batch:
            seen.append(batch.tolist())
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch / 100.0)

    def guide() -> None:
        with pyro.plate("data", 100, subsample_size=5):
            pyro.sample("z", dist.Bernoulli(logits=param("a", 0.3)))

    elbo = EstimatorELBO(LeaveOneOut(3, vectorized=False))
    for _ in range(2):
        seen.clear()
        elbo.loss_and_grads(model, guide)
        assert len(seen) == 3 and seen[0] == seen[1] == seen[2]


def test_graph_costs_have_less_variance_and_no_reparameterised_leak() -> None:
    """Two sites that do not see each other: each one's graph cost lacks the other's terms."""

    def model() -> None:
        for i in range(2):
            z = pyro.sample(f"z{i}", dist.Bernoulli(0.3))
            pyro.sample(f"x{i}", dist.Normal(10.0 * i + z, 1.0), obs=torch.tensor(3.0 * i))

    def guide() -> None:
        for i in range(2):
            pyro.sample(f"z{i}", dist.Bernoulli(logits=param(f"a{i}", 0.3)[0]))

    expected = gradients(TraceGraph_ELBO(), model, guide, steps=20)
    assert_equal(gradients(BaselineELBO(costs="graph"), model, guide, steps=20), expected, 1e-10)


def test_vimco_is_its_formula() -> None:
    """One run against the sum over particles written out, at the same draws."""
    n = 3
    logits = torch.tensor([0.2, -0.4, 0.5])

    def model(x: Tensor) -> None:
        with pyro.plate("data", 8, subsample=torch.arange(4)):
            z = pyro.sample("z", dist.Categorical(logits=logits))
            pyro.sample("x", dist.Normal(z * param("w", 0.4), 1.0), obs=x)

    drawn = []

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 8, subsample=torch.arange(4)):
            drawn.append(pyro.sample("z", dist.Categorical(logits=param("a", 0.1, -0.5, 0.7))))

    got = gradients(EstimatorELBO(VIMCO(n), max_plate_nesting=1), model, guide, X)
    z = drawn[-1]
    a, w = torch.tensor([0.1, -0.5, 0.7], requires_grad=True), torch.tensor([0.4], requires_grad=True)
    log_q = dist.Categorical(logits=a).log_prob(z)
    log_w = dist.Categorical(logits=logits).log_prob(z) + dist.Normal(z * w, 1.0).log_prob(X) - log_q
    bound = (log_w.exp().mean(0)).log()
    surrogate = bound
    for k in range(n):
        others = [j for j in range(n) if j != k]
        stand_in = log_w[others].mean(0).exp()
        without = ((log_w[others].exp().sum(0) + stand_in) / n).log()
        surrogate = surrogate + (bound - without).detach() * log_q[k]
    (-2.0 * surrogate.sum()).backward()  # subsampled 4 of 8
    assert_equal(got, {"loss": -2.0 * bound.sum().detach(), "a": a.grad, "w": w.grad}, 1e-12)


def test_slots_used_outside_their_plates_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("total", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x.sum())

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Bernoulli(logits=param("a", 0.3)))

    with pytest.raises(ValueError, match=r"site 'z'.*inside its plates only, got 'total'"):
        EstimatorELBO(DisARM()).loss_and_grads(model, guide, X)


@pytest.mark.parametrize("estimator", [MovingAverage(), None])
def test_it_trains_under_svi_with_a_smaller_last_batch(estimator: Any) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=param("a", 0.3)))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=BaselineELBO(estimator))
    for size in (4, 3, 1, 4):
        assert torch.isfinite(torch.tensor(svi.step(X[:size])))
    assert pyro.param("a") != 0.3


class Amortised(pyro.nn.PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 3)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=self.net(x[:, None])))


class Decoder(pyro.nn.PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor([-1.0, 0.0, 1.0]))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(3)))
            pyro.sample("x", dist.Normal(self.loc[z], 1.0), obs=x)


def test_it_trains_under_torch_optimisers() -> None:
    module = EstimatorELBO(LeaveOneOut(8))(Decoder(), Amortised())
    first = module(X)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(60):
        optimiser.zero_grad()
        module(X).backward()
        optimiser.step()
    assert module(X) < first
