r"""Convolutions that learn which of their feature maps they need."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pyro_sparse.nn.gates import Gate, HardConcreteGate
from pyro_sparse.nn.l0 import given_gate, with_weights

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class _GatedMaps(nn.modules.conv._ConvNd):
    """Convolutions with a gate on each feature map that they put out."""

    gate: Gate
    #: the ordinary layer
    _plain: ClassVar[type[nn.Module]]

    def _add_gate(self, gate: Any, device: Any, dtype: Any, gate_options: dict[str, Any]) -> None:
        shape = (self.out_channels, *(1,) * len(self.kernel_size))
        self.gate = given_gate(type(self).__name__, gate, shape, device, dtype, gate_options)

    @classmethod
    def from_conv(cls, layer: Any, **gate_options: Any) -> Any:
        """A layer with the weights of an ordinary one, as a copy; ``gate`` is an option, too."""
        if not isinstance(layer, cls._plain):
            raise TypeError(
                f"{cls.__name__}.from_conv: expected an nn.{cls._plain.__name__}, got {type(layer).__name__}. Take the "
                "class of its kind."
            )
        old: Any = layer
        options = {**_options(old), "groups": old.groups, "bias": old.bias is not None}
        make: Any = cls
        new = make(
            *(old.in_channels, old.out_channels),
            **options,
            device=old.weight.device,
            dtype=old.weight.dtype,
            **gate_options,
        )
        return with_weights(new, old, old.weight, old.bias)

    def _by_map(self, weight: Tensor) -> Tensor:
        """The weights by the map that they make, ``(out_channels, in_channels / groups, *kernel)``, and back."""
        if not self.transposed:
            return weight
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    @property
    def expected_l0(self) -> Tensor:
        r"""The expected number of weights that are not zero; a scalar. Biases do not count."""
        return self.in_channels // self.groups * math.prod(self.kernel_size) * self.gate.expected_l0

    @property
    def expected_l2(self) -> Tensor:
        r""":math:`\sum_c P(z_c \ne 0) \lVert W_c \rVert^2`, weight decay that spares what is closed (§2.3)."""
        return self.gate.distribution.prob_nonzero.flatten() @ self._by_map(self.weight).square().flatten(1).sum(1)

    @torch.no_grad()
    def prune(self) -> tuple[Any, Tensor]:
        """An ordinary layer and the indices of the feature maps that it keeps; the others are zero."""
        name = type(self).__name__
        if self.groups != 1:
            raise ValueError(f"{name}.prune: expected groups=1, got {self.groups}. Prune it by hand.")
        kept = self.gate.point_estimate().flatten().nonzero()[:, 0]
        if len(kept) == 0:
            raise ValueError(f"{name}.prune: expected an open feature map, got none. Train with a smaller penalty.")
        weight, bias = self.folded()
        weight = self._by_map(self._by_map(weight)[kept])
        return smaller_conv(self, self._plain, weight, None if bias is None else bias[kept]), kept

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the ordinary layer of this size that does in ``eval()`` mode the same."""
        z = self.gate.point_estimate()
        weight = self._by_map(self._by_map(self.weight) * z.unsqueeze(-1))
        return weight, None if self.bias is None else self.bias * z.flatten()


class L0Conv2d(_GatedMaps, nn.Conv2d):
    r"""
    An ``nn.Conv2d`` with a gate on each feature map that it puts out, the bias included,

    .. math:: y_c = z_c\,(W_c * x + b_c), \qquad z_c \sim \operatorname{HardConcrete}(\log\alpha_c),

    so that a closed gate makes the map exactly zero, and takes its filter away. As for :class:`L0Linear`,
    ``expected_l0`` counts weights and ``gate.expected_l0`` feature maps.

    Args:
        in_channels, out_channels, kernel_size, ...: as in ``nn.Conv2d``, by position or by name.
        gate: the class of its gate, or a gate that it shares with other layers (see :class:`~pyro_sparse.nn.Gate`).
        gate_options: keywords of the gate's class: ``init_open``, ``temperature``, ``max_logit``, ...

    Shapes: input ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``, output as that of ``nn.Conv2d``.

    Reference: as for :class:`L0Linear`.
    """

    _plain = nn.Conv2d

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
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gate: Gate | type[Gate] = HardConcreteGate,
        **gate_options: Any,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._add_gate(gate, device, dtype, gate_options)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(super().forward(x))


class L0Conv1d(_GatedMaps, nn.Conv1d):
    r"""
    An ``nn.Conv1d`` with a gate on each feature map that it puts out; see :class:`L0Conv2d`.

    Args:
        in_channels, out_channels, kernel_size, ...: as in ``nn.Conv1d``, by position or by name.
        gate, gate_options: as for :class:`L0Conv2d`.

    Shapes: as for ``nn.Conv1d``.

    Reference: as for :class:`L0Linear`.
    """

    _plain = nn.Conv1d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: str | int | tuple[int] = 0,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gate: Gate | type[Gate] = HardConcreteGate,
        **gate_options: Any,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._add_gate(gate, device, dtype, gate_options)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(super().forward(x))


class L0ConvTranspose1d(_GatedMaps, nn.ConvTranspose1d):
    r"""
    An ``nn.ConvTranspose1d`` with a gate on each feature map that it puts out; see :class:`L0Conv2d`.

    Args:
        in_channels, out_channels, kernel_size, ...: as in ``nn.ConvTranspose1d``, by position or by name.
        gate, gate_options: as for :class:`L0Conv2d`.

    Shapes: as for ``nn.ConvTranspose1d``.

    Reference: as for :class:`L0Linear`.
    """

    _plain = nn.ConvTranspose1d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: int | tuple[int] = 0,
        output_padding: int | tuple[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int] = 1,
        padding_mode: Literal["zeros"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gate: Gate | type[Gate] = HardConcreteGate,
        **gate_options: Any,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias),
            *(dilation, padding_mode, device, dtype),
        )
        self._add_gate(gate, device, dtype, gate_options)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self.gate(super().forward(x, output_size))


class L0ConvTranspose2d(_GatedMaps, nn.ConvTranspose2d):
    r"""
    An ``nn.ConvTranspose2d`` with a gate on each feature map that it puts out; see :class:`L0Conv2d`.

    Args:
        in_channels, out_channels, kernel_size, ...: as in ``nn.ConvTranspose2d``, by position or by name.
        gate, gate_options: as for :class:`L0Conv2d`.

    Shapes: as for ``nn.ConvTranspose2d``.

    Reference: as for :class:`L0Linear`.
    """

    _plain = nn.ConvTranspose2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: Literal["zeros"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gate: Gate | type[Gate] = HardConcreteGate,
        **gate_options: Any,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias),
            *(dilation, padding_mode, device, dtype),
        )
        self._add_gate(gate, device, dtype, gate_options)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self.gate(super().forward(x, output_size))


def _options(layer: Any) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {name: getattr(layer, name) for name in (*names, *(("output_padding",) if layer.transposed else ()))}


def smaller_conv(layer: Any, plain: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """A plain convolution with these weights and the other options of ``layer``, in the same mode."""
    # Built with one channel and without memory: no random numbers are drawn for weights that would be overwritten.
    new = plain(1, 1, **_options(layer), bias=bias is not None, device="meta")
    outputs, inputs = weight.shape[:2] if not layer.transposed else weight.shape[1::-1]
    new.out_channels, new.in_channels = outputs, inputs
    return with_weights(new, layer, weight, bias)
