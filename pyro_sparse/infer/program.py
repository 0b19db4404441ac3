"""One run of guide and model: traces in, the ELBO's terms out."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask, sum_rightmost
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical, kl_divergence

from pyro_sparse.distributions.kl import kl_bits, kl_categorical
from pyro_sparse.distributions.mixed_base import UnknownDivergence
from pyro_sparse.estimators import Estimator, Exact, LocalExpectation, RaoBlackwell, Site, UnorderedSet
from pyro_sparse.infer.costs import Costs, Frame, SlotDim, Term, subsampling_scale, sum_to
from pyro_sparse.infer.dependencies import Dependencies
from pyro_sparse.infer.estimator_messenger import EstimatorMessenger, data_plates
from pyro_sparse.infer.relaxed import LinearLogProbs, not_relaxed, refuse_indices, smooth_sites, with_fixed_value

_BRANCHES = re.compile(
    "Boolean value of Tensor with more than one value|cannot be converted to Scalar|only integer tensors of a single"
)
# Given all outcomes they are one and the same: the sum of the costs, weighted by probabilities.
_SUMS = (Exact.forward, RaoBlackwell.forward, UnorderedSet.forward, LocalExpectation.forward)


@dataclass
class ScoreSite:
    """A guide site that is trained through its log-probability."""

    site: Site
    estimator: Estimator
    frames: tuple[Frame, ...]
    dims: frozenset[int]  # slot dims of its log-probability: its own, and those of the sites it depends on
    own_dim: int | None
    scale: float

    @property
    def complete(self) -> bool:
        """Whether all its outcomes are laid out, and its estimator sums over them in no way of its own."""
        laid_out = self.own_dim is not None and (self.site.slots is None or self.site.slots.complete)
        return laid_out and type(self.estimator).forward in _SUMS

    def cost(self, run: Run) -> Tensor:
        """Its cost, unscaled: one for each element of its plates, each slot of its own and of those it depends on."""
        return self._unscaled(run.costs.at(self.frames, self.dims, self.site.name))

    def attached_cost(self, run: Run) -> Tensor:
        """
        The same, attached to its slots' values. What later sites draw depends on those too: their log-probabilities,
        times their own costs, bring the derivative of the expectation over them.
        """
        cost = run.attached_costs.at(self.frames, self.dims, self.site.name)
        for later in run.scores:
            if later is not self and self.own_dim in later.dims:
                log_prob = run.costs.mask(later.site.log_prob, relaxed=False)  # log 0 less log 0 would be NaN
                signal = run.costs.at(later.frames, self.dims | later.dims, later.site.name)
                score = run.costs.average(signal * (log_prob - log_prob.detach()), self.dims)
                cost = cost + sum_to(score, later.frames, self.frames)
        return self._unscaled(cost)

    def average_cost(self, runs: list[Run]) -> Tensor:
        """The same in a run on the side (one run for each sequential outcome), averaged over all slots."""
        costs = [run.weighted(self._unscaled(run.costs.at(self.frames, (), self.site.name))) for run in runs]
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
        """Raises if no other term has a derivative by the value of a site whose estimator differentiates by it."""
        sites = smooth_sites(self.guide_trace, self.messenger.estimators)
        for name, what in {**sites, **{n: self.messenger.estimators[n] for n in self.messenger.split}}.items():
            value = self.guide_trace.nodes[name]["value"]
            paths = [term.path.sum() for term in self.costs.terms if term.name != name and term.path is not None]
            if not value.requires_grad or not paths:
                continue
            total = sum(paths[1:], paths[0])
            if not total.requires_grad or _derivative(total, value) is None:
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
        nesting: dims to the left of it belong to slots.
        slots: whether an estimator may draw any.
        analytic_kl: whether closed-form KL divergences stand for log-probabilities.
        depends: finds which terms depend on which draws; None to let all depend on all.
    """

    model: Any
    guide: Any
    args: Any
    kwargs: Any
    find: Callable[[Any], Estimator | None]
    nesting: float
    slots: bool
    analytic_kl: bool = False
    depends: Dependencies | None = None

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
        messenger = EstimatorMessenger(self.find, self.nesting, self.args, self.kwargs, subsamples, kind)
        guide = messenger(self.guide) if self.slots or subsamples or kind != "draw" else self.guide
        guide = guide if wrap is None else wrap(guide)
        tracer = poutine.trace(guide)
        try:
            with refuse_indices(lambda: smooth_sites(tracer.msngr.trace, messenger.estimators)):
                guide_trace = tracer.get_trace(*self.args, **self.kwargs)
                model = poutine.replay(self.model, trace=guide_trace)
                model = LinearLogProbs(messenger.relaxed)(model) if messenger.relaxed else model
                model_trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        except (RuntimeError, TypeError) as error:
            if _BRANCHES.search(str(error)):
                nodes = tracer.msngr.trace.nodes.items()  # as far as it came
                drawn = [
                    (name, node) for name, node in nodes if node["type"] == "sample" and not site_is_subsample(node)
                ]
                found = {name: messenger.estimators.get(name) or self.find(node) for name, node in drawn}
                raise _branches_in_python(found, error) from error
            raise
        indices = {name: node["value"] for name, node in guide_trace.nodes.items() if site_is_subsample(node)}
        if messenger.relaxed and self.depends is not None:
            name = messenger.relaxed[0]
            raise ValueError(
                f"EstimatorELBO, site '{name}': expected costs='plates' with "
                f"{type(messenger.estimators[name]).__name__}, got 'graph'. Leave costs out."
            )
        if messenger.split:
            _same_order(model_trace, guide_trace)
        traces = _log_probs(model_trace, guide_trace, self.nesting, messenger.reparameterized, messenger.split)
        return self._read(*traces, messenger, indices)

    def _read(self, model_trace: Any, guide_trace: Any, messenger: EstimatorMessenger, subsamples: Any) -> Run:
        depends = {} if self.depends is None else self.depends.find(self, model_trace, guide_trace, subsamples)
        kls = self._analytic_kls(model_trace, guide_trace, messenger)
        slots, scores = {}, []
        log_weight: Tensor | None = None
        for name in guide_trace.stochastic_nodes:
            if name in messenger.reparameterized or (name in messenger.split and name in kls):
                continue
            node = guide_trace.nodes[name]
            log_prob, dim = node["score_parts"].score_function, node["infer"].get("_enumerate_dim")
            estimator = messenger.estimators.get(name) or self.find(node)
            if estimator is None or is_identically_zero(log_prob):
                continue
            late = estimator.draws_slots and dim is None and node["infer"].get("enumerate") != "sequential"
            if late or (estimator.splits and name not in messenger.split):
                raise ValueError(
                    f"EstimatorELBO, site '{name}': expected {type(estimator).__name__} at a site that the first run "
                    "reaches, got one that it did not, so that plates were not counted. Pass max_plate_nesting."
                )
            if dim is not None:
                laid_out = messenger.slots.get(name)
                log_weights = log_prob.detach() if laid_out is None else laid_out.log_weights
                slots[dim] = SlotDim(name, _vectorized(node), log_weights.exp(), estimator.relaxes)
            if node["infer"].get("_enum_total") is not None:
                _refuse_vectorized(node)
                log_weight = log_prob if log_weight is None else log_weight + log_prob
                continue
            frames = node["cond_indep_stack"]
            fn = messenger.fns.get(name, node["fn"])
            site = Site(name, fn, data_plates(frames, subsamples), self.args, self.kwargs, log_prob)
            site.value, site.slots = node["value"], messenger.slots.get(name)
            site.options = node["infer"].get("baseline", {})
            dims = frozenset() if dim is None else frozenset([dim])
            scores.append(ScoreSite(site, estimator, frames, dims, dim, subsampling_scale(frames)))
        terms = _terms(model_trace, guide_trace, kls, depends, slots)
        if messenger.split:  # other terms depend on such a draw by their derivative
            every = frozenset(guide_trace.stochastic_nodes)
            for term in terms:
                term.upstream = (every if term.upstream is None else term.upstream) - (messenger.split - {term.name})
        costs = Costs(terms, slots)
        for score in scores:
            score.dims |= costs.slot_dims(score.site.log_prob)
        return Run(costs, scores, log_weight, subsamples, guide_trace, messenger)

    def _analytic_kls(self, model_trace: Any, guide_trace: Any, messenger: EstimatorMessenger) -> dict[str, Tensor]:
        """The KL divergence of each site that has a closed form, if asked for; in any case where it must have one."""
        if self.analytic_kl:
            kls = _analytic_kls(model_trace, guide_trace, guide_trace.stochastic_nodes)
        else:
            kls = _analytic_kls(model_trace, guide_trace, messenger.reparameterized)
        for name in messenger.reparameterized:
            if name not in kls:
                raise ValueError(
                    f"EstimatorELBO, site '{name}': expected with {type(messenger.estimators[name]).__name__} a prior "
                    f"to which {guide_trace.nodes[name]['fn']} has a closed-form KL divergence, got "
                    f"{model_trace.nodes[name]['fn']}. Use the same family in model and guide, or LeaveOneOut."
                )
            if is_validation_enabled():
                as_log_prob: Any = {**guide_trace.nodes[name], "log_prob": kls[name]}
                check_site_shape(as_log_prob, self.nesting)  # type: ignore[arg-type]
        return kls


def _derivative(total: Tensor, value: Tensor) -> Tensor | None:
    return torch.autograd.grad(total, value, retain_graph=True, allow_unused=True)[0]


def _log_probs(
    model_trace: Any, guide_trace: Any, nesting: float, without: Collection[str], fixed: Collection[str]
) -> tuple[Any, Any]:
    """As :func:`pyro.infer.enum.get_importance_trace` once the programs have run, but for some sites."""
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, nesting)
    for trace in (guide_trace, model_trace):  # as prune_subsample_sites, but without a copy
        for name in [name for name, node in trace.nodes.items() if site_is_subsample(node)]:
            trace.remove_node(name)
    for name, node in model_trace.nodes.items():
        if node["type"] == "sample" and not node["is_observed"] and name not in guide_trace.nodes:
            raise ValueError(
                f"EstimatorELBO, site '{name}': expected every latent site of the model in the guide, got one in "
                "the model only. Add it to the guide; to sum it out in the model, use SparseEnumELBO or TraceEnum_ELBO."
            )
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
    return model_trace, guide_trace


def _terms(
    model_trace: Any,
    guide_trace: Any,
    kls: Mapping[str, Tensor],
    depends: Mapping[tuple[str, str], frozenset[str]],
    slots: Mapping[int, SlotDim],
) -> list[Term]:
    terms = []
    for name, node in model_trace.nodes.items():
        if node["type"] == "sample" and name not in kls:
            value = node["log_prob"]
            path = value if slots else node["log_prob_sum"]
            terms.append(Term(name, value, _vectorized(node), path, depends.get(("model", name))))
    earlier: set[str] = set()
    for name, node in guide_trace.nodes.items():
        if node["type"] != "sample":
            continue
        if name in kls:  # it depends on the draws before its own, at most
            reach = depends.get(("guide", name), frozenset(earlier)) & frozenset(earlier)
            terms.append(Term(name, -kls[name], _vectorized(node), -kls[name], reach))
        else:
            entropy = node["score_parts"].entropy_term
            path = None if is_identically_zero(entropy) else -entropy
            terms.append(Term(name, -node["log_prob"], _vectorized(node), path, depends.get(("guide", name))))
        earlier.add(name)
    return terms


def _analytic_kls(model_trace: Any, guide_trace: Any, names: Collection[str]) -> dict[str, Tensor]:
    """The KL divergence of each of these sites that has a closed form."""
    if not names:
        return {}
    kls = {}
    for name in _same_order(model_trace, guide_trace):
        if name not in names:
            continue
        guide_node, model_node = guide_trace.nodes[name], model_trace.nodes[name]
        try:
            kl = _kl_divergence(guide_node["fn"], model_node["fn"])
        except NotImplementedError:
            continue  # as TraceMeanField_ELBO: this site's KL is sampled
        except UnknownDivergence:
            if guide_node["fn"].has_rsample:
                raise  # sampled pathwise it would be biased
            continue
        kls[name] = scale_and_mask(kl, scale=guide_node["scale"], mask=guide_node["mask"])
    return kls


def _same_order(model_trace: Any, guide_trace: Any) -> list[str]:
    """The latent sites. A site's own terms then depend on no draw after its own."""
    latent = [n for n in guide_trace.stochastic_nodes if n in model_trace.nodes]
    if latent != (order := [n for n in model_trace.stochastic_nodes if n in guide_trace.nodes]):
        raise ValueError(
            f"EstimatorELBO: expected the same order of sites in guide and model, got {latent} and {order}. Reorder "
            "them, or leave out what asks for it: analytic_kl, StraightThrough, SplitPathwise."
        )
    return latent


def _kl_divergence(p: Any, q: Any) -> Tensor:
    """torch's, but for bits, which it makes infinite where a probability is rounded to one, and for zeros."""
    dims = getattr(p, "reinterpreted_batch_ndims", 0)
    if dims and getattr(q, "reinterpreted_batch_ndims", 0) == dims:
        p_base, q_base = p.base_dist, q.base_dist
    else:
        p_base, q_base, dims = p, q, 0
    for kind, exact in ((Bernoulli, kl_bits), (Categorical, kl_categorical), (OneHotCategorical, kl_categorical)):
        if isinstance(p_base, kind) and isinstance(q_base, kind):
            return sum_rightmost(exact(p_base, q_base), dims)
    return kl_divergence(p, q)


def _refuse_vectorized(node: Any) -> None:
    if _vectorized(node):
        raise ValueError(
            f"EstimatorELBO, site '{node['name']}': expected sequential enumeration outside of vectorised plates, got "
            "one inside. Use Exact(), which enumerates in parallel, or one particle at a time."
        )


def _vectorized(node: Any) -> frozenset[Frame]:
    return frozenset(frame for frame in node["cond_indep_stack"] if frame.vectorized)


def _branches_in_python(estimators: Mapping[str, Estimator | None], error: Exception) -> ValueError:
    several = [
        f"'{name}' ({type(e).__name__})"
        for name, e in estimators.items()
        if e is not None and (e.draws_slots or e.num_particles > 1)
    ]
    where = "site " + " or ".join(several) if several else "vectorised particles"
    return ValueError(
        f"EstimatorELBO, {where}: expected a program that runs on several values at once, got one that needs a single "
        f"one ({str(error).splitlines()[0]}). Use torch.where in place of a Python branch, or ScoreFunction, "
        "LeaveOneOut(n, vectorized=False), or Exact with infer={'enumerate': 'sequential'}."
    )
