"""Training on several processes: what ``DistributedDataParallel`` does not say, or says a step too late."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyro_sparse.infer.pyro_internals import data_parallel


def require_every_parameter(owner: str, module: nn.Module, loss: Tensor) -> None:
    """
    Raises if a loss misses a parameter of a module in ``DistributedDataParallel``: another process, whose batch needs
    it, would wait for its gradient, and torch would not say so before the next step. Looked at under Pyro's validation,
    at each step: another batch may take another branch.
    """
    parallel = data_parallel()
    if parallel is None or parallel.module is not module or not (loss.requires_grad and is_validation_enabled()):
        return
    if parallel.find_unused_parameters or parallel.static_graph or not parallel.require_backward_grad_sync:
        return
    reached = _reached(loss)
    missing = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in reached]
    if missing:
        raise ValueError(
            f"{owner}: expected a loss of all parameters on every process, got one without {missing} on process "
            f"{torch.distributed.get_rank()}. Where a batch may leave out a site, "
            "DistributedDataParallel(..., find_unused_parameters=True); what no batch needs, requires_grad_(False)."
        )


def _reached(loss: Tensor) -> set[int]:
    """The leaves that a backward pass comes to, by identity."""
    waiting: list[Any] = [loss.grad_fn]
    seen, found = set(waiting), set()
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        waiting += following
    return found


class Means:
    """Says once, on the first process, that running means are not taken over processes."""

    def __init__(self) -> None:
        self._said = False

    def moved(self, owner: str, means: Iterator[Tensor]) -> None:
        """To be called where running means move, if there are any."""
        parallel = None if self._said else data_parallel()
        if parallel is None or next(means, None) is None:
            return
        self._said = True
        group = parallel.process_group
        if group.size() == 1 or group.rank() > 0:
            return
        whose = "process 0, from where they are sent to the others" if parallel.broadcast_buffers else "each process"
        warnings.warn(
            f"{owner}: expected running means over the whole batch, got those of {whose}, as the statistics of a batch "
            "normalisation. The gradient is unbiased all the same.",
            stacklevel=3,
        )
