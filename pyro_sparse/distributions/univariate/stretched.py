r"""A variable on (0, 1), stretched beyond both ends and rectified: the base of hard concrete and hard Kumaraswamy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor

from pyro_sparse.distributions.checks import aligned, checked
from pyro_sparse.distributions.univariate.quadrature import Points, Stretch, logit, same
from pyro_sparse.distributions.univariate.rectified import RectifiedDistribution


def check_stretch(owner: str, low: float | Tensor, high: float | Tensor) -> None:
    """The stretch must reach beyond both ends, by how little so ever: that is what gives the ends probability."""
    checked(owner, "low", low, (low < 0) & (low > -math.inf), "a number below 0", "Use e.g. -0.1.")
    checked(owner, "high", high, (high > 1) & (high < math.inf), "a number above 1", "Use e.g. 1.1.")


def stretched_shape(shape: Size, low: float | Tensor, high: float | Tensor) -> Size:
    """A batch shape broadcast with those of a stretch."""
    return torch.broadcast_shapes(shape, *(x.shape for x in (low, high) if isinstance(x, Tensor)))


def log_width(low: float | Tensor, high: float | Tensor) -> Any:
    """log (high - low), a number of numbers."""
    width = high - low
    return width.log() if isinstance(width, Tensor) else math.log(width)


class Stretched(RectifiedDistribution):
    r"""
    T = low + (high - low) K of a family with K on (0, 1).

    Integrals go by the coordinate y = logit k, in which a tight stretch is nothing special. A ``low`` or ``high`` that
    is a number stays one.
    """

    low: Any
    high: Any

    def __init__(self, like: Tensor, low: Any, high: Any, nodes: int | None, validate_args: bool | None) -> None:
        self.low, self.high = low, high = aligned(type(self).__name__, like, low=low, high=high)
        super().__init__(stretched_shape(like.shape, low, high), like, nodes, validate_args)
        if self._validate_args:
            check_stretch(type(self).__name__, low, high)

    @property
    def _log_width(self) -> Any:
        return log_width(self.low, self.high)

    def _log_parts(self, z: Tensor, rest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log k and log (1 - k), each precise where k is near 0 and near 1; ``rest`` is a better known 1 - z."""
        width, above = self.high - self.low, self.high - z if rest is None else (self.high - 1) + rest
        k, rest = (z - self.low) / width, above / width
        left = k < 0.5
        small, large = torch.where(left, k, 0.5), torch.where(left, 0.5, rest)
        log_k = torch.where(left, small.log(), torch.log1p(-large))
        log_rest = torch.where(left, torch.log1p(-small), large.log())
        return log_k, log_rest

    def _logit(self, z: Tensor) -> Tensor:
        return logit(z, self.low, self.high)

    @property
    def _repr_stretch(self) -> str:
        parts = [
            f"{n}={x}" if not isinstance(x, Tensor) else f"{n}: {tuple(x.shape)}"
            for n, x in (("low", self.low), ("high", self.high))
        ]
        return ", ".join(parts)

    def _log_density_of(self, log_k: Tensor, log_rest: Tensor) -> Tensor:
        """log f where log k and log (1 - k) are these."""
        raise NotImplementedError

    def _log_density(self, z: Tensor) -> Tensor:
        return self._log_density_of(*self._log_parts(z))

    # The quadrature.

    @property
    def _stretch(self) -> Stretch:
        return self.low, self.high

    def _unstretched(self, y: Tensor) -> Tensor:
        """The point z at which logit k is y."""
        return self.low + (self.high - self.low) * y.sigmoid()

    def _middle(self) -> list[Tensor]:
        return [self._unstretched(self._zero)]

    def _log_density_at(self, points: Points) -> Tensor:
        learnt = any(isinstance(x, Tensor) and x.requires_grad for x in (self.low, self.high))
        if points.log_parts is None or learnt or not same(points.stretch, self._stretch):
            return self._log_density_of(*self._log_parts(points.z, points.rest))
        return self._log_density_of(*points.log_parts)
