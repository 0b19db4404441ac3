"""Runs on the side that leave the random number generators as they were, and what tells whether one draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without gradients; on leaving, the generators of torch (CPU, GPUs), Python and numpy are as before."""
    state = pyro.util.get_rng_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        pyro.util.set_rng_state(state)


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
