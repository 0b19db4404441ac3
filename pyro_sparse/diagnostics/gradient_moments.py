"""Mean, variance and bias of gradient estimates, accumulated in a stream."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLD = (
    3.0  # standard errors that make a bias; one-sided, so chance alone takes an unbiased estimator there in 1/740
)


@dataclass(frozen=True)
class Bias:
    """An estimate of the bias, its standard error, whether it shows, and the norm of bias that would have."""

    estimate: float
    error: float
    shows: bool
    detectable: float


class Moments:
    """
    Running moments of vectors :math:`g_i`. No vector is kept. Differences from a shift near the mean have the precision
    of the vectors, sums are float64: with many entries, memory traffic is what it costs.

    Args:
        shift: a vector near the mean.
    """

    def __init__(self, shift: Tensor) -> None:
        self.shift = shift
        self.count = 0
        self.total = torch.zeros_like(shift, dtype=torch.float64)
        self._distance = torch.empty_like(shift)
        self.squares: list[float] = []
        self.first: Tensor | None = None  # the mean of the first half, once there is a second
        self.first_count = 0
        self.first_variance = 0.0
        self.directions: Tensor | None = None
        self.along: list[Tensor] = []

    def add(self, gradient: Tensor) -> float:
        """Adds one vector; returns its squared distance from the shift."""
        distance = torch.sub(gradient, self.shift, out=self._distance)  # new memory would take longer than the rest
        self.total += distance
        self.count += 1
        self.squares.append(float(distance.dot(distance)))
        if self.directions is not None:
            self.along.append(self.directions @ distance)
        return self.squares[-1]

    def begin_second_half(self) -> None:
        self.first, self.first_count, self.first_variance = self.mean(), self.count, self.variance()

    def mean(self) -> Tensor:
        return self.shift + self.total / self.count

    def second(self) -> Tensor:
        """The mean of the second half."""
        assert self.first is not None
        return (self.count * self.mean() - self.first_count * self.first) / (self.count - self.first_count)

    def second_along(self, row: int) -> tuple[float, float]:
        """
        The mean of the second half along one of the directions, and its squared standard error. If the second half saw
        less noise than the first it is given the first's: an outcome that is rare and weighs much may be in one only.
        """
        assert self.directions is not None
        along = [float(x[row]) for x in self.along]
        variance, noise = statistics.variance(along), self._second_variance()
        if noise < self.first_variance:
            variance = variance * self.first_variance / noise if noise > 0 else self.first_variance
        return float(self.directions[row].double() @ self.shift.double()) + statistics.fmean(along), variance / len(
            along
        )

    def _second_variance(self) -> float:
        distance, count = self.second() - self.shift, self.count - self.first_count
        return max(math.fsum(self.squares[self.first_count :]) / count - float(distance.dot(distance)), 0.0)

    def variance(self) -> float:
        """The trace of the covariance matrix."""
        squares = math.fsum(self.squares) - float(self.total.dot(self.total)) / self.count
        return max(squares, 0.0) / (self.count - 1)

    def variance_error(self) -> float:
        """The standard error of :meth:`variance`: the squared distances are an independent sample of it."""
        return statistics.stdev(self.squares) / math.sqrt(self.count)


def direction(moments: Moments, reference: Tensor) -> Tensor:
    """The unit vector in which the first half erred; zero where it did not."""
    assert moments.first is not None
    error = moments.first - reference
    return (error / error.norm().clamp(min=torch.finfo(error.dtype).tiny)).to(moments.shift.dtype)


def bias_along(moments: Moments, reference: Tensor | Moments, row: int, eps: float) -> Bias:
    r"""
    .. math:: \hat b = u^\top\,(\bar g_2 - \bar r_2), \qquad u = \frac{\bar g_1 - \bar r_1}{\|\bar g_1 - \bar r_1\|}

    where :math:`\bar g_1, \bar g_2` are the means of the two halves of the draws. The direction u comes from the first
    half, the test from the second, so :math:`\hat b` is a mean of independent scalars whose expectation is
    :math:`u^\top b \le \|b\|`: zero for an unbiased estimator, in any dimension and for any covariance, and the norm of
    the bias b once that stands out from the noise of the first half.

    A bias of norm b is expected to give
    :math:`b^2 / \sqrt{b^2 + \mathrm{tr}\,\Sigma_1}`, :math:`\Sigma_1` the covariance of :math:`\bar g_1 - \bar r_1`;
    ``detectable`` is the norm at which that is three standard errors (for few draws more, by Student's t).

    Args:
        moments: those of the estimator, whose only direction is u.
        reference: the exact gradient, or the moments of another estimator.
        row: the row of u among the reference's directions.
        eps: the rounding error of one number; differences of a thousand times as much are no
            bias: a small gradient may be what is left of large costs.
    """
    assert moments.directions is not None
    estimate, variance = moments.second_along(0)
    noise = moments.variance() / moments.first_count
    if isinstance(reference, Tensor):
        estimate -= float(moments.directions[0].double() @ reference)
        norm = float(reference.norm())
    else:
        theirs, their_variance = reference.second_along(row)
        estimate -= theirs
        variance += their_variance
        noise += reference.variance() / reference.first_count
        norm = float(reference.mean().norm())
    rounding = 1000 * eps * max(norm, float(moments.mean().norm()))
    error = math.hypot(math.sqrt(variance), rounding)
    threshold = _quantile(len(moments.along) - 1) * error
    least = threshold**2
    detectable = math.sqrt((least + math.sqrt(least * (least + 4 * noise))) / 2)
    return Bias(estimate, error, estimate > threshold, detectable)


def _quantile(degrees: int) -> float:
    """Student's t that is exceeded as often as a normal variable exceeds the threshold: two terms of its expansion."""
    z = THRESHOLD
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
