"""What a run costs: the figures to look at before and after a change of guide or loss."""

from __future__ import annotations

from pyro_sparse.diagnostics.memory import MemoryUse, peak_memory

__all__ = ["MemoryUse", "peak_memory"]
