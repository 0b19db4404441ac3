r"""
KL divergences of the univariate mixed families, as registered with torch.

.. math:: \mathrm{KL}(p \| q) = \sum_a P_a \log \frac{P_a}{Q_a} + \int f \log \frac{f}{g},

inf where q has lost an atom of p to rounding. Where q has no such atom at all the answer is infinite for every
parameter and ``ValueError`` says so; a pair that nobody has worked out raises ``TypeError``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Uniform, kl_divergence
from torch.distributions.kl import register_kl

from pyro_sparse.distributions.half_precision import pair_in_float32
from pyro_sparse.distributions.mixed.base import UnknownDivergence
from pyro_sparse.distributions.mixed.kl import register_wrappers, unknown
from pyro_sparse.distributions.univariate.affine import AffineMixed
from pyro_sparse.distributions.univariate.inflated import InflatedDistribution
from pyro_sparse.distributions.univariate.mixed import MixedDistribution
from pyro_sparse.distributions.univariate.rectified import RectifiedDistribution
from pyro_sparse.distributions.univariate.rectified_normal import RectifiedNormal
from pyro_sparse.distributions.univariate.spike_and_exponential import TruncatedExponential


def _weighted_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), zero where p is zero, inf where only q is."""
    off = log_p == -math.inf
    missing = ~off & (log_q == -math.inf)
    safe_p, safe_q = torch.where(off, 0.0, log_p), torch.where(off | missing, 0.0, log_q)
    return torch.where(missing, math.inf, torch.where(off, 0.0, safe_p.exp() * (safe_p - safe_q)))


def _atoms_kl(p: MixedDistribution, q: MixedDistribution) -> Tensor:
    lost = set(p._atoms) - set(q._atoms)
    if lost:
        raise ValueError(
            f"kl_divergence({p}, {q}): expected q to have the atoms of p, got none at {sorted(lost)}. The divergence "
            "is infinite: choose a prior with probability there, e.g. of p's own family or ZeroOneInflated."
        )
    log_q = dict(zip(q._atoms, q._log_weights(), strict=False))
    terms = [_weighted_ratio(w, log_q[a]) for a, w in zip(p._atoms, p._log_weights(), strict=False)]
    return sum(terms[1:], terms[0])


@register_kl(RectifiedDistribution, RectifiedDistribution)
@register_kl(RectifiedDistribution, InflatedDistribution)
@pair_in_float32
def _kl_rectified(p: RectifiedDistribution, q: MixedDistribution) -> Tensor:
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    atoms, points = _atoms_kl(p, q), p._points(q)
    rectified = isinstance(q, RectifiedDistribution)
    log_f = p._log_density_at(points)
    log_g = q._log_density_at(points) if rectified else q._log_inside(points.z)
    if p._positive and rectified and q._positive:
        inside = log_f.exp() * (log_f - log_g)
    else:
        inside = _weighted_ratio(*torch.broadcast_tensors(log_f, log_g))
        inside = torch.where(points.weights > 0, inside, 0.0)  # on a panel of width zero it may be inf
    return (atoms + (points.weights * inside).sum(0)).expand(shape)


@register_kl(RectifiedNormal, RectifiedNormal)
@pair_in_float32
def _kl_normal(p: RectifiedNormal, q: RectifiedNormal) -> Tensor:
    return _atoms_kl(p, q) + p._inside_kl(q)


@register_kl(InflatedDistribution, InflatedDistribution)
@pair_in_float32
def _kl_inflated(p: InflatedDistribution, q: InflatedDistribution) -> Tensor:
    atoms = _atoms_kl(p, q)
    try:
        slab = kl_divergence(p.slab, q.slab)
    except NotImplementedError as error:
        raise UnknownDivergence(
            f"kl_divergence({p}, {q}): expected slabs with a known divergence, got {type(p.slab).__name__} and "
            f"{type(q.slab).__name__}. Use slabs of one family, or an ELBO that draws the KL, such as Trace_ELBO."
        ) from error
    log_inside = p._log_weights()[-1]
    inside = _weighted_ratio(log_inside, q._log_weights()[-1])
    kl = atoms + inside + torch.where(log_inside == -math.inf, 0.0, log_inside.exp() * slab)
    return kl.expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


@register_kl(TruncatedExponential, TruncatedExponential)
@pair_in_float32
def _kl_exponential(p: TruncatedExponential, q: TruncatedExponential) -> Tensor:
    return p._log_norm() - q._log_norm() + (p.rate - q.rate) * p.mean


@register_kl(TruncatedExponential, Uniform)
@pair_in_float32
def _kl_exponential_uniform(p: TruncatedExponential, q: Uniform) -> Tensor:
    kl = (q.high - q.low).log() - p.entropy()
    return torch.where((q.low <= 0) & (q.high >= 1), kl, math.inf)


@register_kl(Bernoulli, MixedDistribution)
@pair_in_float32
def _kl_bernoulli(p: Bernoulli, q: MixedDistribution) -> Tensor:
    if 1.0 not in q._atoms:
        raise ValueError(
            f"kl_divergence({p}, {q}): expected q to have atoms at 0 and 1, got {q._atoms}. The divergence is "
            "infinite: choose a prior with probability there, e.g. HardConcrete."
        )
    zero, one, _ = q._log_weights()
    log_p1, log_p0 = torch.nn.functional.logsigmoid(p.logits), torch.nn.functional.logsigmoid(-p.logits)
    kl = _weighted_ratio(log_p1, one) + _weighted_ratio(log_p0, zero)
    return kl.expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


register_wrappers(AffineMixed)


@register_kl(AffineMixed, AffineMixed)
def _kl_affine(p: AffineMixed, q: AffineMixed) -> Tensor:
    if p.transforms != q.transforms:
        unknown(p, q)
    return kl_divergence(p.base_dist, q.base_dist)
