"""gradient_report: its statistics, what it measures, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import functools
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_sparse.distributions as sdist
from pyro_sparse.diagnostics import GradientReport, gradient_report
from pyro_sparse.diagnostics.gradient_moments import Bias, Moments, bias_along, direction
from pyro_sparse.estimators import (
    VIMCO,
    Exact,
    LeaveOneOut,
    MovingAverage,
    NeuralBaseline,
    SelfCritic,
    StraightThrough,
)
from pyro_sparse.infer import BaselineELBO, EstimatorELBO, SparseEnumELBO

B, K = 12, 3
X = torch.linspace(1.5, 3.0, B, dtype=torch.float64)  # the guide prefers the wrong outcome: its gradient is large


def model(x: Tensor) -> None:
    w = pyro.param("w", torch.arange(float(K)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(K)))
        pyro.sample("x", dist.Normal(w[z], 1.0), obs=x)


def guide(x: Tensor) -> None:
    logits = pyro.param("logits", torch.tensor([0.5, 0.0, -0.5]))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(logits=logits))


def enumerable_guide(x: Tensor) -> None:
    scores = pyro.param("scores", torch.tensor([0.4, 0.2, -2.0]))
    with pyro.plate("data", len(x)):
        pyro.sample("z", sdist.SparseCategorical(scores))


class Doubled(Trace_ELBO):
    """A biased estimator: twice the gradient."""

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
        loss: float = 2 * self.differentiable_loss(*args, **kwargs)
        loss.backward()  # type: ignore[attr-defined]
        return loss


def report(**kwargs: Any) -> GradientReport:
    given: dict[str, Any] = {"estimators": {"score": Trace_ELBO(max_plate_nesting=1)}, "num_samples": 20, **kwargs}
    return gradient_report(given.pop("model", model), given.pop("guide", guide), given.pop("args", (X,)), **given)


# Statistics


def two_halves(draws: Tensor, reference: Tensor | Moments) -> Moments:
    moments = Moments(torch.zeros(draws.shape[-1]))
    half = len(draws) // 2
    for draw in draws[:half]:
        moments.add(draw)
    moments.begin_second_half()
    first = reference if isinstance(reference, Tensor) else reference.first
    assert first is not None
    moments.directions = direction(moments, first)[None]
    for draw in draws[half:]:
        moments.add(draw)
    return moments


def test_moments_are_mean_and_trace_of_the_covariance() -> None:
    draws = 1e4 + torch.randn(50, 7)
    for shift in (torch.zeros(7), draws[0]):
        moments = Moments(shift)
        for draw in draws:
            moments.add(draw)
        torch.testing.assert_close(moments.mean(), draws.mean(0))
        assert moments.variance() == pytest.approx(draws.T.cov().trace().item(), rel=1e-6)
    squares = (draws - draws[0]).square().sum(-1)
    assert moments.variance_error() == pytest.approx(squares.std().item() / 50**0.5)


def bias_of(draws: Tensor, reference: Tensor) -> Bias:
    return bias_along(two_halves(draws, reference), reference, 0, eps=1e-16)


def test_bias_test_keeps_its_level_and_finds_what_it_says_is_detectable() -> None:
    """400 times 40 draws. An unbiased one shows with probability 1/740: 4 or more of 400 for one seed in 400. A bias of
    the detectable norm shows in half of the cases or more."""
    dimension, found = 30, {0.0: 0, 1.0: 0}
    reference = torch.zeros(dimension)
    detectable = bias_of(torch.randn(40, dimension), reference).detectable
    for size in found:
        for _ in range(400):
            draws = torch.randn(40, dimension)
            draws[:, 3] += size * detectable
            found[size] += bias_of(draws, reference).shows
    assert found[0.0] < 4
    assert found[1.0] > 160


def test_an_outcome_that_only_the_first_half_saw_is_no_bias() -> None:
    """One in a hundred is 100, the others are 0: the second half, without any, would be precise, and off by 1."""
    draws = torch.zeros(20, 1)
    draws[3] = 100.0
    bias = bias_of(draws, torch.ones(1))
    assert abs(bias.estimate) == 1.0 and bias.error > 5 and not bias.shows


def test_bias_test_counts_the_noise_of_the_reference() -> None:
    shows = 0
    for _ in range(200):
        reference = Moments(torch.zeros(5))
        for draw in torch.randn(20, 5):
            reference.add(draw)
        reference.begin_second_half()
        moments = two_halves(torch.randn(400, 5), reference)  # ten times as precise: the reference's noise is all
        reference.directions = moments.directions
        for draw in torch.randn(20, 5):
            reference.add(draw)
        shows += bias_along(moments, reference, 0, eps=1e-16).shows
    assert shows < 4


def test_a_rare_outcome_in_the_first_half_only_is_no_bias() -> None:
    draws = torch.zeros(20, 2)
    draws[3] = torch.tensor([10.0, 0.0])  # once in 20 draws, so that its mean is the reference
    assert not bias_of(draws, torch.tensor([0.5, 0.0])).shows
    assert bias_of(torch.zeros(20, 2), torch.tensor([0.5, 0.0])).shows  # in neither: no test can tell


def test_rounding_is_no_bias() -> None:
    reference = torch.tensor([1.0, 2.0])
    draws = (reference.float() * (1 + 1e-6)).expand(8, 2)
    moments = two_halves(draws, reference)
    assert not bias_along(moments, reference, 0, eps=torch.finfo(torch.float32).eps).shows
    assert bias_along(moments, reference, 0, eps=torch.finfo(torch.float64).eps).shows


# What it measures


def test_variance_is_that_of_the_score_function() -> None:
    """In closed form; z = 4 with 1000 draws, so that one seed in 16000 fails."""
    got = report(args=(X[:1],), num_samples=1000).estimators["score"]
    logits = torch.tensor([0.5, 0.0, -0.5])
    q = logits.softmax(-1)
    f = torch.tensor(1 / 3).log() + dist.Normal(torch.arange(3.0), 1.0).log_prob(X[0]) - q.log()
    g = f[:, None] * (torch.eye(3) - q)
    variance = (q[:, None] * g**2).sum() - (q @ g).square().sum()
    assert abs(got.variance - variance.item()) < 4 * got.variance_error
    assert got.variance_error < 0.1 * got.variance


def test_finds_the_biased_and_recommends_the_best_of_the_unbiased() -> None:
    estimators = {
        "score": Trace_ELBO(max_plate_nesting=1),
        "particles": Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1),
        "doubled": Doubled(max_plate_nesting=1),
        "zero": RenyiELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
        "bound": EstimatorELBO(VIMCO(2), max_plate_nesting=1),
        "rloo": EstimatorELBO(LeaveOneOut(8), max_plate_nesting=1),
    }
    got = report(estimators=estimators, num_samples=100)
    assert got.reference == "exact enumeration"
    assert {name: row.unbiased for name, row in got.estimators.items()} == {
        "score": True,
        "particles": True,
        "doubled": False,
        "zero": False,
        "bound": None,
        "rloo": True,
    }
    zero = got.estimators["zero"]  # its gradient is zero, so its bias is the whole gradient
    assert zero.bias == pytest.approx(got.gradient_norm)
    assert got.estimators["bound"].objective == "bound"
    assert got.recommended == min(("score", "particles", "rloo"), key=lambda name: got.estimators[name].cost)
    assert got.reason.startswith("The least variance x milliseconds of the unbiased")


def test_an_exact_estimator_has_no_noise() -> None:
    estimators = {"sparse": SparseEnumELBO(max_plate_nesting=1), "score": Trace_ELBO(max_plate_nesting=1)}
    got = report(guide=enumerable_guide, estimators=estimators, num_samples=40)
    row = got.estimators["sparse"]
    assert row.unbiased
    assert row.variance < 1e-25
    assert (got.recommended, got.reason) == ("sparse", "It has no noise.")


def test_counts_model_evaluations_and_reruns() -> None:
    estimators = {
        "score": Trace_ELBO(),
        "particles": Trace_ELBO(num_particles=5),
        "vectorized": Trace_ELBO(num_particles=5, vectorize_particles=True),
        "support": SparseEnumELBO(),  # two of three outcomes have mass
        "critic": BaselineELBO(SelfCritic()),
    }
    got = report(guide=enumerable_guide, estimators=estimators)
    rows = {name: row.evaluations for name, row in got.estimators.items()}
    assert rows == {"score": 1, "particles": 5, "vectorized": 5, "support": 2, "critic": 2}


def test_a_model_without_data_counts_its_latent_rows() -> None:
    def latent(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.ones(K)))

    assert report(model=latent).estimators["score"].evaluations == 1


class Counting(Trace_ELBO):
    calls = 0

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        Counting.calls += 1
        return super().loss_and_grads(*args, **kwargs)


def test_draws_no_more_than_it_must() -> None:
    """20 % more than the draws themselves is what it may cost; 4 % are steps to settle."""
    got = report(estimators={"a": Counting(max_plate_nesting=1)}, num_samples=200)
    assert Counting.calls == 200 + got.warmup == 208


# References


def mixed_model(x: Tensor) -> None:
    u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(K)))
        pyro.sample("x", dist.Normal(u + z, 1.0), obs=x)


def mixed_guide(x: Tensor) -> None:
    pyro.sample("u", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))
    guide(x)


def test_noise_left_makes_it_a_mean_of_enumerations() -> None:
    estimators = {"score": Trace_ELBO(max_plate_nesting=1), "doubled": Doubled(max_plate_nesting=1)}
    got = report(model=mixed_model, guide=mixed_guide, estimators=estimators, num_samples=150)
    assert got.reference.startswith("the mean of ")
    assert got.reference.endswith("enumerated gradients, with the noise left at 'u'")
    assert got.estimators["score"].unbiased
    assert got.estimators["doubled"].unbiased is False


def test_subsampling_is_part_of_the_noise() -> None:
    def within(fn: Callable[[Tensor], None]) -> Callable[[], None]:
        def subsampled() -> None:
            with pyro.plate("all", B, subsample_size=2, dim=-1) as i:
                z = pyro.sample("z", dist.Categorical(torch.ones(K)))
                pyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=X[i])

        def subsampled_guide() -> None:
            with pyro.plate("all", B, subsample_size=2, dim=-1):
                pyro.sample("z", dist.Categorical(logits=pyro.param("logits", torch.zeros(K))))

        return subsampled if fn is model else subsampled_guide

    got = report(model=within(model), guide=within(guide), args=())
    assert got.reference == "the mean of 20 enumerated gradients, with the noise left at 'all'"


def test_nothing_to_enumerate_makes_it_a_mean_of_plain_gradients() -> None:
    def continuous_model(x: Tensor) -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(u, 1.0), obs=x.mean())

    def continuous_guide(x: Tensor) -> None:
        pyro.sample("u", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))

    functions = {"model": continuous_model, "guide": continuous_guide}
    estimators = {"one": Trace_ELBO(), "ten": Trace_ELBO(num_particles=10), "doubled": Doubled()}
    got = report(**functions, estimators=estimators, num_samples=60)
    assert got.reference == "the mean of 30 plain gradients of 4 runs each (nothing to enumerate, noise at 'u')"
    assert [row.unbiased for row in got.estimators.values()] == [True, True, False]


def gate_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", sdist.HardConcrete(0.5, torch.tensor(0.0)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def pathwise_gate_guide(x: Tensor) -> None:
    logits = pyro.param("logits", torch.tensor(-2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", sdist.HardConcrete(0.5, logits).mask(True).has_rsample_(True))


def test_a_pathwise_draw_with_atoms_is_trusted_with_an_analytic_kl_only() -> None:
    candidates = {
        "drawn": Trace_ELBO(),
        "analytic": TraceMeanField_ELBO(),
        "ours": BaselineELBO(None, analytic_kl=True),
    }
    given: dict[str, Any] = {"model": gate_model, "guide": pathwise_gate_guide, "num_samples": 80}
    r = report(estimators=candidates, **given)
    assert r.estimators["drawn"].unbiased is False and r.estimators["ours"].unbiased is not False
    assert r.recommended in ("analytic", "ours")
    assert "has_rsample_(True) at 'z'" in str(r)
    assert [row.by_construction for row in r.estimators.values()] == [False, True, True]
    assert "against its construction" not in str(r)


@pytest.mark.slow
def test_a_pathwise_draw_on_the_simplex_is_not_trusted_either() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", sdist.GaussianSparsemax(torch.zeros(2), 1.0))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([0.5, 0.0]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", sdist.GaussianSparsemax(loc, 1.0).has_rsample_(True))

    r = report(model=model, guide=guide, estimators={"drawn": Trace_ELBO()}, num_samples=10)
    assert "has_rsample_(True) at 'z'" in str(r) and r.estimators["drawn"].by_construction is False
    assert r.recommended is None


def test_a_program_that_branches_is_enumerated_outcome_by_outcome() -> None:
    def branching(x: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(1.0 if z > 0 else -1.0, 1.0), obs=x[0])

    def branching_guide(x: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.2))))

    got = report(model=branching, guide=branching_guide, num_samples=40)
    assert got.reference.startswith("exact enumeration, outcome by outcome (on several at once: RuntimeError: Boolean")
    assert got.estimators["score"].unbiased


def test_too_many_outcomes_fall_back_and_say_so() -> None:
    def bits(logits: Tensor) -> None:
        with pyro.plate("data", B):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    got = report(model=lambda x: bits(torch.zeros(20)), guide=lambda x: bits(pyro.param("l", torch.zeros(B, 20))))
    assert got.reference.startswith("the mean of 20 plain gradients of 4 runs each (enumeration failed: ValueError")
    assert "got 1048576" in got.reference


def test_a_reference_of_ones_own() -> None:
    estimators = {"score": Trace_ELBO(max_plate_nesting=1), "doubled": Doubled(max_plate_nesting=1)}
    for reference, text in (
        ("score", "the mean of 'score'"),
        (EstimatorELBO(LeaveOneOut(4), max_plate_nesting=1), "the mean of 100 gradients of the EstimatorELBO given"),
    ):
        got = report(estimators=estimators, num_samples=100, reference=reference)
        assert got.reference == text
        assert set(got.estimators) == set(estimators)
        assert [row.unbiased for row in got.estimators.values()] == [True, False]


# What it leaves alone


def snapshot(modules: list[nn.Module]) -> Any:
    store = pyro.get_param_store()
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "names": list(store),
        "objects": [id(p) for _, p in store.named_parameters()],
        "values": [p.detach().clone() for _, p in store.named_parameters()],
        "grads": [p.grad for _, p in store.named_parameters()],
        "modules": [copy.deepcopy(m.state_dict()) for m in modules],
        "module grads": [p.grad for m in modules for p in m.parameters()],
    }


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert_same(list(a.values()), list(b.values()))
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_leaves_every_state_as_it_was() -> None:
    decoder = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    unregistered = nn.Linear(1, 1)
    free = torch.tensor(0.5, requires_grad=True)

    def state_model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        random.random(), np.random.rand()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(K)))
            code = z.reshape(-1, 1).to(x)
            loc = (decoder(code) + unregistered(code)).reshape(z.shape) + free
            pyro.sample("x", dist.Normal(loc, pyro.param("scale", torch.tensor(1.0))), obs=x)

    def state_guide(x: Tensor) -> None:
        options = {"baseline": {"use_decaying_avg_baseline": True}}
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=pyro.param("logits", torch.zeros(B, K))), infer=options)

    graph, ours = TraceGraph_ELBO(), EstimatorELBO(LeaveOneOut(2))
    average = BaselineELBO(MovingAverage())
    for elbo in (graph, average):  # leaves gradients, a decaying average in the store, one in a buffer
        elbo.loss_and_grads(state_model, state_guide, X)
    modules = [decoder, unregistered, average]
    before, free_grad = snapshot(modules), free.grad
    report(
        model=state_model,
        guide=state_guide,
        estimators={"score": Trace_ELBO(), "graph": graph, "average": average, "rloo": ours},
    )
    assert_same(snapshot(modules), before)
    assert free.grad is free_grad
    assert ours.max_plate_nesting == float("inf")
    assert not list(ours.buffers()) and not list(ours.parameters())


def test_leaves_no_parameters_behind() -> None:
    report()
    assert list(pyro.get_param_store()) == []


def test_state_is_put_back_after_an_error() -> None:
    class Stops(Trace_ELBO):
        def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
            torch.rand(1)
            raise RuntimeError("stop")

    guide(X)
    before = snapshot([])
    with pytest.raises(ValueError, match=r"estimator 'bad': expected an ELBO that runs on .* got RuntimeError: stop"):
        report(estimators={"bad": Stops()})
    assert_same(snapshot([]), before)
    with pytest.raises(ValueError, match=r"got none: 'bad': RuntimeError: stop; 'nan': nan\."):
        report(estimators={"bad": Stops(), "nan": NotFinite(max_plate_nesting=1)})
    assert_same(snapshot([]), before)


@pytest.mark.slow
def test_a_moving_average_begins_where_the_users_is() -> None:
    """With beta this near to one it hardly moves within the report."""
    trained = BaselineELBO(MovingAverage(0.9999), max_plate_nesting=1)
    guide(X), model(X)
    for _ in range(300):
        trained.loss_and_grads(model, guide, X)
    got = report(estimators={"trained": trained, "score": Trace_ELBO(max_plate_nesting=1)}, num_samples=200)
    assert got.estimators["trained"].variance < 0.8 * got.estimators["score"].variance


def test_a_network_is_as_trained_and_estimators_may_share_names() -> None:
    def baseline() -> BaselineELBO:
        return BaselineELBO(NeuralBaseline(nn.Linear(1, 1), inputs=lambda x: x[:, None]), max_plate_nesting=1)

    trained, fresh = baseline(), baseline()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), trained)  # also puts its parameters into the param store
    for _ in range(50):
        svi.step(X)
    before, state = snapshot([trained, fresh]), copy.deepcopy(trained.state_dict())
    got = report(estimators={"trained": trained, "fresh": fresh}, num_samples=60)
    assert got.estimators["trained"].variance < 0.5 * got.estimators["fresh"].variance
    assert_same(snapshot([trained, fresh]), before)
    assert_same(dict(trained.state_dict()), dict(state))
    svi.step(X)


def test_the_same_seed_gives_the_same_report() -> None:
    first, second = report(), report()
    assert first.estimators["score"].variance == second.estimators["score"].variance
    assert first.estimators["score"].bias == second.estimators["score"].bias


def test_works_without_gradients_enabled() -> None:
    with torch.no_grad():
        assert report().estimators["score"].unbiased


# Modules


class Guide(nn.Module):
    """A plain torch module, as ``elbo(model, guide)`` takes it: nothing is in the param store."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, K)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=self.encoder(x[:, None])))


def plain_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(K)))
        pyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=x)


def test_modules_that_pyro_does_not_know() -> None:
    estimators = {"score": Trace_ELBO(), "doubled": Trace_ELBO(), "rloo": EstimatorELBO(LeaveOneOut(4))}
    got = report(model=plain_model, guide=Guide(), estimators=estimators, num_samples=40)
    assert got.num_parameters == 2 * K
    assert all(row.unbiased and row.variance > 0 for row in got.estimators.values())
    with pytest.raises(ValueError, match=r"estimator 'graph'.*no attribute 'differentiable_loss'"):
        report(model=plain_model, guide=Guide(), estimators={"graph": TraceGraph_ELBO()})


def test_an_autoguide() -> None:
    def normal_model(x: Tensor) -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(u, 1.0), obs=x.mean())

    got = report(model=normal_model, guide=AutoNormal(normal_model))
    assert got.num_parameters == 2


# Estimators that fail


class Stops(Trace_ELBO):
    """Fails at its fourteenth gradient: when it has settled, in the first half of the draws."""

    calls = 0

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == 14:
            raise RuntimeError("stop\nhere")
        return super().loss_and_grads(*args, **kwargs)


def test_one_that_raises_is_marked_and_the_others_go_on() -> None:
    estimators = {
        "unfit": SparseEnumELBO("union", max_support=1, max_plate_nesting=1, num_particles=2, vectorize_particles=True),
        "score": Trace_ELBO(max_plate_nesting=1),
        "late": Stops(max_plate_nesting=1),
        "nan": NotFinite(max_plate_nesting=1),
        "doubled": Doubled(max_plate_nesting=1),
    }
    got = report(guide=enumerable_guide, estimators=estimators, num_samples=100)
    rows = got.estimators
    assert list(rows) == list(estimators)
    assert rows["unfit"].error and rows["nan"].error == "nan."
    assert rows["late"].error == "RuntimeError: stop"
    assert rows["late"].variance != rows["late"].variance and rows["late"].unbiased is None
    assert [name for name, row in rows.items() if not row.error] == ["score", "doubled"]
    assert (rows["score"].unbiased, rows["doubled"].unbiased, got.recommended) == (True, False, "score")
    assert re.search(r"\nlate +failed: RuntimeError: stop\n", str(got))
    got.plot().canvas.draw()


def test_a_reference_that_fails_leaves_the_rest() -> None:
    estimators = {"score": Trace_ELBO(max_plate_nesting=1), "late": Stops(max_plate_nesting=1)}
    for reference in ("late", Stops(max_plate_nesting=1)):
        got = report(estimators=estimators, reference=reference, num_samples=100)
        assert got.reference.startswith("none, and so no bias (the mean of ")
        assert got.reference.endswith(" failed: RuntimeError: stop)")
        row = got.estimators["score"]
        assert (row.bias, row.unbiased, got.gradient_norm) == (None, None, None) and row.variance > 0
        assert got.recommended == "score" and "unbiased by construction, which was not checked" in got.reason


# What it prints


def test_text_names_everything() -> None:
    estimators = {"score": Trace_ELBO(max_plate_nesting=1), "doubled": Doubled(max_plate_nesting=1)}
    got = report(estimators=estimators, num_samples=100)
    lines = str(got).splitlines()
    assert lines[0] == (
        "Gradient with respect to the guide's 3 parameters: 100 draws of each estimator, after 5 steps to settle"
    )
    assert lines[1].startswith("Reference: exact enumeration; its norm: ")
    assert lines[3].startswith("score") and lines[3].endswith("  unbiased  <-")
    assert lines[4].startswith("doubled") and lines[4].endswith("  biased")
    assert lines[-1] == "Recommended: score. The least variance x milliseconds of the unbiased: there is no other."


def test_silent_where_output_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    report()
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")


def test_plot() -> None:
    estimators = {
        "score": Trace_ELBO(max_plate_nesting=1),
        "sparse": SparseEnumELBO(max_plate_nesting=1),
        "bound": EstimatorELBO(VIMCO(2), max_plate_nesting=1),
        "doubled": Doubled(max_plate_nesting=1),
    }
    figure = report(guide=enumerable_guide, estimators=estimators, num_samples=40).plot()
    figure.canvas.draw()
    costs, biases = figure.axes
    assert [text.get_text() for text in costs.texts] == ["score", "sparse: no noise", "bound", "doubled"]
    assert [label.get_text() for label in biases.get_yticklabels()] == list(estimators)
    assert len(biases.containers) == 3  # VIMCO's bound has no bias against the ELBO


# Bad input


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"gradient_report: expected at least one estimator, got none\."):
        report(estimators={})
    with pytest.raises(TypeError, match=r"estimator 'rloo': expected a pyro\.infer\.ELBO, got LeaveOneOut\(2\)\. Wrap"):
        report(estimators={"rloo": LeaveOneOut(2)})
    with pytest.raises(ValueError, match=r"expected num_samples of at least 4, got 3\."):
        report(num_samples=3)
    with pytest.raises(ValueError, match=r"expected reference among \['score'\], got 'exact'\."):
        report(reference="exact")
    with pytest.raises(ValueError, match="expected a guide with parameters, got one whose sites depend on none"):
        report(model=plain_model, guide=plain_model_without_data)
    with pytest.raises(ValueError, match=r"estimator 'score': expected finite gradients, got nan"):
        report(estimators={"score": NotFinite(max_plate_nesting=1)})


def plain_model_without_data(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(torch.ones(K)))


class NotFinite(Trace_ELBO):
    def loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().loss_and_grads(*args, **kwargs)
        for parameter in pyro.get_param_store()._params.values():
            parameter.grad = torch.full_like(parameter, float("nan"))
        return loss


# Straight-through


def one_hot_model(x: Tensor) -> None:
    w = pyro.param("w", torch.arange(float(K)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", sdist.OneHotCategoricalST(torch.ones(K)))
        pyro.sample("x", dist.Normal((z @ w) ** 3 / 3, 1.0), obs=x)


def one_hot_guide(x: Tensor, make: Any = sdist.GumbelSoftmaxST) -> None:
    logits = pyro.param("logits", torch.tensor([0.5, 0.0, -0.5]))
    with pyro.plate("data", len(x)):
        pyro.sample("z", make(logits=logits))


def test_straight_through_is_never_the_reference() -> None:
    """Neither as an estimator nor as a family; both are measured against enumeration, and called biased."""
    plain = functools.partial(one_hot_guide, make=dist.OneHotCategorical)
    smooth = functools.partial(one_hot_guide, make=functools.partial(sdist.GumbelSoftmaxST, 0.5))
    elbos = {"straight": EstimatorELBO(StraightThrough()), "exact": EstimatorELBO(Exact())}
    first = report(model=one_hot_model, guide=plain, estimators=elbos, num_samples=200)
    second = report(model=one_hot_model, guide=smooth, num_samples=200)
    assert first.reference == second.reference == "exact enumeration"
    assert first.gradient_norm == pytest.approx(second.gradient_norm, rel=1e-9)
    assert first.estimators["straight"].unbiased is False and first.recommended == "exact"
    assert second.estimators["score"].unbiased is False and second.recommended is None


def test_without_enumeration_straight_through_is_not_trusted() -> None:
    """Thirteen bits have more outcomes than are enumerated."""

    def bits(side: str, make: Any) -> None:
        logits = torch.zeros(13) if side == "model" else pyro.param("logits", torch.linspace(-1.0, 1.0, 13))
        b = pyro.sample("b", make(logits=logits).to_event(1))
        if side == "model":
            pyro.sample("x", dist.Normal(b.sum(), 1.0), obs=torch.tensor(3.0))

    def found(make: Any, **estimators: Any) -> GradientReport:
        model, guide = functools.partial(bits, "model", dist.Bernoulli), functools.partial(bits, "guide", make)
        return report(model=model, guide=guide, args=(), estimators=estimators, num_samples=8)

    straight, score = EstimatorELBO(StraightThrough()), Trace_ELBO(max_plate_nesting=0)
    plain = found(dist.Bernoulli, straight=straight, score=score)
    assert plain.reference.startswith("the mean of 20 plain gradients of 4 runs each (enumeration failed")
    assert plain.recommended == "score"
    own = found(sdist.BernoulliST, score=score)
    assert own.reference.startswith("the mean of 20 plain gradients") and own.recommended is None
    assert [r.estimators["score"].by_construction for r in (plain, own)] == [True, False]


def test_a_bias_that_was_not_detected_is_not_called_unbiased() -> None:
    """With a straight line for a decoder the straight-through gradient is right, and nobody knows that in advance."""

    def line(x: Tensor) -> None:
        w = pyro.param("w", torch.arange(float(K)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(K)))
            pyro.factor("f", 3 * z @ w)

    plain = functools.partial(one_hot_guide, make=dist.OneHotCategorical)
    straight = EstimatorELBO(StraightThrough())
    got = report(model=line, guide=plain, estimators={"straight": straight, "score": Trace_ELBO()}, num_samples=40)
    row = got.estimators["straight"]
    assert (row.unbiased, row.by_construction) == (None, False) and row.bias is not None
    assert row.cost < got.estimators["score"].cost and got.recommended == "score"
    text = str(got)
    assert re.search(r"  no bias detected within \S+ % \(a biased estimator\)\n", text) and "is not unbiased" in text
    assert "of the unbiased: there is no other" in text
    alone = report(model=line, guide=plain, estimators={"straight": straight}, num_samples=40)
    assert alone.recommended is None
    assert "In 'straight', the cheapest of the others, a bias was not detected, and may be there." in alone.reason


class Promising(Trace_ELBO):
    unbiased = True


def test_an_elbo_of_ones_own_says_what_it_promises() -> None:
    got = report(estimators={"own": Promising(max_plate_nesting=1)}, num_samples=10)
    assert got.estimators["own"].by_construction and got.recommended == "own"
