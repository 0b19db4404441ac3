"""What `check_distribution` checks of mixed distributions: atoms, the density between them, and two kinds of draws."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import AffineTransform, ExpTransform, kl_divergence

from pyro_sparse.distributions import MixedDistribution
from pyro_sparse.distributions.constraints import interior_point
from pyro_sparse.distributions.unwrapped import unwrapped
from pyro_sparse.testing.properties import leaves, offered, require
from pyro_sparse.testing.quadrature import integrate


def strata(d: MixedDistribution) -> None:
    """The probabilities of the atoms and of what lies between them, and what is said of them."""
    names = ("prob_zero", "prob_one", "prob_interior", "prob_nonzero")
    probs = {name: getattr(d, name) for name in names}
    for name, prob in probs.items():
        require(prob.shape == d.batch_shape, f"shape of {name}", tuple(d.batch_shape), tuple(prob.shape))
        require(((prob >= 0) & (prob <= 1)).all(), name, "probabilities", prob)
    zero, one, interior, nonzero = probs.values()
    _close("prob_zero + prob_one + prob_interior", zero + one + interior, torch.ones_like(zero))
    _close("prob_zero + prob_nonzero", zero + nonzero, torch.ones_like(zero))
    for atom in (0.0, 1.0):
        expected = d.log_prob(torch.full_like(zero, atom)).exp() if atom in d.support.atoms else torch.zeros_like(zero)
        _close("prob_one" if atom else "prob_zero", one if atom else zero, expected)
    shape = d.point_estimate("mode").shape
    require(shape == d.batch_shape, "shape of point_estimate('mode')", tuple(d.batch_shape), tuple(shape))


def integrals(d: MixedDistribution) -> None:
    """The total mass, entropy, moments and cdf, against sums over the atoms and quadrature between them."""
    facts: dict[str, tuple[Tensor | None, Callable[[Tensor, Tensor], Tensor]]] = {
        "sum of the atoms and the integral of the density": (torch.ones_like(d.prob_zero), lambda z, _: z == z),
        "entropy": (offered(lambda: d.entropy()), lambda _, log_p: -log_p),
    }
    mean = offered(lambda: d.mean)
    if mean is not None and mean.isfinite().any():
        facts["mean"] = mean, lambda z, _: z
        variance = offered(lambda: d.variance)
        if variance is not None and variance.isfinite().any():
            facts["variance"] = variance, lambda z, _: (z - mean).square()
    point = d.prob_zero.new_tensor(0.3)
    if d.support.check(point).all():
        facts["cdf(0.3)"] = offered(lambda: d.cdf(point)), lambda z, _: z <= point
    known = {name: (got, of) for name, (got, of) in facts.items() if got is not None}
    expected = _expectations(d, [of for _, of in known.values()], point)
    for (name, (got, _)), value in zip(known.items(), expected, strict=True):
        _close(name, got, value)


def quantiles(d: MixedDistribution) -> None:
    """cdf jumps by its probability at an atom; icdf(u) is the smallest z with cdf(z) >= u."""
    grid = torch.linspace(0.05, 0.95, 19, dtype=d.prob_zero.dtype, device=d.prob_zero.device)
    u = grid.reshape(-1, *(1,) * len(d.batch_shape)).expand(-1, *d.batch_shape)
    if (z := offered(lambda: d.icdf(u))) is None:
        return
    require(z.shape == u.shape, "shape of icdf", tuple(u.shape), tuple(z.shape))
    require(d.support.check(z).all(), "icdf", f"values in the support {d.support}", z)
    above = d.cdf(z)
    below, slack = above - _jump(d, z), torch.finfo(z.dtype).eps ** 0.5
    wrong = (u > above + slack) | (u < below - slack)
    require(not wrong.any(), "cdf(icdf(u))", f"u = {u[wrong][:3]}, or a jump over it", above.detach()[wrong][:3])


def divergence_from_itself(d: MixedDistribution) -> None:
    """KL(d | d) is zero, or known to be unknown."""
    try:
        kl = kl_divergence(d, d)
    except TypeError:
        return
    _close("kl_divergence(d, d)", kl, torch.zeros_like(d.prob_zero))


def transformed(d: MixedDistribution) -> None:
    """Pyro's TransformedDistribution: no Jacobian at an atom, the map's own between them; or it is refused."""
    point = d.prob_zero.new_tensor(0.3)
    values = [point.new_tensor(atom) for atom in d.support.atoms] + ([point] if d.support.check(point).all() else [])
    for t in (AffineTransform(0.5, -2.0), ExpTransform()):
        try:
            wrapped = dist.TransformedDistribution(d, [t])
        except (TypeError, ValueError, NotImplementedError):
            continue
        for z in values:
            y, at_atom = t(z), float(z) in d.support.atoms
            expected = d.log_prob(z) - (0.0 if at_atom else t.log_abs_det_jacobian(z, y))
            _close(f"log_prob of TransformedDistribution(d, {t}) at {float(y):.3g}", wrapped.log_prob(y), expected)


def draws(d: MixedDistribution) -> None:
    """
    The two draws of a mixed distribution, and of all that wraps it.

    ``d()`` follows the quantiles within its stratum, and the score function covers the strata; or it has no gradient,
    and the score function is all of log_prob. After ``has_rsample_(True)``, before or after wrapping, it follows the
    quantiles of the whole.
    """
    plain = copy.copy(d).has_rsample_(False)
    for how, wrap in _ways(d.batch_shape):
        _check_draw(f"d(){how}", wrap(plain), pathwise=False)
        try:
            before = wrap(copy.copy(plain).has_rsample_(True))
        except (ValueError, NotImplementedError):
            continue  # a slab without a cdf has no pathwise draw
        _check_draw(f"d(){how} after has_rsample_(True)", before, pathwise=True)
        after = wrap(plain).has_rsample_(True)
        require(after.has_rsample, f"has_rsample of d(){how}.has_rsample_(True)", True, False)
        require(not plain.has_rsample or not how, f"has_rsample of d after that of d{how} was set", False, True)
        plain = copy.copy(d).has_rsample_(False)


def _ways(batch: torch.Size) -> Iterator[tuple[str, Callable[[MixedDistribution], Any]]]:
    """All that the wrappers can do to a distribution."""
    mask = (torch.arange(batch.numel()) % 2 == 0).reshape(batch)
    yield "", lambda d: d
    yield ".expand", lambda d: d.expand((2, *batch))
    yield ".mask(True)", lambda d: d.mask(True)
    yield ".mask(m)", lambda d: d.mask(mask)
    yield ", MaskedDistribution(d, m)", lambda d: dist.MaskedDistribution(d, mask)
    yield ", ExpandedDistribution(d, shape)", lambda d: ExpandedDistribution(copy.copy(d), torch.Size((2, *batch)))
    if batch:
        yield ".to_event(1)", lambda d: d.to_event(1)
        yield ", Independent(d, 1)", lambda d: Independent(d, 1)
        yield ".mask(m).to_event(1)", lambda d: d.mask(mask).to_event(1)
        yield ".to_event(1).mask(m)", lambda d: d.to_event(1).mask(mask[..., 0])
        yield ".to_event(1).expand", lambda d: d.to_event(1).expand((2, *batch[:-1]))


def _check_draw(how: str, d: Any, *, pathwise: bool) -> None:
    family = unwrapped(d)
    require(bool(d.has_rsample) == pathwise, f"has_rsample of {how}", pathwise, d.has_rsample)
    z = d()
    shape = (*d.batch_shape, *d.event_shape)
    require(z.shape == shape, f"shape of {how}", shape, tuple(z.shape))
    draw, log_prob = z.detach(), family.log_prob(z.detach())
    parts = d.score_parts(draw)
    _close(f"log_prob of the score parts of {how}", parts.log_prob, d.log_prob(draw))
    if isinstance(parts.entropy_term, Tensor):  # a number where all is left to the score
        _close(f"entropy term of the score parts of {how}", parts.entropy_term, d.log_prob(draw))
    if pathwise:
        require(not isinstance(parts.score_function, Tensor), f"score function of {how}", 0, parts.score_function)
    else:
        at_atom, interior = _jump(family, draw) > 0, family.prob_interior
        log_interior = torch.where(interior > 0, interior, 1.0).log()
        # A draw that has no gradient leaves all of log_prob to the score.
        score = torch.where(at_atom, log_prob, log_interior) if z.requires_grad else log_prob
        score = sum_rightmost(score, len(d.event_shape))
        _same_gradient(f"the score function of {how}", parts.score_function, score, log_prob)
    if pathwise or z.requires_grad:
        weight = draw.cos()
        expected = offered(lambda: followed(family, draw, pathwise))
        if expected is not None:
            _same_gradient(how, z * weight, expected * weight, log_prob)


def followed(d: MixedDistribution, z: Tensor, pathwise: bool) -> Tensor:
    """A tensor with the gradient of a draw that stays at its quantile: dz = -dF / f, F given the stratum or not."""
    mass, density = mass_and_density(d, z, pathwise)
    return torch.where(_jump(d, z) == 0, -mass / density.detach(), 0.0)


def mass_and_density(d: MixedDistribution, z: Tensor, pathwise: bool) -> tuple[Tensor, Tensor]:
    """F and f at a draw, given the stratum or not; harmless numbers where it is an atom."""
    inside = _jump(d, z) == 0
    z = torch.where(inside, z, interior_point(d.support.domain, z))
    mass, density = d.cdf(z), torch.where(inside, d.log_prob(z).exp(), 1.0)
    if pathwise:
        return mass, density
    below = torch.stack([_at(d, atom) * (z >= atom) for atom in d.support.atoms]).sum(0)
    interior = torch.where(inside, d.prob_interior, 1.0)
    return (mass - below) / interior, density / interior


def _at(d: MixedDistribution, atom: float) -> Tensor:
    """The probability of an atom, shape ``batch``."""
    return d.prob_one if atom else d.prob_zero


def _jump(d: MixedDistribution, z: Tensor) -> Tensor:
    """The probability of z where it is an atom, else zero."""
    return torch.stack([torch.where(z == atom, _at(d, atom), 0.0) for atom in d.support.atoms]).sum(0)


def _expectations(d: MixedDistribution, of: list[Callable[[Tensor, Tensor], Tensor]], jump: Tensor) -> Tensor:
    """The expectations of functions of (z, log_prob(z)), which may jump at one point; stacked in front of the batch."""

    def weighted(z: Tensor, log_p: Tensor) -> Tensor:
        # Where exp underflows the product with an infinite log would be NaN.
        gone = log_p.exp() == 0
        z, log_p = z.expand(log_p.shape), torch.where(gone, 0.0, log_p)
        values = torch.stack([f(z, log_p).to(z) for f in of], dim=-1 - len(d.batch_shape))
        return torch.where(gone, 0.0, log_p.exp()).unsqueeze(-1 - len(d.batch_shape)) * values

    def density(t: Tensor) -> Tensor:
        z = t.sinh().reshape(-1, *(1,) * len(d.batch_shape))
        inside = d.support.check(z).expand(len(t), *d.batch_shape)
        log_p = torch.where(inside, d.log_prob(torch.where(inside, z, d.support.atoms[0])), -torch.inf)
        return weighted(z, log_p) * t.cosh().reshape(-1, *(1,) * (log_p.dim()))

    # z = sinh t: the line within reach, and [0, 1] in small panels.
    breaks = torch.cat([torch.arange(-30.0, 31.0), torch.linspace(0.0, 1.0, 17).asinh()]).to(jump)
    with torch.no_grad():
        total = integrate(density, torch.cat([breaks, jump.asinh().reshape(1)]).unique())
        for atom in d.support.atoms:
            total = total + weighted(jump.new_tensor(atom), _at(d, atom).log())
    return total


def _close(prop: str, got: Tensor, expected: Tensor) -> None:
    """Quadrature and closed forms agree to half the digits."""
    tol = torch.finfo(expected.dtype).eps ** 0.5
    close = torch.isclose(got, expected, rtol=tol, atol=tol)
    require(close.all(), prop, expected.detach()[~close], got.detach()[~close])


def _same_gradient(prop: str, got: Tensor, expected: Tensor, over: Tensor) -> None:
    """The gradients of two sums with respect to the leaves that ``over`` depends on, where torch has them."""
    parameters = list(leaves(over))
    if not parameters:
        return
    link = 0 * over.sum()  # so that a constant has a gradient too, of zero
    gradients = [
        offered(partial(torch.autograd.grad, x.sum() + link, parameters, retain_graph=True)) for x in (got, expected)
    ]
    if None not in gradients:
        for a, b in zip(*gradients, strict=True):
            _close(f"gradient of {prop}", a, b)
