"""An ordinary run of guide and model: one value per site."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pyro import poutine


def run_once(
    model: Any, guide: Any, args: Any, kwargs: Any, given: poutine.Trace | None = None
) -> tuple[poutine.Trace, poutine.Trace]:
    """The traces of one ordinary run of guide and model, with log-probabilities. Sites in ``given`` take its values."""
    given = poutine.Trace() if given is None else given
    guide_trace = poutine.trace(poutine.replay(guide, trace=given)).get_trace(*args, **kwargs)
    latent = given.copy()
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample":
            latent.nodes[name] = site  # add_node would warn of names that both have
    model_trace = poutine.trace(poutine.replay(model, trace=latent)).get_trace(*args, **kwargs)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    return guide_trace, model_trace


def sites_of(traces: Iterable[poutine.Trace]) -> dict[str, Any]:
    """The sample sites of guide and model, the guide's where both have one."""
    return {n: s for trace in reversed([*traces]) for n, s in trace.nodes.items() if s["type"] == "sample"}


def nesting_of(traces: Iterable[poutine.Trace]) -> int:
    frames = [frame for site in sites_of(traces).values() for frame in site["cond_indep_stack"] if frame.vectorized]
    return max((-frame.dim for frame in frames), default=0)


def guess_nesting(elbo: Any, model: Any, guide: Any, args: Any, kwargs: Any, *, on_rows: bool) -> None:
    """
    As Pyro's ELBOs find ``max_plate_nesting``. A model that runs on packed rows only, as one that branches on a value,
    has the plates of its guide.
    """
    try:
        elbo._guess_max_plate_nesting(model, guide, args, kwargs)
    except Exception:  # whatever it is: if the guide runs, the run on rows decides
        if not on_rows:
            raise
        with poutine.block():
            trace = poutine.trace(guide).get_trace(*args, **kwargs)
        particles = elbo.vectorize_particles and elbo.num_particles > 1
        elbo.max_plate_nesting = nesting_of([trace]) + int(particles)
