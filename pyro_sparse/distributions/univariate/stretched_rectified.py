r"""Any continuous variable, stretched or not, clamped to [0, 1]."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_sparse._numerics import safe_log
from pyro_sparse.distributions.checks import aligned, first_tensor
from pyro_sparse.distributions.constraints import interior_point, nan_where
from pyro_sparse.distributions.half_precision import in_float32
from pyro_sparse.distributions.univariate.kumaraswamy import Kumaraswamy
from pyro_sparse.distributions.univariate.mixed import cdf_anywhere, check_univariate, has_cdf
from pyro_sparse.distributions.univariate.quadrature import Points
from pyro_sparse.distributions.univariate.rectified import RectifiedDistribution
from pyro_sparse.distributions.univariate.stretched import check_stretch, log_width, stretched_shape


class StretchedRectified(RectifiedDistribution):
    r"""
    .. math:: Z = \min(1, \max(0, l + (h - l) X)), \qquad X \sim \text{base},

    for any continuous ``base`` with a ``cdf``; its own draws need no gradient.

    **Base measure:** :math:`\delta_0 + \delta_1` + Lebesgue; **rsample:** in part (see :class:`MixedDistribution`);
    **enumerable:** no.

    ========== =================================== ============
    shape      ``base``, ``low`` and ``high``      a value
    ========== =================================== ============
    batch      broadcast together                  ``(*batch,)``
    event                                          ``()``
    ========== =================================== ============

    Draws are reparameterised by their cdf (M. Figurnov et al., *Implicit reparameterization gradients*, 2018), so that
    a mixture or any base with a differentiable cdf will do (torch does not differentiate that of a Gamma by its
    concentration, and raises). The cdf must have no flat piece inside (a gap between two
    parts of a mixture): the quantile function would jump there. The upper tail is ``1 - cdf``, all that a base offers:
    a :math:`\Pr(Z = 1)` below the rounding of the base's dtype comes out as zero. :class:`HardConcrete`,
    :class:`HardKumaraswamy` and :class:`RectifiedNormal` are exact there.

    Entropy, KL and moments are integrated between quantiles of the base, to about 1e-10 for a base with one peak; two
    narrow peaks far apart, or a density that is infinite inside [0, 1], need more ``nodes``.

    >>> import pyro.distributions as dist
    >>> d = StretchedRectified(dist.Uniform(0.0, 1.0), low=-0.25, high=1.25)
    >>> round(d.prob_zero.item(), 4), round(d.prob_interior.item(), 4)
    (0.1667, 0.6667)

    Args:
        base: continuous, univariate, with ``cdf`` and ``log_prob``.
        low: below 0, a number or a tensor; where 0 of the base goes.
        high: above 1, where 1 of the base goes.
        nodes: how many nodes each panel of the quadrature has, 16 by default.
        validate_args: as in torch.

    Raises:
        ValueError: for a base that is discrete, multivariate, mixed or has no cdf; ``low >= 0``; ``high <= 1``; from
            mean, variance, entropy and divergences, where an end of the base's support that lies inside has a gradient,
            its own or by a stretch that learns. (Where the base's density bends inside of (0, 1), as Laplace's does,
            second derivatives of these lack what the corner adds.)

    Reference: J. Bastings, W. Aziz and I. Titov, *Interpretable neural predictions with differentiable binary
    variables*, ACL 2019, §3.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"low": constraints.less_than(0), "high": constraints.greater_than(1)}
    _tensors = ("low", "high")
    _positive = False
    _steep = True
    _least_nodes = 16

    def __init__(
        self,
        base: Any,
        low: float | Tensor,
        high: float | Tensor,
        *,
        nodes: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self._setup(base, low, high, nodes, validate_args)
        if self._validate_args:
            check_stretch(type(self).__name__, self.low, self.high)

    def _setup(self, base: Any, low: Any, high: Any, nodes: int | None, validate_args: bool | None) -> None:
        check_univariate(type(self).__name__, "base", base)
        if not has_cdf(base):
            raise ValueError(
                f"{type(self).__name__}.base: expected a distribution with a cdf, got {type(base).__name__}. "
                "Use one that torch can integrate, e.g. Normal, Laplace, Uniform, Kumaraswamy or a mixture of them."
            )
        if (like := first_tensor(base)) is None:
            raise ValueError(
                f"{type(self).__name__}.base: expected a distribution with a parameter, got {base}. Give it tensors."
            )
        self.base_dist = Kumaraswamy.of(base)
        self.low, self.high = low, high = aligned(type(self).__name__, like, low=low, high=high)
        super().__init__(stretched_shape(base.batch_shape, low, high), like, nodes, validate_args)

    def widened(self) -> Any:
        new = super().widened()
        new.base_dist = in_float32(self.base_dist)
        return new

    # In float64 whatever the dtype: near its ends a base on [0, 1] sees a tight stretch by its last digits.

    def _of_base(self, z: Tensor) -> Tensor:
        low, high = (x.double() if isinstance(x, Tensor) else x for x in (self.low, self.high))
        return (z.double() - low) / (high - low)

    def _base_cdf(self, z: Tensor) -> Tensor:
        return cdf_anywhere(self.base_dist, self._of_base(z))

    def _log_cdf(self, z: Tensor) -> Tensor:
        return safe_log(self._base_cdf(z)).to(self._zero.dtype)

    def _log_sf(self, z: Tensor) -> Tensor:
        return safe_log(1 - self._base_cdf(z)).to(self._zero.dtype)

    def _log_mass(self, a: Tensor, b: Tensor) -> Tensor:
        return safe_log(self._base_cdf(b) - self._base_cdf(a)).to(self._zero.dtype)

    def _log_density(self, z: Tensor) -> Tensor:
        x, support = self._of_base(z), self.base_dist.support
        ok = support.check(x)
        log_prob = self.base_dist.log_prob(torch.where(ok, x, interior_point(support, x)))
        return torch.where(ok, log_prob - log_width(self.low, self.high), -math.inf).to(self._zero.dtype)

    def _log_density_at(self, points: Points) -> Tensor:
        right = points.z > 0.5
        return self._log_density(torch.where(right, 1 - points.rest.double(), points.z.double()))

    def _points(self, other: Any = None) -> Points:
        for d in (self, other):
            if isinstance(d, StretchedRectified) and torch.is_grad_enabled() and d._ends_learn():
                raise ValueError(
                    f"{type(d).__name__}: expected a base whose support stays, for an integral over its density, got "
                    f"{d.base_dist.support} with ends that learn, themselves or by low and high: their derivative "
                    "would be missing. Detach them, or take the mean over draws."
                )
        return super()._points(other)

    def _ends_learn(self) -> bool:
        """Whether an end of the support that may lie in (0, 1) has a gradient (looks, where the stretch learns)."""
        support = self.base_dist.support
        ends = [end for name in ("lower_bound", "upper_bound") if (end := getattr(support, name, None)) is not None]
        if any(isinstance(end, Tensor) and end.requires_grad for end in ends):
            return True
        if not any(isinstance(x, Tensor) and x.requires_grad for x in (self.low, self.high)):
            return False
        outer = [end for end in ends if isinstance(end, Tensor) or end not in (0, 1)]  # those go to low and high
        inside = [self.low + (self.high - self.low) * end for end in outer]
        return any(bool(((z > 0) & (z < 1)).any()) for z in map(torch.as_tensor, inside))

    def _peaks(self) -> list[Tensor]:
        # The middle of the base is where a Laplace density, say, has its corner.
        return [*super()._peaks(), self._near_quantile(torch.full_like(self._log_cdf(self._zero), 0.5))]

    def _kinks(self) -> list[Tensor]:
        return self._peaks()

    def _draw(self, shape: Size) -> Tensor:
        base = copy.copy(self.base_dist).expand(self._batch_shape)
        x = base.sample(shape[: len(shape) - len(self._batch_shape)])
        return (self.low + (self.high - self.low) * x).clamp(0.0, 1.0)

    def _quantile(self, u: Tensor) -> Tensor:
        at_zero, at_one = self._base_cdf(self._zero) >= u, self._base_cdf(self._zero + 1) < u
        z = torch.where(at_zero, 0.0, torch.where(at_one, 1.0, self._bisected(u, 60)))
        return nan_where(u.isnan(), z)

    def _near_quantile(self, u: Tensor) -> Tensor:
        return self._bisected(u, 40)

    def _bisected(self, u: Tensor, halvings: int) -> Tensor:
        # cdf is monotone, so its inverse needs nothing but cdf; in float32, 30 halvings leave nothing to tell apart.
        low, high = torch.zeros_like(u), torch.ones_like(u)
        for _ in range(halvings if u.dtype == torch.float64 else min(halvings, 30)):
            middle = (low + high) / 2
            short = self._base_cdf(middle) < u
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return high

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_dist}, low={self.low}, high={self.high})"


class Rectified(StretchedRectified):
    r"""
    .. math:: Z = \min(1, \max(0, X)), \qquad X \sim \text{base}.

    :class:`StretchedRectified` without a stretch, for a base that reaches beyond [0, 1].

    **Base measure:** :math:`\delta_0 + \delta_1` + Lebesgue; **rsample:** in part (see :class:`MixedDistribution`);
    **enumerable:** no.

    ========== ============ ============
    shape      ``base``     a value
    ========== ============ ============
    batch      batch shape  ``(*batch,)``
    event                   ``()``
    ========== ============ ============

    >>> import pyro.distributions as dist
    >>> round(Rectified(dist.Laplace(0.5, 1.0)).prob_one.item(), 4)
    0.3033

    Args:
        base: continuous, univariate, with ``cdf`` and ``log_prob``.
        nodes: how many nodes each panel of the quadrature has, 16 by default.
        validate_args: as in torch.

    Raises:
        ValueError: for a base that is discrete, multivariate, mixed or has no cdf.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: Any, *, nodes: int | None = None, validate_args: bool | None = None) -> None:
        self._setup(base, 0.0, 1.0, nodes, validate_args)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_dist})"
