"""A run that keeps no graph: the backward pass makes it again."""

from __future__ import annotations

from collections.abc import Callable

import pyro
from torch import Tensor

from pyro_sparse.infer.runs.undisturbed import Generators, generators, random_state, set_generators


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
        self.before: Generators | None = None

    def __call__(self) -> list[Tensor]:
        if self.begun:
            now = generators()
            if self.before is not None:
                set_generators(self.before)
            try:
                return self.run()
            finally:
                set_generators(now)
        self.begun, before = True, generators()
        result = self.run()
        if random_state() != random_state(before):  # a state takes 8 kB for each part
            self.before = before
        return result
