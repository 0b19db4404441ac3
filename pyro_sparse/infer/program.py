"""One run of guide and model: traces in, the ELBO's terms out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor

from pyro_sparse._autograd import reaches
from pyro_sparse.estimators import Estimator, Exact, LocalExpectation, RaoBlackwell, Site, UnorderedSet
from pyro_sparse.infer.collapse import ModelEnumMessenger, without_collapsed
from pyro_sparse.infer.costs import Costs, Frame, SlotDim, subsampling_scale, sum_to
from pyro_sparse.infer.dependencies import is_used, priors_that_see_their_draws
from pyro_sparse.infer.divergences import closed_form_divergences, same_order
from pyro_sparse.infer.estimator_messenger import EstimatorMessenger, PlatesUnknownError, data_plates
from pyro_sparse.infer.explanations import Alone, Several, explained
from pyro_sparse.infer.factors import sites_of_own_draws
from pyro_sparse.infer.law import law
from pyro_sparse.infer.masked_rows import MaskedRows, mask_within
from pyro_sparse.infer.provenance import LabelDraws, Provenance
from pyro_sparse.infer.relaxed import LinearLogProbs, not_relaxed, smooth_sites
from pyro_sparse.infer.terms import (
    attached_without_draw,
    compute_log_probs,
    find_upstream,
    make_terms,
    sampled,
    score_function,
    vectorized,
)

# Given all outcomes they are one and the same: the sum of the costs, weighted by probabilities.
_SUMS = (Exact.forward, RaoBlackwell.forward, UnorderedSet.forward, LocalExpectation.forward)


@dataclass
class ScoreSite:
    """A guide site that is trained through its log-probability."""

    site: Site
    estimator: Estimator
    frames: tuple[Frame, ...]
    dims: frozenset[int]  # slot dims: its own, and those of its ancestors
    own_dim: int | None
    scale: float
    own_draws: bool = False  # whether it stands for draws outside of sample statements, on which any term may depend

    @property
    def complete(self) -> bool:
        """Whether all its outcomes are laid out, and its estimator sums over them in no way of its own."""
        laid_out = self.own_dim is not None and (self.site.slots is None or self.site.slots.complete)
        return laid_out and type(self.estimator).forward in _SUMS

    def cost(self, run: Run) -> Tensor:
        """Its cost, unscaled: one for each element of its plates, each slot of its own and of its ancestors."""
        return self._unscaled(run.costs.at(self.frames, self.dims, self._reaching))

    @property
    def _reaching(self) -> str | None:
        return None if self.own_draws else self.site.name

    def attached_cost(self, run: Run) -> Tensor:
        """
        The same, attached to its slots' values. What later sites draw depends on those too: their log-probabilities,
        times their own costs, bring the derivative of the expectation over them.
        """
        cost = run.attached_costs.at(self.frames, self.dims, self._reaching)
        for later in run.scores:
            if later is not self and self.own_dim in later.dims:
                log_prob = run.costs.mask(later.site.log_prob, relaxed=False)  # log 0 less log 0 would be NaN
                signal = run.costs.at(later.frames, self.dims | later.dims, later._reaching)
                score = run.costs.average(signal * (log_prob - log_prob.detach()), self.dims)
                cost = cost + sum_to(score, later.frames, self.frames)
        return self._unscaled(cost)

    def average_cost(self, runs: list[Run]) -> Tensor:
        """The same in a run on the side (one run for each sequential outcome), averaged over all slots."""
        costs = [run.weighted(self._unscaled(run.costs.at(self.frames, (), self._reaching))) for run in runs]
        return sum(costs[1:], costs[0])

    def _unscaled(self, cost: Tensor) -> Tensor:
        return cost if self.scale == 1.0 else cost / self.scale


@dataclass
class Run:
    """The terms of one run, its score-function sites, and the weight of its sequentially enumerated outcomes."""

    costs: Costs
    scores: list[ScoreSite]
    log_weight: Tensor | None  # attached; None without sequential enumeration
    subsamples: Mapping[str, Tensor]
    guide_trace: Any
    messenger: EstimatorMessenger
    program: Program

    def elbo(self) -> Tensor:
        """The run's estimate of the ELBO, detached."""
        return self.costs.at(())

    @cached_property
    def attached_costs(self) -> Costs:
        """The costs with their derivatives, made when a site first asks for them."""
        return Costs(self.costs.terms, self.costs.slots, attached=True)

    @property
    def exact(self) -> bool:
        """Whether no estimator draws, so that :meth:`attached_elbo` is right in derivatives of every order."""
        return all(s.complete for s in self.scores) and not (self.messenger.reparameterized or self.messenger.split)

    def attached_elbo(self) -> Tensor:
        """The ELBO with the derivatives of its terms and of the probabilities that weight them."""
        slots = {**self.costs.slots}
        for score in self.scores:
            if score.own_dim in slots:
                slot = slots[score.own_dim]
                log_prob = torch.where(slot.weights > 0, score.site.log_prob, 0.0)
                slots[score.own_dim] = replace(slot, weights=slot.weights * (log_prob - log_prob.detach()).exp())
        elbo = Costs(self.costs.terms, slots, attached=True).at(())
        return elbo if self.log_weight is None else self.log_weight.exp() * elbo

    def weighted(self, value: Tensor) -> Tensor:
        """Times the probability of the sequentially enumerated outcomes, detached."""
        return value if self.log_weight is None else self.log_weight.detach().exp() * value

    def check_derivatives(self) -> None:
        """
        Raises if other terms depend on the value of a site whose estimator differentiates by it, and none of them has a
        derivative by it.
        """
        sites = smooth_sites(self.guide_trace, self.messenger.estimators)
        for name, what in {**sites, **{n: self.messenger.estimators[n] for n in self.messenger.split}}.items():
            value = self.guide_trace.nodes[name]["value"]
            paths = [term.path for term in self.costs.terms if term.name != name and term.path is not None]
            if not value.requires_grad or reaches(paths, value):
                continue
            if is_used(self.program, self.guide_trace, self.subsamples, name):
                got = "without a derivative by them: it rounds the value, or takes an index from it"
                raise not_relaxed({name: what}, got)

    @property
    def has_sequential(self) -> bool:
        """Whether a site asks for sequential enumeration."""
        nodes = self.guide_trace.nodes.values()
        return any(node["type"] == "sample" and node["infer"].get("enumerate") == "sequential" for node in nodes)


@dataclass
class Program:
    """
    A guide and a model with their arguments.

    Attributes:
        find: gives the estimator of a sample site, None for reparameterised ones.
        find_for_score: gives that of a score function for which no draw of a latent site accounts.
        count_plates: gives the number of dims that plates may have: those to the left belong to slots.
        nesting: that number; infinite where it is not known yet.
        alone: the same without a plate of particles around guide and model.
        analytic_kl: whether closed-form KL divergences stand for log-probabilities.
        graph: whether a site's cost has only the terms that depend on its draw.
        rows: what is known of masked rows.
    """

    model: Any
    guide: Any
    args: Any
    kwargs: Any
    find: Callable[[Any], Estimator | None]
    find_for_score: Callable[[Any], Estimator]
    count_plates: Callable[[], float]
    nesting: float
    alone: Alone
    analytic_kl: bool = False
    graph: bool = False
    rows: MaskedRows = field(default_factory=MaskedRows)

    def run(
        self,
        kind: str = "draw",
        subsamples: Mapping[str, Tensor] | None = None,
        wrap: Callable[[Any], Any] | None = None,
    ) -> Run:
        """
        Runs the guide, then the model on its values.

        Args:
            kind: "draw"; "mode" puts each score-function site without slots at its mode; "sample" as "draw".
            subsamples: the indices that plates are to reuse.
            wrap: goes around the guide, outside of what draws the slots.
        """
        # Of a run for one outcome of others there is no second.
        whole = self.rows.whole if wrap is None else None
        messenger = EstimatorMessenger(self.find, self.nesting, self.args, self.kwargs, subsamples, kind, whole)
        guide = messenger(self.guide)
        tracer = poutine.trace(guide if wrap is None else wrap(guide))
        provenance = Provenance() if self.graph else None
        with ExitStack() as stack:
            if provenance is not None:
                stack.enter_context(provenance.watching())
            put_back = stack.enter_context(self.rows.around(whole is not None))
            try:
                with self._explained(tracer, messenger):
                    model_trace, guide_trace = self._traces(tracer, messenger, provenance)
                    names = guide_trace.nodes.items()
                    indices = {name: node["value"] for name, node in names if site_is_subsample(node)}
                    compute_log_probs(
                        model_trace, guide_trace, self.nesting, messenger.reparameterized, messenger.split
                    )
            except PlatesUnknownError:
                self.nesting = self.count_plates()
                begun = tracer.msngr.trace  # else the branches that lead to slots would be drawn less often
                wrap = wrap or (lambda guide: guide)
                return self.run(kind, subsamples, lambda guide: poutine.replay(wrap(guide), trace=begun))
            if messenger.relaxed and self.graph:
                name = messenger.relaxed[0]
                raise ValueError(
                    f"EstimatorELBO, site '{name}': expected costs='plates' with "
                    f"{type(messenger.estimators[name]).__name__}, got 'graph'. Leave costs out."
                )
            kls = self._analytic_kls(model_trace, guide_trace, messenger, indices)
            if again := wrap is None and self.rows.found(messenger, [(guide_trace, model_trace)], kls):
                put_back()
        if again:
            return self.run(kind, subsamples)
        return self._read(model_trace, guide_trace, messenger, indices, kls, provenance)

    def _traces(self, tracer: Any, messenger: EstimatorMessenger, provenance: Provenance | None) -> tuple[Any, Any]:
        with ExitStack() as stack:
            if provenance is not None:
                stack.enter_context(LabelDraws(provenance))
            guide_trace = tracer.get_trace(*self.args, **self.kwargs)
        sites = [name for name, node in guide_trace.nodes.items() if node["type"] == "sample"]
        enumerated = ModelEnumMessenger(self.nesting, sites)(self.model)
        model = poutine.replay(enumerated, trace=guide_trace)
        model = LinearLogProbs(messenger.relaxed)(model) if messenger.relaxed else model
        return poutine.trace(model).get_trace(*self.args, **self.kwargs), guide_trace

    def _explained(self, tracer: Any, messenger: EstimatorMessenger) -> AbstractContextManager[None]:
        """Around runs of guide and model."""

        def several() -> Several | None:
            particles = self.model is not self.alone.model
            return Several.of(messenger.estimators, particles) if messenger.num_laid_out or particles else None

        return explained(self.alone, several, lambda: smooth_sites(tracer.msngr.trace, messenger.estimators))

    def _read(
        self,
        model_trace: Any,
        guide_trace: Any,
        messenger: EstimatorMessenger,
        subsamples: Mapping[str, Tensor],
        kls: Mapping[str, Tensor],
        provenance: Provenance | None,
    ) -> Run:
        names = attached_without_draw(guide_trace)
        own = sites_of_own_draws(self.guide, self.args, self.kwargs, guide_trace, subsamples, names)
        slots, scores, log_weight = self._score_sites(guide_trace, messenger, subsamples, kls, own)
        terms = make_terms(model_trace, guide_trace, kls, slots, own)
        if provenance is not None:
            find_upstream(terms, model_trace, guide_trace, kls, provenance)
        if messenger.split:  # other terms depend on such a draw by their derivative
            every = frozenset(guide_trace.stochastic_nodes)
            for term in terms:
                term.upstream = (every if term.upstream is None else term.upstream) - (messenger.split - {term.name})
        costs = Costs(terms, slots)
        if log_weight is not None and (dims := costs.slot_dims(log_weight)):
            raise _sequential_after(guide_trace, [slots[dim].site for dim in dims])
        for score in scores:
            score.dims = costs.with_ancestors(score.dims | costs.slot_dims(score.site.log_prob))
        return Run(costs, scores, log_weight, subsamples, guide_trace, messenger, self)

    def _score_sites(
        self,
        guide_trace: Any,
        messenger: EstimatorMessenger,
        subsamples: Mapping[str, Tensor],
        kls: Mapping[str, Tensor],
        own_draws: Collection[str],
    ) -> tuple[dict[int, SlotDim], list[ScoreSite], Tensor | None]:
        """The slot dims, the sites with a score function, and the log-probability of sequentially enumerated ones."""
        slots, scores = {}, []
        log_weight: Tensor | None = None
        for name, node in sampled(guide_trace):
            if name in messenger.reparameterized or (name in messenger.split and name in kls):
                continue
            log_prob, dim = score_function(node, messenger.laws.get(name)), node["infer"].get("_enumerate_dim")
            if is_identically_zero(log_prob) or (node["is_observed"] and name not in own_draws):
                continue
            estimator = self._estimator(name, node, messenger)
            if dim is not None:
                laid_out = messenger.slots.get(name)
                log_weights = log_prob.detach() if laid_out is None else laid_out.log_weights
                slots[dim] = SlotDim(name, vectorized(node), log_weights.exp(), estimator.relaxes)
            if node["infer"].get("_enum_total") is not None:
                _refuse_vectorized(node)
                log_weight = log_prob if log_weight is None else log_weight + log_prob
                continue
            frames = node["cond_indep_stack"]
            fn = messenger.laws.get(name, law(node["fn"]))
            site = Site(name, fn, data_plates(frames, subsamples, fn.batch_shape), self.args, self.kwargs, log_prob)
            site.value, site.slots = node["value"], messenger.slots.get(name)
            site.mask = mask_within(node, log_prob.shape)
            site.options = node["infer"].get("baseline", {})
            dims = frozenset() if dim is None else frozenset([dim])
            scores.append(ScoreSite(site, estimator, frames, dims, dim, subsampling_scale(frames), name in own_draws))
        return slots, scores, log_weight

    def _estimator(self, name: str, node: Any, messenger: EstimatorMessenger) -> Estimator:
        """That of a site with a score function."""
        estimator = None if node["is_observed"] else messenger.estimators.get(name) or self.find(node)
        return self.find_for_score(node) if estimator is None else estimator

    def _analytic_kls(
        self, model_trace: Any, guide_trace: Any, messenger: EstimatorMessenger, subsamples: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The KL divergence of each site that has a closed form, if asked for; in any case where it must have one."""
        required = messenger.reparameterized
        names = guide_trace.stochastic_nodes if self.analytic_kl else required
        circular: frozenset[str] = frozenset()
        if (names or messenger.split) and not same_order(model_trace, guide_trace):
            circular = priors_that_see_their_draws(self, guide_trace, subsamples)
        for name in messenger.split & circular:
            raise ValueError(
                f"EstimatorELBO, site '{name}': expected for SplitPathwise a prior that does not depend on what the "
                "guide draws after this site from its value, got one that does. Draw the sites in the model's order, "
                "or use LeaveOneOut."
            )
        kls = closed_form_divergences(model_trace, guide_trace, names, required, circular)
        kls = without_collapsed(kls, model_trace, guide_trace, required, messenger.split)
        if is_validation_enabled():
            for name in required:
                as_log_prob: Any = {**guide_trace.nodes[name], "log_prob": kls[name]}
                check_site_shape(as_log_prob, self.nesting)  # type: ignore[arg-type]
        return kls


def _refuse_vectorized(node: Any) -> None:
    if vectorized(node):
        raise ValueError(
            f"EstimatorELBO, site '{node['name']}': expected sequential enumeration outside of vectorised plates, got "
            "one inside. Use Exact(), which enumerates in parallel, or one particle at a time."
        )


def _sequential_after(guide_trace: Any, parents: list[str]) -> ValueError:
    sites = [name for name, node in sampled(guide_trace) if node["infer"].get("_enum_total") is not None]
    return ValueError(
        f"EstimatorELBO, site {sites}: expected sequential enumeration at a site whose probabilities are the same for "
        f"all values of others, got one that depends on {parents}, of which several values are run at once. Enumerate "
        "both alike, or use SparseEnumELBO."
    )
