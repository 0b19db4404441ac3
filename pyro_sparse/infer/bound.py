"""The n-particle bound of a vectorised run, for VIMCO."""

from __future__ import annotations

from torch import Tensor

from pyro_sparse.estimators import VIMCO, Site
from pyro_sparse.infer.costs import sum_to
from pyro_sparse.infer.estimator_messenger import PARTICLES
from pyro_sparse.infer.program import Run


def importance_bound(vimco: VIMCO, run: Run, particle_dim: int) -> tuple[Tensor, Tensor]:
    """
    The bound, summed over data-plate elements and detached, and its surrogate.

    Raises:
        ValueError: naming the site, if a latent lies outside the plates that all sites share, or is enumerated.
    """
    frames = frozenset.intersection(*(term.frames for term in run.costs.terms))
    data = frozenset(frame for frame in frames if frame.name != PARTICLES)
    for term in run.costs.terms:
        inside = [frame.name for frame in term.frames - frames]
        if not data and inside and term.name in run.guide_trace.nodes:
            raise ValueError(
                f"EstimatorELBO, site '{term.name}': expected for VIMCO one data plate around all sites, got one in "
                f"{inside} beside sites outside of it, whose weights would be those of the whole data set. Use LeaveOneOut."
            )
    for slot in run.costs.slots.values():
        raise ValueError(
            f"EstimatorELBO, site '{slot.site}': expected for VIMCO draws only, got an enumerated site. Leave "
            "infer['enumerate'] out, or use Exact() for all sites."
        )
    scale = 1.0
    for frame in frames:
        scale *= frame.full_size / frame.size
    log_weights = sum(sum_to(term.value, term.frames, frames) for term in run.costs.terms) / scale
    log_probs: Tensor | float = 0.0
    for score in run.scores:
        assert score.site.log_prob is not None
        vectorized = [frame for frame in score.frames if frame.vectorized]
        log_probs = log_probs + sum_to(score.site.log_prob, vectorized, frames)
    log_weights = log_weights.movedim(particle_dim, 0)
    everything = Site("*", run.guide_trace.nodes[run.costs.terms[-1].name]["fn"])
    if isinstance(log_probs, Tensor):
        everything.log_prob = log_probs.movedim(particle_dim, 0)
    else:  # reparameterised sites only: the gradient is pathwise
        everything.log_prob = log_weights.detach() * 0
    surrogate, _ = vimco(log_weights, everything)
    return (vimco.bound(log_weights.detach()) * scale).sum(), (surrogate * scale).sum()
