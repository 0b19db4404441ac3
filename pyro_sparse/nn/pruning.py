r"""What is left of a trained network with gates: an ordinary, smaller one, with the same outputs."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_sparse.nn.l0 import L0Linear, smaller_linear
from pyro_sparse.nn.l0_convolutions import L0Conv2d, smaller_conv

_SIZES = (16, 64)  # of maps on which a module is tried


class _Layer(NamedTuple):
    """A layer with its gates' fixed values multiplied into its weights."""

    module: nn.Linear | nn.Conv2d
    weight: Tensor
    bias: Tensor | None
    open_inputs: Tensor
    open_outputs: Tensor

    @property
    def has_maps(self) -> bool:
        return isinstance(self.module, nn.Conv2d)

    @property
    def pads(self) -> bool:
        return isinstance(self.module, nn.Conv2d) and self.module.padding not in ((0, 0), "valid")

    def smaller(self, inputs: Tensor, outputs: Tensor) -> nn.Module:
        weight = self.weight[outputs][:, inputs]
        bias = None if self.bias is None else self.bias[outputs]
        if isinstance(self.module, nn.Conv2d):
            return smaller_conv(self.module, nn.Conv2d, weight, bias)
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
            groups), an ``nn.Flatten`` of each image where they become linear, anything after the last, and between
            them modules that treat each unit, or each feature map, by itself: activations, dropout, pooling,
            ``nn.BatchNorm2d`` with the statistics of ``eval()`` mode, ... They are tried on random numbers. The network
            is left as it is; names, modes and what requires a gradient stay.

    Returns:
        The smaller network, and the indices of the inputs (features, or channels of images) that it keeps, in order:
        ``smaller(x[:, kept])`` is ``network.eval()(x)``, up to rounding.

    Raises:
        TypeError: for a module between layers that mixes units; it is named.
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
    layers = [_with_gates_multiplied_in(f"module {i}", network[i]) for i in places]
    kept_inputs = layers[0].open_inputs.nonzero()[:, 0]
    smaller: list[nn.Module] = [copy.deepcopy(module) for module in network]
    start = _Chain.into(layers[0])
    start.run(network, -1, places[0])
    start.cut(smaller, kept_inputs)
    inputs = kept_inputs
    for n, (place, layer) in enumerate(zip(places, layers, strict=True)):
        if n + 1 < len(layers):
            chain = _Chain.out_of(layer, len(layers[n + 1].open_inputs))
            chain.run(network, place, places[n + 1])
            names = f"modules {place} and {places[n + 1]}"
            outputs, next_inputs, layers[n + 1] = _interface(names, layer, layers[n + 1], chain)
            chain.cut(smaller, outputs)
        else:
            outputs, next_inputs = torch.arange(len(layer.weight), device=layer.weight.device), inputs
        smaller[place] = layers[n].smaller(inputs, outputs)
        inputs = next_inputs
    names_of = [name for name, _ in network.named_children()]
    result = nn.Sequential(OrderedDict(zip(names_of, smaller, strict=True)))
    result.training = network.training  # of the container alone: its parts have their own
    return result, kept_inputs


class _Chain:
    """
    What lies between two layers, tried on random numbers: no module may mix units, or feature maps. And what becomes
    of those that a closed gate makes zero.
    """

    def __init__(self, constant: Tensor, maps: bool, inputs: int, like: Tensor) -> None:
        self.constant = constant  # of each unit; NaN if it is not
        self.maps, self.inputs, self.like = maps, inputs, like
        self.per_output = 1
        self.stages: list[tuple[int, int]] = []  # places of modules, and how many units there are for an output

    @classmethod
    def into(cls, layer: _Layer) -> _Chain:
        inputs = len(layer.open_inputs)
        return cls(layer.weight.new_full((inputs,), math.nan), layer.has_maps, inputs, layer.weight)

    @classmethod
    def out_of(cls, layer: _Layer, inputs: int) -> _Chain:
        constant = layer.weight.new_zeros(len(layer.open_outputs)).masked_fill(layer.open_outputs, math.nan)
        return cls(constant, layer.has_maps, inputs, layer.weight)

    def run(self, network: nn.Sequential, first: int, second: int) -> None:
        for i in range(first + 1, second):
            module = network[i]
            if self.maps and isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
                self.per_output, rest = divmod(self.inputs, len(self.constant))
                if rest:
                    break  # the sizes will be refused
                self.constant, self.maps = self.constant.repeat_interleave(self.per_output), False
            elif not self._passes(module):
                raise TypeError(
                    "prune: expected modules that treat each unit, or each feature map, by itself, and one "
                    f"nn.Flatten() after convolutions, got {module} as module {i}. Take it out, or prune layer by "
                    "layer with their own prune()."
                )
            else:
                self.stages.append((i, self.per_output))
        else:
            if self.maps != isinstance(network[second], nn.Conv2d):
                raise TypeError(
                    f"prune: expected an nn.Flatten() where convolutions become linear, got none before module "
                    f"{second}. Check that the network runs, or prune layer by layer with their own prune()."
                )

    def _passes(self, module: nn.Module) -> bool:
        """Whether a module does to some units what it does to them among all; moves the constants through it."""
        if isinstance(module, nn.Flatten):  # of what there is but in the data
            return False
        n = len(self.constant)
        some = torch.arange(0, n, 2, device=self.like.device)
        generator = torch.Generator().manual_seed(0)
        for size in _SIZES if self.maps else (0,):
            x = torch.randn(3, n, *(size, size) if size else (), generator=generator).to(self.like)
            x = torch.where(self._as_maps(self.constant.isnan(), size), x, self._as_maps(self.constant, size))
            try:
                y, part = (copy.deepcopy(m).eval()(v) for m, v in ((module, x), (_cut(module, some, n), x[:, some])))
            except (RuntimeError, ValueError, IndexError):  # such as that maps are too small
                continue
            if y.shape[:2] != x.shape[:2] or part.shape[1:2] != some.shape or not torch.allclose(y[:, some], part):
                return False
            y = y.movedim(1, 0).flatten(1)
            still = (y.amax(1) == y.amin(1)) & ~self.constant.isnan()
            self.constant = torch.where(still, y[:, 0], math.nan)
            return True
        return False

    @staticmethod
    def _as_maps(x: Tensor, size: int) -> Tensor:
        return x[:, None, None] if size else x

    def cut(self, smaller: list[nn.Module], outputs: Tensor) -> None:
        """Parameters that the modules have for each unit, such as those of a normalisation by batches."""
        for place, per in self.stages:
            kept = (outputs.unsqueeze(-1) * per + torch.arange(per, device=outputs.device)).flatten()
            smaller[place] = _cut(smaller[place], kept, len(self.constant) // self.per_output * per)


def _cut(module: nn.Module, kept: Tensor, units: int) -> nn.Module:
    new = copy.deepcopy(module)
    for part in new.modules():
        for name, p in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if p.dim() and len(p) == units:
                cut = p.detach()[kept].clone()
                setattr(part, name, nn.Parameter(cut, p.requires_grad) if isinstance(p, nn.Parameter) else cut)
        for name in ("num_features", "num_parameters"):
            if getattr(part, name, None) == units:
                setattr(part, name, len(kept))
    return new


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


def _interface(names: str, first: _Layer, second: _Layer, chain: _Chain) -> tuple[Tensor, Tensor, _Layer]:
    """
    Which outputs of the first layer stay, and which inputs of the second; a feature map may be many inputs. What a
    closed gate makes constant goes into the second layer's bias, but for maps that it pads with zeros.
    """
    outputs, inputs, per_output = len(first.open_outputs), len(second.open_inputs), chain.per_output
    if inputs != outputs * per_output:
        raise ValueError(
            f"prune: expected as many inputs as outputs between {names}, got {outputs} outputs and {inputs} inputs. "
            "Check that the network runs."
        )
    gone = chain.constant == 0 if second.pads else ~chain.constant.isnan()
    kept = (second.open_inputs & ~gone).view(outputs, per_output).any(1)
    if first.has_maps and not kept.any():
        raise ValueError(
            f"prune: expected an open feature map between {names}, got none of {outputs}. Train with a smaller penalty."
        )
    kept_inputs = kept.repeat_interleave(per_output)
    constant = torch.where(kept_inputs, 0.0, chain.constant.nan_to_num(0.0))
    if constant.any():
        shift = second.weight.flatten(2).sum(-1) @ constant if second.has_maps else second.weight @ constant
        second = second._replace(bias=shift if second.bias is None else second.bias + shift)
    return kept.nonzero()[:, 0], kept_inputs.nonzero()[:, 0], second
