r"""A stretched and rectified Kumaraswamy variable: a gate with two shape parameters."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pyro.distributions import constraints
from torch import Tensor

from pyro_sparse._numerics import log1mexp, log1mexpexp
from pyro_sparse.distributions.checks import broadcast, check_positive
from pyro_sparse.distributions.univariate.kumaraswamy import log_neg_log1mexp, log_quantile
from pyro_sparse.distributions.univariate.stretched import Stretched


class HardKumaraswamy(Stretched):
    r"""
    .. math:: Z = \min(1, \max(0, l + (h - l) K)), \qquad K = \left(1 - (1 - U)^{1/b}\right)^{1/a},
       \quad U \sim \mathrm{Uniform}(0, 1),

    a the ``concentration1``, b the ``concentration0``, :math:`l < 0 < 1 < h` the stretch.

    **Base measure:** :math:`\delta_0 + \delta_1` + Lebesgue; **rsample:** in part (see :class:`MixedDistribution`);
    **enumerable:** no.

    ========== ============================ ============
    shape      all parameters, broadcast    a value
    ========== ============================ ============
    batch      ``(*batch,)``                ``(*batch,)``
    event                                   ``()``
    ========== ============================ ============

    >>> import torch
    >>> d = HardKumaraswamy(torch.tensor([0.5, 2.0]), torch.tensor([0.5, 2.0]))
    >>> [round(p, 3) for p in d.prob_zero.tolist()], [round(p, 3) for p in d.prob_one.tolist()]
    ([0.157, 0.014], [0.206, 0.026])

    Args:
        concentration1: :math:`a > 0`; large values move mass towards 1.
        concentration0: :math:`b > 0`; large values move mass towards 0.
        low: below 0, a number or a tensor.
        high: above 1, a number or a tensor.
        nodes: how many nodes each of three panels of the quadrature has; by default as many as give 1e-10.
        validate_args: as in torch.

    Raises:
        ValueError: a concentration that is not positive, ``low >= 0``, ``high <= 1``, NaN.

    Reference: J. Bastings, W. Aziz and I. Titov, *Interpretable neural predictions with differentiable binary
    variables*, ACL 2019, §3.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "concentration1": constraints.positive,
        "concentration0": constraints.positive,
    }
    _tensors = ("concentration1", "concentration0", "low", "high")

    def __init__(
        self,
        concentration1: float | Tensor,
        concentration0: float | Tensor,
        low: float | Tensor = -0.1,
        high: float | Tensor = 1.1,
        *,
        nodes: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        both = broadcast(type(self).__name__, concentration1=concentration1, concentration0=concentration0)
        self.concentration1, self.concentration0 = both
        super().__init__(self.concentration1, low, high, nodes, validate_args)
        if self._validate_args:
            for name in ("concentration1", "concentration0"):
                check_positive(type(self).__name__, name, getattr(self, name))

    def _log_hazard(self, z: Tensor) -> Tensor:
        """log H, the hazard of kumaraswamy.py."""
        return log_neg_log1mexp(self.concentration1 * self._log_parts(z)[0])

    def _log_cdf(self, z: Tensor) -> Tensor:
        return log1mexpexp(self.concentration0.log() + self._log_hazard(z))

    def _log_sf(self, z: Tensor) -> Tensor:
        return self.concentration0 * log1mexp(self.concentration1 * self._log_parts(z)[0])

    def _log_mass(self, a: Tensor, b: Tensor) -> Tensor:
        hazard_a, hazard_b = self._log_hazard(a), self._log_hazard(b)
        log_difference = hazard_b + log1mexp(hazard_a - hazard_b)
        return self._log_sf(a) + log1mexpexp(self.concentration0.log() + log_difference)

    def _log_density_of(self, log_k: Tensor, log_rest: Tensor) -> Tensor:
        a, b = self.concentration1, self.concentration0
        return a.log() + b.log() + (a - 1) * log_k + (b - 1) * log1mexp(a * log_k) - self._log_width

    def _point_of(self, hazard: Tensor) -> Tensor:
        """The z at which H is this."""
        log_k = log1mexp(-hazard) / self.concentration1
        return self._unstretched(log_k - log1mexp(log_k))

    def _ends(self) -> tuple[Tensor, Tensor]:
        # b H is exponential: beyond these points it is with probability e^-33.
        return self._point_of(math.exp(-33) / self.concentration0), self._point_of(33 / self.concentration0)

    def _peaks(self) -> list[Tensor]:
        return [self._point_of((1 / self.concentration0).clamp(max=1.0))]

    def _kinks(self) -> list[Tensor]:
        return [self._unstretched(self.concentration1.log())]

    def _quantile(self, u: Tensor) -> Tensor:
        k = log_quantile(u, self.concentration1, self.concentration0).exp()
        return self.low + (self.high - self.low) * k

    def __repr__(self) -> str:
        shape = tuple(self._batch_shape)
        return f"{type(self).__name__}(concentration1: {shape}, concentration0: {shape}, {self._repr_stretch})"
