"""Which sites the terms of the ELBO depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
from pyro import poutine
from torch import Tensor

from pyro_sparse.infer.provenance import LabelDraws, Labels, Provenance
from pyro_sparse.infer.undisturbed import undisturbed

Subsamples = Mapping[str, Tensor]


def with_ancestors(labels: Labels, parents: Mapping[str, Labels]) -> Labels:
    """A term's sites, with those that they depend on themselves."""
    found, todo = set(labels), list(labels)
    while todo:
        new = parents.get(todo.pop(), frozenset()) - found
        found |= new
        todo += new
    return frozenset(found)


def is_used(program: Any, guide_trace: Any, subsamples: Subsamples, site: str) -> bool:
    """Whether any term but its own depends on a site's value, be it without a derivative."""
    provenance = Provenance()
    replayed = latent_values(guide_trace, subsamples, lambda node: True)
    # Without validation, since values may lie between the outcomes.
    with pyro.validation_enabled(False), undisturbed(), poutine.block(), provenance.watching():
        with LabelDraws(provenance):
            guide = poutine.replay(program.guide, trace=replayed)
            own = poutine.trace(guide).get_trace(*program.args, **program.kwargs)
        model = poutine.replay(program.model, trace=own)
        traces = own, poutine.trace(model).get_trace(*program.args, **program.kwargs)
        for trace in traces:
            trace.compute_log_prob(lambda name, node: name != site and name not in subsamples)
        return any(
            site in provenance.of(node["log_prob"])
            for trace in traces
            for node in trace.nodes.values()
            if "log_prob" in node
        )


def latent_values(guide_trace: Any, subsamples: Subsamples, keep: Callable[[Any], bool]) -> poutine.Trace:
    """What a side run is to take from a run: values of latent sites, and the plates' indices."""
    replayed = poutine.Trace()
    for name in guide_trace.stochastic_nodes:
        if keep(guide_trace.nodes[name]):
            replayed.add_node(name, **guide_trace.nodes[name])
    for name, value in subsamples.items():
        replayed.add_node(name, type="sample", name=name, value=value, is_observed=False, infer={})
    return replayed
