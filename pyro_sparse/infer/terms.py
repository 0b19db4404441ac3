"""Traces in, the terms of the ELBO out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyro.distributions.util import is_identically_zero
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_sparse.infer.collapse import collapsed_terms
from pyro_sparse.infer.costs import Frame, SlotDim, Term
from pyro_sparse.infer.dependencies import with_ancestors
from pyro_sparse.infer.divergences import same_order
from pyro_sparse.infer.law import law
from pyro_sparse.infer.provenance import Provenance
from pyro_sparse.infer.relaxed import with_fixed_value


def compute_log_probs(
    model_trace: Any, guide_trace: Any, nesting: float, without: Collection[str], fixed: Collection[str]
) -> None:
    """As :func:`pyro.infer.enum.get_importance_trace` once the programs have run, but for some sites."""
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, nesting)
    for trace in (guide_trace, model_trace):  # as prune_subsample_sites, but without a copy
        for name in [name for name, node in trace.nodes.items() if site_is_subsample(node)]:
            trace.remove_node(name)
    for name, node in model_trace.nodes.items():
        latent = node["type"] == "sample" and not node["is_observed"] and "_enumerate_dim" not in node["infer"]
        if latent and name not in guide_trace.nodes:
            raise ValueError(
                f"EstimatorELBO, site '{name}': expected every latent site of the model in the guide, got one in the "
                "model only. Add it to the guide; or sum it out, if it can be: infer={'enumerate': 'parallel'}."
            )
    _check_nesting(model_trace, guide_trace, nesting)
    for name in fixed:
        for node in (trace.nodes[name] for trace in (guide_trace, model_trace) if name in trace.nodes):
            node["fn"] = with_fixed_value(node["fn"])
    model_trace.compute_log_prob(lambda name, node: name not in without)
    for name in without:
        guide_trace.nodes[name]["score_parts"] = None  # else Pyro would compute them
    guide_trace.compute_score_parts()
    if is_validation_enabled():
        for node in [*model_trace.nodes.values(), *guide_trace.nodes.values()]:
            if node["type"] == "sample" and node["name"] not in without:
                check_site_shape(node, nesting)  # type: ignore[arg-type]


def _check_nesting(model_trace: Any, guide_trace: Any, nesting: float) -> None:
    """Raises where a plate takes a dim in which slots may lie: an earlier batch may have had fewer plates."""
    for name, node in sampled(guide_trace) + sampled(model_trace):
        for frame in vectorized(node):
            if -frame.dim > nesting:
                raise ValueError(
                    f"EstimatorELBO, site '{name}': expected at most {nesting} plates in dims of their own, as at the "
                    f"first step, got plate '{frame.name}' at dim {frame.dim}. Pass max_plate_nesting={-frame.dim}."
                )


def score_function(node: Any, drawn_from: Any) -> Any:
    """The log-probability of what a guide site drew, whatever mask lies on its costs."""
    drawn = law(node["fn"])
    if drawn is node["fn"] or "score_parts" in node["fn"].__dict__:
        return node["score_parts"].score_function
    return (drawn if drawn_from is None else drawn_from).score_parts(node["value"]).score_function


def attached_without_draw(guide_trace: Any) -> list[str]:
    """The factors and observed sites of a guide that claim not to be reparameterised, and have a derivative."""
    return [
        name
        for name, node in guide_trace.nodes.items()
        if node["type"] == "sample"
        and node["is_observed"]
        and not is_identically_zero(node["score_parts"].score_function)
        and node["log_prob"].requires_grad
    ]


def make_terms(
    model_trace: Any,
    guide_trace: Any,
    kls: Mapping[str, Tensor],
    slots: Mapping[int, SlotDim],
    own: Collection[str],
) -> list[Term]:
    terms, gone = collapsed_terms(model_trace, guide_trace)
    for name, node in model_trace.nodes.items():
        if node["type"] == "sample" and name not in kls and name not in gone:
            value = node["log_prob"]
            path = value if slots else node["log_prob_sum"]
            terms.append(Term(name, value, vectorized(node), path))
    earlier: set[str] = set() if same_order(model_trace, guide_trace) else set(guide_trace.stochastic_nodes)
    for name, node in guide_trace.nodes.items():
        if node["type"] != "sample":
            continue
        if name in kls:  # it depends on the draws before its own, at most; in any case not on its own
            terms.append(Term(name, -kls[name], vectorized(node), -kls[name], frozenset(earlier) - {name}))
        else:
            entropy = node["log_prob"] if node["is_observed"] and name not in own else node["score_parts"].entropy_term
            path = None if is_identically_zero(entropy) else -entropy
            terms.append(Term(name, -node["log_prob"], vectorized(node), path))
        earlier.add(name)
    return terms


def find_upstream(terms: list[Term], model_trace: Any, guide_trace: Any, kls: Any, provenance: Provenance) -> None:
    """Says of each term on which sites it depends, and on which those do."""
    model = {name: provenance.of(node.get("log_prob")) for name, node in sampled(model_trace)}
    guide = {name: provenance.of(kls.get(name, node.get("log_prob"))) for name, node in sampled(guide_trace)}
    known = [term for term in terms if not term.collapsed]  # the model's, then all of the guide's
    for i, term in enumerate(known):
        labels = (model if i < len(known) - len(guide) else guide)[term.name]
        term.upstream = with_ancestors(labels, guide)


def sampled(trace: Any) -> list[tuple[str, Any]]:
    return [(name, node) for name, node in trace.nodes.items() if node["type"] == "sample"]


def vectorized(node: Any) -> frozenset[Frame]:
    return frozenset(frame for frame in node["cond_indep_stack"] if frame.vectorized)
