r"""Layers that learn which of their inputs they need."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_sparse.nn.gates import Gate, HardConcreteGate

_L = TypeVar("_L", bound=Any)
_M = TypeVar("_M", bound=Any)


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
        gate: the class of its gate, or a gate that it shares with other layers (see :class:`~pyro_sparse.nn.Gate`).
        gate_options: keywords of the gate's class: ``init_open``, ``temperature``, ``max_logit``, ...

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
        *,
        gate: Gate | type[Gate] = HardConcreteGate,
        **gate_options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.gate = given_gate("L0Linear", gate, (in_features,), device, dtype, gate_options)

    @classmethod
    def from_linear(cls, layer: nn.Linear, **gate_options: Any) -> L0Linear:
        """A layer with the weights of another one, such as a trained one, as a copy; ``gate`` is an option, too."""
        if not isinstance(layer, nn.Linear) or isinstance(layer, L0Linear) or is_lazy(layer.weight):
            raise TypeError(
                f"{cls.__name__}.from_linear: expected an nn.Linear without gates and with its weights, got {layer}. "
                "For a convolution there is from_conv; a lazy layer is complete after its first call."
            )
        like = layer.weight
        sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
        new = cls(*sizes, bias, like.device, like.dtype, **gate_options)
        return with_weights(new, layer, layer.weight, layer.bias)

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


def smaller_linear(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A plain ``nn.Linear`` with these weights, in the same mode."""
    # Built with one unit and without memory: no random numbers are drawn for weights that would be overwritten.
    new = nn.Linear(1, 1, bias is not None, device="meta")
    new.out_features, new.in_features = weight.shape
    return with_weights(new, layer, weight, bias)


def given_gate(owner: str, gate: Any, shape: tuple[int, ...], device: Any, dtype: Any, options: dict[str, Any]) -> Gate:
    """The gate of a layer: new, or shared."""
    if not isinstance(gate, Gate):
        if not (isinstance(gate, type) and issubclass(gate, Gate)):
            raise TypeError(f"{owner}.gate: expected a class of gates, or a gate, got {gate!r}. Pass HardConcreteGate.")
        make: Any = gate
        new: Gate = make(shape, device=device, dtype=dtype, **options)
        return new
    if options:
        raise ValueError(f"{owner}: expected no options with a given gate, got {sorted(options)}. Leave them out.")
    if gate.shape != shape:
        raise ValueError(f"{owner}: expected a gate of shape {shape}, got {tuple(gate.shape)}. Make one of that shape.")
    return gate


def with_weights(new: _L, layer: _M, weight: Tensor, bias: Tensor | None) -> _L:
    """``new``, with copies of these, in the mode of ``layer``; what was frozen there is."""
    frozen = layer.bias if layer.bias is not None else layer.weight
    new.weight = nn.Parameter(weight.detach().clone(), layer.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), frozen.requires_grad)
    return new.train(layer.training)
