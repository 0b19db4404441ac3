"""
What ``pyro.markov`` keeps apart: the dims of steps outside of its window are given to later sites, so that a site that
depends on one of those would be read as depending on another. Pyro does not look; where sizes agree, its number is
wrong.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pyro
from pyro import poutine
from pyro.poutine.messenger import Messenger

from pyro_sparse.infer.expansion.messengers import outside_window
from pyro_sparse.infer.pyro_internals import is_subsample
from pyro_sparse.infer.runs.explanations import Alone
from pyro_sparse.infer.runs.provenance import Provenance
from pyro_sparse.infer.runs.undisturbed import undisturbed


def require_window(alone: Alone, enumerated: Collection[str]) -> None:
    """
    Raises if a site of guide or model depends on an enumerated one that is outside of its ``pyro.markov``'s window.

    Args:
        alone: the program, which is run once, on single values.
        enumerated: the sites with several values in a dim of their own.
    """
    provenance = Provenance()
    guide = _Window(alone.owner, provenance, enumerated)
    model = _Window(alone.owner, provenance, enumerated)
    args, kwargs = alone.args, alone.kwargs
    with undisturbed(), poutine.block(), pyro.validation_enabled(False), provenance.watching():
        guide_trace = poutine.trace(guide(alone.guide)).get_trace(*args, **kwargs)
        poutine.replay(model(alone.model), trace=guide_trace)(*args, **kwargs)


class _Window(Messenger):
    """Labels each value by its own site's name only, and looks which labels a distribution has."""

    def __init__(self, owner: str, provenance: Provenance, enumerated: Collection[str]) -> None:
        super().__init__()
        self.owner = owner
        self.provenance = provenance
        self.carriers = set(enumerated)  # and what is computed from their values without a sum
        self.depths: dict[str, int] = {}  # of the sites in a pyro.markov
        self.scopes: dict[str, dict[str, int]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        # A replayed site has the guide's infer afterwards.
        self.scopes[msg["name"]] = dict(msg["infer"].get("_markov_scope") or {})
        if "_markov_depth" in msg["infer"]:
            self.depths[msg["name"]] = msg["infer"]["_markov_depth"]

    def _pyro_post_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if is_subsample(fn) or self.provenance.of(None):  # all that follows an .item() depends on it
            return
        value = msg["value"].clone()
        self.provenance.mark(value, frozenset())
        labels = self.provenance.of(fn.log_prob(value)) & self.carriers
        scope = self.scopes[name]
        for other in sorted(labels):
            if other in self.depths and scope.get(other) != self.depths[other]:
                raise outside_window(self.owner, name, f"on site '{other}'")
        if not msg["is_observed"]:
            if labels:
                self.carriers.add(name)
            self.provenance.mark(value, frozenset({name}))
            msg["value"] = value
