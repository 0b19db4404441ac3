"""What ``pyro.factor(..., has_rsample=False)`` and observed sites in a guide mean for a gradient."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pyro import poutine
from pyro.distributions.score_parts import ScoreParts
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sparse.infer.expansion.law import is_point_mass
from pyro_sparse.infer.runs.provenance import OWN, LabelDraws, Provenance
from pyro_sparse.infer.runs.undisturbed import random_state_of_python, undisturbed
from pyro_sparse.infer.terms.dependencies import Subsamples, latent_values

Guide = Callable[..., Any]


def sites_of_own_draws(
    guide: Guide, args: Any, kwargs: Any, trace: Any, subsamples: Subsamples, names: Collection[str]
) -> Collection[str]:
    """
    Which of these guide sites are log-densities of what the guide drew outside of its sample statements, as in
    ``z = q.sample(); pyro.factor("q_z", q.log_prob(z), has_rsample=False)``. The others are costs like any term of the
    model: a classification loss, say. Their values decide, at each step anew: whether they depend on such a draw.

    Args:
        guide, args, kwargs: run once more, without a trace, if there are any names.
        trace: one of its runs, whose draws are taken again.
        subsamples: the indices that plates had in it.
        names: factors and observed sites.
    """
    if not names:
        return ()
    provenance = Provenance(own_draws=True)
    # What point masses are at is drawn again, to be seen.
    replayed = latent_values(trace, subsamples, lambda node: not is_point_mass(node["fn"]))
    with undisturbed(), poutine.block(), provenance.watching(), LabelDraws(provenance, own_draws=True):
        before = random_state_of_python()
        again = poutine.trace(poutine.replay(guide, trace=replayed)).get_trace(*args, **kwargs)
        if random_state_of_python() != before:  # where such a draw went is not seen
            return frozenset(names)
        again.compute_log_prob(lambda name, node: name in names)
        return {name for name in names if OWN in provenance.of(again.nodes[name].get("log_prob"))}


def as_costs(guide: Guide, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Guide:
    """
    The guide, with those of its factors and observed sites that are costs read as terms of the loss, which have their
    own derivative and no score function: for ELBOs that would take each for the density of a draw.
    """

    @functools.cache
    def own() -> Collection[str]:  # asked only if there is such a site: it runs the guide
        with undisturbed(), poutine.block():
            trace = poutine.trace(guide).get_trace(*args, **kwargs)
        subsamples: Any = {name: node["value"] for name, node in trace.nodes.items() if site_is_subsample(node)}
        for name in subsamples:
            trace.remove_node(name)
        return sites_of_own_draws(guide, args, kwargs, trace, subsamples, trace.observation_nodes)

    wrapped: Guide = _Costs(own)(guide)
    return wrapped


class _Costs(Messenger):
    def __init__(self, own: Callable[[], Collection[str]]) -> None:
        super().__init__()
        self._own = own

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not msg["fn"].has_rsample:
            msg["fn"] = self._as_cost(msg["name"], msg["fn"])

    def _as_cost(self, name: str, fn: Any) -> Any:
        view = copy.copy(fn)
        view.__dict__["score_parts"] = functools.partial(self._score_parts, name, fn)
        # A plate of particles lies around all others and this.
        view.__dict__["expand"] = lambda *args, **kwargs: self._as_cost(name, fn.expand(*args, **kwargs))
        return view

    def _score_parts(self, name: str, fn: Any, value: Tensor) -> ScoreParts:
        if name in self._own():
            parts: ScoreParts = fn.score_parts(value)
            return parts
        log_prob = fn.log_prob(value)
        return ScoreParts(log_prob, 0, log_prob)  # type: ignore[arg-type]
