r"""
Gumbel noise, its conditional law, and stand-ins for one-hot draws, against rejection and against formulas.

Statistical tests reject at p < 1e-6. There are about 40 of them: with everything right and seeds that are not fixed,
one run in 25,000 would have a failure.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_sparse import _relaxation
from pyro_sparse._relaxation import (
    JACOBIANS,
    Jacobian,
    conditional_gumbels,
    draw_with_stand_in,
    exact_logits,
    gumbel_like,
    linear_log_prob,
    one_hot_at_max,
    straight_through,
)

SIGNIFICANCE = 1e-6
LOGITS = torch.tensor([1.2, -0.7, 0.1, -1.5], dtype=torch.float64)
each_jacobian = pytest.mark.parametrize("jacobian", JACOBIANS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def jacobian_of_softmax(probs: Tensor) -> Tensor:
    return torch.diag_embed(probs) - probs[..., :, None] * probs[..., None, :]


def differentiated(soft: Tensor, logits: Tensor) -> Tensor:
    """The Jacobian of one stand-in (K,) by the logits (K,)."""
    return torch.stack([torch.autograd.grad(s, logits, retain_graph=True)[0] for s in soft])


# Gumbel noise.


def test_gumbel_noise_has_its_law() -> None:
    assert stats.kstest(gumbel_like(torch.zeros(200_000)).numpy(), stats.gumbel_r.cdf).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("winner", range(4))
def test_conditional_gumbels_against_rejection(winner: int) -> None:
    """Each coordinate alone, and each difference from the largest, which their joint law decides."""
    log_probs = LOGITS.log_softmax(-1)
    drawn = log_probs + gumbel_like(torch.zeros(300_000, 4))
    kept = drawn[drawn.argmax(-1) == winner]
    hard = torch.eye(4)[winner]
    ours = conditional_gumbels(log_probs, hard.expand(50_000, 4))
    for k in range(4):
        assert stats.ks_2samp(ours[:, k].numpy(), kept[:, k].numpy()).pvalue > SIGNIFICANCE
        if k != winner:
            differences = [(x[:, winner] - x[:, k]).numpy() for x in (ours, kept)]
            assert stats.ks_2samp(*differences).pvalue > SIGNIFICANCE
    others = [k for k in range(4) if k != winner]
    gaps = [(x[:, others[0]] - x[:, others[1]]).numpy() for x in (ours, kept)]
    assert stats.ks_2samp(*gaps).pvalue > SIGNIFICANCE


def test_conditional_gumbels_broadcast() -> None:
    assert conditional_gumbels(LOGITS.log_softmax(-1).expand(7, 1, 4), torch.eye(4)).shape == (7, 4, 4)


@each_dtype
@pytest.mark.parametrize("peak", [40.0, 1000.0])
@pytest.mark.parametrize("winner", range(4))
def test_conditional_gumbels_of_peaked_probabilities_are_finite(winner: int, peak: float, dtype: torch.dtype) -> None:
    """The least likely outcome, too, may be the one that was drawn; the largest is where it should be."""
    log_probs = torch.tensor([peak, -peak, 0.0, 1.0], dtype=dtype).log_softmax(-1)
    z = conditional_gumbels(log_probs, torch.eye(4, dtype=dtype)[winner].expand(20_000, 4))
    assert z.dtype == dtype and z.isfinite().all()
    others = z.clone()
    others[:, winner] = -math.inf
    assert (z[:, winner] >= others.amax(-1)).all()


def test_conditional_gumbels_leave_out_what_has_no_probability() -> None:
    log_probs = torch.tensor([0.0, -math.inf, 0.0]).log_softmax(-1)
    z = conditional_gumbels(log_probs, torch.eye(3)[0].expand(1000, 3))
    assert (z[:, 1] == -math.inf).all() and z[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("probs", [[0.1, 0.2, 0.3, 0.4], [0.0, 0.95, 0.05, 0.0], [1.0, 0.0], [1e-4, 0.9999]], ids=str)
@each_dtype
def test_the_maximum_is_exactly_categorical(probs: list[float], dtype: torch.dtype) -> None:
    """Chi-square tests; what has no probability is never drawn."""
    p = torch.tensor(probs, dtype=dtype)
    logits = exact_logits(dist.OneHotCategorical(probs=p)).expand(400_000, -1)
    hard, _ = draw_with_stand_in(logits, "softmax", 1.0, 1)
    assert ((hard == 0) | (hard == 1)).all() and (hard.sum(-1) == 1).all()
    counts, possible = hard.sum(0).double(), p > 0
    assert (counts[~possible] == 0).all()
    if possible.sum() == 1:
        return
    expected = p[possible].double() / p.double().sum() * len(logits)
    assert stats.chisquare(counts[possible].numpy(), expected.numpy()).pvalue > SIGNIFICANCE


# The logits of a distribution.


def test_exact_logits_are_those_of_the_distribution() -> None:
    logits = torch.randn(3, 4)
    for family in (dist.Categorical, dist.OneHotCategorical):
        torch.testing.assert_close(exact_logits(family(logits=logits)), logits.log_softmax(-1))
        probs = logits.softmax(-1)
        torch.testing.assert_close(exact_logits(family(probs=probs)), logits.log_softmax(-1))
    bits = torch.randn(3)
    for d in (dist.Bernoulli(logits=bits), dist.Bernoulli(probs=bits.sigmoid())):
        torch.testing.assert_close(exact_logits(d).softmax(-1), torch.stack([bits.sigmoid(), (-bits).sigmoid()], -1))


@pytest.mark.parametrize("asked", [False, True], ids=["", "asked"])
@each_dtype
def test_a_probability_of_zero_is_zero(dtype: torch.dtype, asked: bool) -> None:
    """In whatever order probabilities and logits were asked for."""
    p = torch.tensor([0.0, 0.3, 0.7], dtype=dtype)
    for family in (dist.Categorical, dist.OneHotCategorical):
        d = family(probs=p)
        if asked:
            d.entropy()
        for e in (d, d.expand((2,))):
            assert torch.equal(exact_logits(e).exp() == 0, (p == 0).expand(*e.batch_shape, 3))
    bits = dist.Bernoulli(probs=torch.tensor([0.0, 1.0, 0.3], dtype=dtype))
    if asked:
        bits.entropy()
    for e in (bits, bits.expand((2, 3))):
        impossible = exact_logits(e) == -math.inf
        assert torch.equal(
            impossible, torch.tensor([[True, False], [False, True], [False, False]]).expand_as(impossible)
        )


@pytest.mark.parametrize("asked", [False, True], ids=["", "asked"])
@each_dtype
def test_a_probability_that_underflows_is_not(dtype: torch.dtype, asked: bool) -> None:
    logits = torch.tensor([40.0, -40.0, 20.0, -110.0], dtype=dtype)
    bits, categories = dist.Bernoulli(logits=logits), dist.OneHotCategorical(logits=logits)
    if asked:
        bits.entropy(), categories.entropy()
    assert exact_logits(bits).isfinite().all()
    assert exact_logits(categories).isfinite().all()


def test_exact_logits_have_finite_gradients() -> None:
    p = torch.tensor([0.0, 0.3, 0.7], requires_grad=True)
    exact_logits(dist.OneHotCategorical(probs=p))[1:].sum().backward()
    assert p.grad.isfinite().all()


# Stand-ins.


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    soft = torch.tensor([1e30, -0.1, 1 / 3], requires_grad=True)
    hard = torch.tensor([1.0, 0.0, 0.0])
    z = straight_through(hard, 3 * soft)
    assert torch.equal(z, hard)
    z.sum().backward()
    assert torch.equal(soft.grad, torch.full((3,), 3.0))


def test_one_hot_at_max() -> None:
    x = torch.tensor([[0.1, 3.0, -1.0], [-math.inf, -2.0, -5.0]])
    assert torch.equal(one_hot_at_max(x), torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.0, 10.0])
def test_jacobians_in_closed_form(temperature: float) -> None:
    logits = LOGITS.clone().requires_grad_()
    p, p_tau = LOGITS.softmax(-1), (LOGITS / temperature).softmax(-1)
    seen = set()
    for _ in range(20):
        for jacobian in ("identity", "softmax", "reinmax"):
            hard, soft = draw_with_stand_in(logits, jacobian, temperature, 1)
            expected = {
                "identity": torch.eye(4),
                "softmax": jacobian_of_softmax(p),
                "reinmax": 2 * jacobian_of_softmax((p_tau + hard) / 2) - jacobian_of_softmax(p) / 2,
            }[jacobian]
            torch.testing.assert_close(differentiated(soft, logits), expected)
            assert not hard.requires_grad
            seen.add(int(hard.argmax()))
    assert len(seen) > 1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 10.0])
def test_the_gumbel_softmax_shares_its_noise_with_the_draw(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = LOGITS.clone().requires_grad_()
    noise = gumbel_like(torch.zeros(4))
    monkeypatch.setattr(_relaxation, "gumbel_like", lambda x: noise)
    hard, soft = draw_with_stand_in(logits, "gumbel-softmax", temperature, 1)
    assert hard.argmax() == (LOGITS + noise).argmax()
    u = ((LOGITS + noise) / temperature).softmax(-1)
    torch.testing.assert_close(soft, u)
    torch.testing.assert_close(differentiated(soft, logits), jacobian_of_softmax(u) / temperature)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_gumbel_rao_averages_over_noise_that_gives_the_draw(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given that noise, in closed form; its mean, by a z-test (|z| < 5) against rejection."""
    logits = LOGITS.clone().requires_grad_()
    others: list[Tensor] = []

    def recorded(log_probs: Tensor, hard: Tensor) -> Tensor:
        others.append(conditional_gumbels(log_probs, hard))
        return others[-1]

    monkeypatch.setattr(_relaxation, "conditional_gumbels", recorded)
    hard, soft = draw_with_stand_in(logits, "gumbel-rao", temperature, 20_000)
    assert others[0].shape == (20_000, 4) and (others[0].argmax(-1) == hard.argmax()).all()
    terms = jacobian_of_softmax((others[0] / temperature).softmax(-1)) / temperature
    torch.testing.assert_close(differentiated(soft, logits), terms.mean(0))
    drawn = LOGITS.log_softmax(-1) + gumbel_like(torch.zeros(100_000, 4))
    kept = drawn[drawn.argmax(-1) == hard.argmax()]
    rejected = jacobian_of_softmax((kept / temperature).softmax(-1)) / temperature
    error = (terms.var(0) / len(terms) + rejected.var(0) / len(rejected)).sqrt()
    assert ((terms.mean(0) - rejected.mean(0)).abs() < 5 * error).all()


@each_jacobian
def test_jacobians_do_not_see_a_shift_of_the_logits(jacobian: Jacobian) -> None:
    found = []
    for shift in (0.0, 300.0):
        torch.manual_seed(3)
        logits = (LOGITS + shift).requires_grad_()
        hard, soft = draw_with_stand_in(logits, jacobian, 0.5, 4)
        found += [torch.cat([hard[None], differentiated(soft, logits)])]
    torch.testing.assert_close(found[0], found[1])


@each_jacobian
@pytest.mark.parametrize("temperature", [0.01, 10.0])
@each_dtype
def test_draws_and_gradients_are_finite(jacobian: Jacobian, temperature: float, dtype: torch.dtype) -> None:
    """Peaked logits, and outcomes that are ruled out: those are not drawn and get no gradient of their own."""
    for row in ([40.0, -40.0, 0.0], [40.0, 40.0, -40.0], [0.0, -math.inf, 1.0]):
        logits = torch.tensor(row, dtype=dtype).expand(500, 3).clone().requires_grad_()
        hard, soft = draw_with_stand_in(logits, jacobian, torch.tensor(temperature, dtype=dtype), 5)
        z = straight_through(hard, soft)
        assert z.dtype == dtype and torch.equal(z, hard)
        (z * torch.randn(500, 3, dtype=dtype)).sum().backward()
        assert logits.grad.isfinite().all()
        assert (hard[logits == -math.inf] == 0).all() and (logits.grad[logits == -math.inf] == 0).all()


# Linear log-probabilities.


def test_linear_log_prob_is_linear_and_right_at_the_outcomes() -> None:
    d = dist.OneHotCategorical(logits=torch.randn(3, 4))
    outcomes = d.enumerate_support()
    torch.testing.assert_close(linear_log_prob(d.logits, outcomes), d.log_prob(outcomes))
    weights = torch.rand(3, 4)
    torch.testing.assert_close(linear_log_prob(d.logits, weights), (weights.T * d.log_prob(outcomes)).sum(0))


def test_linear_log_prob_of_what_is_impossible() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0], requires_grad=True)
    for value, expected in (([1.0, 0.0, 0.0], 0.0), ([0.0, 1.0, 0.0], -math.inf), ([0.9, 0.1, 0.0], -math.inf)):
        v = torch.tensor(value, requires_grad=True)
        found = linear_log_prob(logits, v)
        assert found == expected
        gradients: Any = torch.autograd.grad(found, [logits, v])
        assert all(g.isfinite().all() for g in gradients)
