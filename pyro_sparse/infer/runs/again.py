"""A run that keeps no graph: the backward pass makes it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_sparse.infer.runs.undisturbed import random_state


def made_again(run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """
    What ``run`` gives, without its graph: the backward pass makes it, by running again on the same random numbers, if
    it takes any.
    """
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop  # an older one changes warnings' filters

    while True:
        known = len(pyro.get_param_store())
        with set_checkpoint_early_stop(False):
            result: list[Tensor] = checkpoint(_Repeatable(run), use_reentrant=False, preserve_rng_state=False)
        if len(pyro.get_param_store()) == known:  # else what a first value drew would not be drawn again
            return result


class _Repeatable:
    """Runs the second time as the first: with the state that the generators had then, kept only if it drew."""

    def __init__(self, run: Callable[[], list[Tensor]]) -> None:
        self.run, self.begun = run, False
        self.before: Any = None

    def __call__(self) -> list[Tensor]:
        if self.begun:
            now = _state()
            if self.before is not None:
                _put_back(self.before)
            try:
                return self.run()
            finally:
                _put_back(now)
        self.begun, before, drawn = True, _state(), random_state()
        result = self.run()
        if random_state() != drawn:  # a state takes 8 kB for each part
            self.before = before
        return result


def _state() -> Any:
    return pyro.util.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _put_back(state: Any) -> None:
    pyro.util.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1])
