"""
What each tensor of a run depends on: the sites whose draws went into it, and random numbers of the program's own.

The operations themselves are watched, below autograd, so that in-place writes, ``torch.func.vmap`` and scripted
functions are seen; and whatever leaves torch for Python (``.item()``, ``if x > 0:``) is taken to reach all that
follows. Nothing is kept from one run to the next.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyro_sparse._autograd import WatchingMode
from pyro_sparse.infer.expansion.law import is_point_mass, law
from pyro_sparse.infer.pyro_internals import is_subsample

Labels = frozenset[str]

OWN = ""  # the label of random numbers that no sample statement drew; no site has this name
_NONE: Labels = frozenset()
# These read memory without an operation; what makes a Python number is one.
_READING_MEMORY = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr}
# These read the elements of a list by no operation that is seen.
_FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, Tensor.new}
# Where these look at values, they check them and raise.
_CHECKERS = ("torch.distributions.", "pyro.", "pyro_sparse.")
# Their random numbers are a network's noise, not draws.
_REGULARISERS = ("dropout", "rrelu", "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu")


class Provenance(WatchingMode):
    """
    Watches the operations under it, from :meth:`watching` on.

    Args:
        own_draws: whether the results of random operations get the label ``OWN``.
        noise: whether those of dropout and its like do so, too.
    """

    def __init__(self, own_draws: bool = False, noise: bool = False) -> None:
        super().__init__()
        self._labels: dict[int, Labels] = {}  # by storage: views and what is written in place share theirs
        self._alive: list[Tensor] = []  # so that no storage is given to another tensor
        self._everywhere: Labels = _NONE
        self.own_draws = own_draws
        self.noise = noise
        self.supports_higher_order_operators = True  # torch.cond, and its like
        self.takes_elements = False  # whether a number is read to take an element by it

    @contextmanager
    def watching(self) -> Iterator[None]:
        with self, _Leaving(self):
            yield

    def of(self, value: Any) -> Labels:
        """What a value depends on."""
        return self._everywhere.union(*self._of(value)) if isinstance(value, Tensor) else self._everywhere

    def mark(self, value: Tensor, labels: Labels) -> None:
        """Says what a value depends on, and all that shares its storage."""
        if value.layout != torch.strided:
            self._everywhere |= labels
            return
        self._labels[value.untyped_storage()._cdata] = labels
        self._alive.append(value)

    def reach_everything(self, labels: Labels) -> None:
        """Takes all that follows to depend on these, if it is the program itself that asks."""
        if labels and not self.takes_elements and not _caller().startswith(_CHECKERS):
            self._everywhere |= labels

    def of_all(self, values: Iterable[Any]) -> Labels:
        """What any of these depends on by itself."""
        return _NONE.union(*(labels for value in values for labels in self._of(value)))

    def _of(self, value: Any) -> Iterable[Labels]:
        if self._labels and isinstance(value, Tensor) and value.layout == torch.strided:
            labels = self._labels.get(value.untyped_storage()._cdata)
            if labels:
                yield labels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = tree_leaves((args, kwargs))
        labels = self._everywhere | self.of_all(inputs)
        out = func(*args, **(kwargs or {}))
        if not isinstance(func, OpOverload):  # of higher order, whose operations are not seen
            labels |= {OWN} if self.own_draws else _NONE
            for value in tree_leaves(out):
                if labels and isinstance(value, Tensor):
                    self.mark(value, labels)
            return out
        if self.own_draws and torch.Tag.nondeterministic_seeded in func.tags:
            labels |= {OWN}
        if labels:
            for value in tree_leaves((out, _written(func, args, kwargs) if func._schema.is_mutable else ())):
                if isinstance(value, Tensor):
                    self.mark(value, labels.union(*self._of(value)))
            if isinstance(out, bool | int | float):
                self.reach_everything(labels)
            if torch.Tag.dynamic_output_shape in func.tags and _counts(func, inputs):
                self.reach_everything(labels)  # its length may be used as a number
        return out


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """What an operation writes in place, which it need not return."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    given.update(kwargs or {})
    return [given.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def _counts(func: Any, inputs: list[Any]) -> bool:
    """Whether the shape of the result depends on values: not where an index is by number."""
    return "index" not in func.__name__ or any(isinstance(x, Tensor) and x.dtype == torch.bool for x in inputs)


class _Leaving(TorchFunctionMode):
    """Sees where values leave torch for Python, in the program itself and not in a library's checks."""

    def __init__(self, provenance: Provenance) -> None:
        super().__init__()
        self.provenance = provenance

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READING_MEMORY:
            self.provenance.reach_everything(self.provenance.of_all(args))
        if func in _FROM_NUMBERS and (labels := self.provenance.of_all(tree_leaves((args, kwargs)))):
            out = func(*args, **kwargs)
            self.provenance.mark(out, self.provenance.of(out) | labels)
            return out
        if func is Tensor.__getitem__ and (labels := self.provenance.of_all(_scalars(args[1]))):
            return self._take_element(func, args, labels)
        own_draws_only = self.provenance.own_draws and not self.provenance.noise
        if own_draws_only and any(word in getattr(func, "__name__", "") for word in _REGULARISERS):
            self.provenance.own_draws = False
            try:
                return func(*args, **kwargs)
            finally:
                self.provenance.own_draws = True
        return func(*args, **kwargs)

    def _take_element(self, func: Any, args: Any, labels: Labels) -> Any:
        """``table[z]`` for a single z, which torch reads as a number and makes a view of the table by."""
        self.provenance.takes_elements = True
        try:
            out = func(*args).clone()
        finally:
            self.provenance.takes_elements = False
        self.provenance.mark(out, self.provenance.of(out) | labels)
        return out


def _scalars(index: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(index) if isinstance(leaf, Tensor) and leaf.dim() == 0]


def _caller() -> str:
    """The module of the code that called torch, or that of torch's distributions."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "") + "."
        if module != __name__ + "." and (not module.startswith("torch.") or module.startswith(_CHECKERS)):
            return str(module)
        frame = frame.f_back
    return ""


class LabelDraws(Messenger):
    """
    In a guide: labels what its sites draw by their names.

    Args:
        provenance: keeps the labels.
        own_draws: takes the values of sites to depend on nothing in place of this, so that what is left are draws that
            no sample statement made. A point mass draws nothing: its value keeps its labels.
    """

    def __init__(self, provenance: Provenance, own_draws: bool = False) -> None:
        super().__init__()
        self.provenance = provenance
        self.own_draws = own_draws

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] or is_subsample(msg["fn"]) or is_point_mass(msg["fn"]):
            return
        if self.own_draws:
            self.provenance.mark(msg["value"], _NONE)
            return
        if not msg["fn"].has_rsample:  # it may share the storage of a parameter, or of a table
            msg["value"] = msg["value"].clone()
        labels = self.provenance.of(msg["value"]) | {msg["name"]}
        if (drawn := law(msg["fn"])) is not msg["fn"]:  # the masked log-probability may not tell of its parents
            labels |= self.provenance.of(drawn.log_prob(msg["value"]))
        self.provenance.mark(msg["value"], labels)
