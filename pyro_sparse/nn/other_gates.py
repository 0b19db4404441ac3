r"""Gates of other families than the hard concrete."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pyro_sparse.distributions import HardKumaraswamy, RectifiedNormal
from pyro_sparse.nn.gates import Gate

PointKind = Literal["mean", "median", "mode"]


def _check_kind(owner: str, kind: str) -> None:
    if kind not in get_args(PointKind):
        raise ValueError(f"{owner}: expected kind in {get_args(PointKind)}, got {kind!r}. Choose one of them.")


class HardKumaraswamyGate(Gate):
    r"""
    Multiplies its input by gates with a hard Kumaraswamy distribution
    (:class:`~pyro_sparse.distributions.HardKumaraswamy`), whose two parameters can put mass at both ends at once. It
    learns their logarithms.

    Args:
        shape: as for :class:`~pyro_sparse.nn.HardConcreteGate`.
        init_open: :math:`P(z \ne 0)` to begin with, by a = 1 and
            :math:`b = \log(\text{init\_open}) / \log(\text{high} / (\text{high} - \text{low}))`.
        low: below 0.
        high: above 1.
        per_example: as for :class:`~pyro_sparse.nn.HardConcreteGate`.
        kind: of the point estimate in ``eval()`` mode: ``"median"``, exactly 0 where :math:`P(z = 0) \ge 1/2`,
            ``"mode"`` or ``"mean"``.

    Shapes: input ``(*, *shape)``, output the same.

    Reference: J. Bastings, W. Aziz, I. Titov, *Interpretable neural predictions with differentiable binary variables*,
    ACL 2019, §4.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        init_open: float = 0.9,
        low: float = -0.1,
        high: float = 1.1,
        per_example: bool = False,
        kind: PointKind = "median",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shape, init_open, per_example, kind)
        _check_kind("HardKumaraswamyGate", kind)
        if not (-math.inf < low < 0 and 1 < high < math.inf):
            raise ValueError(
                f"HardKumaraswamyGate: expected low < 0 and high > 1, got {low!r} and {high!r}. Use, say, -0.1 and 1.1."
            )
        self.low, self.high = low, high
        b = math.log(init_open) / math.log(high / (high - low))
        self.log_concentration1 = nn.Parameter(torch.zeros(self.shape, device=device, dtype=dtype))
        self.log_concentration0 = nn.Parameter(torch.full(self.shape, math.log(b), device=device, dtype=dtype))

    @property
    def distribution(self) -> HardKumaraswamy:
        """Of the gates; its batch shape is ``shape``."""
        return HardKumaraswamy(self.log_concentration1.exp(), self.log_concentration0.exp(), self.low, self.high)

    def extra_repr(self) -> str:
        options = f"low={self.low}, high={self.high}, per_example={self.per_example}, kind={self.kind!r}"
        return f"{tuple(self.shape)}, {options}"


class RectifiedNormalGate(Gate):
    r"""
    Multiplies its input by gates :math:`z = \min(1, \max(0, \mu + \sigma \epsilon))`, "stochastic gates": it learns
    :math:`\mu` (``loc``), and :math:`P(z \ne 0) = \Phi(\mu / \sigma)`.

    Args:
        shape: as for :class:`~pyro_sparse.nn.HardConcreteGate`.
        init_open: :math:`P(z \ne 0)` to begin with; the paper's :math:`\mu = \sigma` is 0.84.
        scale: :math:`\sigma`, which is not learnt.
        per_example: as for :class:`~pyro_sparse.nn.HardConcreteGate`.
        kind: of the point estimate in ``eval()`` mode: ``"median"``, :math:`\min(1, \max(0, \mu))` as in the paper,
            ``"mode"`` or ``"mean"``.

    Shapes: input ``(*, *shape)``, output the same.

    Reference: Y. Yamada et al., *Feature selection using stochastic gates*, ICML 2020, §3.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        init_open: float = 0.84,
        scale: float = 0.5,
        per_example: bool = False,
        kind: PointKind = "median",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shape, init_open, per_example, kind)
        _check_kind("RectifiedNormalGate", kind)
        if not 0 < scale < math.inf:
            raise ValueError(f"RectifiedNormalGate: expected scale > 0, got {scale!r}. Use, say, 0.5.")
        self.scale = scale
        loc = scale * float(torch.special.ndtri(torch.tensor(init_open, dtype=torch.float64)))
        self.loc = nn.Parameter(torch.full(self.shape, loc, device=device, dtype=dtype))

    @property
    def distribution(self) -> RectifiedNormal:
        """Of the gates; its batch shape is ``shape``."""
        return RectifiedNormal(self.loc, self.scale)

    def point_estimate(self) -> Tensor:
        return self.loc.clamp(0.0, 1.0) if self.kind == "median" else super().point_estimate()

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, scale={self.scale}, per_example={self.per_example}, kind={self.kind!r}"
