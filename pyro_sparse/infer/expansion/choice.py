"""What mode "auto" has learned of a program, and what it chooses at each step: costs, never numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pyro_sparse.infer.expansion.layouts import WORTHWHILE, Layout, Size, cheapest, size
from pyro_sparse.infer.expansion.messengers import SparseSite
from pyro_sparse.infer.expansion.rows import Rows, rows_of
from pyro_sparse.infer.expansion.work import slot_ratios


class Choice:
    """
    Attributes:
        ratios: what a slot was counted to cost; see :func:`~pyro_sparse.infer.expansion.layouts.cheapest`.
        uncounted: sizes that the last run would have needed beside these.
        taken: the name of the layout of each site of the last run, ``"packed"`` for those to be packed if they can be.
    """

    def __init__(self) -> None:
        self.ratios: dict[Size, float] = {}
        self.uncounted: set[Size] = set()
        self.taken: dict[str, str] = {}
        self._unpackable: set[str] = set()
        self._meeting: set[frozenset[str]] = set()  # sites on all of which one site of the model depends

    def layout(self, nesting: int) -> Layout:
        """That of the next run."""
        self.uncounted.clear()
        self.taken.clear()
        return cheapest(self.ratios, nesting, self.uncounted, self.taken, self._unpackable)

    def count(self, run: Callable[[Layout], Mapping[str, SparseSite]], nesting: int) -> None:
        """Learns what slots cost, from runs on given layouts, of which each returns its sites."""

        def sizes(layout: Layout) -> dict[str, Size]:
            sites = run(layout).items()
            return {name: size(name, site.support_size.shape, site.num_outcomes, nesting) for name, site in sites}

        self.ratios.update(slot_ratios(sizes))

    def rows(self, owner: str, guide_trace: Any, agree: Callable[[Rows], bool]) -> Rows | None:
        """
        The rows for a model, where they cost least, and if they ``agree`` with ordinary runs; None for slots. What
        cannot be packed is not tried again.
        """
        packing = {name for name, layout in self.taken.items() if layout == "packed"}
        if not packing:
            return None
        try:
            rows = rows_of(owner, guide_trace, packing)
        except ValueError:  # there are none for these sites
            self._unpackable |= packing
            return None
        if rows is None or rows.sites != packing:
            self._unpackable |= packing - (frozenset() if rows is None else rows.sites)
            return None
        together = len(rows.sites) > 1
        if together and (rows.sites not in self._meeting or rows.count > WORTHWHILE * math.prod(rows.sizes)):
            return None
        if not agree(rows):
            self._unpackable |= rows.sites
            return None
        return rows

    def learn(self, sites: Mapping[str, SparseSite], model_trace: Any, guide_trace: Any) -> None:
        """From a run on slots: which sites meet in one of the model's. Else their sums can be taken one by one."""
        dims = {name: guide_trace.nodes[name]["infer"].get("_enumerate_dim") for name in sites if name in guide_trace}
        for node in model_trace.nodes.values():
            if node["type"] == "sample" and "log_prob" in node:
                shape = node["log_prob"].shape
                self._meeting.add(
                    frozenset(n for n, dim in dims.items() if dim and len(shape) >= -dim and shape[dim] > 1)
                )
