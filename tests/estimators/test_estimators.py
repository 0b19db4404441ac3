"""Each estimator's draws and weights, and its surrogate's gradient against a loop that spells out the formula."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, OneHotCategorical

from pyro_sparse.distributions import SparseCategorical, SparseOneHotCategorical
from pyro_sparse.estimators import (
    ARMS,
    REBAR,
    VIMCO,
    DisARM,
    Estimator,
    Exact,
    LeaveOneOut,
    RaoBlackwell,
    ScoreFunction,
    Site,
    Slots,
    SplitPathwise,
    StraightThrough,
)

PROBS = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.05, 0.05, 0.2], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)


def laid_out(estimator: Estimator, fn: Distribution) -> Site:
    """A site on which the estimator has drawn, with its log-probabilities."""
    site = Site("z", fn)
    site.slots = estimator.draw(site)
    site.log_prob = fn.log_prob(site.slots.values)
    return site


def gradient(estimator: Estimator, cost: Tensor, site: Site, logits: Tensor) -> Tensor:
    surrogate, loss = estimator(cost, site)
    assert loss == 0.0
    return torch.autograd.grad(surrogate.sum(), [logits], retain_graph=True)[0]


# Score function and leave-one-out.


def test_the_plain_score_function() -> None:
    log_prob, cost = torch.randn(5, requires_grad=True), torch.randn(5)
    site = Site("z", Bernoulli(torch.tensor(0.5)), log_prob=log_prob)
    torch.testing.assert_close(gradient(ScoreFunction(), cost, site, log_prob), cost)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_leave_one_out(n: int) -> None:
    """Terms whose mean over particles is the estimate."""
    log_prob, cost = torch.randn(n, 4, requires_grad=True), torch.randn(n, 4)
    site = Site("z", Bernoulli(torch.tensor(0.5)), log_prob=log_prob)
    found = gradient(LeaveOneOut(n), cost, site, log_prob)
    for k in range(n):
        others = sum(cost[j] for j in range(n) if j != k) / (n - 1)
        torch.testing.assert_close(found[k], cost[k] - others)


# Exact.


def test_exact_lays_out_all_outcomes_with_their_probabilities() -> None:
    site = laid_out(Exact(), Categorical(PROBS))
    assert site.slots is not None and site.slots.num_enumerated == 4
    assert torch.equal(site.slots.values.expand(4, 3), Categorical(PROBS).enumerate_support())
    torch.testing.assert_close(site.slots.log_weights.exp(), PROBS.T)


def test_exact_is_the_gradient_of_the_expectation() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    cost = torch.randn(4, 3)
    site = laid_out(Exact(), Categorical(logits=logits))
    expected = torch.autograd.grad((logits.softmax(-1) * cost.T).sum(), [logits])[0]
    torch.testing.assert_close(gradient(Exact(), cost, site, logits), expected)


# Rao-Blackwell.


def in_tail(slots: Slots) -> Tensor:
    """Where a sampled slot repeats an enumerated outcome."""
    k = slots.num_enumerated
    return (slots.values[k:, None] == slots.values[None, :k]).any(1)


@pytest.mark.parametrize("k, n", [(1, 1), (2, 1), (3, 4), (1, 3)])
def test_the_likely_outcomes_are_summed_and_the_tail_drawn(k: int, n: int) -> None:
    fn = Categorical(PROBS.expand(50, 3, 4))
    slots = RaoBlackwell(k, n).draw(Site("z", fn))
    assert slots.values.shape == slots.log_weights.shape == (k + n, 50, 3) and slots.num_enumerated == k
    torch.testing.assert_close(slots.log_weights.exp().sum(0), torch.ones(50, 3))
    top = PROBS.topk(k, -1)
    torch.testing.assert_close(slots.log_weights[:k].exp(), top.values.T[:, None].expand(k, 50, 3))
    enumerated = fn.log_prob(slots.values)[:k].exp()
    torch.testing.assert_close(enumerated, slots.log_weights[:k].exp())
    assert all((slots.values[i] != slots.values[j]).all() for i, j in itertools.combinations(range(k), 2))
    assert not in_tail(slots).any()
    torch.testing.assert_close(slots.log_weights[k:].exp(), ((1 - top.values.sum(-1)) / n).expand(n, 50, 3))


@pytest.mark.parametrize("k", [4, 9])
def test_enough_outcomes_are_all_of_them(k: int) -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    estimator, costs = RaoBlackwell(k, 3), torch.randn(4, 3)
    site = laid_out(estimator, Categorical(logits=logits))
    assert site.slots is not None and site.slots.num_enumerated == len(site.slots.values) == 4
    cost = costs.gather(0, site.slots.values)
    expected = torch.autograd.grad((logits.softmax(-1) * costs.T).sum(), [logits])[0]
    torch.testing.assert_close(gradient(estimator, cost, site, logits), expected)


@pytest.mark.parametrize("coverage, k", [(0.2, 1), (0.25, 1), (0.3, 2), (0.69, 3), (0.7, 3), (0.76, 4), (1.0, 4)])
def test_coverage(coverage: float, k: int) -> None:
    """The smallest k for which every row of the batch has it; the third row is uniform."""
    assert RaoBlackwell(coverage=coverage).draw(Site("z", Categorical(PROBS))).num_enumerated == k
    alone = {0.2: 1, 0.25: 1, 0.3: 1, 0.69: 1, 0.7: 1, 0.76: 2, 1.0: 4}[coverage]
    assert RaoBlackwell(coverage=coverage).draw(Site("z", Categorical(PROBS[1]))).num_enumerated == alone


@pytest.mark.parametrize("family", [SparseCategorical, SparseOneHotCategorical])
@pytest.mark.parametrize("k, n", [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2), (4, 1)])
def test_sparse_supports(family: Any, k: int, n: int) -> None:
    """What q rules out weighs nothing, whatever its cost: k may exceed a row's support, and a row have no tail."""
    scores = torch.tensor([[3.0, 0.0, 0.0, 0.0], [1.0, 0.9, 0.5, -5.0], [1.0, 0.5, -5.0, -5.0]], requires_grad=True)
    fn = family(scores)
    assert fn.support_size.tolist() == [1, 3, 2]
    estimator = RaoBlackwell(k, n)
    site = laid_out(estimator, fn)
    assert site.slots is not None
    weights = site.slots.log_weights.exp()
    torch.testing.assert_close(weights.sum(0), torch.ones(3))
    ruled_out = fn.log_prob(site.slots.values) == -math.inf
    assert not weights[ruled_out].any()
    cost = torch.randn(weights.shape).masked_fill(ruled_out, math.inf)  # log p - log q
    found = gradient(estimator, cost, site, scores)
    assert found.isfinite().all()
    # The first row has one outcome, the third is exact from k = 2 on: costs of slots without weight do not count.
    assert not found[0].any()
    if k >= 2:
        values = site.slots.values if family is SparseCategorical else site.slots.values.argmax(-1)
        costs = torch.zeros(4).scatter(0, values[:2, 2], cost[:2, 2])
        expected = torch.autograd.grad((family(scores).probs[2] * costs).sum(), [scores])[0]
        torch.testing.assert_close(found[2], expected[2])


@pytest.mark.parametrize("k, n", [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_rao_blackwell(k: int, n: int) -> None:
    """The docstring's formula, outcome by outcome."""
    logits = PROBS.log().requires_grad_()
    estimator = RaoBlackwell(k, n)
    site = laid_out(estimator, Categorical(logits=logits))
    assert site.slots is not None
    z, cost = site.slots.values, torch.randn(k + n, 3)
    expected = torch.zeros(3, 4)
    for row in range(3):
        q, f = PROBS[row], cost[:, row]

        def score(outcome: Tensor, q: Tensor = q) -> Tensor:  # the gradient of log q with respect to the logits
            return torch.nn.functional.one_hot(outcome, 4) - q

        inside = [float(q[z[i, row]]) for i in range(k)]
        mass, summed = 1 - sum(inside), sum(inside[i] * f[i] for i in range(k))
        if n == 1:
            baselines = [summed / sum(inside)]
        else:
            draws = range(k, k + n)
            baselines = [summed + mass * sum(f[i] for i in draws if i != j) / (n - 1) for j in draws]
        for i in range(k):
            expected[row] += inside[i] * (f[i] - sum(baselines) / n) * score(z[i, row])
        for j in range(n):
            expected[row] += mass / n * (f[k + j] - baselines[j]) * score(z[k + j, row])
    torch.testing.assert_close(gradient(estimator, cost, site, logits), expected)


def test_rao_blackwell_of_one_hot_vectors() -> None:
    slots = RaoBlackwell(2, 3).draw(Site("z", OneHotCategorical(PROBS)))
    assert slots.values.shape == (5, 3, 4) and torch.equal(slots.values.sum(-1), torch.ones(5, 3))
    assert torch.equal(slots.values[:2].argmax(-1), PROBS.topk(2, -1).indices.T)


# Antithetic draws.


@pytest.mark.parametrize("event_dims", [0, 1])
def test_disarm(event_dims: int) -> None:
    r""":math:`\tfrac12 (f(b) - f(\tilde b)) (-1)^{\tilde b} 1[b \ne \tilde b] \sigma(|\alpha|)`, bit by bit."""
    logits = torch.tensor([[-3.0, -0.4, 0.0], [0.2, 1.5, 6.0]], requires_grad=True)
    estimator = DisARM()
    fn: Distribution = Bernoulli(logits=logits)
    fn = Independent(fn, event_dims) if event_dims else fn
    for _ in range(20):
        site = laid_out(estimator, fn)
        assert site.slots is not None
        b, other = site.slots.values
        cost = torch.randn(2, *fn.batch_shape)
        difference = (cost[0] - cost[1]).reshape(fn.batch_shape + (1,) * event_dims)
        expected = 0.5 * difference * (-1) ** other * (b != other) * logits.abs().sigmoid()
        torch.testing.assert_close(gradient(estimator, cost, site, logits), expected.detach())


def test_antithetic_pairs() -> None:
    """1[u < p] and 1[1 - u < p]: both one with probability max(0, 2p - 1), and both zero with max(0, 1 - 2p)."""
    probs = torch.tensor([0.0, 0.1, 0.5, 0.8, 1.0]).expand(1000, 5)
    first, second = DisARM().draw_bits(probs)
    assert not ((first == 1) & (second == 1))[:, :3].any()
    assert not ((first == 0) & (second == 0))[:, 2:].any()
    assert torch.equal(first[:, 2], 1 - second[:, 2])
    assert not (first[:, 0] + second[:, 0]).any() and (first[:, 4] * second[:, 4]).all()


@pytest.mark.parametrize("n", [2, 3, 6])
def test_arms(n: int) -> None:
    """The docstring's formula, the correlation from the copula's pair probability."""
    logits = torch.tensor([-4.0, -0.7, 0.0, 0.3, 5.0], requires_grad=True)
    estimator = ARMS(n)
    site = laid_out(estimator, Bernoulli(logits=logits))
    assert site.slots is not None and site.slots.values.shape == (n, 5)
    torch.testing.assert_close(site.slots.log_weights.exp(), torch.full((n, 5), 1 / n))
    cost = torch.randn(n, 5)
    found = gradient(estimator, cost, site, logits)
    for bit, p in enumerate(logits.detach().sigmoid().tolist()):
        r = min(p, 1 - p)
        pair = max(0.0, 2 * r ** (1 / (n - 1)) - 1) ** (n - 1)
        correlation = (pair - r * r) / (r * (1 - r))
        f, b = cost[:, bit], site.slots.values[:, bit]
        expected = sum((f[k] - f.mean()) * (b[k] - p) for k in range(n)) / ((n - 1) * (1 - correlation))
        assert float(found[bit]) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_arms_at_certain_bits(n: int) -> None:
    """Probabilities of zero and one give those bits, and a gradient of zero, not NaN."""
    probs = torch.tensor([0.0, 1.0])
    bits = ARMS(n).draw_bits(probs)
    assert not bits[:, 0].any() and bits[:, 1].all()
    logits = torch.tensor([-800.0, 800.0], requires_grad=True)
    estimator = ARMS(n)
    site = laid_out(estimator, Bernoulli(logits=logits))
    assert not gradient(estimator, torch.randn(n, 2), site, logits).any()


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_arms_draws_have_the_bits_probabilities(n: int) -> None:
    """Each of n draws is Bernoulli. z-tests at |z| < 5 for n · 7 proportions: 119 in all fail once in 15 000 runs."""
    probs, size = torch.tensor([0.003, 0.05, 0.3, 0.5, 0.62, 0.9, 0.999]), 400_000
    means = ARMS(n).draw_bits(probs.expand(size, 7)).mean(1)
    z = (means - probs) / (probs * (1 - probs) / size).sqrt()
    assert means.shape == (n, 7) and z.abs().max() < 5


# What a class implements says what it does.


class OneValue(Estimator):
    def reparameterized(self, site: Site) -> Tensor:
        return site.fn.sample()


class ValueAndScore(OneValue):
    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        return cost * site.log_prob, 0.0


class Flagged(ValueAndScore):
    """What it says in so many words counts, as it did when there was no other way."""

    reparameterizes = True

    def __init__(self, n: int) -> None:
        super().__init__()
        self.draws_slots = n > 1


@pytest.mark.parametrize(
    "estimator, slots, reparameterizes, splits",
    [
        (ScoreFunction(), False, False, False),
        (LeaveOneOut(2), False, False, False),
        (Exact(), True, False, False),
        (RaoBlackwell(), True, False, False),
        (DisARM(), True, False, False),
        (REBAR(), True, False, False),
        (StraightThrough(), False, True, False),
        (SplitPathwise(), False, False, True),
        (OneValue(), False, True, False),
        (ValueAndScore(), False, False, True),
        (Flagged(1), False, True, False),
        (Flagged(2), True, True, False),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Estimator) else "",
)
def test_what_is_implemented(estimator: Estimator, slots: bool, reparameterizes: bool, splits: bool) -> None:
    for e in (estimator, copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))):
        assert (e.draws_slots, e.reparameterizes, e.splits) == (slots, reparameterizes, splits)


# VIMCO.


@pytest.mark.parametrize("n", [2, 3, 5])
def test_vimco(n: int) -> None:
    """The signal of each particle, and its gradients by log w and log q, in a loop."""
    log_w, log_prob = torch.randn(n, 3, requires_grad=True), torch.randn(n, 3, requires_grad=True)
    estimator = VIMCO(n)
    surrogate, _ = estimator(log_w, Site("z", Bernoulli(torch.tensor(0.5)), log_prob=log_prob))
    by_weight, by_log_prob = torch.autograd.grad(surrogate.sum(), [log_w, log_prob])
    w = log_w.detach()
    bound = w.exp().mean(0).log()
    torch.testing.assert_close(estimator.bound(w), bound)
    for k in range(n):
        others = [w[j] for j in range(n) if j != k]
        geometric = torch.stack(others).mean(0)
        without = (sum(v.exp() for v in [*others, geometric]) / n).log()
        torch.testing.assert_close(by_log_prob[k], bound - without)
        torch.testing.assert_close(by_weight[k], w[k].exp() / w.exp().sum(0))


def test_vimcos_bound_does_not_overflow() -> None:
    log_w = torch.tensor([[-2000.0], [-2001.0]])
    expected = -2000 + math.log((1 + math.exp(-1)) / 2)
    assert VIMCO(2).bound(log_w).item() == pytest.approx(expected, abs=1e-12)
