"""One run of guide and model: traces in, the ELBO's terms out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer.enum import get_importance_trace
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sparse.estimators import Estimator, Site
from pyro_sparse.infer.costs import Costs, Frame, SlotDim, Term, subsampling_scale
from pyro_sparse.infer.estimator_messenger import EstimatorMessenger

_BRANCHES = re.compile(
    "Boolean value of Tensor with more than one value|cannot be converted to Scalar|only integer tens"
)
Upstream = Callable[[Any, Any], Mapping[tuple[str, str], frozenset[str]]]


@dataclass
class ScoreSite:
    """A guide site that is trained through its log-probability."""

    site: Site
    estimator: Estimator
    frames: tuple[Frame, ...]
    dims: frozenset[int]  # slot dims of its log-probability: its own, and those of the sites it depends on
    own_dim: int | None
    scale: float

    def cost(self, run: Run) -> Tensor:
        """Its cost, unscaled: one for each element of its plates, each slot of its own and of those it depends on."""
        return run.costs.at(self.frames, self.dims, self.site.name) / self.scale

    def average_cost(self, runs: list[Run]) -> Tensor:
        """The same in a run on the side (one run for each sequential outcome), averaged over all slots."""
        costs = [run.weight() * run.costs.at(self.frames, (), self.site.name) / self.scale for run in runs]
        return sum(costs[1:], costs[0])


@dataclass
class Run:
    """The terms of one run, its score-function sites, and the weight of its sequentially enumerated outcomes."""

    costs: Costs
    scores: list[ScoreSite]
    log_weight: Tensor | None  # attached; None without sequential enumeration
    subsamples: Mapping[str, Tensor]
    model_trace: Any
    guide_trace: Any

    def elbo(self) -> Tensor:
        """The run's estimate of the ELBO, detached."""
        return self.costs.at(())

    def weight(self) -> Tensor | float:
        """The probability of the sequentially enumerated outcomes, detached."""
        return 1.0 if self.log_weight is None else self.log_weight.detach().exp()


def run_program(
    guide: Any,
    model: Any,
    args: Any,
    kwargs: Any,
    messenger: EstimatorMessenger,
    nesting: float,
    analytic_kl: bool,
    upstream: Upstream | None,
) -> Run:
    """Runs the guide (already under the messenger) and the model, and reads their traces."""
    try:
        model_trace, guide_trace = get_importance_trace("flat", nesting, model, guide, args, kwargs)
    except (RuntimeError, TypeError) as error:
        if _BRANCHES.search(str(error)):
            raise _branches_in_python(messenger, error) from error
        raise
    _check_match(model_trace, guide_trace)
    slots = _slot_dims(guide_trace, messenger)
    depends = upstream(model_trace, guide_trace) if upstream is not None else {}
    costs = Costs(_terms(model_trace, guide_trace, analytic_kl, depends), slots)
    scores, log_weight = _score_sites(guide_trace, messenger, costs)
    return Run(costs, scores, log_weight, messenger.subsamples, model_trace, guide_trace)


def _check_match(model_trace: Any, guide_trace: Any) -> None:
    for name, node in model_trace.nodes.items():
        if node["type"] == "sample" and not node["is_observed"] and name not in guide_trace.nodes:
            raise ValueError(
                f"EstimatorELBO, site '{name}': expected every latent site of the model in the guide, got one in "
                "the model only. Add it to the guide; to sum it out in the model, use SparseEnumELBO or TraceEnum_ELBO."
            )


def _slot_dims(guide_trace: Any, messenger: EstimatorMessenger) -> dict[int, SlotDim]:
    slots = {}
    for name in messenger.estimators:
        node = guide_trace.nodes[name]
        if (dim := node["infer"].get("_enumerate_dim")) is not None:
            drawn = messenger.slots.get(name)
            log_weights = node["score_parts"].score_function.detach() if drawn is None else drawn.log_weights
            slots[dim] = SlotDim(name, _vectorized(node), log_weights.exp())
    return slots


def _terms(
    model_trace: Any, guide_trace: Any, analytic_kl: bool, depends: Mapping[tuple[str, str], frozenset[str]]
) -> list[Term]:
    kls = _analytic_kls(model_trace, guide_trace) if analytic_kl else {}
    terms = []
    for name, node in model_trace.nodes.items():
        if node["type"] == "sample" and name not in kls:
            value = node["log_prob"]
            terms.append(Term(name, value, _vectorized(node), value, depends.get(("model", name))))
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


def _analytic_kls(model_trace: Any, guide_trace: Any) -> dict[str, Tensor]:
    """The KL divergence of each latent site that has a closed form."""
    latent = [n for n in guide_trace.stochastic_nodes if n in model_trace.nodes]
    if latent != (order := [n for n in model_trace.stochastic_nodes if n in guide_trace.nodes]):
        raise ValueError(
            f"EstimatorELBO: expected with analytic_kl=True the same order of sites in guide and model, got {latent} "
            f"and {order}. Reorder them, or leave analytic_kl out."
        )
    kls = {}
    for name in latent:
        guide_node, model_node = guide_trace.nodes[name], model_trace.nodes[name]
        try:
            kl = kl_divergence(guide_node["fn"], model_node["fn"])
        except NotImplementedError:
            continue  # as TraceMeanField_ELBO: this site's KL is sampled
        kls[name] = scale_and_mask(kl, scale=guide_node["scale"], mask=guide_node["mask"])
    return kls


def _score_sites(
    guide_trace: Any, messenger: EstimatorMessenger, costs: Costs
) -> tuple[list[ScoreSite], Tensor | None]:
    scores: list[ScoreSite] = []
    log_weight: Tensor | None = None
    for name, estimator in messenger.estimators.items():
        node = guide_trace.nodes[name]
        log_prob = node["score_parts"].score_function
        if is_identically_zero(log_prob):
            continue
        if node["infer"].get("_enum_total") is not None:
            if _vectorized(node):
                raise ValueError(
                    f"EstimatorELBO, site '{name}': expected sequential enumeration outside of vectorised plates, got "
                    "one inside. Use Exact(), which enumerates in parallel, or one particle at a time."
                )
            log_weight = log_prob if log_weight is None else log_weight + log_prob
            continue
        site = messenger.site(node)
        site.log_prob = log_prob
        own_dim = node["infer"].get("_enumerate_dim")
        site.slots = messenger.slots.get(name)
        frames = node["cond_indep_stack"]
        dims = costs.slot_dims(log_prob) | ({own_dim} if own_dim is not None else set())
        scores.append(ScoreSite(site, estimator, frames, dims, own_dim, subsampling_scale(frames)))
    return scores, log_weight


def _vectorized(node: Any) -> frozenset[Frame]:
    return frozenset(frame for frame in node["cond_indep_stack"] if frame.vectorized)


def _branches_in_python(messenger: EstimatorMessenger, error: Exception) -> ValueError:
    several = [
        f"'{name}' ({type(e).__name__})"
        for name, e in messenger.estimators.items()
        if e.draws_slots or e.num_particles > 1
    ]
    where = "site " + " or ".join(several) if several else "vectorised particles"
    return ValueError(
        f"EstimatorELBO, {where}: expected a program that runs on several values at once, got one that needs a single "
        f"one ({error}). Use torch.where in place of a Python branch, or ScoreFunction, "
        "LeaveOneOut(n, vectorized=False), or Exact with infer={'enumerate': 'sequential'}."
    )
