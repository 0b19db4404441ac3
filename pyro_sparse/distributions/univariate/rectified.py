r"""A continuous variable clamped to [0, 1]: what falls outside becomes the atoms."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Size, Tensor

from pyro_sparse.distributions.univariate.implicit import implicit
from pyro_sparse.distributions.univariate.mixed import MixedDistribution
from pyro_sparse.distributions.univariate.quadrature import Points, bends, nodes_for, place, same, tighter

_LEVELS = (1e-14, 1e-7, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 1e-7, 1 - 1e-14)


class RectifiedDistribution(MixedDistribution):
    r"""
    .. math:: Z = \min(1, \max(0, T)), \qquad \Pr(Z = 0) = F_T(0), \quad \Pr(Z = 1) = 1 - F_T(1), \quad f = f_T.

    A family gives the mass of T on each side in log space, its density and its quantiles; everything else follows.
    The moments, the entropy and the KL divergence have their atoms exactly, and integrate the inside by Gauss-Legendre
    quadrature on panels. A panel ends where the density gathers or where its logarithm bends, so that on each the
    integrand is smooth and the rule converges exponentially. The default number of nodes gives 1e-10 (absolute, or
    relative to values above one) for all parameters that we tried, extreme ones included.
    """

    #: how many nodes each panel has, None for the family's default
    nodes: int | None
    #: whether the density is positive on all of (0, 1)
    _positive: ClassVar[bool] = True
    #: whether the density may be steeper near 0 and 1 than its stretch says
    _steep: ClassVar[bool] = False
    #: how many nodes a panel has at least, where their number is left to the family
    _least_nodes: ClassVar[int] = 0

    def __init__(self, batch_shape: Size, like: Tensor, nodes: int | None, validate_args: bool | None) -> None:
        if nodes is not None and (not isinstance(nodes, int) or nodes < 1):
            raise ValueError(
                f"{type(self).__name__}.nodes: expected a positive integer or None, got {nodes!r}. Leave it out."
            )
        self.nodes = nodes
        super().__init__(batch_shape, like, validate_args)

    def _log_cdf(self, z: Tensor) -> Tensor:
        """log F_T(z), finite where F_T(z) > 0 in exact arithmetic."""
        raise NotImplementedError

    def _log_sf(self, z: Tensor) -> Tensor:
        """log (1 - F_T(z)), never by subtraction from one."""
        raise NotImplementedError

    def _log_mass(self, a: Tensor, b: Tensor) -> Tensor:
        """log (F_T(b) - F_T(a)) for a < b, without cancellation."""
        raise NotImplementedError

    def _quantile(self, u: Tensor) -> Tensor:
        """T at the probability u, before it is clamped."""
        raise NotImplementedError

    def _log_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        zero = self._zero
        return self._log_cdf(zero), self._log_sf(zero + 1), self._log_mass(zero, zero + 1)

    @property
    def prob_nonzero(self) -> Tensor:
        return self._log_sf(self._zero).exp().expand(self._batch_shape)

    # Draws.

    def _uniform(self, shape: Size) -> Tensor:
        info = torch.finfo(self._zero.dtype)
        u = torch.rand(shape, dtype=self._zero.dtype, device=self._zero.device)
        return u.clamp(info.tiny, 1 - info.eps)

    def _draw(self, shape: Size) -> Tensor:
        u, one = self._uniform(shape), self._zero + 1
        z = self._off_atoms(self._quantile(u).clamp(0.0, 1.0))
        # By probability, not by where z is: beside an end of a tight stretch many a draw is rounded to it.
        z = torch.where(u <= self._log_cdf(self._zero).exp(), 0.0, z)
        return torch.where(u > self._log_cdf(one).exp(), 1.0, z)

    def _pathwise(self, z: Tensor, u: Tensor | None = None) -> Tensor:
        """``u`` is the probability of which z is the quantile, where it may have a derivative."""
        inner, inside = self._inside(z), self._is_inside(z)
        below = self._log_cdf(inner) < self._log_sf(inner)

        def log_mass(z: Tensor) -> Tensor:
            return torch.where(below, self._log_cdf(z), self._log_sf(z))

        level = None if u is None else torch.where(below, u, 1 - u).masked_fill(~inside, 0.5).log()
        return implicit(z, inner, inside, below, log_mass, self._log_density(inner), level)

    def _stratified(self, shape: Size) -> Tensor:
        z = self._undifferentiated(shape)
        inner = self._inside(z)
        # The gradient of the conditional quantile is the same from either end of [0, 1]; a sum of masses cancels less
        # from the nearer one.
        below = inner < 0.5
        log_inside = self._log_mass(self._zero, self._zero + 1)

        def log_mass(z: Tensor) -> Tensor:
            return self._log_mass(torch.where(below, 0.0, z), torch.where(below, z, 1.0)) - log_inside

        return implicit(z, inner, self._is_inside(z), below, log_mass, self._log_density(inner) - log_inside)

    # Distribution functions.

    def cdf(self, value: Tensor) -> Tensor:
        r""":math:`\Pr(Z \le z)`, right-continuous: it jumps to :math:`\Pr(Z = 0)` at 0 and to 1 at 1."""
        if self._validate_args:
            self._validate_sample(value)
        inner = self._log_cdf(value.clamp(0.0, 1.0)).exp()
        inner = torch.where(value < 0, 0.0, torch.where(value >= 1, 1.0, inner))
        return inner.expand(torch.broadcast_shapes(inner.shape, self._batch_shape))

    def icdf(self, value: Tensor) -> Tensor:
        r"""The smallest z with ``cdf(z) >= value``, in [0, 1]; differentiable in the parameters and the probability."""
        u = self._probability(value)
        with torch.no_grad():
            z = self._quantile(u).clamp(0.0, 1.0)
        return self._pathwise(z.detach(), u if u.requires_grad else None)

    # Integrals over the inside.

    # All of these are points z; what lies outside of [0, 1] is taken for its nearer end.

    def _ends(self) -> tuple[Tensor, Tensor]:
        """Beyond which there is no mass to speak of."""
        return self._zero, self._zero + 1

    def _peaks(self) -> list[Tensor]:
        """At which the density gathers: quantiles of the inside, where nothing better is known."""
        at_zero, at_one = self._log_cdf(self._zero).exp(), self._log_cdf(self._zero + 1).exp()
        levels = torch.tensor(_LEVELS, dtype=at_zero.dtype, device=at_zero.device).reshape(-1, *(1,) * at_zero.dim())
        return list(self._near_quantile(at_zero + levels * (at_one - at_zero)))

    def _near_quantile(self, u: Tensor) -> Tensor:
        """As the quantile, but good enough to end a panel."""
        return self._quantile(u)

    def _kinks(self) -> list[Tensor]:
        """Near which log f bends."""
        raise NotImplementedError

    def _middle(self) -> list[Tensor]:
        """Near which z and log f bend in the coordinate of the stretch."""
        return []

    def _log_density_at(self, points: Points) -> Tensor:
        return self._log_density(points.z)

    def _points(self, other: MixedDistribution | None = None) -> Points:
        """The nodes for an integral of f, alone or times the logarithm of another density; they carry no gradient."""
        with torch.no_grad():  # for speed: `place` detaches them
            return self._placed_points(other)

    def _placed_points(self, other: MixedDistribution | None) -> Points:
        shape, stretch, breaks = self._batch_shape, self._stretch, [*self._ends(), *self._peaks()]
        alike = type(other) is type(self) and same(stretch, other._stretch)
        if not alike:
            breaks += self._middle()
        if other is not None:
            shape = torch.broadcast_shapes(shape, other.batch_shape)
            stretch = tighter(stretch, other._stretch)
            breaks += other._kinks() if isinstance(other, RectifiedDistribution) else []
            for one in (self._stretch, other._stretch):
                breaks += [] if same(one, stretch) else bends(one, self._zero)
        steep = self._steep or (isinstance(other, RectifiedDistribution) and other._steep)
        return place(breaks, shape, stretch, self.nodes or max(self._least_nodes, nodes_for(stretch)), double=steep)

    def _inside_mass(self) -> tuple[Tensor, Tensor, Tensor]:
        """Points z of (0, 1), their weights in an expectation over the inside, and log f (zero where f is)."""
        points = self._points()
        log_density = self._log_density_at(points)
        mass = points.weights * log_density.exp()
        if not self._positive:  # 0 log 0 = 0
            log_density = torch.where(log_density == -math.inf, 0.0, log_density)
        return points.z, mass, log_density

    @property
    def mean(self) -> Tensor:
        z, mass, _ = self._inside_mass()
        return (self.prob_one + (mass * z).sum(0)).expand(self._batch_shape)

    @property
    def variance(self) -> Tensor:
        z, mass, _ = self._inside_mass()
        zero, one = self.prob_zero, self.prob_one
        mean = one + (mass * z).sum(0)
        return (mass * (z - mean).square()).sum(0) + zero * mean.square() + one * (1 - mean).square()

    def entropy(self) -> Tensor:
        r""":math:`-\sum_a P_a \log P_a - \int_0^1 f \log f`, in nats w.r.t. the base measure."""
        _, mass, log_density = self._inside_mass()
        return (self._atoms_entropy() - (mass * log_density).sum(0)).expand(self._batch_shape)
