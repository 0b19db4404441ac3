r"""What is left of a trained network with gates: an ordinary, smaller one, with the same outputs."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_sparse.nn.gates import Gate
from pyro_sparse.nn.l0 import L0Linear, smaller_linear
from pyro_sparse.nn.l0_convolutions import L0Conv1d, L0Conv2d, smaller_conv

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_SIZES = (16, 64)  # of maps on which a module is tried


class _Layer(NamedTuple):
    """A layer with its gates' fixed values multiplied into its weights."""

    module: nn.Linear | nn.Conv1d | nn.Conv2d
    weight: Tensor
    bias: Tensor | None
    open_inputs: Tensor
    open_outputs: Tensor

    @property
    def dims(self) -> int:
        """Of its feature maps; none where it is linear."""
        return _dims(self.module)

    @property
    def pads(self) -> bool:
        padding = getattr(self.module, "padding", "valid")
        return padding != "valid" and padding != (0,) * self.dims

    def smaller(self, inputs: Tensor, outputs: Tensor) -> nn.Module:
        weight = self.weight[outputs][:, inputs]
        bias = None if self.bias is None else self.bias[outputs]
        if isinstance(self.module, nn.Linear):
            return smaller_linear(self.module, weight, bias)
        return smaller_conv(self.module, nn.Conv1d if self.dims == 1 else nn.Conv2d, weight, bias)


def _dims(layer: nn.Module) -> int:
    return 0 if isinstance(layer, nn.Linear) else 1 if isinstance(layer, nn.Conv1d) else 2


@torch.no_grad()
def prune(network: nn.Sequential) -> tuple[nn.Sequential, Tensor]:
    r"""
    Turns a trained network with gates into a smaller one of ordinary layers.

    Gates take the values that they have in ``eval()`` mode. Between two layers a unit goes if either gates it to
    zero: a row of the first weight matrix and a column of the second; a feature map goes with all its inputs to the
    next convolution, or, through an ``nn.Flatten``, to the next linear layer. Other gates' values are multiplied into
    the weights. The last layer keeps its outputs.

    Args:
        network: an ``nn.Sequential``, which may have others in it, of :class:`L0Linear`, :class:`L0Conv1d` and
            :class:`L0Conv2d`, ``nn.Linear``, ``nn.Conv1d`` and ``nn.Conv2d`` (without groups), an ``nn.Flatten`` of
            each image where they become linear, anything after the last, and between them modules that treat each
            unit, or each feature map, by itself: activations, dropout, pooling, ``nn.BatchNorm2d`` with the statistics
            of ``eval()`` mode, ... They are tried on random numbers. The network is left as it is; names, modes and
            what requires a gradient stay.

    Returns:
        The smaller network, and the indices of the inputs (features, or channels of images) that it keeps, in order:
        ``smaller(x[:, kept])`` is ``network.eval()(x)``, up to rounding.

    Raises:
        TypeError: for a module between layers that mixes units, or a gate by itself; it is named.
        ValueError: for a network without layers, with groups, not yet run, or where no feature map is open.

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
        raise TypeError(
            f"prune: expected an nn.Sequential, got {type(network).__name__}. Put it into one, or prune its parts."
        )
    modules = dict(_flat(network))
    names, parts = [*modules], [*modules.values()]
    places = [i for i, module in enumerate(parts) if isinstance(module, _LAYERS)]
    if not places:
        raise ValueError(
            "prune: expected a network with layers, L0Linear, L0Conv1d, L0Conv2d or ordinary ones of these kinds, got "
            f"{[type(module).__name__ for module in parts]}. Give it one."
        )
    layers = [_with_gates_multiplied_in(f"module {names[i]}", parts[i]) for i in places]
    kept_inputs = layers[0].open_inputs.nonzero()[:, 0]
    smaller: list[nn.Module] = [copy.deepcopy(module) for module in parts]
    start = _Chain.into(layers[0])
    start.run(names, parts, -1, places[0])
    start.cut(smaller, kept_inputs)
    inputs = kept_inputs
    for n, (place, layer) in enumerate(zip(places, layers, strict=True)):
        if n + 1 < len(layers):
            chain = _Chain.out_of(layer, len(layers[n + 1].open_inputs))
            chain.run(names, parts, place, places[n + 1])
            between = f"modules {names[place]} and {names[places[n + 1]]}"
            outputs, next_inputs, layers[n + 1] = _interface(between, layer, layers[n + 1], chain)
            chain.cut(smaller, outputs)
        else:
            outputs, next_inputs = torch.arange(len(layer.weight), device=layer.weight.device), inputs
        smaller[place] = layers[n].smaller(inputs, outputs)
        inputs = next_inputs
    return _rebuilt(network, iter(smaller)), kept_inputs


def _flat(network: nn.Sequential, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of all levels, by their paths, in order."""
    for name, module in network._modules.items():  # named_children() leaves out what is there twice
        assert module is not None
        if _is_plain(module):
            yield from _flat(module, f"{path}{name}.")
        else:
            yield path + name, module


def _is_plain(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _rebuilt(network: nn.Sequential, parts: Iterator[nn.Module]) -> nn.Sequential:
    """The same levels and names, with other modules."""
    children: Any = network._modules
    new = nn.Sequential(
        OrderedDict((n, _rebuilt(m, parts) if _is_plain(m) else next(parts)) for n, m in children.items())
    )
    new.training = network.training  # of the container alone: its parts have their own
    return new


class _Chain:
    """
    What lies between two layers, tried on random numbers: no module may mix units, or feature maps. And what becomes
    of those that a closed gate makes zero.
    """

    def __init__(self, constant: Tensor, dims: int, inputs: int, like: Tensor) -> None:
        self.constant = constant  # of each unit; NaN if it is not
        self.dims, self.inputs, self.like = dims, inputs, like
        self.per_output = 1
        self.stages: list[tuple[int, int]] = []  # places of modules, and how many units there are for an output

    @classmethod
    def into(cls, layer: _Layer) -> _Chain:
        inputs = len(layer.open_inputs)
        return cls(layer.weight.new_full((inputs,), math.nan), layer.dims, inputs, layer.weight)

    @classmethod
    def out_of(cls, layer: _Layer, inputs: int) -> _Chain:
        constant = layer.weight.new_zeros(len(layer.open_outputs)).masked_fill(layer.open_outputs, math.nan)
        return cls(constant, layer.dims, inputs, layer.weight)

    def run(self, names: list[str], parts: list[nn.Module], first: int, second: int) -> None:
        for i in range(first + 1, second):
            module = parts[i]
            if self.dims and isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
                self.per_output, rest = divmod(self.inputs, len(self.constant))
                if rest:
                    break  # the sizes will be refused
                self.constant, self.dims = self.constant.repeat_interleave(self.per_output), 0
            elif not self._passes(module):
                raise _mixes(names[i], module)
            else:
                self.stages.append((i, self.per_output))
        else:
            if self.dims != _dims(parts[second]):
                raise TypeError(
                    f"prune: expected an nn.Flatten() where convolutions become linear, got none before module "
                    f"{names[second]}. Check that the network runs, or prune layer by layer with their own prune()."
                )

    def _passes(self, module: nn.Module) -> bool:
        """Whether a module does to some units what it does to them among all; moves the constants through it."""
        if isinstance(module, nn.Flatten):  # of what there is but in the data
            return False
        n = len(self.constant)
        some = torch.arange(0, n, 2, device=self.like.device)
        generator = torch.Generator().manual_seed(0)
        for size in _SIZES if self.dims else (0,):
            x = torch.randn(3, n, *(size,) * self.dims, generator=generator).to(self.like)
            x = torch.where(self._as_maps(self.constant.isnan()), x, self._as_maps(self.constant))
            try:
                y, part = (copy.deepcopy(m).eval()(v) for m, v in ((module, x), (_cut(module, some, n), x[:, some])))
            except (RuntimeError, ValueError, IndexError, AssertionError):  # such as that maps are too small
                continue
            if y.shape[:2] != x.shape[:2] or part.shape[1:2] != some.shape or not torch.allclose(y[:, some], part):
                return False
            y = y.movedim(1, 0).flatten(1)
            still = (y.amax(1) == y.amin(1)) & ~self.constant.isnan()
            self.constant = torch.where(still, y[:, 0], math.nan)
            return True
        return False

    def _as_maps(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *(1,) * self.dims)

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


def _mixes(name: str, module: nn.Module) -> TypeError:
    if isinstance(module, Gate):
        return TypeError(
            f"prune: expected gates in layers, got {type(module).__name__} by itself as module {name}. Give it to the "
            "layer that it stands before, L0Linear(..., gate=gate), or behind, such as L0Conv2d(..., gate=gate)."
        )
    return TypeError(
        "prune: expected modules that treat each unit, or each feature map, by itself, and one nn.Flatten() after "
        f"convolutions, between layers (L0Linear, L0Conv1d, L0Conv2d or ordinary ones of these kinds), got {module} as "
        f"module {name}. Take it out, or prune layer by layer with their own prune()."
    )


def _with_gates_multiplied_in(name: str, module: nn.Module) -> _Layer:
    assert isinstance(module, _LAYERS)
    if is_lazy(module.weight):
        raise ValueError(f"prune: expected layers with their weights, got {module} as {name}. Run the network once.")
    if not isinstance(module, nn.Linear) and module.groups != 1:
        raise ValueError(f"prune: expected convolutions without groups, got {module} as {name}. Prune it by hand.")
    open_outputs, open_inputs = (
        torch.ones(n, dtype=torch.bool, device=module.weight.device) for n in module.weight.shape[:2]
    )
    if not isinstance(module, (L0Linear, L0Conv1d, L0Conv2d)):
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
    if first.dims and not kept.any():
        raise ValueError(
            f"prune: expected an open feature map between {names}, got none of {outputs}. Train with a smaller penalty."
        )
    kept_inputs = kept.repeat_interleave(per_output)
    constant = torch.where(kept_inputs, 0.0, chain.constant.nan_to_num(0.0))
    if constant.any():
        shift = second.weight.flatten(2).sum(-1) @ constant if second.dims else second.weight @ constant
        second = second._replace(bias=shift if second.bias is None else second.bias + shift)
    return kept.nonzero()[:, 0], kept_inputs.nonzero()[:, 0], second
