r"""A variable on (0, 1), stretched beyond both ends and rectified: what hard concrete and hard Kumaraswamy share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_sparse.distributions.mixed import checked
from pyro_sparse.distributions.rectified import Point, RectifiedDistribution


def check_stretch(owner: str, low: float | Tensor, high: float | Tensor) -> None:
    """The stretch must reach beyond both ends, by how little so ever: that is what gives the ends probability."""
    checked(owner, "low", low, low < 0, "a number below 0", "Use e.g. the default -0.1.")
    checked(owner, "high", high, high > 1, "a number above 1", "Use e.g. the default 1.1.")


class Stretched(RectifiedDistribution):
    r"""
    T = low + (high - low) K of a family with K on (0, 1).

    Integrals go by the coordinate y = logit k, in which a tight stretch is nothing special. A ``low`` or ``high`` that
    is a number stays one.
    """

    low: Any
    high: Any

    def __init__(self, like: Tensor, low: Any, high: Any, nodes: int | None, validate_args: bool | None) -> None:
        check_stretch(type(self).__name__, low, high)
        self.low, self.high, self.nodes = low, high, nodes
        shapes = [x.shape for x in (low, high) if isinstance(x, Tensor)]
        super().__init__(torch.broadcast_shapes(like.shape, *shapes), validate_args=False)
        self._validate_args = type(self)._validate_args if validate_args is None else validate_args
        self._like = like.detach().new_zeros(())

    @property
    def _zero(self) -> Tensor:
        return self._like

    @property
    def _log_width(self) -> Any:
        width = self.high - self.low
        return width.log() if isinstance(width, Tensor) else math.log(width)

    def _log_parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log k and log (1 - k), each precise where k is near 0 and near 1."""
        width = self.high - self.low
        k, rest = (z - self.low) / width, (self.high - z) / width
        left = k < 0.5
        small, large = torch.where(left, k, 0.5), torch.where(left, 0.5, rest)
        log_k = torch.where(left, small.log(), torch.log1p(-large))
        log_rest = torch.where(left, torch.log1p(-small), large.log())
        return log_k, log_rest

    def _logit(self, z: Tensor) -> Tensor:
        return ((z - self.low) / (self.high - z)).log()

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

    def _default_nodes(self) -> int:
        if isinstance(self.low, Tensor) or isinstance(self.high, Tensor):
            return 44  # what a stretch of 1e-6 takes: looking would wait for the device
        ends = math.log(-self.high / self.low), math.log((1 - self.low) / (self.high - 1))
        return math.ceil(28 + 1.1 * max(ends))

    def _coordinate(self, z: Tensor) -> Tensor:
        return self._logit(z)

    def _bounds(self) -> tuple[Tensor, Tensor]:
        return self._logit(self._zero), self._logit(self._zero + 1)

    def _own_kinks(self) -> list[Tensor]:
        return [torch.as_tensor((self.low + self.high) / 2).to(self._zero)]

    def _point(self, y: Tensor, weights: Tensor) -> Point:
        log_parts = logsigmoid(y), logsigmoid(-y)
        width = self.high - self.low
        return Point(
            self.low + width * y.sigmoid(),
            weights * width * (log_parts[0] + log_parts[1]).exp(),
            (self.low, self.high),
            log_parts,
        )

    def _log_density_at(self, point: Point) -> Tensor:
        same = point.stretch is not None and all(
            a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
            for a, b in zip(point.stretch, (self.low, self.high), strict=True)
        )
        if same and point.log_parts is not None:
            return self._log_density_of(*point.log_parts)
        return self._log_density(point.z)
