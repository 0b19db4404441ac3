"""Each baseline against its formula: the value before it moves, how it moves, what it trains, what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

from pyro_sparse.estimators import (
    REBAR,
    Baseline,
    MovingAverage,
    NeuralBaseline,
    Plate,
    SampleBaseline,
    Scaled,
    ScoreFunction,
    SelfCritic,
    Site,
    Sum,
    TrainableConstant,
)
from pyro_sparse.infer import BaselineELBO, EstimatorELBO
from pyro_sparse.infer.assignment import PyroBaseline


def make_site(*plates: Plate, args: Any = (), **kwargs: Any) -> Site:
    return Site("z", Bernoulli(torch.tensor(0.5)), plates, args, kwargs)


def in_plate(size: int, full_size: int | None = None, indices: Any = None, dim: int = -1, args: Any = ()) -> Site:
    rows = None if indices is None else torch.as_tensor(indices)
    return make_site(Plate("data", dim, size, full_size or size, rows), args=args)


def act(baseline: Baseline, cost: Tensor, site: Site) -> Tensor:
    """One step: the value that is used, then the update."""
    value, _ = baseline(cost, site)
    used = value.detach().clone()
    with torch.no_grad():
        baseline.update(cost, site)
    return used


# MovingAverage.


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(), (5,), (3, 1), (2, 5)])
def test_the_moving_average(beta: float, shape: tuple[int, ...]) -> None:
    r""":math:`\sum_s \beta^{t-s} \bar f_s / \sum_s \beta^{t-s}` over earlier steps, zero at the first."""
    baseline, site, means = MovingAverage(beta), make_site(), []
    for t in range(6):
        cost = torch.randn(shape) + t
        weights = np.array([beta ** (t - 1 - s) for s in range(t)])
        expected = (weights * means).sum() / weights.sum() if t else 0.0
        assert float(act(baseline, cost, site)) == pytest.approx(expected, abs=1e-12)
        means.append(float(cost.mean()))


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("particles", [(), (2,)])
def test_a_table_goes_by_data_index(dim: int, particles: tuple[int, ...]) -> None:
    """Shuffled subsamples, a smaller last batch, a batch of one; each row has the history of its own index."""
    full, beta = 7, 0.6
    baseline = MovingAverage(beta, num_data=full)
    history: list[list[float]] = [[] for _ in range(full)]
    for epoch in range(3):
        order = torch.randperm(full)
        for rows in order.split(3 if epoch < 2 else 6):
            shape = (*particles, len(rows)) if dim == -1 else (*particles, len(rows), 1)
            cost = torch.randn(shape)
            used = act(baseline, cost, in_plate(len(rows), full, rows, dim))
            assert used.shape == shape[len(particles) :]
            per_row = cost.reshape(-1, len(rows)).mean(0)
            for place, row in enumerate(rows.tolist()):
                weights = np.array([beta**age for age in reversed(range(len(history[row])))])
                expected = (weights * history[row]).sum() / weights.sum() if history[row] else 0.0
                assert float(used.flatten()[place]) == pytest.approx(expected, abs=1e-12)
                history[row].append(float(per_row[place]))


def test_a_table_without_subsampling() -> None:
    baseline = MovingAverage(0.5, num_data=3)
    act(baseline, torch.tensor([1.0, 2.0, 3.0]), in_plate(3))
    torch.testing.assert_close(act(baseline, torch.zeros(3), in_plate(3)), torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("plates", [(), (Plate("a", -1, 3, 4),), (Plate("a", -1, 3, 3), Plate("b", -2, 3, 3))])
def test_a_table_needs_its_one_plate(plates: tuple[Plate, ...]) -> None:
    cost = torch.zeros([plate.size for plate in plates])
    with pytest.raises(ValueError, match=r"MovingAverage, site 'z': expected one data plate of num_data=3, got .*\. "):
        MovingAverage(num_data=3)(cost, make_site(*plates))


@pytest.mark.parametrize("sizes", [(4, 4, 2), (1,)])
def test_a_table_in_an_elbo(sizes: tuple[int, ...]) -> None:
    """By the plate's own indices, whether Pyro draws them or the user gives them."""
    full = 10
    data, baseline = torch.arange(float(full)), MovingAverage(0.0, num_data=full)
    elbo = BaselineELBO(baseline)
    for size, given in [(size, given) for size in sizes for given in (True, False)]:
        rows = torch.randperm(full)[:size]
        seen: list[Tensor] = []

        def program(
            obs: Tensor | None, size: int = size, rows: Any = rows if given else None, seen: Any = seen
        ) -> None:
            with pyro.plate("data", full, subsample_size=size, subsample=rows) as i:
                seen.append(torch.as_tensor(i))
                z = pyro.sample("z", dist.Bernoulli(torch.full((size,), 0.5)))
                if obs is not None:  # a cost that tells the row: its size is that of the datum
                    pyro.sample("x", dist.Normal(torch.zeros(size), 1.0), obs=obs[i] + 0.0 * z)

        before = baseline.mean.clone()
        elbo.loss_and_grads(lambda: program(data), lambda: program(None))
        used = seen[-1]
        expected = dist.Normal(0.0, 1.0).log_prob(data)  # the Bernoullis' log-probabilities cancel
        torch.testing.assert_close(baseline.mean[used], expected[used])
        others = torch.ones(full, dtype=torch.bool)
        others[used] = False
        assert torch.equal(baseline.mean[others], before[others])


# TrainableConstant.


def test_a_trainable_constant() -> None:
    baseline, cost = TrainableConstant(), torch.tensor([1.0, 2.0, 6.0])
    with torch.no_grad():
        baseline.constant.fill_(1.5)
    value, loss = baseline(cost, in_plate(3))
    assert value == 1.5
    [gradient] = torch.autograd.grad(loss, [baseline.constant])
    assert float(gradient) == pytest.approx(2 * (1.5 - 3.0))  # of the mean of (f - b)²
    optimizer = torch.optim.SGD(baseline.parameters(), lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        baseline(cost, in_plate(3))[1].backward()
        optimizer.step()
    assert baseline.constant.item() == pytest.approx(3.0, abs=1e-9)


# NeuralBaseline.


class Network(nn.Module):
    """A parameter times what ``output`` makes of the input."""

    def __init__(self, output: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.output = output

    def forward(self, x: Any) -> Tensor:
        return self.weight * self.output(x)


ROWS = torch.tensor([0.5, -1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("output", [lambda x: x, lambda x: x[:, None]])
@pytest.mark.parametrize("particles", [(), (4,)])
def test_a_network_with_one_output_unit(output: Any, particles: tuple[int, ...]) -> None:
    """``(B,)`` or ``(B, 1)``; with vectorised particles the same for each."""
    net = Network(output)
    cost = torch.randn(*particles, 3)
    value, loss = NeuralBaseline(net)(cost, in_plate(3, args=(ROWS,)))
    torch.testing.assert_close(value, 2 * ROWS)
    torch.testing.assert_close(loss, (cost - 2 * ROWS).square().mean())
    [gradient] = torch.autograd.grad(loss, [net.weight])
    torch.testing.assert_close(gradient, (-2 * (cost - 2 * ROWS) * ROWS).mean())


def test_a_network_for_a_batch_of_one_and_outside_of_plates() -> None:
    one = torch.tensor([0.7])
    for output in (lambda x: x, lambda x: x[:, None]):
        value, _ = NeuralBaseline(Network(output))(torch.zeros(1), in_plate(1, args=(one,)))
        assert value.shape == (1,)
    value, _ = NeuralBaseline(Network(lambda x: x.sum()))(torch.zeros(()), make_site(args=(ROWS,)))
    torch.testing.assert_close(value, 2 * ROWS.sum())
    value, _ = NeuralBaseline(Network(lambda x: x[:, None]))(torch.zeros(3, 1), in_plate(3, dim=-2, args=(ROWS,)))
    assert value.shape == (3, 1)
    nested = make_site(Plate("a", -2, 2, 2), Plate("b", -1, 3, 3), args=(ROWS,))
    value, _ = NeuralBaseline(Network(lambda x: x.expand(2, 3)))(torch.zeros(2, 3), nested)
    assert value.shape == (2, 3)


@pytest.mark.parametrize(
    "output, site",
    [
        (lambda x: x[:2], in_plate(3, args=(ROWS,))),
        (lambda x: x.sum(), in_plate(3, args=(ROWS,))),
        (lambda x: x[None], in_plate(3, args=(ROWS,))),
        (lambda x: x[:, None, None], in_plate(3, args=(ROWS,))),
        (lambda x: x[:, None].expand(3, 2), in_plate(3, args=(ROWS,))),
        (lambda x: x[:1], make_site(args=(ROWS,))),
        (lambda x: x, in_plate(3, dim=-2, args=(ROWS,))),
        # With two plates no (B, 1): its one would be the other plate.
        (lambda x: x[:, None], make_site(Plate("a", -2, 2, 2), Plate("b", -1, 3, 3), args=(ROWS,))),
    ],
)
def test_outputs_of_another_shape(output: Any, site: Site) -> None:
    got = tuple(output(ROWS).shape)
    with pytest.raises(ValueError) as error:
        NeuralBaseline(Network(output))(torch.zeros(site.batch_shape), site)
    assert str(error.value).startswith("NeuralBaseline, site 'z': expected")
    assert f"batch shape {tuple(site.batch_shape)}, got {got}. " in str(error.value)


def test_outputs_with_nan() -> None:
    with pytest.raises(ValueError, match=r"NeuralBaseline, site 'z': expected a number .*, got NaN\. "):
        NeuralBaseline(Network(lambda x: x.log()))(torch.zeros(3), in_plate(3, args=(ROWS,)))


def test_outputs_attached_to_something_else() -> None:
    foreign = torch.ones(3, requires_grad=True)
    for inputs in (lambda x: x * foreign, lambda x: (x * foreign).exp() + x):
        with pytest.raises(ValueError, match=r"NeuralBaseline, site 'z': .*of shape \(3,\)\. Detach the inputs"):
            NeuralBaseline(Network(lambda x: x), inputs)(torch.zeros(3), in_plate(3, args=(ROWS,)))
    value, _ = NeuralBaseline(Network(lambda x: x), lambda x: (x * foreign).detach())(
        torch.zeros(3), in_plate(3, args=(ROWS,))
    )
    assert value.requires_grad


def test_inputs() -> None:
    """The first argument, or a function of all; a subsampled plate's rows where there is one for each datum."""
    full = torch.arange(8.0)
    rows = torch.tensor([6, 1, 3])

    def value(baseline: Baseline, site: Site) -> Tensor:
        return baseline(torch.zeros(3), site)[0]

    plate = Plate("data", -1, 3, 8, rows)
    net = Network(lambda x: x)
    torch.testing.assert_close(value(NeuralBaseline(net), make_site(plate, args=(full,))), 2 * full[rows])
    own = NeuralBaseline(net, inputs=lambda y, scale: scale * y)
    torch.testing.assert_close(value(own, make_site(plate, args=(full,), scale=3.0)), 6 * full[rows])
    # The guide's arguments may be the batch itself.
    torch.testing.assert_close(value(NeuralBaseline(net), make_site(plate, args=(ROWS,))), 2 * ROWS)
    with pytest.raises(ValueError, match=r"NeuralBaseline, site 'z': expected a first argument .*, got keywords only"):
        value(NeuralBaseline(net), make_site(plate, x=full))


@pytest.mark.parametrize("kwargs", [{}, {"num_particles": 3, "vectorize_particles": True}])
@pytest.mark.parametrize("size", [4, 1])
def test_a_network_in_an_elbo(kwargs: Any, size: int) -> None:
    """A subsampled plate, ``(B, 1)`` outputs, vectorised particles: the value is that of the rows drawn."""
    data = torch.randn(6)
    seen: dict[str, Tensor] = {}

    class Watched(NeuralBaseline):
        def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
            value, loss = super().forward(cost, site)
            seen.update(value=value, cost=cost)
            return value, loss

    def model(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=size) as i:
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=size) as i:
            seen["rows"] = i
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("slope", torch.tensor(0.5)) * x[i]))

    elbo = BaselineELBO(Watched(Network(lambda x: x[:, None])), **kwargs)
    elbo.loss_and_grads(model, guide, data)
    torch.testing.assert_close(seen["value"], 2 * data[seen["rows"]])
    assert seen["cost"].shape == ((3, size) if kwargs else (size,))


# Scaled.


class Given(Baseline):
    """What it is told."""

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        return self.value, 0.25

    def set(self, value: Tensor) -> None:
        self.value = value


@pytest.mark.parametrize("beta", [0.0, 0.7, 0.95])
def test_scaled_is_the_least_squares_line_of_earlier_steps(beta: float) -> None:
    """Against numpy's weighted covariance of all draws so far; a step weighs beta as much as the one after it."""
    inner = Given()
    baseline, site = Scaled(inner, beta), in_plate(6)
    costs, values, weights = np.empty(0), np.empty(0), np.empty(0)
    for t, size in enumerate((6, 6, 2, 5, 1, 6)):
        b = torch.randn(size)
        f = 3.0 - 2.0 * b + torch.randn(size) + t
        inner.set(b)
        value, loss = baseline(f, site)
        assert loss == 0.25
        if t == 0:
            torch.testing.assert_close(value, b)
        elif beta or size > 1:
            keep = weights > 0
            covariance = np.cov(costs[keep], values[keep], aweights=weights[keep], ddof=0)
            means = [np.average(x[keep], weights=weights[keep]) for x in (costs, values)]
            if covariance[1, 1] > 0:
                expected = means[0] + covariance[0, 1] / covariance[1, 1] * (b.numpy() - means[1])
                np.testing.assert_allclose(value.numpy(), expected, atol=1e-10)
        baseline.update(f, site)
        costs, values = np.append(costs, f), np.append(values, b)
        weights = np.append(beta * weights, np.full(size, 1 / size))


def test_scaled_where_its_baseline_does_not_vary_is_that_baseline() -> None:
    """Rounding must not pass for variance: 0.1 is no sum of powers of two."""
    inner = Given()
    baseline, site = Scaled(inner), in_plate(7)
    inner.set(torch.tensor(0.1))
    for _ in range(50):
        value, _ = baseline(cost := 10 * torch.randn(7), site)
        assert float(value.mean()) == pytest.approx(0.1, abs=1e-6)
        baseline.update(cost, site)


def test_scaled_moves_what_is_inside() -> None:
    inner = MovingAverage(0.5)
    act(Scaled(inner), torch.tensor([1.0, 3.0]), in_plate(2))
    assert float(inner.mean) == 2.0


# Sum.


def test_the_second_of_a_sum_learns_what_the_first_leaves() -> None:
    net = Network(lambda x: x)
    first = MovingAverage(0.5)
    baseline, site = Sum(first, NeuralBaseline(net)), in_plate(3, args=(ROWS,))
    act(baseline, torch.tensor([5.0, 5.0, 8.0]), site)
    cost = torch.tensor([4.0, 7.0, 10.0])
    value, loss = baseline(cost, site)
    torch.testing.assert_close(value, 6.0 + 2 * ROWS)
    [gradient] = torch.autograd.grad(loss, [net.weight])
    torch.testing.assert_close(gradient, (-2 * (cost - 6.0 - 2 * ROWS) * ROWS).mean())


def test_a_sum_updates_both_by_the_values_that_were_used() -> None:
    first, second = MovingAverage(0.5), MovingAverage(0.0)
    baseline, site = Sum(first, second), make_site()
    assert float(act(baseline, torch.tensor(4.0), site)) == 0.0
    assert (float(first.mean), float(second.mean)) == (4.0, 4.0)  # the first gave 0
    assert float(act(baseline, torch.tensor(10.0), site)) == 8.0
    assert (float(first.mean), float(second.mean)) == (pytest.approx(8.0), 6.0)  # it gave 4
    both = Sum(TrainableConstant(), TrainableConstant())
    _, loss = both(torch.tensor(3.0), site)
    assert [g.item() for g in torch.autograd.grad(loss, [*both.parameters()])] == [-6.0, -6.0]


# SelfCritic and SampleBaseline.


@pytest.mark.parametrize("baseline, kind", [(SelfCritic(), "mode"), (SampleBaseline(), "sample")])
def test_extra_runs(baseline: Baseline, kind: str) -> None:
    site = make_site()
    site.rerun = {"mode": torch.tensor(1.0), "sample": torch.tensor(2.0)}.__getitem__
    assert baseline(torch.tensor(9.0), site) == (site.rerun(kind), 0.0)


P_Z = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]], dtype=torch.float64)
P_Y = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], dtype=torch.float64)
X = torch.tensor([0.3, 1.7], dtype=torch.float64)


def dependent_model() -> None:
    with pyro.plate("data", 4, subsample=torch.tensor([2, 0])):
        z = pyro.sample("z", dist.Categorical(torch.full((3,), 1 / 3)))
        y = pyro.sample("y", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z + 2.0 * y, 1.0), obs=X)


def dependent_guide() -> None:
    with pyro.plate("data", 4, subsample=torch.tensor([2, 0])):
        z = pyro.sample("z", dist.Categorical(P_Z))
        pyro.sample("y", dist.Bernoulli(P_Y[z, 1]))


def unscaled_cost(z: Tensor, y: Tensor) -> Tensor:
    """log p(x, z, y) - log q(z, y), for each of the two rows."""
    model = -torch.log(torch.tensor(3.0)) + dist.Bernoulli(0.3).log_prob(y) + dist.Normal(z + 2 * y, 1.0).log_prob(X)
    return model - P_Z.gather(-1, z[:, None])[:, 0].log() - dist.Bernoulli(P_Y[z, 1]).log_prob(y)


@pytest.mark.parametrize("kwargs", [{}, {"num_particles": 3, "vectorize_particles": True}])
def test_the_self_critic_takes_modes_one_after_the_other(kwargs: Any) -> None:
    """The mode of y is that given the mode of z; costs are not scaled by the plate."""
    values: dict[str, Tensor] = {}

    class Watched(SelfCritic):
        def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
            value, loss = super().forward(cost, site)
            values[site.name] = value
            assert not value.requires_grad
            return value, loss

    BaselineELBO(Watched(), **kwargs).loss_and_grads(dependent_model, dependent_guide)
    z = torch.tensor([1, 0])
    expected = unscaled_cost(z, torch.tensor([1.0, 0.0]))
    for name in ("z", "y"):
        torch.testing.assert_close(values[name], expected.expand_as(values[name]))


def test_the_sample_baseline_is_another_draw() -> None:
    """Of all sites at once: the cost of one of the six pairs, and not that of the step itself."""
    outcomes = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    costs = torch.stack([unscaled_cost(z.expand(2), y.double().expand(2)) for z, y in outcomes])
    differ = 0

    class Watched(SampleBaseline):
        def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
            nonlocal differ
            value, loss = super().forward(cost, site)
            for drawn in (value, cost):
                assert (drawn - costs).abs().min(0).values.max() < 1e-10
            differ += int((value != cost).sum())
            return value, loss

    elbo = BaselineELBO({"z": Watched(), "y": Watched()})
    for _ in range(10):
        elbo.loss_and_grads(dependent_model, dependent_guide)
    assert differ > 10


# Steps with costs that are not numbers, which the user skips.

BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "make",
    [
        MovingAverage,
        lambda: Scaled(Given()),
        lambda: Scaled(MovingAverage()),
        lambda: Sum(MovingAverage(), Scaled(Given())),
        lambda: PyroBaseline("z", {"use_decaying_avg_baseline": True}),
    ],
    ids=["moving average", "scaled", "scaled moving average", "sum", "Pyro's own"],
)
def test_a_step_without_finite_costs_moves_nothing(make: Callable[[], Baseline], bad: float) -> None:
    baseline, site = make(), in_plate(3)
    given = [module for module in baseline.modules() if isinstance(module, Given)]

    def step(cost: Tensor) -> None:
        for module in given:
            module.set(torch.randn(3))
        act(baseline, cost, site)

    for t in range(3):
        step(torch.randn(3) + t)
    before = {name: value.clone() for name, value in baseline.state_dict().items()}
    step(torch.full((3,), bad))
    for name, value in baseline.state_dict().items():
        assert torch.equal(value, before[name]), name
    step(torch.randn(3))
    assert all(value.isfinite().all() for value in baseline.state_dict().values())
    assert any(not torch.equal(value, before[name]) for name, value in baseline.state_dict().items())


@pytest.mark.parametrize("bad", BAD)
def test_the_finite_costs_of_a_step_count(bad: float) -> None:
    """As if the others were not there; a row of a table without a finite cost stays."""
    for make in (MovingAverage, lambda: Scaled(MovingAverage())):
        whole, part = make(), make()
        for t in range(4):
            cost = torch.randn(5) + t
            act(part, cost[:3], in_plate(3))
            act(whole, torch.cat([cost[:3], torch.full((2,), bad)]), in_plate(5))
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(value, part.state_dict()[name])
    table = MovingAverage(0.5, num_data=4)
    act(table, torch.tensor([1.0, 2.0, 3.0]), in_plate(3, 4, [0, 2, 3]))
    act(table, torch.tensor([[bad, 5.0], [4.0, bad]]), in_plate(2, 4, [2, 1]))
    act(table, torch.tensor([bad, 9.0]), in_plate(2, 4, [0, 1]))
    torch.testing.assert_close(table.mean, torch.tensor([1.0, (0.5 * 5.0 + 9.0) / 1.5, (0.5 * 2.0 + 4.0) / 1.5, 3.0]))
    assert table.weight.tolist() == [1.0, 1.5, 1.5, 1.0]


def test_a_mean_of_all_costs_would_stay_nan() -> None:
    mean = torch.zeros(())
    for cost in (1.0, float("nan"), 2.0):
        mean.lerp_(torch.tensor(cost), 0.5)
    assert mean.isnan()


@pytest.mark.parametrize("make", [MovingAverage, lambda: Scaled(SelfCritic()), lambda: MovingAverage(0.9, 2)])
def test_after_a_skipped_batch_an_elbo_goes_on(make: Callable[[], Baseline]) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("theta", torch.zeros(()))))

    elbo, good, bad = BaselineELBO(make()), torch.tensor([0.0, 1.0]), torch.tensor([0.0, float("nan")])
    finite = []
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in (good, good, bad, good):
            loss = elbo.differentiable_loss(model, guide, x)
            theta = pyro.get_param_store()._params["theta"]
            finite.append(bool(loss.isfinite() and torch.autograd.grad(loss, theta)[0].isfinite()))
    assert finite == [True, True, False, True]


@pytest.mark.parametrize("learner", [MovingAverage, lambda: MovingAverage(num_data=3), TrainableConstant, REBAR])
def test_a_loss_follows_its_costs(learner: Any) -> None:
    """What is learnt in float64, 0-dim or not, makes no float64 of a float32 program."""
    estimator = learner() if learner is REBAR else ScoreFunction(learner())

    def model() -> None:
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(3, dtype=torch.float32)))
            pyro.factor("x", z.sin().sum(-1))

    def guide() -> None:
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.OneHotCategorical(logits=pyro.param("l", torch.zeros(3, dtype=torch.float32))))

    assert EstimatorELBO(estimator).differentiable_loss(model, guide).dtype == torch.float32
