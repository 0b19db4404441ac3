"""What a run costs, and how good its gradients are: what to look at before and after a change of guide or loss."""

from __future__ import annotations

from pyro_sparse.diagnostics.gradient_report import EstimatorReport, GradientReport, gradient_report
from pyro_sparse.diagnostics.memory import MemoryUse, peak_memory

__all__ = [
    # gradients
    "gradient_report",
    "GradientReport",
    "EstimatorReport",
    # memory
    "peak_memory",
    "MemoryUse",
]
