"""Counts where a piece of code would wait for a GPU, on the CPU too."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyro_sparse._autograd import WatchingMode

# Operations whose result on the host, or whose shape, depends on values.
_WAITING = (
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "histc"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
)
# What copies a tensor to the host, or numbers from it; each waits for the queue.
_COPYING = (Tensor.tolist, Tensor.cpu, Tensor.__repr__, Tensor.__format__)
_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
_TORCH = str(Path(torch.__file__).parent)


class HostWaits:
    """
    What :func:`count_host_waits` saw.

    Attributes:
        places: how often at each ``file:line operation``, the line being the innermost outside of torch.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """How many waits in all."""
        return self.places.total()

    def _add(self, what: str) -> None:
        frame: Any = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, __file__)):
            frame = frame.f_back
        self.places[f"{frame.f_code.co_filename}:{frame.f_lineno} {what}"] += 1

    def __repr__(self) -> str:
        return "\n".join([f"HostWaits(total={self.total})", *(f"{n} at {place}" for place, n in self.places.items())])


@contextmanager
def count_host_waits() -> Iterator[HostWaits]:
    r"""
    Counts in a ``with`` block the operations after which the host would wait for a GPU's queue: those that bring a
    number to Python (``.item()``, ``bool(x)``, ``.tolist()``, ``print``), whose result has a shape that depends on
    values (``nonzero``, ``unique``, an index of booleans), and that bring numbers of Python's to the device
    (``torch.tensor``). The same on the CPU, so that they can be tested where there is no GPU; but code that asks for
    the device first takes the CPU's way there.

    >>> with count_host_waits() as waits:
    ...     x = torch.arange(3.0)
    ...     y = x[x > 1] * float(x.max())
    >>> waits.total
    2

    Yields:
        A :class:`HostWaits`, which may be read in the block and after it.
    """
    waits = HostWaits()
    with _Operations(waits), _Functions(waits):
        yield waits


class _Operations(WatchingMode):
    """Sees each operation below autograd, those of the backward pass included."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if (
            name in _WAITING
            or (name in ("index", "index_put") and any(x.dtype == torch.bool for x in args[1] if x is not None))
            or (name == "repeat_interleave" and kwargs.get("output_size") is None and isinstance(args[-1], Tensor))
        ):
            self.waits._add(name)
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Sees what is no operation on the CPU."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        from_numbers = func in _FROM_NUMBERS and not any(isinstance(x, Tensor) for x in tree_leaves(args[-1:]))
        if func in _COPYING or from_numbers:
            self.waits._add(getattr(func, "__name__", str(func)))
        return func(*args, **kwargs)
