"""Traces in, the terms of the ELBO and its score functions out: the one place that reads them for estimators."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pyro.distributions.util import is_identically_zero
from pyro.infer.util import is_validation_enabled
from pyro.util import check_site_shape
from torch import Tensor

from pyro_sparse.estimators import Estimator, Site
from pyro_sparse.infer.expansion.estimator_messenger import data_plates
from pyro_sparse.infer.expansion.law import law
from pyro_sparse.infer.expansion.masked_rows import mask_within
from pyro_sparse.infer.runs.traces import Traces, sampled, vectorized
from pyro_sparse.infer.terms.collapse import collapsed_terms, without_collapsed
from pyro_sparse.infer.terms.costs import Costs, SlotDim, Term, subsampling_scale
from pyro_sparse.infer.terms.dependencies import priors_that_see_their_draws, with_ancestors
from pyro_sparse.infer.terms.divergences import closed_form_divergences, same_order
from pyro_sparse.infer.terms.factors import sites_of_own_draws
from pyro_sparse.infer.terms.scores import Run, ScoreSite


@dataclass(frozen=True)
class Reader:
    """
    Reads traces.

    Args:
        find: gives the estimator of a sample site, None for reparameterised ones.
        find_for_score: gives that of a score function for which no draw of a latent site accounts.
        analytic_kl: whether closed-form KL divergences stand for log-probabilities.
    """

    find: Callable[[Any], Estimator | None]
    find_for_score: Callable[[Any], Estimator]
    analytic_kl: bool = False

    def divergences(self, traces: Traces) -> dict[str, Tensor]:
        """The KL divergence of each site that has a closed form, if asked for; in any case where it must have one."""
        with traces.watching():
            return self._divergences(traces)

    def _divergences(self, traces: Traces) -> dict[str, Tensor]:
        required, split = traces.expansion.reparameterized, traces.expansion.split
        names = traces.guide.stochastic_nodes if self.analytic_kl else required
        if names and traces.rows is not None:
            raise ValueError(
                f"EstimatorELBO, site '{names[0]}': expected no closed-form KL divergence beside packed rows, of which "
                "the prior is known there only, got one. Leave out what asks for it (analytic_kl, StraightThrough), or "
                "use Exact(mode='padded')."
            )
        circular: frozenset[str] = frozenset()
        if (names or split) and not same_order(traces.model, traces.guide):
            circular = priors_that_see_their_draws(traces.program, traces.guide, traces.subsamples)
        for name in split & circular:
            raise ValueError(
                f"EstimatorELBO, site '{name}': expected for SplitPathwise a prior that does not depend on what the "
                "guide draws after this site from its value, got one that does. Draw the sites in the model's order, "
                "or use LeaveOneOut."
            )
        kls = closed_form_divergences(traces.model, traces.guide, names, required, circular)
        kls = without_collapsed(kls, traces.model, traces.guide, required, split)
        if is_validation_enabled():
            for name in required:
                as_log_prob: Any = {**traces.guide.nodes[name], "log_prob": kls[name]}
                check_site_shape(as_log_prob, traces.program.nesting)
        return kls

    def read(self, traces: Traces, kls: Mapping[str, Tensor]) -> Run:
        """
        The terms, the sites with a score function, and the weight of sequentially enumerated outcomes.

        Args:
            traces: of one run.
            kls: its closed-form divergences, as :meth:`divergences` gives them.
        """
        _refuse_relaxed(traces)
        program, names = traces.program, attached_without_draw(traces.guide)
        own = sites_of_own_draws(program.guide, program.args, program.kwargs, traces.guide, traces.subsamples, names)
        scored = self._scored(traces, kls, own)
        slots = self._slots(traces, scored)
        costs = Costs(self._terms(traces, kls, slots, own), slots)
        sequential = [name for name, node, _ in scored if "_enum_total" in node["infer"]]
        log_weight = _log_weight(traces, scored, sequential)
        if log_weight is not None and (dims := costs.slot_dims(log_weight)):
            raise _sequential_after(sequential, [slots[dim].site for dim in dims])
        scores = [
            self._score_site(traces, name, node, log_prob, costs, name in own)
            for name, node, log_prob in scored
            if name not in sequential
        ]
        return Run(costs, scores, log_weight, traces)

    def _scored(
        self, traces: Traces, kls: Mapping[str, Tensor], own_draws: Collection[str]
    ) -> list[tuple[str, Any, Tensor]]:
        """The guide's sites that have a score function, with it."""
        expansion, found = traces.expansion, []
        for name, node in sampled(traces.guide):
            if name in expansion.reparameterized or (name in expansion.split and name in kls):
                continue
            log_prob = score_function(node, expansion.laws.get(name))
            if not is_identically_zero(log_prob) and not (node["is_observed"] and name not in own_draws):
                found.append((name, node, log_prob))
        return found

    def _slots(self, traces: Traces, scored: list[tuple[str, Any, Tensor]]) -> dict[int, SlotDim]:
        """The dims in which sites have several values."""
        slots = {}
        for name, node, log_prob in scored:
            if (dim := node["infer"].get("_enumerate_dim")) is not None:
                laid_out = traces.expansion.slots.get(name)
                log_weights = log_prob.detach() if laid_out is None else laid_out.log_weights
                slots[dim] = SlotDim(name, vectorized(node), log_weights.exp(), name in traces.expansion.relaxed)
        return slots

    def _score_site(
        self, traces: Traces, name: str, node: Any, log_prob: Tensor, costs: Costs, own_draws: bool
    ) -> ScoreSite:
        frames, dim = node["cond_indep_stack"], node["infer"].get("_enumerate_dim")
        fn = traces.expansion.laws.get(name, law(node["fn"]))
        site = Site(
            name,
            fn,
            data_plates(frames, traces.subsamples, fn.batch_shape),
            traces.program.args,
            traces.program.kwargs,
            log_prob,
            mask=mask_within(node, log_prob.shape),
            value=node["value"],
            slots=traces.expansion.slots.get(name),
            options=node["infer"].get("baseline", {}),
        )
        dims = costs.with_ancestors(costs.slot_dims(log_prob) | ({dim} if dim is not None else set()))
        estimator = self._estimator(traces, name, node)
        return ScoreSite(site, estimator, frames, dims, dim, subsampling_scale(frames), own_draws)

    def _estimator(self, traces: Traces, name: str, node: Any) -> Estimator:
        """That of a site with a score function."""
        estimator = None if node["is_observed"] else traces.expansion.estimators.get(name) or self.find(node)
        return self.find_for_score(node) if estimator is None else estimator

    def _terms(
        self, traces: Traces, kls: Mapping[str, Tensor], slots: Mapping[int, SlotDim], own: Collection[str]
    ) -> list[Term]:
        """The terms, and on which sites each depends, as far as that is known."""
        terms = make_terms(traces, kls, slots, own)
        if traces.provenance is not None:
            terms = with_upstream(terms, traces, kls)
        split = traces.expansion.split
        if not split:
            return terms
        every = frozenset(traces.guide.stochastic_nodes)  # others depend on such a draw by their derivative
        return [replace(t, upstream=(every if t.upstream is None else t.upstream) - (split - {t.name})) for t in terms]


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
        for name, node in sampled(guide_trace)
        if node["is_observed"]
        and not is_identically_zero(node["score_parts"].score_function)
        and node["log_prob"].requires_grad
    ]


def make_terms(
    traces: Traces, kls: Mapping[str, Tensor], slots: Mapping[int, SlotDim], own: Collection[str]
) -> list[Term]:
    """The summands of the ELBO, the model's first."""
    terms, gone = collapsed_terms(traces.model, traces.guide)
    for name, node in sampled(traces.model):
        if name not in kls and name not in gone:
            value = node["log_prob"]
            terms.append(Term(name, value, vectorized(node), value if slots else node["log_prob_sum"]))
    in_order = same_order(traces.model, traces.guide)
    earlier: set[str] = set() if in_order else set(traces.guide.stochastic_nodes)
    for name, node in sampled(traces.guide):
        if name in kls:  # it depends on the draws before its own, at most; in any case not on its own
            terms.append(Term(name, -kls[name], vectorized(node), -kls[name], frozenset(earlier) - {name}))
        else:
            entropy = node["log_prob"] if node["is_observed"] and name not in own else node["score_parts"].entropy_term
            path = None if is_identically_zero(entropy) else -entropy
            terms.append(Term(name, -node["log_prob"], vectorized(node), path))
        earlier.add(name)
    return terms


def with_upstream(terms: list[Term], traces: Traces, kls: Mapping[str, Tensor]) -> list[Term]:
    """Says of each term on which sites it depends, and on which those do."""
    of: Any = traces.provenance
    model = {name: of.of(node.get("log_prob")) for name, node in sampled(traces.model)}
    guide = {name: of.of(kls.get(name, node.get("log_prob"))) for name, node in sampled(traces.guide)}
    of_model = sum(not term.collapsed for term in terms) - len(guide)  # the model's, then all of the guide's
    found, i = [], 0
    for term in terms:
        if not term.collapsed:
            labels = (model if i < of_model else guide)[term.name]
            term, i = replace(term, upstream=with_ancestors(labels, guide)), i + 1
        found.append(term)
    return found


def _log_weight(traces: Traces, scored: list[tuple[str, Any, Tensor]], sequential: list[str]) -> Tensor | None:
    """The log-probability of the sequentially enumerated outcomes."""
    total: Tensor | None = None
    for name, node, log_prob in scored:
        if name not in sequential:
            continue
        if vectorized(node):
            raise ValueError(
                f"EstimatorELBO, site '{name}': expected sequential enumeration outside of vectorised plates, got "
                "one inside. Use Exact(), which enumerates in parallel, or one particle at a time."
            )
        total = log_prob if total is None else total + log_prob
    return total


def _refuse_relaxed(traces: Traces) -> None:
    expansion = traces.expansion
    if expansion.relaxed and traces.provenance is not None:
        name = expansion.relaxed[0]
        raise ValueError(
            f"EstimatorELBO, site '{name}': expected costs='plates' with "
            f"{type(expansion.estimators[name]).__name__}, got 'graph'. Leave costs out."
        )


def _sequential_after(sites: list[str], parents: list[str]) -> ValueError:
    return ValueError(
        f"EstimatorELBO, site {sites}: expected sequential enumeration at a site whose probabilities are the same for "
        f"all values of others, got one that depends on {parents}, of which several values are run at once. Enumerate "
        "both alike, or use SparseEnumELBO."
    )
