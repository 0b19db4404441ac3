"""The gradient of the ELBO by plain draws and score functions: what estimators are compared with beside enumeration."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.util import MultiFrameTensor
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_sparse.distributions.discrete.straight_through import is_straight_through
from pyro_sparse.infer.expansion.law import jumps
from pyro_sparse.infer.expansion.views import with_whole_score
from pyro_sparse.infer.refusals import refuse_guide_messenger
from pyro_sparse.infer.terms.factors import as_costs


class ScoreFunctionELBO(Trace_ELBO):
    r"""
    .. math::
        \frac1n \sum_{i=1}^n \Bigl(\nabla f(z_i) + \sum_s \Bigl(f_s(z_i) - \frac1{n - 1} \sum_{j \ne i} f_s(z_j)\Bigr)
        \nabla \log q_s(z_i)\Bigr), \qquad f = \log p - \log q,

    over n ordinary runs of guide and model one after the other, s the guide's sites without a reparameterised gradient
    and :math:`f_s` the part of f in the plates of s: :class:`~pyro.infer.Trace_ELBO`, with the mean of the other runs
    as the baseline of each. It shares nothing with :class:`~pyro_sparse.infer.EstimatorELBO`, which it is there to
    check.

    A site whose own derivative is not that of its expectation gets a score function as well: straight-through families,
    and mixed ones drawn pathwise by ``has_rsample_(True)``. Reparameterised sites of other families are pathwise, which
    is right if the model is continuous in them.

    Args:
        num_particles: the number n of runs.
    """

    def __init__(self, num_particles: int = 4) -> None:
        super().__init__(num_particles=num_particles)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        refuse_guide_messenger("ScoreFunctionELBO", guide)
        guide = _PlainDraws()(as_costs(guide, args, kwargs))
        runs = list(self._get_traces(model, guide, args, kwargs))
        costs = [_site_costs(*traces) for traces in runs]
        loss, surrogate = 0.0, torch.zeros(())
        for i, (model_trace, guide_trace) in enumerate(runs):
            elbo = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
            loss -= float(elbo.detach()) / len(runs)
            surrogate = surrogate - model_trace.log_prob_sum() / len(runs)
            for name, site in _scored(guide_trace).items():
                others = [c[name] for j, c in enumerate(costs) if j != i and name in c]
                centred = costs[i][name] - (0.0 if site["is_observed"] else _mean_of(others, costs[i][name]))
                surrogate = surrogate - (centred * site["score_parts"].score_function).sum() / len(runs)
            for site in _sample_sites(guide_trace).values():
                surrogate = surrogate + torch.as_tensor(site["score_parts"].entropy_term).sum() / len(runs)
        return loss + surrogate - surrogate.detach()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())


class _PlainDraws(Messenger):
    """Draws without a derivative where a site's own would not be that of its expectation."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if not msg["is_observed"] and (jumps(fn) or is_straight_through(fn)):
            msg["fn"] = with_whole_score(fn)
            if msg["value"] is None:
                with torch.no_grad():
                    msg["value"] = fn(*msg["args"], **msg["kwargs"])


def _sample_sites(trace: poutine.Trace) -> dict[str, Any]:
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def _scored(guide_trace: poutine.Trace) -> dict[str, Any]:
    """The sites that have a score function."""
    sites = _sample_sites(guide_trace)
    return {name: site for name, site in sites.items() if isinstance(site["score_parts"].score_function, Tensor)}


def _site_costs(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> dict[str, Tensor]:
    """For each scored site the terms of f, summed over the plates that it is not in; all guide sites count."""
    terms = MultiFrameTensor()
    for sign, trace in ((1, model_trace), (-1, guide_trace)):
        for site in _sample_sites(trace).values():
            terms.add((site["cond_indep_stack"], sign * site["log_prob"].detach()))
    return {name: terms.sum_to(site["cond_indep_stack"]) for name, site in _scored(guide_trace).items()}


def _mean_of(others: list[Tensor], cost: Tensor) -> Tensor | float:
    """The mean of those of the cost's shape; a program that branches may have others."""
    alike = [other for other in others if other.shape == cost.shape]
    return sum(alike) / len(alike) if alike else 0.0
