"""One run of guide and model under Pyro's enumeration, the model on slots or on packed rows: packed traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape, check_traceenum_requirements

from pyro_sparse.infer.expansion.rows import Ran, Rows
from pyro_sparse.infer.pyro_internals import check_local_sampling
from pyro_sparse.infer.runs.explanations import Alone
from pyro_sparse.infer.runs.on_rows import OnRows
from pyro_sparse.infer.runs.traces import widen_log_probs

Pair = tuple[poutine.Trace, poutine.Trace]  # model, guide


def enumerated(
    model: Any, guide: Any, alone: Alone, on: OnRows, rows_of: Callable[[poutine.Trace], Rows | None]
) -> tuple[Pair, Ran | None]:
    """
    The traces of a run, the model on packed rows of the guide's trace where ``rows_of`` gives any, and else on slots;
    and on how many rows it ran.
    """
    guide_trace = poutine.trace(guide).get_trace(*alone.args, **alone.kwargs)
    model_trace, ran_on = on.model_trace(model, alone, guide_trace, rows_of(guide_trace))
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, on.nesting)
    guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
    model_trace.compute_log_prob()
    guide_trace.compute_score_parts()
    if is_validation_enabled():
        for node in [*model_trace.nodes.values(), *guide_trace.nodes.values()]:
            if node["type"] == "sample":
                check_site_shape(node, on.nesting)
        check_traceenum_requirements(model_trace, guide_trace)
        check_local_sampling(model_trace, guide_trace)
    widen_log_probs(model_trace, guide_trace)
    guide_trace.pack_tensors()
    model_trace.pack_tensors(guide_trace.plate_to_symbol)
    return (model_trace, guide_trace), ran_on
