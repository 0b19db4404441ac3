r"""A spike at zero, and a slab on [0, 1] that increases or decreases exponentially."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions.utils import broadcast_all

from pyro_sparse._numerics import as_like, log1mexp, safe_log
from pyro_sparse.distributions.checks import aligned, check_floating, checked
from pyro_sparse.distributions.half_precision import HalfPrecision
from pyro_sparse.distributions.univariate.spike_and_slab import SpikeAndSlab


class TruncatedExponential(HalfPrecision, TorchDistribution):
    r"""
    .. math:: f(\zeta) = \frac{\beta e^{\beta \zeta}}{e^{\beta} - 1}, \qquad \zeta \in [0, 1],

    increasing for a rate :math:`\beta > 0`, uniform at 0, decreasing below.

    **Base measure:** Lebesgue; **rsample:** yes; **enumerable:** no.

    ========== ============ ============
    shape      ``rate``     a value
    ========== ============ ============
    batch      ``(*batch,)``  ``(*batch,)``
    event                   ``()``
    ========== ============ ============

    torch's ``ContinuousBernoulli(logits=rate)`` is this density; its cdf and icdf replace a band of rates around 0 by
    the uniform ones, which is off by up to 5e-4.

    Args:
        rate: :math:`\beta`, any real number.
        validate_args: as in torch.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"rate": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, rate: float | Tensor, *, validate_args: bool | None = None) -> None:
        check_floating(type(self).__name__, "rate", rate)
        (self.rate,) = broadcast_all(rate)
        super().__init__(self.rate.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TruncatedExponential:
        """A view with a larger batch shape."""
        new = self._get_checked_instance(TruncatedExponential, _instance)
        new.rate = self.rate.expand(batch_shape)
        super(TruncatedExponential, new).__init__(new.rate.shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def dtype(self) -> torch.dtype:
        return self.rate.dtype

    def widened(self) -> TruncatedExponential:
        return TruncatedExponential(self.rate.float(), validate_args=self._validate_args)

    def _log_norm(self) -> Tensor:
        r""":math:`\log \beta / (e^\beta - 1) = -\beta/2 + \log (x / \sinh x)` with :math:`x = \beta / 2`, even in x."""
        x = self.rate / 2
        flat = x.abs() < 1e-3
        steep = torch.where(flat, 1.0, x.abs())  # abs has no second derivative at zero
        log_ratio = steep.log() - steep - log1mexp(-2 * steep) + math.log(2)
        return torch.where(flat, -x.square() / 6 + x**4 / 180, log_ratio) - self.rate / 2

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.rate * value + self._log_norm()

    def cdf(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        flat, rate, scale = self._scaled()
        # expm1(beta z) / expm1(beta), divided by e^beta above and below where beta is positive.
        up = rate > 0
        grown = torch.expm1(torch.where(up, -rate * (1 - value), 0.0)) - torch.expm1(torch.where(up, -rate, -1.0))
        plain = torch.expm1(torch.where(up, 0.0, rate * value))
        # The generating function of the Bernoulli polynomials.
        b, r, two = value * (value - 1), torch.where(flat, self.rate, 0.0), 2 * value - 1
        small = value + r * b * (1 / 2 + r * (two / 12 + r * b / 24))
        return torch.where(flat, small, torch.where(up, grown, plain) / scale)

    def icdf(self, value: Tensor) -> Tensor:
        flat, rate, _ = self._scaled()
        up, steepness = rate > 0, rate.abs()
        # The distance t from the end where the density is high, 1 for positive rates: t = -log(1 - w (1 - e^-b)) / b.
        w = torch.where(up, 1 - value, value)
        taken = w * -torch.expm1(-steepness)
        near = taken < 0.5
        log_near = torch.log1p(-torch.where(near, taken, 0.5))
        log_far = torch.logaddexp(-steepness, safe_log(1 - w) + log1mexp(-steepness))
        t = -torch.where(near, log_near, log_far) / steepness
        # The cumulants of a bit.
        b, r = value * (1 - value), torch.where(flat, self.rate, 0.0)
        small = value + r * b * (1 / 2 + r * ((1 - 2 * value) / 6 + r * (1 - 6 * b) / 24))
        return torch.where(flat, small, torch.where(up, 1 - t, t))

    def _scaled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the rate is nearly zero; a rate that is not; and what a cdf is divided by."""
        flat = self.rate.abs() < (1e-3 if self.rate.dtype == torch.float64 else 3e-2)
        rate = torch.where(flat, 1.0, self.rate)
        return flat, rate, torch.where(rate > 0, -torch.expm1(-rate.abs()), torch.expm1(-rate.abs()))

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        u = torch.rand(self._extended_shape(Size(sample_shape)), dtype=self.rate.dtype, device=self.rate.device)
        return self.icdf(u)

    @property
    def mean(self) -> Tensor:
        r""":math:`\tfrac12 (1 + \coth x - 1/x)` with :math:`x = \beta / 2`."""
        x = self.rate / 2
        flat = x.abs() < 0.03
        steep = torch.where(flat, 1.0, x)
        langevin = 1 / torch.tanh(steep) - 1 / steep
        return (1 + torch.where(flat, x / 3 - x**3 / 45 + 2 * x**5 / 945, langevin)) / 2

    @property
    def variance(self) -> Tensor:
        r""":math:`\tfrac14 (1/x^2 - 1/\sinh^2 x)` with :math:`x = \beta / 2`."""
        x = self.rate / 2
        flat = x.abs() < 0.06
        steep = torch.where(flat, 1.0, x.abs())
        # 1 / sinh^2 = 4 e^{-2x} / (1 - e^{-2x})^2, which does not overflow.
        decay = torch.expm1(-2 * steep)
        exact = 1 / steep.square() - 4 * (decay + 1) / decay.square()
        return torch.where(flat, 1 / 3 - x**2 / 15 + 2 * x**4 / 189 - x**6 / 675, exact) / 4

    def entropy(self) -> Tensor:
        r""":math:`-\log \frac{\beta}{e^\beta - 1} - \beta E[\zeta]`, in nats."""
        return -self._log_norm() - self.rate * self.mean


class SpikeAndExponential(SpikeAndSlab):
    r"""
    .. math:: \Pr(Z = 0) = 1 - p, \qquad Z \sim \frac{\beta e^{\beta \zeta}}{e^{\beta} - 1} \text{ on } [0, 1]
       \text{ with probability } p,

    a smoothed bit: for a large rate :math:`\beta` the slab gathers at 1.

    **Base measure:** :math:`\delta_0` + Lebesgue; **rsample:** in part (see :class:`MixedDistribution`);
    **enumerable:** no.

    ========== ======================================= ============
    shape      ``rate`` and ``logits`` or ``probs``    a value
    ========== ======================================= ============
    batch      broadcast together                      ``(*batch,)``
    event                                              ``()``
    ========== ======================================= ============

    >>> d = SpikeAndExponential(rate=5.0, probs=0.5)
    >>> round(d.mean.item(), 3), round(d.cdf(torch.tensor(0.5)).item(), 3)
    (0.403, 0.538)

    Args:
        rate: :math:`\beta`, any real number.
        logits: log-odds of being off the spike.
        probs: instead of logits: probabilities of being off the spike.
        validate_args: as in torch.

    Raises:
        ValueError: for both or neither of logits and probs, NaN, probs outside [0, 1].

    Reference: J. Rolfe, *Discrete variational autoencoders*, ICLR 2017, appendix D.1.
    """

    def __init__(
        self,
        rate: float | Tensor,
        *,
        logits: float | Tensor | None = None,
        probs: float | Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        rate, logits, probs = aligned(type(self).__name__, rate=rate, logits=logits, probs=probs)
        other = next((x for x in (rate, logits, probs) if isinstance(x, Tensor)), None)
        rate = rate if other is None else as_like(rate, other)
        slab = TruncatedExponential(rate, validate_args=False)
        super().__init__(slab, logits=logits, probs=probs, validate_args=validate_args)
        if self._validate_args:
            checked(type(self).__name__, "rate", slab.rate, slab.rate.isfinite(), "a finite number", "Check the model.")

    @property
    def rate(self) -> Tensor:
        r""":math:`\beta`, shape ``batch_shape``."""
        return self.slab.rate.expand(self._batch_shape)
