r"""What is left of a trained network with gates: an ordinary, smaller one, with the same outputs."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_sparse.nn.l0 import L0Conv2d, L0Linear, smaller_conv2d, smaller_linear

# Between layers: modules that treat each unit by itself and make zero of zero, and those that so treat feature maps.
_ELEMENTWISE = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Dropout)
_MAPWISE = (nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


class _Layer(NamedTuple):
    """A layer with its gates' fixed values multiplied into its weights."""

    module: nn.Linear | nn.Conv2d
    weight: Tensor
    bias: Tensor | None
    open_inputs: Tensor
    open_outputs: Tensor

    def smaller(self, inputs: Tensor, outputs: Tensor) -> nn.Module:
        weight = self.weight[outputs][:, inputs]
        bias = None if self.bias is None else self.bias[outputs]
        if isinstance(self.module, nn.Conv2d):
            return smaller_conv2d(self.module, weight, bias)
        return smaller_linear(self.module, weight, bias)


@torch.no_grad()
def prune(network: nn.Sequential) -> tuple[nn.Sequential, Tensor]:
    r"""
    Turns a trained network with gates into a smaller one of ordinary layers.

    Gates take the values that they have in ``eval()`` mode. Between two layers a unit goes if either gates it to
    zero: a row of the first weight matrix and a column of the second; a feature map goes with all its inputs to the
    next convolution, or, through an ``nn.Flatten``, to the next linear layer. Other gates' values are multiplied into
    the weights. The last layer keeps its outputs.

    Args:
        network: an ``nn.Sequential`` of :class:`L0Linear`, :class:`L0Conv2d`, ``nn.Linear`` and ``nn.Conv2d`` (without
            groups), with activations of which zero is a fixed point, dropout and pooling between them, an
            ``nn.Flatten`` of each image where they become linear, and anything after the last. It is left as it is.

    Returns:
        The smaller network, and the indices of the inputs (features, or channels of images) that it keeps, in order:
        ``smaller(x[:, kept])`` is ``network.eval()(x)``, up to rounding.

    Raises:
        TypeError: for a module between layers that could mix units, or make something of zeros; it is named.
        ValueError: for a network without layers, with groups, or where no feature map is open.

    Example::

        >>> import torch
        >>> from torch import nn
        >>> from pyro_sparse.nn import L0Linear, prune
        >>> network = nn.Sequential(L0Linear(8, 6, init_open=0.9), nn.ReLU(), L0Linear(6, 2, init_open=0.9)).eval()
        >>> _ = network[0].gate.logits.data[3:].fill_(-4.0)
        >>> _ = network[2].gate.logits.data[::2].fill_(-4.0)
        >>> smaller, kept = prune(network)
        >>> smaller
        Sequential(
          (0): Linear(in_features=3, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=2, bias=True)
        )
        >>> x = torch.randn(5, 8)
        >>> torch.allclose(smaller(x[:, kept]), network(x), atol=1e-6)
        True

    Reference: C. Louizos, M. Welling, D. Kingma, *Learning sparse neural networks through L0 regularization*, ICLR
    2018, §2.4 and §4.1.
    """
    if not isinstance(network, nn.Sequential):
        raise TypeError(f"prune: expected an nn.Sequential, got {type(network).__name__}. Prune its parts in turn.")
    places = [i for i, module in enumerate(network) if isinstance(module, (nn.Linear, nn.Conv2d))]
    if not places:
        raise ValueError(f"prune: expected a network with layers, got {network}. Give it an L0Linear or L0Conv2d.")
    for first, second in pairwise([-1, *places]):
        _check_between(network, first, second)
    layers = [_with_gates_multiplied_in(f"module {i}", network[i]) for i in places]

    kept_inputs = layers[0].open_inputs.nonzero()[:, 0]
    smaller: list[nn.Module] = [copy.deepcopy(module) for module in network]
    inputs = kept_inputs
    for n, (place, layer) in enumerate(zip(places, layers, strict=True)):
        if n + 1 < len(layers):
            outputs, next_inputs = _interface(f"modules {place} and {places[n + 1]}", layer, layers[n + 1])
        else:
            outputs, next_inputs = torch.arange(len(layer.weight), device=layer.weight.device), inputs
        smaller[place] = layer.smaller(inputs, outputs)
        inputs = next_inputs
    result = nn.Sequential(*smaller)
    result.training = network.training  # of the container alone: its parts have their own
    return result, kept_inputs


def _check_between(network: nn.Sequential, first: int, second: int) -> None:
    """What is cut at one layer must be cut at the other: nothing between module ``first`` and ``second`` mixes it."""
    maps = first >= 0 and isinstance(network[first], nn.Conv2d)  # whether dimension 1 has maps, or the last one units
    for i in range(first + 1, second):
        module = network[i]
        flattens = maps and isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
        if not (flattens or isinstance(module, _ELEMENTWISE) or (maps and isinstance(module, _MAPWISE))):
            raise TypeError(
                f"prune: expected activations or dropout, after convolutions also pooling and one nn.Flatten(), got "
                f"{module} as module {i}. Take it out, or prune layer by layer with their own prune()."
            )
        maps = maps and not flattens
    if first >= 0 and maps != isinstance(network[second], nn.Conv2d):
        raise TypeError(
            f"prune: expected an nn.Flatten() where convolutions become linear, got none before module {second}. Check "
            "that the network runs, or prune layer by layer with their own prune()."
        )


def _with_gates_multiplied_in(name: str, module: nn.Module) -> _Layer:
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise ValueError(f"prune: expected convolutions without groups, got {module} as {name}. Prune it by hand.")
    open_outputs, open_inputs = (
        torch.ones(n, dtype=torch.bool, device=module.weight.device) for n in module.weight.shape[:2]
    )
    if not isinstance(module, (L0Linear, L0Conv2d)):
        return _Layer(module, module.weight, module.bias, open_inputs, open_outputs)
    is_open = module.gate.point_estimate().flatten() != 0
    if isinstance(module, L0Linear):
        open_inputs = is_open
    else:
        open_outputs = is_open
    return _Layer(module, *module.folded(), open_inputs, open_outputs)


def _interface(names: str, first: _Layer, second: _Layer) -> tuple[Tensor, Tensor]:
    """Which outputs of the first layer stay, and which inputs of the second; a feature map may be many inputs."""
    outputs, inputs = len(first.open_outputs), len(second.open_inputs)
    per_output, rest = divmod(inputs, outputs)
    if rest or (per_output != 1 and not isinstance(first.module, nn.Conv2d)):
        raise ValueError(
            f"prune: expected as many inputs as outputs between {names}, got {outputs} outputs and {inputs} inputs. "
            "Check that the network runs."
        )
    kept = first.open_outputs & second.open_inputs.view(outputs, per_output).any(1)
    if isinstance(first.module, nn.Conv2d) and not kept.any():
        raise ValueError(
            f"prune: expected an open feature map between {names}, got none of {outputs}. Train with a smaller penalty."
        )
    return kept.nonzero()[:, 0], kept.repeat_interleave(per_output).nonzero()[:, 0]
