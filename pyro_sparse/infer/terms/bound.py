"""The n-particle bound of a vectorised run, for an estimator that has it for its objective."""

from __future__ import annotations

import torch
from pyro.distributions import Unit
from torch import Tensor

from pyro_sparse.estimators import Estimator, Site
from pyro_sparse.infer.expansion.law import is_point_mass
from pyro_sparse.infer.pyro_internals import PARTICLES
from pyro_sparse.infer.terms.costs import subsampling_scale, sum_to
from pyro_sparse.infer.terms.dependencies import without_draws
from pyro_sparse.infer.terms.scores import Run


def importance_bound(estimator: Estimator, run: Run, particle_dim: int) -> tuple[Tensor, Tensor]:
    """
    The bound, summed over data-plate elements and detached, and its surrogate. What depends on no draw and lies outside
    of the data plate, such as a penalty on parameters, is the same in all weights: a summand of the bound.

    Raises:
        ValueError: naming the site, if a latent lies outside the plates that all sites share, or is enumerated.
    """
    owner, common = type(estimator).__name__, _common(run)
    terms = [term for term in run.costs.terms if term.name not in common]
    frames = frozenset.intersection(*(term.frames for term in terms))
    data = frozenset(frame for frame in frames if frame.name != PARTICLES)
    for term in terms:
        inside = sorted(frame.name for frame in term.frames - frames)
        if not data and inside and term.name in run.traces.guide.nodes:
            outside = sorted({other.name for other in terms if not other.frames & (term.frames - frames)})
            raise ValueError(
                f"EstimatorELBO, site '{term.name}': expected for {owner} one data plate around all sites that depend "
                f"on draws, got one in {inside} and {outside} outside of it, whose weights would be those of all data. "
                "Use LeaveOneOut."
            )
    if own := [score.site.name for score in run.scores if score.own_draws]:
        raise ValueError(
            f"EstimatorELBO, site '{own[0]}': expected for {owner} draws by sample statements, which its particles "
            "make anew, got draws that the guide makes by itself. Use BaselineELBO."
        )
    for slot in run.costs.slots.values():
        raise ValueError(
            f"EstimatorELBO, site '{slot.site}': expected for {owner} draws only, got an enumerated site. Leave "
            "infer['enumerate'] out, or use Exact() for all sites."
        )
    scale = subsampling_scale(frames)
    weights = [sum_to(term.value, term.frames, frames) for term in terms]
    log_weights = (sum(weights[1:], weights[0]) / scale).movedim(particle_dim, 0)
    log_prob = torch.zeros_like(log_weights)
    for score in run.scores:
        vectorized = [frame for frame in score.frames if frame.vectorized]
        log_prob = log_prob + sum_to(score.site.log_prob, vectorized, frames).movedim(particle_dim, 0)
    everything = Site("*", Unit(log_prob), log_prob=log_prob)
    surrogate, _ = estimator(log_weights, everything)
    shared = [term.value.sum() / estimator.num_particles for term in run.costs.terms if term.name in common]
    value = sum(shared, (estimator.bound(log_weights.detach()) * scale).sum())
    return value.detach(), sum(shared, (surrogate * scale).sum())


def _common(run: Run) -> frozenset[str]:
    """Names of terms that lie outside of a plate around all latent sites, and depend on no draw."""
    nodes = run.traces.guide.nodes
    drawn = {name for name in run.traces.guide.stochastic_nodes if not is_point_mass(nodes[name]["fn"])}
    inside = [term.frames for term in run.costs.terms if term.name in drawn]
    terms = [term for term in run.costs.terms if not term.collapsed]
    outside = {term.name for term in terms if inside and frozenset.intersection(*inside) - term.frames}
    return (
        without_draws(run.traces.program, run.traces.guide, run.traces.subsamples, outside) if outside else frozenset()
    )
