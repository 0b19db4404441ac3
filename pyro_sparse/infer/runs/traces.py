"""The traces of one run of guide and model, with the log-probabilities of their sites."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from pyro.distributions.score_parts import ScoreParts
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_sparse._precision import HALF, widened
from pyro_sparse.infer.expansion.estimator_messenger import EstimatorMessenger
from pyro_sparse.infer.expansion.rows import Ran, Rows
from pyro_sparse.infer.expansion.views import with_fixed_value
from pyro_sparse.infer.pyro_internals import Frame
from pyro_sparse.infer.runs.provenance import Provenance


@dataclass(frozen=True)
class Traces:
    """
    What one run leaves.

    Attributes:
        model, guide: the traces.
        expansion: what gave the guide's sites their values.
        subsamples: the indices of the plates.
        program: what was run.
        provenance: what watched the run; None if nothing did.
        rows: the packed rows that the model ran on, and how many in all; None if it ran on slots.
    """

    model: Any
    guide: Any
    expansion: EstimatorMessenger
    subsamples: Mapping[str, Tensor]
    program: Any
    provenance: Provenance | None = None
    rows: Rows | None = None
    ran_on: Ran | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around what is computed from the traces, if the run was watched."""
        with nullcontext() if self.provenance is None else self.provenance.watching():
            yield

    @property
    def has_sequential(self) -> bool:
        """Whether a site asks for sequential enumeration."""
        return any(node["infer"].get("enumerate") == "sequential" for _, node in sampled(self.guide))


def compute_log_probs(
    model_trace: Any, guide_trace: Any, nesting: float, without: Collection[str], fixed: Collection[str]
) -> None:
    """As :func:`pyro.infer.enum.get_importance_trace` once the programs have run, but for some sites."""
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, nesting)
    for trace in (guide_trace, model_trace):  # as prune_subsample_sites, but without a copy
        for name in [name for name, node in trace.nodes.items() if site_is_subsample(node)]:
            trace.remove_node(name)
    for name, node in model_trace.nodes.items():
        latent = node["type"] == "sample" and not node["is_observed"] and "_enumerate_dim" not in node["infer"]
        if latent and name not in guide_trace.nodes:
            raise ValueError(
                f"EstimatorELBO, site '{name}': expected every latent site of the model in the guide, got one in the "
                "model only. Add it to the guide; or sum it out, if it can be: infer={'enumerate': 'parallel'}."
            )
    _check_nesting(model_trace, guide_trace, nesting)
    for name in fixed:
        for node in (trace.nodes[name] for trace in (guide_trace, model_trace) if name in trace.nodes):
            node["fn"] = with_fixed_value(node["fn"])
    model_trace.compute_log_prob(lambda name, node: name not in without)
    for name in without:
        guide_trace.nodes[name]["score_parts"] = None  # else Pyro would compute them
    guide_trace.compute_score_parts()
    widen_log_probs(model_trace, guide_trace)
    if is_validation_enabled():
        for node in [*model_trace.nodes.values(), *guide_trace.nodes.values()]:
            if node["type"] == "sample" and node["name"] not in without:
                check_site_shape(node, nesting)  # type: ignore[arg-type]


def widen_log_probs(*traces: Any) -> None:
    """Log-probabilities in half precision are summed in float32, also where the sites differ in their dtype."""
    for trace in traces:
        for node in trace.nodes.values():
            if node["type"] == "sample" and getattr(node.get("log_prob"), "dtype", None) in HALF:
                node.update({key: widened(node[key]) for key in ("log_prob", "unscaled_log_prob")})
                node["log_prob_sum"] = node["log_prob"].sum()
                if (parts := node.get("score_parts")) is not None:
                    node["score_parts"] = ScoreParts(*(widened(x) if isinstance(x, Tensor) else x for x in parts))


def _check_nesting(model_trace: Any, guide_trace: Any, nesting: float) -> None:
    """Raises where a plate takes a dim in which slots may lie: an earlier batch may have had fewer plates."""
    for name, node in sampled(guide_trace) + sampled(model_trace):
        for frame in vectorized(node):
            if -frame.dim > nesting:
                raise ValueError(
                    f"EstimatorELBO, site '{name}': expected at most {nesting} plates in dims of their own, as at the "
                    f"first step, got plate '{frame.name}' at dim {frame.dim}. Pass max_plate_nesting={-frame.dim}."
                )


def sampled(trace: Any) -> list[tuple[str, Any]]:
    return [(name, node) for name, node in trace.nodes.items() if node["type"] == "sample"]


def vectorized(node: Any) -> frozenset[Frame]:
    return frozenset(frame for frame in node["cond_indep_stack"] if frame.vectorized)
