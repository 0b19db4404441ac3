"""Kumaraswamy's distribution, right at its own draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor

from pyro_sparse._numerics import log1mexp, log1mexpexp


class Kumaraswamy(dist.Kumaraswamy):
    r"""
    .. math:: f(k) = a b\,k^{a - 1} (1 - k^a)^{b - 1}, \qquad k \in (0, 1)

    The stock distribution is a chain of transforms, which goes through :math:`1 - k^a`: where that rounds to zero, as
    it does at draws near one, log_prob and its gradient are NaN. Here all is in logarithms; draws are inside (0, 1).
    """

    @classmethod
    def of(cls, d: Any) -> Any:
        """A stock one in this form; anything else as it is."""
        if type(d) is not dist.Kumaraswamy:
            return d
        new = object.__new__(cls)
        new.__dict__.update(d.__dict__)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        a, b = self.concentration1, self.concentration0
        rest = log1mexp(a * value.log())
        return a.log() + b.log() + torch.xlogy(a - 1, value) + (b - 1) * torch.where((value == 1) & (b == 1), 0.0, rest)

    def cdf(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        ends = (value <= 0) | (value >= 1)
        log_hazard = log_neg_log1mexp(self.concentration1 * torch.where(ends, 0.5, value).log())
        inside = log1mexpexp(self.concentration0.log() + log_hazard).exp()
        return torch.where(ends, value.clamp(0.0, 1.0), inside)

    def icdf(self, value: Tensor) -> Tensor:
        ends = (value <= 0) | (value >= 1)
        inside = log_quantile(torch.where(ends, 0.5, value), self.concentration1, self.concentration0).exp()
        return torch.where(ends, value.clamp(0.0, 1.0), inside)

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        shape, like = self._extended_shape(Size(sample_shape)), self.concentration1
        info = torch.finfo(like.dtype)
        u = torch.rand(shape, dtype=like.dtype, device=like.device).clamp(info.tiny, 1 - info.eps)
        k = log_quantile(u, self.concentration1, self.concentration0).exp()
        return k.clamp(info.tiny, 1 - info.eps / 2)

    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape).detach()  # torch.jit.trace does not record no_grad


# 1 - F = (1 - k^a)^b = exp(-b H), H = -log(1 - k^a). Both k^a and H underflow for large a where their logs do not.


def log_quantile(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """log k where F(k) = u, by the tail that is not near one: H = -log(1 - u) / b, a log k = log(1 - exp(-H))."""
    return log1mexpexp(torch.log(-torch.log1p(-u)) - b.log()) / a


def log_neg_log1mexp(x: Tensor) -> Tensor:
    r""":math:`\log(-\log(1 - e^x))` for :math:`x < 0`; for :math:`x \to -\infty` it is :math:`x + e^x / 2`."""
    tiny = x < -18.0 if x.dtype == torch.float64 else x < -8.0
    plain = (-log1mexp(torch.where(tiny, -1.0, x))).log()
    low = torch.where(tiny, x, -18.0)
    return torch.where(tiny, low + low.exp() / 2, plain)
