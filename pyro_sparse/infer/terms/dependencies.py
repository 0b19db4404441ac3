"""Which sites the terms of the ELBO depend on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import pyro
from pyro import poutine
from torch import Tensor

from pyro_sparse.infer.expansion.law import is_point_mass
from pyro_sparse.infer.runs.provenance import LabelDraws, Labels, Provenance
from pyro_sparse.infer.runs.undisturbed import undisturbed

Subsamples = Mapping[str, Tensor]
_L = TypeVar("_L")


def with_ancestors(labels: Collection[_L], parents: Mapping[_L, Collection[_L]]) -> frozenset[_L]:
    """These, such as a term's sites, with those that they depend on themselves, and so on."""
    found, todo = set(labels), list(labels)
    while todo:
        new = set(parents.get(todo.pop(), ())) - found
        found |= new
        todo += new
    return frozenset(found)


def is_used(program: Any, guide_trace: Any, subsamples: Subsamples, site: str) -> bool:
    """Whether any term but its own depends on a site's value, be it without a derivative."""
    found = _draws_behind(program, guide_trace, subsamples, lambda name: name != site)
    return any(site in labels for labels in found.values())


def without_draws(program: Any, guide_trace: Any, subsamples: Subsamples, names: Collection[str]) -> frozenset[str]:
    """Which of these sites have log-probabilities that depend on no draw: factors of parameters and data, say."""
    found = _draws_behind(program, guide_trace, subsamples, lambda name: name in names)
    return frozenset(name for name in names if not found.get(name))


def priors_that_see_their_draws(program: Any, guide_trace: Any, subsamples: Subsamples) -> frozenset[str]:
    """
    The latent sites whose distribution in the model depends on their own draw, through what the guide draws after it:
    their divergence, given those later draws, is none to average over the guide's distribution.
    """
    with _watched(program, guide_trace, subsamples) as (provenance, own, model_trace):
        own.compute_log_prob(lambda name, node: name not in subsamples)
        parents = {name: provenance.of(node.get("log_prob")) for name, node in own.nodes.items()}
        found = set()
        for name in (name for name in own.stochastic_nodes if name in model_trace and name not in subsamples):
            node = model_trace.nodes[name]
            value = node["value"].clone()
            provenance.mark(value, frozenset())
            labels = provenance.of(node["fn"].log_prob(value)) | provenance.of(node["mask"])
            if name in with_ancestors(labels, parents):
                found.add(name)
        return frozenset(found)


def _draws_behind(
    program: Any, guide_trace: Any, subsamples: Subsamples, keep: Callable[[str], bool]
) -> dict[str, Labels]:
    """The sites on whose draws each log-probability of a run depends, found by a run on the same draws."""
    with _watched(program, guide_trace, subsamples) as (provenance, *traces):
        found: dict[str, Labels] = {}
        for trace in traces:
            trace.compute_log_prob(lambda name, node: keep(name) and name not in subsamples)
            for name, node in trace.nodes.items():
                if "log_prob" in node:
                    found[name] = found.get(name, frozenset()) | provenance.of(node["log_prob"])
        return found


@contextmanager
def _watched(program: Any, guide_trace: Any, subsamples: Subsamples) -> Iterator[tuple[Provenance, Any, Any]]:
    """A run of guide and model on the draws of another one, which are labelled; without validation."""
    provenance = Provenance()
    # What point masses are at is computed again, to be seen: it may depend on draws.
    replayed = latent_values(guide_trace, subsamples, lambda node: not is_point_mass(node["fn"]))
    # Values may lie between the outcomes.
    with pyro.validation_enabled(False), undisturbed(), poutine.block(), provenance.watching():
        with LabelDraws(provenance):
            guide = poutine.replay(program.guide, trace=replayed)
            own = poutine.trace(guide).get_trace(*program.args, **program.kwargs)
        model = poutine.replay(program.model, trace=own)
        yield provenance, own, poutine.trace(model).get_trace(*program.args, **program.kwargs)


def latent_values(guide_trace: Any, subsamples: Subsamples, keep: Callable[[Any], bool]) -> poutine.Trace:
    """What a side run is to take from a run: values of latent sites, and the plates' indices."""
    replayed = poutine.Trace()
    for name in guide_trace.stochastic_nodes:
        if keep(guide_trace.nodes[name]):
            replayed.add_node(name, **guide_trace.nodes[name])
    for name, value in subsamples.items():
        replayed.add_node(name, type="sample", name=name, value=value, is_observed=False, infer={})
    return replayed
