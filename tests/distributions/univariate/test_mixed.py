"""The mixed families: log_prob against exact arithmetic, everything else against adaptive quadrature of log_prob."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_sparse.distributions import (
    HardConcrete,
    HardKumaraswamy,
    Rectified,
    RectifiedNormal,
    SpikeAndSlab,
    StretchedRectified,
    ZeroOneInflated,
)
from tests.distributions.univariate.mixed_zoo import EXTREME, LINE, MILD, UNIT, expected_value, extreme, leaves, mild

each_mild = pytest.mark.parametrize("name", MILD)
each_extreme = pytest.mark.parametrize("name", EXTREME)
POINTS = [0.0, 1e-9, 0.3, 1 - 1e-9, 1.0]


def breaks(name: str) -> Tensor:
    return LINE if name == "SpikeAndSlab" else UNIT


def z_dims(values: list[float], d: Any) -> Tensor:
    """Values in front of the batch."""
    like = d.prob_zero.detach()
    return like.new_tensor(values).reshape(-1, *(1,) * like.dim()).expand(-1, *like.shape)


def close(got: Tensor, expected: Tensor, tol: float) -> None:
    torch.testing.assert_close(got.detach(), expected.detach(), rtol=tol, atol=tol)


# log_prob in 60 digits, written from the definitions.


def stretched_cdf(name: str, p: list[Any], z: Any) -> tuple[Any, Any, Any]:
    """F(z), 1 - F(z), f(z) of the variable before it is clamped."""
    mp = mpmath
    if name == "RectifiedNormal":
        t = (z - p[0]) / p[1]
        return mp.ncdf(t), mp.ncdf(-t), mp.npdf(t) / p[1]
    low, high = p[2:]
    k, rest, width = (z - low) / (high - low), (high - z) / (high - low), high - low
    if name == "HardConcrete":
        x = p[0] * mp.log(k / rest) - p[1]
        cdf, sf = 1 / (1 + mp.exp(-x)), 1 / (1 + mp.exp(x))
        return cdf, sf, cdf * sf * p[0] / (k * rest * width)
    log_sf = p[1] * mp.log1p(-(k ** p[0]))
    density = p[0] * p[1] * k ** (p[0] - 1) * (1 - k ** p[0]) ** (p[1] - 1) / width
    return -mp.expm1(log_sf), mp.exp(log_sf), density


@pytest.mark.parametrize("name", ["HardConcrete", "HardKumaraswamy", "RectifiedNormal"])
def test_log_prob_in_exact_arithmetic(name: str) -> None:
    d, parameters = extreme(name)
    numbers = [x.tolist() for x in parameters]
    if name != "RectifiedNormal":
        numbers[2:] = [d.low.tolist(), d.high.tolist()]
    got = d.log_prob(z_dims(POINTS, d))
    with mpmath.workdps(60):
        rows = zip(*([mpmath.mpf(x) for x in column] for column in numbers), strict=True)
        expected = []
        for p in rows:
            cdf, sf, densities = zip(*(stretched_cdf(name, list(p), mpmath.mpf(z)) for z in POINTS), strict=True)
            values = [cdf[0], *densities[1:-1], sf[-1]]
            expected.append([float(mpmath.log(v)) if v > 0 else -math.inf for v in values])
    close(got, torch.tensor(expected).T, 1e-11)


@pytest.mark.parametrize("rate", [-500.0, -1.0, -1e-9, 0.0, 1e-4, 0.01, 30.0])
def test_the_exponential_slab_in_exact_arithmetic(rate: float) -> None:
    d, _ = extreme("SpikeAndExponential")
    slab = type(d.slab)(torch.tensor(rate))
    with mpmath.workdps(60):
        b = mpmath.mpf(rate) or mpmath.mpf(10) ** -17
        z = mpmath.mpf(0.3)
        mean = 1 / (1 - mpmath.exp(-b)) - 1 / b
        variance = 1 / b**2 - mpmath.exp(b) / mpmath.expm1(b) ** 2
        log_norm = mpmath.log(b / mpmath.expm1(b))
        exact = [log_norm + b * z, mpmath.expm1(b * z) / mpmath.expm1(b), mean, variance, -log_norm - b * mean]
        expected = torch.tensor([float(x) for x in exact])
    value = torch.tensor(0.3)
    got = torch.stack([slab.log_prob(value), slab.cdf(value), slab.mean, slab.variance, slab.entropy()])
    close(got, expected, 1e-12)
    close(slab.cdf(slab.icdf(value)), value, 1e-14)


# Integrals.


@each_extreme
def test_atoms_and_density_integrate_to_one(name: str) -> None:
    d, _ = extreme(name)
    # At 50 the Beta density is itself off by 1e-12: lgamma of 100.
    close(expected_value(d, lambda z, _: 1.0, breaks(name)), torch.ones(d.batch_shape), 1e-12)


@each_extreme
@pytest.mark.parametrize("what", ["mean", "variance", "entropy"])
def test_moments_and_entropy(name: str, what: str) -> None:
    d, _ = extreme(name)
    if what == "mean":
        got, expected = d.mean, expected_value(d, lambda z, _: z, breaks(name))
    elif what == "variance":
        mean = expected_value(d, lambda z, _: z, breaks(name))
        got, expected = d.variance, expected_value(d, lambda z, _: (z - mean).square(), breaks(name))
    else:
        got, expected = d.entropy(), expected_value(d, lambda _, log_p: -log_p, breaks(name))
    close(got, expected, 1e-10)


@each_extreme
def test_strata(name: str) -> None:
    d, _ = extreme(name)
    at = {atom: d.log_prob(torch.tensor(atom)).exp() for atom in d.support.atoms}
    close(d.prob_zero, at[0.0], 1e-15)
    close(d.prob_one, at.get(1.0, torch.zeros(d.batch_shape)), 1e-15)
    close(d.prob_interior, expected_value(d, lambda z, _: ((z != 0) & (z != 1)).double(), breaks(name)), 1e-12)
    close(d.prob_nonzero, d.prob_one + d.prob_interior, 1e-13)
    close(d.prob_zero + d.prob_nonzero, torch.ones(d.batch_shape), 1e-13)


@pytest.mark.parametrize("name", ["HardConcrete", "HardKumaraswamy"])
def test_tiny_probabilities_keep_their_digits(name: str) -> None:
    """Far beyond where one minus a probability is one."""
    if name == "HardConcrete":
        d = HardConcrete(0.5, torch.tensor([-60.0, 60.0]))
        expected = torch.tensor([math.exp(-60.0 + 0.5 * math.log(11.0)), math.exp(-60.0 - 0.5 * math.log(11.0))])
    else:  # (1 - (1/12)^100)^0.01, (1 - (11/12)^0.01)^100
        d = HardKumaraswamy(torch.tensor([0.01, 100.0]), torch.tensor([100.0, 0.01]))
        expected = torch.tensor([(-math.expm1(-0.01 * math.log(12))) ** 100, 0.01 * 12.0**-100])
    got = torch.stack([d.prob_nonzero[0], d.prob_zero[1]])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0.0)


# Distribution functions.


@each_extreme
def test_cdf_is_the_integral(name: str) -> None:
    d, _ = extreme(name)
    if name == "ZeroOneInflated":
        with pytest.raises(NotImplementedError, match=r"expected a slab with a cdf, got Beta\. \w+"):
            d.cdf(torch.tensor(0.3))
        return
    grid = torch.cat([breaks(name), torch.tensor([0.3])]).unique()
    expected = expected_value(d, lambda z, _: (z <= 0.3).double(), grid)
    close(d.cdf(torch.tensor(0.3)), expected, 1e-12)
    if name != "SpikeAndSlab":
        close(d.cdf(torch.tensor(0.0)), d.prob_zero, 1e-15)
        assert (d.cdf(torch.tensor(1.0)) == 1).all()


@pytest.mark.parametrize("name", [*EXTREME, *MILD])
def test_icdf_inverts_cdf(name: str) -> None:
    d = mild(name) if name in MILD else extreme(name)[0]
    u = z_dims([0.0, 1e-6, 0.05, 0.3, 0.5, 0.7, 0.95, 1 - 1e-6, 1.0], d)
    if name == "ZeroOneInflated":
        with pytest.raises(NotImplementedError, match=r"ZeroOneInflated.icdf: expected a slab with .* got Beta\. \w+"):
            d.icdf(u)
        return
    z = d.icdf(u).detach()
    assert (z[1:] >= z[:-1]).all()
    finite = z.isfinite()  # quantiles 0 and 1 of a normal slab are infinite
    assert d.support.check(z[finite]).all()
    assert finite[1:-1].all()
    z = torch.where(finite, z, 0.5)
    above = d.cdf(z).detach()
    jump = torch.zeros_like(z)
    for atom in d.support.atoms:
        jump = jump + torch.where(z == atom, d.log_prob(torch.tensor(atom)).detach().exp(), 0.0)
    # Rounding of z by one part in 2^52 moves the cdf by the density times as much.
    inside = (z != 0) & (z != 1)
    density = torch.where(inside, d.log_prob(torch.where(inside, z, 0.5)).detach().exp(), 0.0)
    slack = 1e-12 + 4e-16 * density * (1 + z.abs())
    assert ((u <= above + slack) & (u >= above - jump - slack) | ~finite).all()


def test_icdf_where_the_inside_is_rare() -> None:
    d = ZeroOneInflated(dist.Uniform(*torch.tensor([0.0, 1.0])), probs=torch.tensor([0.8, 0.15, 0.05]))
    close(
        d.icdf(torch.tensor([0.02, 0.5, 0.81, 0.84, 0.86, 0.99])), torch.tensor([0.0, 0.0, 0.2, 0.8, 1.0, 1.0]), 1e-13
    )


def test_a_base_that_does_not_fill_the_interval() -> None:
    d = Rectified(dist.Uniform(*torch.tensor([0.2, 0.7])))
    close(d.entropy(), torch.tensor(math.log(0.5)), 1e-9)
    close(d.mean, torch.tensor(0.45), 1e-9)


def test_cdf_outside_the_support() -> None:
    d = HardConcrete(0.5, 0.0, validate_args=False)
    assert torch.equal(d.cdf(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 1.0]))
    assert torch.equal(d.log_prob(torch.tensor([-1.0, 2.0])), torch.tensor([-math.inf, -math.inf]))
    s = SpikeAndSlab(dist.Exponential(1.0), probs=0.5, validate_args=False)
    assert s.cdf(torch.tensor(-1.0)) == 0 and s.log_prob(torch.tensor(-1.0)) == -math.inf


@pytest.mark.parametrize("loc", [-0.3, 0.3, 0.62, 1.1])
def test_a_generic_base_with_a_corner(loc: float) -> None:
    scale = torch.tensor([0.02, 0.3, 2.0])
    d = Rectified(dist.Laplace(torch.tensor(loc), scale))
    grid = torch.cat([UNIT, torch.tensor([loc])]).clamp(0, 1).unique()
    close(d.entropy(), expected_value(d, lambda _, log_p: -log_p, grid), 1e-6)


# Point estimates.


@each_mild
def test_point_estimates(name: str) -> None:
    d = mild(name)
    if d.mean.isfinite().all():
        assert torch.equal(d.point_estimate(), d.mean)
        strata = [d.prob_zero, d.prob_one, d.prob_interior]
        inside = (d.mean - d.prob_one) / d.prob_interior
        best = torch.stack(strata).argmax(0)
        close(
            d.point_estimate("mode"), torch.stack([0 * inside, 1 + 0 * inside, inside]).gather(0, best[None])[0], 1e-14
        )
    if name != "ZeroOneInflated":
        assert torch.equal(d.point_estimate("median"), d.icdf(torch.tensor(0.5)))


def test_the_rule_of_the_l0_paper() -> None:
    d = HardConcrete(0.5, torch.tensor([-3.0, 0.0, 0.4, 3.0]))
    expected = torch.tensor([0.0, 0.5, 1.2 / (1 + math.exp(-0.4)) - 0.1, 1.0])
    close(d.point_estimate("l0"), expected, 1e-14)


# One family in the words of another.


def same_distribution(p: Any, q: Any, tol: float) -> None:
    z = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    close(p.log_prob(z), q.log_prob(z), tol)
    close(p.cdf(z), q.cdf(z), tol)
    for fact in ("prob_zero", "prob_one", "prob_interior", "prob_nonzero", "mean", "variance"):
        close(getattr(p, fact), getattr(q, fact), tol)
    close(p.entropy(), q.entropy(), tol)
    for u in (0.1, 0.5, 0.9):
        close(p.icdf(torch.tensor(u)), q.icdf(torch.tensor(u)), 10 * tol)


def test_families_that_coincide() -> None:
    m, s = torch.tensor(0.3), torch.tensor(0.4)
    same_distribution(RectifiedNormal(m, s), Rectified(dist.Normal(m, s)), 1e-12)
    low, width = -0.2, 1.3
    stretched = StretchedRectified(dist.Normal((m - low) / width, s / width), low, low + width)
    same_distribution(RectifiedNormal(m, s), stretched, 1e-12)
    a, b = torch.tensor(0.7), torch.tensor(1.4)
    base = dist.Kumaraswamy(a, b)
    same_distribution(HardKumaraswamy(a, b, -0.3, 1.2), StretchedRectified(base, -0.3, 1.2), 1e-12)
    # Beta(1, 1) and Kumaraswamy(1, 1) are uniform.
    one = torch.tensor(1.0)
    flat = [ZeroOneInflated(slab, torch.randn(3)) for slab in (dist.Uniform(0 * one, one), dist.Kumaraswamy(one, one))]
    flat[1]._given = flat[0]._given
    same_distribution(*flat, 1e-12)


# Gradients.


def differentiable(d: Any) -> dict[str, Callable[[Any], Tensor]]:
    facts: dict[str, Callable[[Any], Tensor]] = {
        name: lambda d, name=name: getattr(d, name)
        for name in ("prob_zero", "prob_one", "prob_interior", "prob_nonzero", "mean", "variance")
    }
    inside = (d.prob_interior < 1) & d.support.check(torch.tensor(0.7)).all()
    assert inside.all()
    for z in (0.0, 0.2, 0.7, 1.0):
        facts[f"log_prob({z})"] = lambda d, z=z: d.log_prob(torch.tensor(z))
        facts[f"cdf({z})"] = lambda d, z=z: d.cdf(torch.tensor(z))
    facts["entropy"] = lambda d: d.entropy()
    facts["icdf"] = lambda d: d.icdf(torch.tensor(0.6))
    return facts


@each_mild
def test_gradients_by_finite_differences(name: str) -> None:
    parameters = leaves(name)
    d = MILD[name][0](*parameters)
    facts = differentiable(d)
    if name == "ZeroOneInflated":
        facts = {fact: f for fact, f in facts.items() if "cdf" not in fact}
    if name == "Rectified":  # of a Cauchy; rounding of its atan
        facts.pop("icdf")
    values = {}
    for fact, f in facts.items():
        try:
            values[fact] = f(d)
        except NotImplementedError:
            assert "mixture" in name and fact == "entropy", fact
    assert values.keys() >= {"mean", "log_prob(0.0)"}

    def all_facts(*p: Tensor) -> Tensor:
        other = MILD[name][0](*p)
        return torch.stack([f(other) for f in facts.values()])

    assert torch.autograd.gradcheck(all_facts, parameters, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("name", ["HardConcrete", "HardKumaraswamy", "RectifiedNormal", "StretchedRectified"])
def test_gradients_at_the_extremes(name: str) -> None:
    """Those of the integrals, against adaptive quadrature; for the stretch, to what rounding near 1 allows."""
    d, parameters = extreme(name)
    mean = d.mean.detach()
    pairs = {
        "mean": (d.mean, expected_value(d, lambda z, _: z)),
        "variance": (d.variance, expected_value(d, lambda z, _: (z - mean).square())),
        "entropy": (d.entropy(), expected_value(d, lambda _, log_p: -log_p)),
    }
    for fact, (got, expected) in pairs.items():
        ours, theirs = (torch.autograd.grad(x.sum(), parameters) for x in (got, expected))
        for a, b, tol in zip(ours, theirs, [1e-9, 1e-9, 2e-5], strict=False):
            torch.testing.assert_close(a, b, rtol=tol, atol=tol, msg=lambda m, fact=fact: f"{fact}: {m}")


@each_mild
def test_the_gradient_in_the_value(name: str) -> None:
    """log_prob of an observed or transformed value is differentiable inside."""
    d, z = mild(name), torch.tensor([[0.2], [0.7]], requires_grad=True)
    assert torch.autograd.gradcheck(d.log_prob, z)
    at_atom = torch.tensor(0.0, requires_grad=True)
    d.log_prob(at_atom).sum().backward()
    assert at_atom.grad == 0


# float32 at the extremes.


def facts_at_extremes(name: str) -> dict[str, Callable[[Any], Tensor]]:
    facts: dict[str, Callable[[Any], Tensor]] = {
        fact: lambda d, fact=fact: getattr(d, fact)
        for fact in ("prob_zero", "prob_one", "prob_interior", "prob_nonzero", "mean", "variance")
    }
    facts["entropy"] = lambda d: d.entropy()
    for z in (0.0, 0.25, 0.75, 1.0):
        facts[f"log_prob({z})"] = lambda d, z=z: d.log_prob(d.prob_zero.new_tensor(z))
        if name != "ZeroOneInflated":
            facts[f"cdf({z})"] = lambda d, z=z: d.cdf(d.prob_zero.new_tensor(z))
    return facts


@each_extreme
def test_float32_is_finite_and_right(name: str) -> None:
    d, parameters = extreme(name, torch.float32)
    exact = EXTREME[name][0](*(x.detach().double() for x in parameters))
    for fact, f in facts_at_extremes(name).items():
        got, expected = f(d), f(exact)
        assert got.dtype == torch.float32, fact
        ok = torch.ones_like(got, dtype=torch.bool)
        if "ectified" in name and name != "RectifiedNormal" and "log_prob" in fact:
            ok = expected > -10  # of a base that has a cdf and no log of it, atoms below rounding are lost
        assert got[ok].isfinite().all(), fact
        error = (got.detach().double() - expected).abs() / (1e-2 + expected.abs())
        assert error[ok].max() < 1e-2, fact
        if got.requires_grad:
            for gradient in torch.autograd.grad(got, parameters, ok.float(), allow_unused=True):
                assert gradient is None or gradient.isfinite().all(), fact


@each_extreme
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pathwise", [False, True])
def test_draws_are_finite(name: str, dtype: torch.dtype, pathwise: bool) -> None:
    d, parameters = extreme(name, dtype)
    if name == "ZeroOneInflated" and pathwise:
        with pytest.raises(NotImplementedError, match=r"expected a slab with a cdf, got Beta\. \w+"):
            d.has_rsample_(True)
        return
    d.has_rsample_(pathwise)
    z = d((100,))
    assert z.dtype == dtype
    assert d.support.check(z).all()
    parts = d.score_parts(z.detach())
    assert parts.log_prob.isfinite().all()
    total = (z * z.detach().cos()).sum() + parts.log_prob.sum()
    total = total if pathwise else total + parts.score_function.sum()
    for gradient in torch.autograd.grad(total, parameters, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("scale", [1.5, 2.0, 5.0, 10.0, 30.0, 100.0])
def test_float32_variance_of_a_wide_normal(scale: float) -> None:
    """The closed form would cancel."""
    loc = scale * torch.tensor([-3.0, -1.0, -0.2, 0.0, 0.5, 1.0, 1.7, 4.0])
    wide = RectifiedNormal(loc, torch.tensor(scale)).variance
    narrow = RectifiedNormal(loc.float(), torch.tensor(scale).float()).variance
    torch.testing.assert_close(narrow.double(), wide, rtol=5e-6, atol=0)
