"""Which masked rows matter all the same: what they draw reaches a term that no mask takes out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sparse.infer.expansion.masked_rows import MaskedRowsMessenger, mask_of
from pyro_sparse.infer.runs.undisturbed import rewindable
from pyro_sparse.infer.terms.dependencies import with_ancestors

Terms = Mapping[str, Tensor]


@dataclass
class MaskedRows:
    """What an ELBO has learned of a program's masked rows."""

    whole: set[str] = field(default_factory=set)  # sites whose masked rows matter
    narrows: bool = True  # whether the last run might have left some out: the next one may have to be done again

    def around(self, may_narrow: bool = True) -> AbstractContextManager[Callable[[], None]]:
        """Around a run; gives what puts back what it has moved: what is drawn is drawn once."""
        return rewindable() if may_narrow and self.narrows else nullcontext(lambda: None)

    def found(self, messenger: MaskedRowsMessenger, traces: Iterable[tuple[Any, Any]], terms: Terms) -> bool:
        """
        Whether a run has to be done again, since masked rows that it left out do matter.

        Args:
            messenger: around the guide.
            traces: of guide and model.
            terms: what stands for the log-probabilities of sites that have none.
        """
        self.narrows, narrowed = messenger.masked, messenger.narrowed
        seen = set().union(*(reaching_unmasked(narrowed, q, p, terms) for q, p in traces)) if narrowed else set()
        self.whole |= seen
        return bool(seen)


def reaching_unmasked(narrowed: Mapping[str, Tensor], guide_trace: Any, model_trace: Any, terms: Terms) -> set[str]:
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
    found = [(name, node, node["log_prob"] if "log_prob" in node else terms[name]) for name, node in nodes]
    return {name for name, mask in narrowed.items() if _is_seen(name, mask, found, own)}


def _is_seen(site: str, mask: Tensor, nodes: list[tuple[str, Any, Tensor]], own: Mapping[str, int]) -> bool:
    latent = [(name, node, term) for name, node, term in nodes if not node["is_observed"]]
    children = {
        dim: frozenset(own[name] for name, _, term in latent if name in own and _varies(term, {dim}))
        for dim in own.values()
    }
    dims = with_ancestors({own[site]}, children)
    return any(_varies(term, dims) and _sees(node, mask) for _, node, term in nodes) or any(
        # Those without a dim of their own show whether they were drawn once for each outcome.
        _varies(term, dims) and not _varies(node["value"], dims, node["fn"].event_dim)
        for name, node, term in latent
        if name not in own
    )


def _varies(value: Tensor, dims: Collection[int], event_dim: int = 0) -> bool:
    return any(value.dim() - event_dim >= -dim and value.shape[dim - event_dim] > 1 for dim in dims)


def _sees(node: Any, mask: Tensor) -> bool:
    own = mask_of(node)
    return own is None or bool((own & ~mask).any())
