"""
How the sparse support of a site is laid out for the model: the one place that decides which values it runs on.

A layout is a function of a site's name, its distribution and the batch dims along which all rows must share one list
of outcomes; it returns values of shape ``(S,) + batch_shape + event_shape`` (size one where they do not vary), which
Pyro's parallel enumeration then broadcasts. Every row's support must be among its values, each outcome at most once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from pyro_sparse.distributions import SparseDistribution

Layout = Callable[[str, SparseDistribution, tuple[int, ...]], Tensor]
Size = tuple[str, int, int | None]

WORTHWHILE = 0.8  # a layout must leave at most this share of the work, to pay for finding and gathering the support


def padded(name: str, fn: SparseDistribution, shared_dims: tuple[int, ...]) -> Tensor:
    """Each row its own support, filled up to the longest: S·B rows."""
    return fn.support_values(shared_dims)


def union(name: str, fn: SparseDistribution, shared_dims: tuple[int, ...]) -> Tensor:
    """One list for all rows, the union of their supports: a decoder of the outcome alone runs on U rows."""
    return fn.support_values(tuple(range(-len(fn.batch_shape), 0)))


def dense(name: str, fn: SparseDistribution, shared_dims: tuple[int, ...]) -> Tensor:
    """All K outcomes, as under ``TraceEnum_ELBO``."""
    return fn.enumerate_support(expand=False)


def size(name: str, batch_shape: tuple[int, ...], outcomes: int | None, nesting: int) -> Size:
    """What the costs of a site's slots depend on: also how many rows its plates have, to a factor of two."""
    rows = math.prod(batch_shape[-nesting:]) if nesting else 1
    return name, rows.bit_length(), outcomes


def cheapest(
    ratios: Mapping[Size, float],
    nesting: int,
    uncounted: set[Size],
    taken: dict[str, str] | None = None,
    unpackable: Collection[str] = (),
) -> Layout:
    r"""
    The layout with the least work, given what a slot costs.

    A decoder's work is :math:`\alpha` for what it computes from the outcome alone and :math:`\beta` for what it
    computes from outcome and row. One outcome shared by B rows costs :math:`\alpha + \beta B`, one slot with a value
    per row :math:`(\alpha + \beta) B`; their ratio r, between 1 and B, decides: S slots of the padded layout cost as
    much as S·r shared outcomes, to be compared with the union's U and with all K. Packed rows cost as much as the mean
    support in place of S, and something for taking them apart.

    Args:
        ratios: r for each site (:func:`~pyro_sparse.infer.expansion.work.slot_ratios`); sites not in it are padded.
        nesting: how many dims plates have.
        uncounted: gets the sizes that are not in ``ratios``.
        taken: gets the name of each site's layout, ``"packed"`` for one that is padded to be packed; None where none
            can be packed.
        unpackable: sites that are not to be.
    """

    names: dict[str, str] = {} if taken is None else taken

    def layout(name: str, fn: SparseDistribution, shared_dims: tuple[int, ...]) -> Tensor:
        outcomes = math.inf if fn.num_outcomes is None else fn.num_outcomes
        key = size(name, fn.batch_shape, fn.num_outcomes, nesting)
        ratio = ratios.get(key)
        names[name] = "padded"
        if ratio is None:
            uncounted.add(key)
            return padded(name, fn, shared_dims)
        if outcomes <= ratio:  # even one slot per row costs as much as all outcomes
            names[name] = "dense"
            return dense(name, fn, shared_dims)
        values = padded(name, fn, shared_dims)
        work = ratio * len(values)
        if taken is not None and name not in unpackable:
            packed = ratio * float(fn.support_size.double().mean()) / WORTHWHILE
            if packed < work:
                work, names[name] = packed, "packed"
        if ratio * WORTHWHILE > 1:  # else the union, at least as long as the longest support, saves too little
            shared = union(name, fn, shared_dims)
            if len(shared) < work:
                values, work, names[name] = shared, len(shared), "union"
        if work > WORTHWHILE * outcomes:
            names[name] = "dense"
            return dense(name, fn, shared_dims)
        return values

    return layout
