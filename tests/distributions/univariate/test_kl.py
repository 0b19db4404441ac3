"""KL divergences of the mixed families: against adaptive quadrature of log_prob, and what is infinite or unknown."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sparse.distributions import (
    HardConcrete,
    HardKumaraswamy,
    Rectified,
    RectifiedNormal,
    SpikeAndExponential,
    SpikeAndSlab,
    StretchedRectified,
    ZeroOneInflated,
)
from tests.distributions.univariate.mixed_zoo import EXTREME, LINE, MILD, UNIT, expected_value, extreme, leaves, mild


def by_quadrature(p: Any, q: Any, breaks: Tensor = UNIT) -> Tensor:
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    return expected_value(p.expand(shape), lambda z, log_p: log_p - q.log_prob(z), breaks)


def close(got: Tensor, expected: Tensor, tol: float) -> None:
    torch.testing.assert_close(got.detach(), expected.detach(), rtol=tol, atol=tol)


def tensors(*values: float) -> list[Tensor]:
    return [torch.tensor(v) for v in values]


PRIORS: dict[str, Any] = {
    "HardConcrete": lambda: HardConcrete(*tensors(2 / 3, -1.0)),
    "HardConcrete, own stretch": lambda: HardConcrete(*tensors(0.3, 1.0), -0.01, 1.5),
    "HardKumaraswamy": lambda: HardKumaraswamy(*tensors(0.5, 2.0)),
    "RectifiedNormal": lambda: RectifiedNormal(*tensors(0.3, 0.5)),
    "StretchedRectified": lambda: StretchedRectified(dist.Normal(*tensors(0.3, 0.5)), -0.2, 1.2),
    "Rectified": lambda: Rectified(dist.Cauchy(*tensors(0.3, 0.5))),
    "Uniform": lambda: ZeroOneInflated(dist.Uniform(*tensors(0.0, 1.0)), torch.tensor([0.5, -0.5, 0.2])),
    "Beta": lambda: ZeroOneInflated(dist.Beta(*tensors(2.0, 3.0)), torch.tensor([0.5, -0.5, 0.2])),
}
KNOWN = [name for name in MILD if name != "ZeroOneInflated, Kumaraswamy"]  # torch knows no KL of two Kumaraswamys
RECTIFIED = ["HardConcrete", "HardKumaraswamy", "RectifiedNormal", "StretchedRectified", "Rectified"]


@pytest.mark.parametrize("name", EXTREME)
def test_within_a_family(name: str) -> None:
    """Each member of the grid of extremes with another one, stretched otherwise."""
    p, parameters = extreme(name)
    # Sixty-four of them, far apart in the grid.
    n = p.batch_shape[0]
    chosen = torch.arange(64) * 37 % n
    others = (chosen * 5 + 11) % n
    make = EXTREME[name][0]
    p, q = (make(*(x.detach()[rows] for x in parameters)) for rows in (chosen, others))
    breaks = LINE if name == "SpikeAndSlab" else UNIT
    close(kl_divergence(p, q), by_quadrature(p, q, breaks), 1e-10)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", RECTIFIED)
def test_rectified_families_against_other_priors(name: str, prior: str) -> None:
    p, q = extreme(name)[0], PRIORS[prior]()
    got, expected = kl_divergence(p, q).detach(), by_quadrature(p, q)
    if prior == "Beta" and isinstance(p, HardConcrete | HardKumaraswamy):
        # The log of a Beta density is infinite at 0 and 1 themselves, where a tight stretch has much to integrate.
        tight = p.high < 1 + 1e-4
        close(got[tight], expected[tight], 2e-7)
        got, expected = got[~tight], expected[~tight]
    close(got, expected, 1e-10)


@pytest.mark.parametrize(
    "p, q",
    [
        ("ZeroOneInflated", "Uniform"),
        ("ZeroOneInflated", "Beta"),
        ("SpikeAndSlab", lambda: SpikeAndSlab(dist.Normal(*tensors(0.0, 1.0)), logits=torch.tensor(0.3))),
        ("SpikeAndSlab of probs", lambda: SpikeAndSlab(dist.Exponential(torch.tensor(1.0)), probs=torch.tensor(0.3))),
        ("SpikeAndExponential", lambda: SpikeAndSlab(dist.Uniform(*tensors(0.0, 1.0)), probs=torch.tensor(0.3))),
        ("SpikeAndExponential", lambda: SpikeAndExponential(*tensors(3.0), probs=torch.tensor(0.3))),
    ],
)
def test_inflated_families(p: str, q: Any) -> None:
    first, second = mild(p), PRIORS[q]() if isinstance(q, str) else q()
    breaks = LINE if first.support.domain.check(torch.tensor(2.0)) else UNIT
    if p == "SpikeAndSlab of probs":
        breaks = breaks[breaks >= 0]
    close(kl_divergence(first, second), by_quadrature(first, second, breaks), 1e-10)


def test_two_slabs_in_closed_form() -> None:
    m, s = tensors(0.4, 2.0)
    p = SpikeAndSlab(dist.Normal(m, s), probs=0.3)
    q = SpikeAndSlab(dist.Normal(0 * m, s), probs=0.1)
    bernoulli = 0.3 * math.log(0.3 / 0.1) + 0.7 * math.log(0.7 / 0.9)
    close(kl_divergence(p, q), torch.tensor(bernoulli + 0.3 * 0.4**2 / 8), 1e-14)


def test_a_bit_against_a_gate() -> None:
    bit, gate = dist.Bernoulli(logits=torch.tensor([-1.0, 2.0])), PRIORS["HardConcrete"]()
    got = kl_divergence(bit, gate)
    p = bit.probs
    close(got, p * (p / gate.prob_one).log() + (1 - p) * ((1 - p) / gate.prob_zero).log(), 1e-13)


@pytest.mark.parametrize("name", KNOWN)
def test_gradients_by_finite_differences(name: str) -> None:
    make = MILD[name][0]
    p = leaves(name)
    q = [(1.2 * x.detach()).requires_grad_() for x in leaves(name)]
    if name == "SpikeAndSlab of probs":
        q[1] = torch.tensor([0.5, 0.2], requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: kl_divergence(make(*x[: len(p)]), make(*x[len(p) :])), (*p, *q), fast_mode=True
    )


@pytest.mark.parametrize("name", KNOWN)
def test_a_distribution_and_itself(name: str) -> None:
    d = mild(name)
    kl = kl_divergence(d, d.expand((3, 2)))
    assert kl.shape == (3, 2)
    close(kl, torch.zeros(3, 2), 1e-14)


# Wrappers.


@pytest.mark.parametrize("name", KNOWN)
def test_wrappers(name: str) -> None:
    p, q = mild(name).expand((3, 2)), MILD[name][0](*[x.flip(0) for x in leaves(name)])
    kl = kl_divergence(p, q)
    assert (kl > 0.01).all()
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    kept = torch.where(mask, kl, 0.0)
    q = q.expand((3, 2))
    close(kl_divergence(p.to_event(1), q.to_event(1)), kl.sum(-1), 1e-15)
    close(kl_divergence(p.to_event(2), q.to_event(2)), kl.sum(), 1e-15)
    close(kl_divergence(p.mask(mask), q.mask(mask)), kept, 1e-15)
    other = torch.tensor([[True, True], [False, True], [False, True]])
    both = torch.tensor([[True, False], [False, False], [False, True]])  # neither of the two is masked
    close(kl_divergence(p.mask(mask), q.mask(other)), torch.where(both, kl, 0.0), 1e-15)
    close(kl_divergence(p.mask(True), q.mask(True)), kl, 1e-15)
    close(kl_divergence(p.mask(False), q.mask(False)), 0 * kl, 1e-15)
    close(kl_divergence(p.mask(mask).to_event(1), q.mask(mask).to_event(1)), kept.sum(-1), 1e-15)
    rows = mask[:, 0]
    close(kl_divergence(p.to_event(1).mask(rows), q.to_event(1).mask(rows)), torch.where(rows, kl.sum(-1), 0.0), 1e-15)


# Infinite or unknown.


def test_a_prior_without_an_atom() -> None:
    for p in (PRIORS["HardConcrete"](), PRIORS["Uniform"](), dist.Bernoulli(torch.tensor(0.5))):
        for q in (SpikeAndSlab(dist.Uniform(*tensors(0.0, 1.0)), probs=0.5), SpikeAndExponential(1.0, probs=0.5)):
            with pytest.raises(ValueError, match=r"^kl_divergence\(.*expected q to have .*got .*infinite.*\.$"):
                kl_divergence(p, q)


def test_a_prior_whose_atom_has_no_probability() -> None:
    p = PRIORS["HardConcrete"]()
    q = ZeroOneInflated(dist.Uniform(*tensors(0.0, 1.0)), probs=torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.3, 0.5]]))
    kl = kl_divergence(p, q)
    assert kl[0] == math.inf and kl[1].isfinite()
    # What p never does costs nothing.
    close(kl_divergence(q, q), torch.zeros(2), 1e-15)


def test_gradients_beside_an_infinite_one() -> None:
    x = torch.tensor(0.3, requires_grad=True)
    q = ZeroOneInflated(dist.Uniform(*tensors(0.0, 1.0)), probs=torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.3, 0.5]]))
    kl = kl_divergence(HardConcrete(0.5, x), q)
    (gradient,) = torch.autograd.grad(kl, x, torch.tensor([0.0, 1.0]))
    assert gradient.isfinite()


def test_a_slab_that_does_not_cover() -> None:
    q = SpikeAndSlab(dist.Uniform(*tensors(0.0, 0.5)), probs=0.5)
    assert kl_divergence(SpikeAndExponential(torch.tensor(2.0), probs=0.5), q) == math.inf
    q = ZeroOneInflated(dist.Uniform(*tensors(0.1, 0.5)), torch.zeros(3))
    assert kl_divergence(PRIORS["HardConcrete"](), q) == math.inf


def everything() -> dict[str, Any]:
    plain = {name: mild(name).expand((3, 2)) for name in MILD}
    stock = {
        "Normal": dist.Normal(0.0, 1.0).expand((3, 2)),
        "Uniform": dist.Uniform(0.0, 1.0).expand((3, 2)),
        "Beta": dist.Beta(1.0, 2.0).expand((3, 2)),
        "Bernoulli": dist.Bernoulli(0.4).expand((3, 2)),
        "Kumaraswamy": dist.Kumaraswamy(1.0, 2.0).expand((3, 2)),
        "LogNormal": dist.LogNormal(0.0, 1.0).expand((3, 2)),
        "RelaxedBernoulli": dist.RelaxedBernoulli(torch.tensor(0.5), logits=torch.zeros(3, 2)),
        "Unit": dist.Unit(torch.zeros(3, 2)),
        "mixture": dist.MixtureSameFamily(dist.Categorical(torch.ones(4)), dist.Normal(torch.zeros(4), 1.0)),
        "expanded": dist.torch_distribution.ExpandedDistribution(dist.Normal(0.0, 1.0), torch.Size((3, 2))),
    }
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    made = {**plain, **stock}
    for name, d in [*plain.items(), *stock.items()]:
        if name in ("HardConcrete", "RectifiedNormal", "SpikeAndSlab", "ZeroOneInflated", "Normal", "Bernoulli"):
            own = name in plain
            made[f"{name}.to_event"] = d.to_event(1) if own else Independent(d, 1)
            made[f"{name}.mask"] = d.mask(mask) if own else MaskedDistribution(d, mask)
            made[f"{name}.mask.to_event"] = d.mask(mask).to_event(1)
            made[f"{name}.to_event.mask"] = d.to_event(1).mask(mask[:, 0])
    return made


def test_every_pair_is_known_or_refused() -> None:
    """Never NotImplementedError: Pyro's TraceMeanField_ELBO would take it for leave to be biased."""
    known = 0
    made = everything()
    for (first, p), (second, q) in itertools.product(made.items(), made.items()):
        if not any(name.split(".")[0] in MILD for name in (first, second)):
            continue
        if second == "ZeroOneInflated, Kumaraswamy":
            continue  # Pyro's Kumaraswamy density is lost to rounding near 0
        try:
            kl = kl_divergence(p, q)
        except RuntimeError:
            assert p.event_shape != q.event_shape
        except (TypeError, ValueError) as error:
            assert str(error).startswith("kl_divergence("), (first, second, error)
            assert ": expected " in str(error) and ", got " in str(error), (first, second, error)
            assert first != second or first not in KNOWN, (first, error)
        else:
            known += 1
            assert kl.shape == p.batch_shape, (first, second)
            assert (kl >= -1e-12).all() and not kl.isnan().any(), (first, second)
    assert known > 100


def test_a_point_mass_is_as_pyros_own() -> None:
    q = PRIORS["HardConcrete"]()
    for v in (0.0, 0.4, 1.0):
        assert kl_divergence(dist.Delta(torch.tensor(v)), q) == -q.log_prob(torch.tensor(v))
