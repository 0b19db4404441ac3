"""
Rows of a guide site that a mask takes out of the ELBO, such as padded words: one outcome there, not a support.

What such a row draws may still reach a term that no mask takes out. This is looked for in the traces, and such a site
is enumerated in full.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sparse.distributions import SparseDistribution
from pyro_sparse.infer.dependencies import with_ancestors
from pyro_sparse.infer.messenger import SparseEnumMessenger
from pyro_sparse.infer.undisturbed import rewindable

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


class MaskedRowsMessenger(SparseEnumMessenger):
    """
    :class:`SparseEnumMessenger` for a guide, which enumerates a single outcome, with weight one, in masked rows.

    Args:
        whole: the sites to be enumerated in full all the same; None for all.
        args, kwargs: those of :class:`SparseEnumMessenger`.
    """

    def __init__(self, *args: Any, whole: Collection[str] | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.whole = whole
        self.masked = False  # whether a site that might have been narrowed had a mask
        self.narrowed: dict[str, Tensor] = {}  # the mask of each site that has been

    def _pyro_sample(self, msg: Any) -> None:
        latent = not msg["done"] and not msg["is_observed"]
        if latent and self.whole is not None and msg["name"] not in self.whole and self._enumerates(msg):
            self._narrow(msg)
        super()._pyro_sample(msg)

    def _narrow(self, msg: Any) -> None:
        fn: SparseDistribution = msg["fn"]
        mask = mask_of(msg)
        mask = None if mask is None else mask.to(fn.support_size.device)
        if mask is None or _shape(mask, fn.batch_shape) != fn.batch_shape:
            return
        self.masked = True
        if bool(mask.all()):
            return
        msg["fn"] = fn.narrowed(mask)
        if msg["fn"] is not fn:
            self.narrowed[msg["name"]] = mask

    def _lay_out(self, msg: Any) -> Tensor:
        values, fn, mask = super()._lay_out(msg), msg["fn"], self.narrowed.get(msg["name"])
        if mask is None:
            return values
        site = self.sites[msg["name"]]
        self.sites[msg["name"]] = replace(site, support_size=torch.where(mask, site.support_size, 0))
        # With one slot, the traces would not tell which terms depend on the site.
        return _with_another(values, fn) if len(values) == 1 and fn.num_outcomes > 1 else values


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


def mask_of(node: Any) -> Tensor | None:
    """What ``poutine.mask`` and ``.mask()`` make of a site together; None where there is no mask."""
    result = None
    for mask in _masks(node):
        if mask is None or mask is True:
            continue
        mask = torch.as_tensor(mask, device=node["value"].device if node["value"] is not None else None).bool()
        result = mask if result is None else result & mask
    return result


def mask_within(node: Any, shape: torch.Size) -> Tensor | None:
    """The mask, where it is of the elements of this shape and not of more."""
    mask = mask_of(node)
    return None if mask is None or _shape(mask, shape) != shape else mask


def _masks(node: Any) -> Iterator[Any]:
    yield node["mask"]
    fn, rightmost = node["fn"], 0  # how many dims of the mask are summed over
    while fn is not None:
        mask = getattr(fn, "_mask", None)
        yield _over_event(mask, rightmost) if isinstance(mask, Tensor) else mask
        rightmost += getattr(fn, "reinterpreted_batch_ndims", 0)
        fn = getattr(fn, "base_dist", None)


def _over_event(mask: Tensor, dims: int) -> Tensor:
    """Whether some part of the event is open."""
    dims = min(dims, mask.dim())
    return mask.flatten(-dims).any(-1) if dims else mask


def _shape(mask: Tensor, batch_shape: torch.Size) -> torch.Size | None:
    try:
        return torch.broadcast_shapes(mask.shape, batch_shape)
    except RuntimeError:  # it is for Pyro to say so
        return None


def _with_another(values: Tensor, fn: SparseDistribution) -> Tensor:
    """And in each row another outcome."""
    first, second = fn.enumerate_support(expand=False)[:2]
    same = (values == first).all(-1, keepdim=True) if fn.event_shape else values == first
    return torch.cat([values, torch.where(same, second, first).expand_as(values)])
