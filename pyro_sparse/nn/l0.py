r"""Layers that learn which of their inputs, or of their feature maps, they need."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from pyro_sparse.nn.gates import HardConcreteGate

_L = TypeVar("_L", nn.Linear, nn.Conv2d)


class L0Linear(nn.Linear):
    r"""
    An ``nn.Linear`` with a gate on each input unit,

    .. math:: y = W (z \odot x) + b, \qquad z_j \sim \operatorname{HardConcrete}(\log\alpha_j),

    so that a closed gate takes a column of W away, and with it the unit that computes :math:`x_j`. The penalty of the
    paper is :math:`\lambda` times

    .. math:: \texttt{expected\_l0} = \sum_j P(z_j \ne 0)\,|W_{\cdot j}|_0 = \text{out\_features} \sum_j P(z_j \ne 0),

    the expected number of weights that are not zero; added to the *sum* of the losses of N examples, or, times
    :math:`1/N`, to their mean. ``gate.expected_l0`` counts units.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        gate_options: keywords of :class:`HardConcreteGate`: ``init_open``, ``temperature``, ``max_logit``, ...

    Shapes: input ``(*, in_features)``, output ``(*, out_features)``.

    Reference: C. Louizos, M. Welling, D. Kingma, *Learning sparse neural networks through L0 regularization*, ICLR
    2018, §2.3 and §2.4.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **gate_options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.gate = HardConcreteGate(in_features, device=device, dtype=dtype, **gate_options)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.gate(x))

    @property
    def expected_l0(self) -> Tensor:
        r"""The expected number of weights that are not zero; a scalar. Biases, which are not gated, do not count."""
        return self.out_features * self.gate.expected_l0

    @property
    def expected_l2(self) -> Tensor:
        r""":math:`\sum_j P(z_j \ne 0) \lVert W_{\cdot j} \rVert^2`, weight decay that spares what is closed (§2.3)."""
        return self.gate.distribution.prob_nonzero @ self.weight.square().sum(0)

    @torch.no_grad()
    def prune(self) -> tuple[nn.Linear, Tensor]:
        """An ordinary layer and the indices of the inputs that it keeps: ``smaller(x[..., kept])`` is the output."""
        kept = self.gate.point_estimate().nonzero()[:, 0]
        weight, bias = self.folded()
        return smaller_linear(self, weight[:, kept], bias), kept

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the ordinary layer of this size that does in ``eval()`` mode the same."""
        return self.weight * self.gate.point_estimate(), self.bias


class L0Conv2d(nn.Conv2d):
    r"""
    An ``nn.Conv2d`` with a gate on each feature map that it puts out, the bias included,

    .. math:: y_c = z_c\,(W_c * x + b_c), \qquad z_c \sim \operatorname{HardConcrete}(\log\alpha_c),

    so that a closed gate makes the map exactly zero, and takes its filter away. As for :class:`L0Linear`,
    ``expected_l0`` counts weights and ``gate.expected_l0`` feature maps.

    Args:
        in_channels, out_channels, kernel_size, ...: as in ``nn.Conv2d``, by position or by name.
        gate_options: keywords of :class:`HardConcreteGate`: ``init_open``, ``temperature``, ``max_logit``, ...

    Shapes: input ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``, output as that of ``nn.Conv2d``.

    Reference: as for :class:`L0Linear`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **gate_options: Any,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.gate = HardConcreteGate((out_channels, 1, 1), device=device, dtype=dtype, **gate_options)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(super().forward(x))

    @property
    def expected_l0(self) -> Tensor:
        r"""The expected number of weights that are not zero; a scalar. Biases do not count."""
        return self.weight[0].numel() * self.gate.expected_l0

    @property
    def expected_l2(self) -> Tensor:
        r""":math:`\sum_c P(z_c \ne 0) \lVert W_c \rVert^2`, weight decay that spares what is closed (§2.3)."""
        return self.gate.distribution.prob_nonzero.flatten() @ self.weight.square().flatten(1).sum(1)

    @torch.no_grad()
    def prune(self) -> tuple[nn.Conv2d, Tensor]:
        """An ordinary layer and the indices of the feature maps that it keeps; the others are zero."""
        if self.groups != 1:
            raise ValueError(f"L0Conv2d.prune: expected groups=1, got {self.groups}. Prune it by hand.")
        kept = self.gate.point_estimate().flatten().nonzero()[:, 0]
        if len(kept) == 0:
            raise ValueError("L0Conv2d.prune: expected an open feature map, got none. Train with a smaller penalty.")
        weight, bias = self.folded()
        return smaller_conv2d(self, weight[kept], None if bias is None else bias[kept]), kept

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the ordinary layer of this size that does in ``eval()`` mode the same."""
        z = self.gate.point_estimate()
        return self.weight * z.unsqueeze(-1), None if self.bias is None else self.bias * z.flatten()


def smaller_linear(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A plain ``nn.Linear`` with these weights, in the same mode."""
    # Built with one unit and without memory: no random numbers are drawn for weights that would be overwritten.
    new = nn.Linear(1, 1, bias is not None, device="meta")
    new.out_features, new.in_features = weight.shape
    return _with(new, layer, weight, bias)


def smaller_conv2d(layer: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A plain ``nn.Conv2d`` with these weights and the other options of ``layer``, in the same mode."""
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    options: dict[str, Any] = {name: getattr(layer, name) for name in names}
    new = nn.Conv2d(1, 1, **options, bias=bias is not None, device="meta")
    new.out_channels, new.in_channels = weight.shape[:2]
    return _with(new, layer, weight, bias)


def _with(new: _L, layer: _L, weight: Tensor, bias: Tensor | None) -> _L:
    frozen = layer.bias if layer.bias is not None else layer.weight
    new.weight = nn.Parameter(weight.detach().clone(), layer.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), frozen.requires_grad)
    return new.train(layer.training)
