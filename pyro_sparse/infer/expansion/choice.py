"""What mode "auto" has learned of a program, and what it chooses at each step: costs, never numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pyro_sparse.infer.expansion.layouts import WORTHWHILE, Layout, Size, cheapest
from pyro_sparse.infer.expansion.messengers import SparseSite
from pyro_sparse.infer.expansion.rows import Rows, rows_of


class Choice:
    """
    Attributes:
        ratios: what a slot was counted to cost; see :func:`~pyro_sparse.infer.expansion.layouts.cheapest`.
        uncounted: sizes that the last step would have needed beside these.
    """

    def __init__(self) -> None:
        self.ratios: dict[Size, float] = {}
        self.uncounted: set[Size] = set()
        self._packing: set[str] = set()  # sites of this step for which packed rows are the cheapest
        self._unpackable: set[str] = set()
        self._meeting: set[frozenset[str]] = set()  # sites on all of which one site of the model depends

    def layout(self, nesting: int) -> Layout:
        """That of the next run."""
        self.uncounted.clear()
        self._packing.clear()
        return cheapest(self.ratios, nesting, self.uncounted, self._packing, self._unpackable)

    def refuse(self, rows: Rows) -> None:
        """Packs these sites never again."""
        self._unpackable |= rows.sites

    def rows(self, owner: str, guide_trace: Any) -> Rows | None:
        """The rows for a model, where they cost least; None for slots."""
        if not self._packing:
            return None
        try:
            rows = rows_of(owner, guide_trace, self._packing)
        except ValueError:  # there are none for these sites
            self._unpackable |= self._packing
            return None
        if rows is None or rows.sites != self._packing:
            self._unpackable |= self._packing - (frozenset() if rows is None else rows.sites)
            return None
        together = len(rows.sites) > 1
        if together and (rows.sites not in self._meeting or rows.count > WORTHWHILE * math.prod(rows.sizes)):
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
