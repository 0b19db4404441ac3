"""One run of guide and model under Pyro's enumeration, the model on slots or on packed rows: packed traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro import poutine
from pyro.infer.enum import get_importance_trace
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape, check_traceenum_requirements

from pyro_sparse.infer.expansion.rows import Rows
from pyro_sparse.infer.pyro_internals import check_local_sampling
from pyro_sparse.infer.runs.explanations import Alone, explained_on_rows
from pyro_sparse.infer.runs.on_rows import OnRows

Pair = tuple[poutine.Trace, poutine.Trace]  # model, guide


def on_slots(model: Any, guide: Any, alone: Alone, nesting: int) -> Pair:
    """The traces of a run whose model sees all slots."""
    return _packed(*get_importance_trace("flat", nesting, model, guide, alone.args, alone.kwargs))


def on_rows(
    model: Any, guide: Any, alone: Alone, on: OnRows, rows_of: Callable[[poutine.Trace], Rows | None]
) -> tuple[Pair, int | None]:
    """The same, with the model on packed rows of the guide's trace, if there are any; and on how many it ran."""
    guide_trace = poutine.trace(guide).get_trace(*alone.args, **alone.kwargs)
    rows, ran_on = rows_of(guide_trace), None
    if rows is None:
        model = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(model).get_trace(*alone.args, **alone.kwargs)
    else:
        with explained_on_rows(alone, rows.frame.name):
            on.check_once(model, alone.args, alone.kwargs, guide_trace, rows)
            model_trace, ran_on = on.run(model, alone.args, alone.kwargs, guide_trace, rows)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, on.nesting)
    guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
    model_trace.compute_log_prob()
    guide_trace.compute_score_parts()
    if is_validation_enabled():
        for node in [*model_trace.nodes.values(), *guide_trace.nodes.values()]:
            if node["type"] == "sample":
                check_site_shape(node, on.nesting)
    return _packed(model_trace, guide_trace), ran_on


def _packed(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Pair:
    if is_validation_enabled():
        check_traceenum_requirements(model_trace, guide_trace)
        check_local_sampling(model_trace, guide_trace)
    guide_trace.pack_tensors()
    model_trace.pack_tensors(guide_trace.plate_to_symbol)
    return model_trace, guide_trace
