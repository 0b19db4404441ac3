"""Counts what a slot costs a model, so that ``SparseEnumELBO("auto")`` chooses by arithmetic and not by a clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pyro_sparse._autograd import WatchingMode
from pyro_sparse.distributions import SparseDistribution
from pyro_sparse.infer.expansion.layouts import Layout, Size

# What an element written by a pointwise operation costs, in floating-point operations of a matrix product.
ELEMENT_FLOPS = 50


class CountWork(WatchingMode):
    """
    Counts the work of the operations under it: matrix products and convolutions by their floating-point operations,
    everything by the elements that it writes. The same on every run, unlike time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total += ELEMENT_FLOPS * sum(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
            if (flops := flop_registry.get(func._overloadpacket)) is not None:
                self.total += flops(*args, **(kwargs or {}), out_val=out)
        return out


def probe(slots: int, expanded: bool, site: str | None = None) -> Layout:
    """
    So many outcomes at ``site`` and one at all others, one list for all rows or (``expanded``) a copy of
    it in each row. The values are not a support: only the cost of running on them means anything.
    """

    def layout(name: str, fn: SparseDistribution, shared_dims: tuple[int, ...]) -> Tensor:
        count = slots if name == site else 1
        support = fn.support_values(tuple(range(-len(fn.batch_shape), 0)))
        values = torch.cat([support[:count], *[support[:1]] * (count - len(support))])
        if name != site or not expanded:
            return values
        batch = [1 if dim - len(fn.batch_shape) in shared_dims else n for dim, n in enumerate(fn.batch_shape)]
        return values.expand(values.shape[:1] + torch.Size(batch) + fn.event_shape).contiguous()

    return layout


def slot_ratios(run: Callable[[Layout], Mapping[str, Size]]) -> dict[Size, float]:
    r"""
    For each site, the work of one slot with a value per row over that of one outcome shared by all rows (between 1
    and the number of rows; see :func:`~pyro_sparse.infer.expansion.layouts.cheapest`).

    Args:
        run: runs guide and model with a layout and returns the sparse sites by name. It is called once, and twice per
            site.
    """

    def work(layout: Layout) -> tuple[int, Mapping[str, Size]]:
        with CountWork() as count:
            sites = run(layout)
        return count.total, sites

    base, sites = work(probe(1, False))
    ratios = {}
    for site, size in sites.items():
        second_outcome = work(probe(2, False, site))[0] - base
        value_per_row = work(probe(1, True, site))[0] - base
        ratios[size] = 1.0 + value_per_row / max(second_outcome, 1)
    return ratios
