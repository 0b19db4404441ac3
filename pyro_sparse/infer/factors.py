"""What ``pyro.factor(..., has_rsample=False)`` and observed sites in a guide mean for a gradient."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from pyro.distributions.score_parts import ScoreParts
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_sparse.infer.undisturbed import random_state, undisturbed


def as_costs(guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """
    The guide, with its factors and observed sites read as terms of the loss, which have their own derivative and no
    score function: the gradient of the loss which every ELBO reports, if all draws are sample sites'. In a guide that
    draws by hand (or anything outside of its sites: dropout, a random first value) such a site may hold the density of
    the draw, and keeps the score function that Pyro gives it.
    """
    wrapped: Callable[..., Any] = _Costs(functools.cache(lambda: _draws_by_hand(guide, args, kwargs)))(guide)
    return wrapped


class _Costs(Messenger):
    def __init__(self, by_hand: Callable[[], bool]) -> None:
        super().__init__()
        self._by_hand = by_hand  # asked only if there is such a site: it runs the guide

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not msg["fn"].has_rsample:
            view = copy.copy(msg["fn"])
            view.__dict__["score_parts"] = functools.partial(self._score_parts, msg["fn"])
            msg["fn"] = view

    def _score_parts(self, fn: Any, value: Tensor) -> ScoreParts:
        if self._by_hand():
            parts: ScoreParts = fn.score_parts(value)
            return parts
        log_prob = fn.log_prob(value)
        return ScoreParts(log_prob, 0, log_prob)  # type: ignore[arg-type]


def _draws_by_hand(guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the guide draws random numbers although the values of all its sample sites are given."""
    with undisturbed(), poutine.block():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
        before = random_state()
        poutine.replay(guide, trace=trace)(*args, **kwargs)
        return random_state() != before
