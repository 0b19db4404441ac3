"""Pyro's own way to ask for a baseline, read as one of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.estimators import Baseline, MovingAverage
from pyro_sparse.estimators.base import Site


class PyroBaseline(Baseline):
    """Pyro's own ``infer={"baseline": {...}}``: decaying average (ours, pooled and bias-corrected), network, value."""

    OPTIONS = ("nn_baseline", "nn_baseline_input", "use_decaying_avg_baseline", "baseline_beta", "baseline_value")

    def __init__(self, site: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        if unknown := set(options) - set(self.OPTIONS):
            raise ValueError(
                f"EstimatorELBO, site '{site}': expected infer['baseline'] with keys among {self.OPTIONS}, got "
                f"{sorted(unknown)}. Use those, or infer={{'estimator': ...}}."
            )
        if options.get("nn_baseline") is not None and options.get("baseline_value") is not None:
            raise ValueError(
                f"EstimatorELBO, site '{site}': expected nn_baseline or baseline_value, got both. Leave one out."
            )
        decaying = options.get("use_decaying_avg_baseline", False)
        self.average = MovingAverage(options.get("baseline_beta", 0.9)) if decaying else None

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        value = cost.new_zeros(()) if self.average is None else self.average(cost, site)[0]
        learned = site.options.get("baseline_value")
        if (network := site.options.get("nn_baseline")) is not None:
            learned = network(_detach(site.options["nn_baseline_input"]))
        if learned is None:
            return value, 0.0
        # Broadcasting to the left only: a (B, 1) output would make a (B, B) table of differences.
        if learned.shape != cost.shape[cost.dim() - learned.dim() :]:
            raise ValueError(
                f"EstimatorELBO, site '{site.name}': expected a baseline of the cost's shape {tuple(cost.shape)}, got "
                f"{tuple(learned.shape)}. Squeeze the network's output."
            )
        value = value + learned
        error = cost - value
        return value, (error if site.mask is None else torch.where(site.mask, error, 0.0)).square().sum()

    def update(self, cost: Tensor, site: Site) -> None:
        if self.average is not None:
            self.average.update(cost, site)


def _detach(value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, value)
