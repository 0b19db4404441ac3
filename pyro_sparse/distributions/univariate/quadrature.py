r"""
Where to put the nodes of an integral over (0, 1).

A rule of Gauss and Legendre converges exponentially on a panel on which the integrand is smooth. A panel therefore ends
where the density gathers and where a logarithm bends. A stretched density has a singularity just outside of [0, 1]; in
the coordinate :math:`y = \operatorname{logit} \frac{z - l}{h - l}` it is far away, however tight the stretch is.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.nn.functional import logsigmoid

from pyro_sparse._numerics import as_like, panels

#: the (l, h) of a stretched density, each a number or a tensor; None of one that is smooth in z
Stretch = tuple[Any, Any] | None


class Points(NamedTuple):
    """
    Nodes z, and 1 - z to all its digits; their weights with respect to Lebesgue measure; and log k and log (1 - k) of
    which stretch. None has a gradient.
    """

    z: Tensor
    rest: Tensor
    weights: Tensor
    stretch: Stretch
    log_parts: tuple[Tensor, Tensor] | None


def logit(z: Tensor, low: Any, high: Any) -> Tensor:
    """The coordinate of a stretch."""
    return ((z - low) / (high - z)).log()


def place(breaks: list[Tensor], shape: Size, stretch: Stretch, count: int, double: bool = False) -> Points:
    """
    Nodes between each two neighbours of some points of [0, 1].

    Args:
        breaks: where the integral begins, where it ends, and points between, in any order.
        shape: the batch shape that they broadcast to.
        stretch: whose coordinate is used.
        count: nodes on each panel.
        double: whether to compute in float64 whatever the dtype, where a density is steeper than the stretch says.
    """
    dtype = breaks[0].dtype
    z = [b.detach().clamp(0.0, 1.0).expand(shape) for b in breaks]
    if double:
        z = [b.double() for b in z]
    if stretch is not None:
        low, high = (x.detach() if isinstance(x, Tensor) else x for x in stretch)
        z = [logit(b, low, high) for b in z]
    first, last, *inner = z
    inner = [b.maximum(first).minimum(last) for b in inner]
    if len(inner) == 2:  # by far the most frequent, and sort is slow
        inner = [torch.minimum(*inner), torch.maximum(*inner)]
    elif inner:
        inner = list(torch.stack(inner).sort(0).values)
    y, weights = panels(torch.stack([first, *inner, last]), count)
    if stretch is None:
        return Points(y.to(dtype), (1 - y).to(dtype), weights.to(dtype), None, None)
    width, log_k = high - low, logsigmoid(y)
    log_parts = log_k.to(dtype), (log_k - y).to(dtype)
    info = torch.finfo(dtype)
    inside = (low + width * y.sigmoid()).to(dtype).clamp(info.tiny, 1 - info.eps / 2)
    rest = ((1 - high) + width * (-y).sigmoid()).to(dtype).clamp(info.tiny, 1.0)
    return Points(inside, rest, (weights * width).to(dtype) * (log_parts[0] + log_parts[1]).exp(), stretch, log_parts)


def nearly_none(like: Tensor) -> Stretch:
    """In whose coordinate a density with singularities at 0 and 1 themselves is smooth enough."""
    reach = 1e-9 if like.dtype == torch.float64 else 1e-5
    return -reach, 1 + reach


def nodes_for(stretch: Stretch) -> int:
    """How many nodes a panel needs for an error of 1e-10: more, the longer the coordinate is."""
    if stretch is None:
        return 0
    low, high = stretch
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return 44  # what a stretch of 1e-6 takes: looking would wait for the device
    return math.ceil(28 + 1.1 * max(math.log(-high / low), math.log((1 - low) / (high - 1))))


def same(a: Stretch, b: Stretch) -> bool:
    """Whether two stretches are known to be equal without looking into tensors."""
    if a is None or b is None:
        return a is b
    return all(
        x is y or (not (isinstance(x, Tensor) or isinstance(y, Tensor)) and x == y) for x, y in zip(a, b, strict=True)
    )


def tighter(a: Stretch, b: Stretch) -> Stretch:
    """A stretch in whose coordinate both densities are smooth."""
    if a is None or b is None or same(a, b):
        return a if b is None else b
    if any(isinstance(x, Tensor) for x in (*a, *b)):
        other = next(x for x in (*a, *b) if isinstance(x, Tensor))
        (la, ha), (lb, hb) = ([as_like(x, other) for x in pair] for pair in (a, b))
        return torch.maximum(la, lb), torch.minimum(ha, hb)
    return max(a[0], b[0]), min(a[1], b[1])


def bends(stretch: Stretch, other: Tensor) -> list[Tensor]:
    """Where the logarithms of a wider stretch bend in the coordinate of a tighter one."""
    return [] if stretch is None else [as_like(x, other) for x in (-stretch[0], 2 - stretch[1])]
