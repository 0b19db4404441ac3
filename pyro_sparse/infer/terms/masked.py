"""Which masked rows matter all the same: what they draw reaches a term that no mask takes out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sparse.infer.expansion.masked_rows import mask_of
from pyro_sparse.infer.terms.dependencies import with_ancestors


def reaching_unmasked(narrowed: Mapping[str, Tensor], guide_trace: Any, model_trace: Any) -> set[str]:
    """
    Those of the sites whose masked rows are seen by a term that is not masked there: by itself, or through other latent
    sites, whose probabilities depend on what is drawn there though they are masked, too.
    """
    pairs = [(name, node) for trace in (guide_trace, model_trace) for name, node in trace.nodes.items()]
    nodes = [(name, node) for name, node in pairs if node["type"] == "sample" and not site_is_subsample(node)]
    own: dict[str, int] = {}  # the guide's, where both have one
    for name, node in nodes:
        if (dim := node["infer"].get("_enumerate_dim")) is not None:
            own.setdefault(name, dim)
    return {name for name, mask in narrowed.items() if _is_seen(name, mask, nodes, own)}


def _is_seen(site: str, mask: Tensor, nodes: list[tuple[str, Any]], own: Mapping[str, int]) -> bool:
    latent = [(name, node) for name, node in nodes if not node["is_observed"]]
    children = {
        dim: frozenset(own[name] for name, node in latent if name in own and _varies(node["log_prob"], {dim}))
        for dim in own.values()
    }
    dims = with_ancestors({own[site]}, children)
    return any(_varies(node["log_prob"], dims) and _sees(node, mask) for _, node in nodes) or any(
        # Those without a dim of their own show whether they were drawn once for each outcome.
        _varies(node["log_prob"], dims) and not _varies(node["value"], dims, node["fn"].event_dim)
        for name, node in latent
        if name not in own
    )


def _varies(value: Tensor, dims: Collection[int], event_dim: int = 0) -> bool:
    return any(value.dim() - event_dim >= -dim and value.shape[dim - event_dim] > 1 for dim in dims)


def _sees(node: Any, mask: Tensor) -> bool:
    own = mask_of(node)
    return own is None or bool((own & ~mask).any())
