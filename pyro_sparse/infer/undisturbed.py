"""Runs on the side that leave random numbers, modules' buffers and parameters as they were, and what tells of draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import nn


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without gradients; on leaving, buffers and generators (of torch, CPU and GPUs, Python, numpy) are as before."""
    state = pyro.util.get_rng_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), buffers_as_they_were():
            yield
    finally:
        pyro.util.set_rng_state(state)


@contextmanager
def buffers_as_they_were() -> Iterator[None]:
    """
    On leaving, each module that was called has the buffers it had, so that batch normalisation counts a step once.
    The run writes to copies: an earlier run's graph may need what is in the buffers.
    """
    kept: dict[nn.Module, dict[str, Any]] = {}

    def before_forward(module: nn.Module, args: Any) -> None:
        if module._buffers and module not in kept:
            kept[module] = dict(module._buffers)
            module._buffers.update({name: x if x is None else x.clone() for name, x in module._buffers.items()})

    hook = nn.modules.module.register_module_forward_pre_hook(before_forward)
    try:
        yield
    finally:
        hook.remove()
        for module, buffers in kept.items():
            module._buffers.update(buffers)


@contextmanager
def no_new_parameters() -> Iterator[None]:
    """
    On leaving, the param store holds what it held: a parameter that the run made is made again, by the random numbers
    that its first value draws. One tensor may have several names in it.
    """
    store: Any = pyro.get_param_store()
    before = dict(store._params), dict(store._param_to_name), dict(store._constraints)
    try:
        yield
    finally:
        store._params, store._param_to_name, store._constraints = before


def random_state() -> tuple[Any, ...]:
    """The state of every generator that a program may draw from, to compare."""
    state = pyro.util.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return *(x.numpy().tobytes() for x in [state["torch"], *cuda]), *random_state_of_python()


def random_state_of_python() -> tuple[Any, ...]:
    """That of the generators that torch does not know: Python's and numpy's."""
    state = pyro.util.get_rng_state()
    _, keys, *position = state["numpy"]
    return state["random"], keys.tobytes(), position
