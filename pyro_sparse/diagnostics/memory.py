"""Counts the bytes of the tensors that a piece of code makes, the same on every machine and at every run."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_leaves

from pyro_sparse._autograd import WatchingMode


class MemoryUse:
    """
    Live tensor bytes as :func:`peak_memory` counts them.

    Attributes:
        peak: the most bytes that were alive at once.
        current: the bytes that are alive now; after the block, those that outlived it.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._live: dict[int, int] = {}  # address of a storage -> its bytes
        self.current = 0

    def _knows(self, storage: UntypedStorage) -> bool:
        return storage._cdata in self._live

    def _record(self, storage: UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._live:
            self._live[address] = 0
            # What autograd saves keeps its storage alive, so this waits for autograd too.
            weakref.finalize(storage, self._forget, address).atexit = False
        self.current += storage.nbytes() - self._live[address]
        self._live[address] = storage.nbytes()  # again at each operation: resize_ and out= change it
        self.peak = max(self.peak, self.current)

    def _forget(self, address: int) -> None:
        self.current -= self._live.pop(address)

    def __repr__(self) -> str:
        return f"MemoryUse(peak={self.peak}, current={self.current})"


@contextmanager
def peak_memory() -> Iterator[MemoryUse]:
    r"""
    Counts the peak of the live tensor bytes made in a ``with`` block:

    .. math:: \mathrm{peak} = \max_t \sum_{s\ \text{alive at}\ t} \mathrm{bytes}(s)

    over the storages s that operations in the block made. A storage counts once however many views it has, from the
    operation that makes it until nothing holds it any more: no variable, no view, nothing saved for a backward pass.

    >>> with peak_memory() as memory:
    ...     x = torch.zeros(256, dtype=torch.float32)   # 1024 bytes
    ...     y = (x + 1).sum()                           # 1024 more, freed after the sum of 4 bytes
    >>> memory.peak, memory.current
    (2052, 1028)

    The number is a property of the program: the same at each run, and on the CPU and on a GPU where both run the same
    operations. It is not what the process takes from the system: it leaves out tensors made before the block, the
    workspace inside an operation, the rounding, caching and fragmentation of the allocator, and tensors made by other
    threads (a backward pass counts: autograd hands the block's context to its own threads). A tensor made from a numpy
    array counts, though the two share their bytes. ``torch.compile`` runs eagerly under it. It slows a program down,
    so do not measure time under it. Blocks may be nested; each counts what is made in it.

    Yields:
        A :class:`MemoryUse`, which may be read in the block and after it.

    Raises:
        NotImplementedError: if an operation in the block returns a tensor that is not strided.
    """
    use = MemoryUse()
    with _CountStorages(use):
        yield use


class _CountStorages(WatchingMode):
    """Sees each operation below autograd, those of the backward pass included."""

    def __init__(self, use: MemoryUse) -> None:
        super().__init__()
        self.use = use

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # torch.tensor and from_numpy make their tensor out of sight and pass it through lift_fresh.
        given = () if func is torch.ops.aten.lift_fresh.default else _storages(args, kwargs)
        older = {storage._cdata for storage in given if not self.use._knows(storage)}
        out = func(*args, **kwargs)
        for storage in _storages(out):
            if storage._cdata not in older:
                self.use._record(storage)
        return out


def _storages(*trees: Any) -> list[UntypedStorage]:
    tensors = [x for x in tree_leaves(trees) if isinstance(x, Tensor)]
    for x in tensors:
        if x.layout is not torch.strided:
            raise NotImplementedError(
                f"peak_memory: expected strided tensors, got one of layout {x.layout} and shape {tuple(x.shape)}. "
                "Leave sparse layouts out of the block: they have no single storage to count."
            )
    return [x.untyped_storage() for x in tensors]
