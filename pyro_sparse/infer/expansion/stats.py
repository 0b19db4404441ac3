"""What a step ran on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.infer.expansion.messengers import SparseSite
from pyro_sparse.infer.expansion.rows import Ran


@dataclass(frozen=True)
class SupportStats:
    """
    The supports and rows of one step.

    Attributes:
        mean: the mean support size over the rows of all sparse sites; masked rows do not count.
        max: the largest.
        model_rows: (example, outcome) rows on which the model ran, padding included: the largest number of
            log-probabilities at one model site, summed over particles that are not vectorised.
        dense_rows: what enumerating all K outcomes would have cost; where two sites meet in a third and one of them
            has a support of one outcome everywhere, a lower bound. None where nobody can list the outcomes.
        sites: for each sparse site its mean and largest support size.
        layouts: for each sparse site what it ran on: ``"padded"`` or ``"union"`` slots, ``"packed"`` rows, or all K
            outcomes, ``"dense"``. In mode ``"auto"`` that is the choice; of several particles the last one's.
    """

    mean: float
    max: int
    model_rows: int
    dense_rows: int | None
    sites: Mapping[str, tuple[float, int]]
    layouts: Mapping[str, str] = field(default_factory=dict)


@dataclass
class StepRecord:
    """What :meth:`summary` needs of a step, kept as tensors: reading them waits until the user asks."""

    sites: list[Mapping[str, SparseSite]] = field(default_factory=list)
    model_rows: int = 0
    dense_rows: int | None = 0
    layouts: dict[str, str] = field(default_factory=dict)

    def add(
        self,
        sites: Mapping[str, SparseSite],
        model_trace: Any,
        guide_trace: Any,
        ran_on: Ran | None,
        taken: Mapping[str, str],
    ) -> None:
        """
        Adds one particle's traces; on which rows the model ran, if there were any; and the layouts that were chosen for
        some sites, of which a packed one stands for slots where there were none.
        """
        dims = {**_enumerate_dims(guide_trace, sites), **_enumerate_dims(model_trace, sites)}
        listed = {name: site.num_outcomes for name, site in sites.items() if site.num_outcomes is not None}
        rows, dense_rows = 0, 0
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample" or "log_prob" not in site:
                continue
            sizes = {-1 - i: size for i, size in enumerate(reversed(site["log_prob"].shape))}
            rows = max(rows, prod(sizes.values()))
            for other, dim in dims.items():
                if other in listed and (sizes.get(dim, 1) > 1 or other == name):
                    sizes[dim] = listed[other]
            dense_rows = max(dense_rows, prod(sizes.values()))
        self.sites.append(sites)
        self.model_rows += rows if ran_on is None else ran_on.rows
        packed = frozenset() if ran_on is None else ran_on.sites
        for name, site in sites.items():
            on_slots = taken.get(name, site.layout).replace("packed", "padded")
            self.layouts[name] = "packed" if name in packed else on_slots
        self.dense_rows = None if self.dense_rows is None or len(listed) < len(sites) else self.dense_rows + dense_rows

    def summary(self) -> SupportStats:
        """The statistics; synchronises with the device."""
        pooled: dict[str, list[Tensor]] = {}
        for sites in self.sites:
            for name, site in sites.items():
                size = site.support_size
                pooled.setdefault(name, []).append(size[size > 0])  # without masked rows
        sizes = {name: torch.cat(parts) for name, parts in pooled.items()}
        everything = torch.cat([*sizes.values()]) if sizes else torch.zeros(1)
        return SupportStats(
            *_mean_and_max(everything),
            model_rows=self.model_rows,
            dense_rows=self.dense_rows,
            sites={name: _mean_and_max(size) for name, size in sizes.items()},
            layouts=self.layouts,
        )


def _mean_and_max(sizes: Tensor) -> tuple[float, int]:
    return (sizes.double().mean().item(), int(sizes.max())) if sizes.numel() else (0.0, 0)


def _enumerate_dims(trace: Any, sites: Mapping[str, SparseSite]) -> dict[str, int]:
    nodes = {name: trace.nodes[name] for name in sites if name in trace.nodes}
    return {name: n["infer"]["_enumerate_dim"] for name, n in nodes.items() if "_enumerate_dim" in n["infer"]}
