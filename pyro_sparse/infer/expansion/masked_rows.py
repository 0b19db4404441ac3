"""
Rows of a guide site that a mask takes out of the ELBO, such as padded words: one outcome there, not a support.

What such a row draws may still reach a term that no mask takes out. This is looked for in the traces, and such a site
is enumerated in full.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.distributions import SparseDistribution
from pyro_sparse.infer.expansion.law import masks
from pyro_sparse.infer.expansion.messengers import SparseEnumMessenger


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
        if mask is None or _shape(mask, fn.batch_shape) != fn.batch_shape or not fn.has_enumerate_support:
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
        return _with_another(values, fn) if len(values) == 1 and fn.num_outcomes != 1 else values


def mask_of(node: Any) -> Tensor | None:
    """What ``poutine.mask`` and ``.mask()`` make of a site together; None where there is no mask."""
    result = None
    for mask in (node["mask"], *masks(node["fn"])):
        if mask is None or mask is True:
            continue
        mask = torch.as_tensor(mask, device=node["value"].device if node["value"] is not None else None).bool()
        result = mask if result is None else result & mask
    return result


def mask_within(node: Any, shape: torch.Size) -> Tensor | None:
    """The mask, where it is of the elements of this shape and not of more."""
    mask = mask_of(node)
    return None if mask is None or _shape(mask, shape) != shape else mask


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
