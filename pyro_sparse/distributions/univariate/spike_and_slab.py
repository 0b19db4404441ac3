r"""A variable that is exactly zero, or drawn from a density."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_sparse._autograd import is_true
from pyro_sparse._numerics import safe_log
from pyro_sparse.distributions.checks import check_given, given
from pyro_sparse.distributions.univariate.inflated import InflatedDistribution


class SpikeAndSlab(InflatedDistribution):
    r"""
    .. math:: \Pr(Z = 0) = 1 - p, \qquad Z \sim \text{slab with probability } p, \qquad p = \sigma(\text{logits}).

    With a Normal slab, the classical prior of Bayesian variable selection.

    **Base measure:** :math:`\delta_0` + Lebesgue; **rsample:** in part (see :class:`MixedDistribution`);
    **enumerable:** no. ``rsample`` looks at where the slab's support is, which waits for a GPU.

    ========== ======================================= ============
    shape      ``slab`` and ``logits`` or ``probs``    a value
    ========== ======================================= ============
    batch      broadcast together                      ``(*batch,)``
    event                                              ``()``
    ========== ======================================= ============

    The KL divergence of two is closed form where that of their slabs is. The purely pathwise form
    (``has_rsample_(True)``) needs a slab with a cdf that reaches down, or up, to zero without a gap.

    >>> import pyro.distributions as dist
    >>> d = SpikeAndSlab(dist.Normal(0.0, 2.0), probs=torch.tensor([0.1, 0.5]))
    >>> [round(p, 3) for p in d.prob_zero.tolist()], [round(v, 3) for v in d.variance.tolist()]
    ([0.9, 0.5], [0.4, 2.0])

    Args:
        slab: any continuous univariate Pyro distribution.
        logits: log-odds of being off the spike.
        probs: instead of logits: probabilities of being off the spike, in [0, 1].
        validate_args: as in torch.

    Raises:
        ValueError: for both or neither of logits and probs, NaN, probs outside [0, 1], a slab that is discrete,
            multivariate or mixed.
        TypeError: for a slab that is no Pyro distribution.

    Reference: T. Mitchell and J. Beauchamp, *Bayesian variable selection in linear regression*, JASA 1988, §2.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"logits": constraints.real, "probs": constraints.unit_interval}
    _atoms = (0.0,)
    _tensors = ("_given",)

    def __init__(
        self,
        slab: Any,
        *,
        logits: float | Tensor | None = None,
        probs: float | Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        value, self._from_logits = given(type(self).__name__, logits, probs)
        super().__init__(slab, value.shape, value, validate_args)
        if self._validate_args:
            check_given(type(self).__name__, self._given, self._from_logits)

    @property
    def logits(self) -> Tensor:
        """The log-odds of being off the spike, shape ``batch_shape``."""
        log_spike, log_slab = self._log_weights()
        return (self._given if self._from_logits else log_slab - log_spike).expand(self._batch_shape)

    @property
    def probs(self) -> Tensor:
        """The probability of being off the spike, shape ``batch_shape``."""
        return (self._given.sigmoid() if self._from_logits else self._given).expand(self._batch_shape)

    def _log_weights(self) -> tuple[Tensor, Tensor]:
        if self._from_logits:
            return logsigmoid(-self._given), logsigmoid(self._given)
        return safe_log(1 - self._given), safe_log(self._given)

    def _require_pathwise(self) -> None:
        super()._require_pathwise()
        zero, check = self._zero, self.slab.support.check
        tiny = torch.finfo(zero.dtype).tiny
        if not is_true(check(zero) | check(zero + tiny) | check(zero - tiny)):
            raise ValueError(
                f"{type(self).__name__}.rsample: expected a slab that reaches zero, got support {self.slab.support}. "
                "The quantile function jumps over the gap: leave has_rsample False (the default)."
            )

    def _is_below(self, z: Tensor) -> Tensor:
        return z < 0

    def _log_tail(self, z: Tensor, below: Tensor) -> Tensor:
        cdf = self._slab_cdf(z)
        return self._log_weights()[1] + safe_log(torch.where(below, cdf, 1 - cdf))

    def __repr__(self) -> str:
        name = "logits" if self._from_logits else "probs"
        return f"{type(self).__name__}({self.slab}, {name}: {tuple(self._given.shape)})"
