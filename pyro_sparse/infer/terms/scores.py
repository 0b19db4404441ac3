"""One run, read: the terms of the ELBO, and the guide sites that are trained through their log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyro_sparse._autograd import reaches
from pyro_sparse.estimators import Estimator, Exact, LocalExpectation, RaoBlackwell, Site, UnorderedSet
from pyro_sparse.infer.pyro_internals import Frame
from pyro_sparse.infer.refusals import not_relaxed, smooth_sites
from pyro_sparse.infer.runs.traces import Traces
from pyro_sparse.infer.terms.costs import Costs, sum_to
from pyro_sparse.infer.terms.dependencies import is_used

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
    traces: Traces

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
        expansion = self.traces.expansion
        return all(s.complete for s in self.scores) and not (expansion.reparameterized or expansion.split)

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
        Raises if other terms depend on the value of a site whose estimator differentiates with respect to it, and none
        of them has a derivative with respect to it.
        """
        guide, expansion = self.traces.guide, self.traces.expansion
        sites = smooth_sites(guide, expansion.estimators)
        for name, what in {**sites, **{n: expansion.estimators[n] for n in expansion.split}}.items():
            value = guide.nodes[name]["value"]
            paths = [term.path for term in self.costs.terms if term.name != name and term.path is not None]
            if not value.requires_grad or reaches(paths, value):
                continue
            if is_used(self.traces.program, guide, self.traces.subsamples, name):
                got = "without a derivative with respect to them: it rounds the value, or takes an index from it"
                raise not_relaxed({name: what}, got)
