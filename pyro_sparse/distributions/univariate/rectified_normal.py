r"""A normal variable clamped to [0, 1], the hard-sigmoid Gaussian, in closed form."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.special import ndtri

from pyro_sparse._numerics import gauss_legendre, log1mexp, log_ndtr
from pyro_sparse.distributions.checks import broadcast, check_finite, check_positive
from pyro_sparse.distributions.univariate.rectified import RectifiedDistribution

_HALF_LOG_2PI = math.log(2 * math.pi) / 2


class RectifiedNormal(RectifiedDistribution):
    r"""
    .. math:: Z = \min(1, \max(0, T)), \qquad T \sim \mathcal{N}(\mu, \sigma^2),

    with moments, entropy and the KL divergence of two in closed form, for :math:`\sigma` of any size.

    **Base measure:** :math:`\delta_0 + \delta_1` + Lebesgue; **rsample:** in part (see :class:`MixedDistribution`);
    **enumerable:** no.

    ========== ============================ ============
    shape      ``loc``, ``scale``           a value
    ========== ============================ ============
    batch      ``(*batch,)``                ``(*batch,)``
    event                                   ``()``
    ========== ============================ ============

    >>> d = RectifiedNormal(torch.tensor([0.0, 0.5]), 0.5)
    >>> [round(p, 3) for p in d.prob_zero.tolist()], [round(m, 3) for m in d.mean.tolist()]
    ([0.5, 0.159], [0.195, 0.5])

    Args:
        loc: :math:`\mu`, real.
        scale: :math:`\sigma > 0`.
        nodes: how many nodes each panel of the KL divergence to another family has, 24 by default.
        validate_args: as in torch.

    Raises:
        ValueError: ``scale <= 0``, NaN.

    Reference: G. Hinton and Z. Ghahramani, *Generative models for discovering sparse distributed representations*,
    1997, §3; the formulas are moments of a truncated normal.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"loc": constraints.real, "scale": constraints.positive}
    _tensors = ("loc", "scale")
    _least_nodes = 24

    def __init__(
        self,
        loc: float | Tensor,
        scale: float | Tensor,
        *,
        nodes: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale = broadcast(type(self).__name__, loc=loc, scale=scale)
        super().__init__(self.loc.shape, self.loc, nodes, validate_args)
        if self._validate_args:
            check_finite(type(self).__name__, "loc", self.loc)
            check_positive(type(self).__name__, "scale", self.scale)

    def _standardise(self, z: Tensor) -> Tensor:
        return (z - self.loc) / self.scale

    def _log_cdf(self, z: Tensor) -> Tensor:
        return log_ndtr(self._standardise(z))

    def _log_sf(self, z: Tensor) -> Tensor:
        return log_ndtr(-self._standardise(z))

    def _log_mass(self, a: Tensor, b: Tensor) -> Tensor:
        s, t = self._standardise(a), self._standardise(b)
        # By symmetry both may be taken from the left tail, where log_ndtr is exact.
        right = s + t > 0
        s, t = torch.where(right, -t, s), torch.where(right, -s, t)
        log_s, log_t = log_ndtr(s), log_ndtr(t)
        return log_t + log1mexp(log_s - log_t)

    def _log_density(self, z: Tensor) -> Tensor:
        return -self._standardise(z).square() / 2 - self.scale.log() - _HALF_LOG_2PI

    def _kinks(self) -> list[Tensor]:
        return []  # log f is a parabola

    def _quantile(self, u: Tensor) -> Tensor:
        return self.loc + self.scale * ndtri(u)

    def _inside_moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """The integrals of 1, t and t squared over the inside, t the standardised value."""
        s, t = self._standardise(self._zero), self._standardise(self._zero + 1)
        at_s, at_t = (-s.square() / 2 - _HALF_LOG_2PI).exp(), (-t.square() / 2 - _HALF_LOG_2PI).exp()
        mass = self._log_mass(self._zero, self._zero + 1).exp()
        return mass, at_s - at_t, mass + s * at_s - t * at_t

    def _inside_distances(self, centre: Tensor) -> tuple[Tensor, Tensor]:
        """The integrals over the inside of the distance to a centre and of its square."""
        mass, first, second = self._inside_moments()
        scale, off = self.scale, self.loc - centre
        # The closed form cancels by a factor of scale squared; where the scale is large the density is nearly flat over
        # [0, 1], and 16 nodes are exact to rounding.
        z, weights = gauss_legendre(16, self._zero)
        shape = (-1, *(1,) * centre.dim())
        z, weighted = z.reshape(shape) - centre, weights.reshape(shape) * self._log_density(z.reshape(shape)).exp()
        flat = scale > 1
        distance = torch.where(flat, (weighted * z).sum(0), scale * first + off * mass)
        square = scale.square() * second + 2 * scale * off * first + off.square() * mass
        return distance, torch.where(flat, (weighted * z.square()).sum(0), square)

    @property
    def mean(self) -> Tensor:
        return self.prob_one + self._inside_distances(torch.zeros_like(self.loc))[0]

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        ends = self.prob_zero * mean.square() + self.prob_one * (1 - mean).square()
        return self._inside_distances(mean)[1] + ends

    def entropy(self) -> Tensor:
        r""":math:`-\sum_a P_a \log P_a - \int_0^1 f \log f`, in nats w.r.t. the base measure."""
        mass, _, second = self._inside_moments()
        return self._atoms_entropy() + second / 2 + (self.scale.log() + _HALF_LOG_2PI) * mass

    def _inside_kl(self, other: RectifiedNormal) -> Tensor:
        """The integral over the inside of f log (f / g)."""
        mass, _, second = self._inside_moments()
        centre = other.loc.expand(torch.broadcast_shapes(self.loc.shape, other.loc.shape))
        spread = self._inside_distances(centre)[1] / other.scale.square()
        return (spread - second) / 2 + (other.scale.log() - self.scale.log()) * mass

    def __repr__(self) -> str:
        shape = tuple(self._batch_shape)
        return f"{type(self).__name__}(loc: {shape}, scale: {shape})"
