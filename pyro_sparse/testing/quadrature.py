"""Adaptive quadrature over a batch, for checks that must not trust the quadrature of what they check."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_sparse._numerics import gauss_legendre

_POINTS = 15
_HALVINGS = 1100  # as many as a double has exponents
_PANELS = 100_000


def integrate(f: Callable[[Tensor], Tensor], breaks: Tensor) -> Tensor:
    r"""
    :math:`\int f` from the first of the breaks to the last, to rounding where f is piecewise smooth.

    A panel is halved until its 15-point Gauss-Legendre sum agrees with that of its halves for the whole batch, or it
    cannot be halved in this dtype, which is how integrable singularities end.

    Args:
        f: takes points, shape ``(n,)``, to values, shape ``(n, *batch)``.
        breaks: ascending, shape ``(m + 1,)``; a bump of f that is much narrower than its panel may be missed.

    Returns:
        Shape ``batch``, in the dtype of f.

    >>> bool((integrate(torch.sqrt, torch.tensor([0.0, 1.0], dtype=torch.float64)) - 2 / 3).abs() < 1e-12)
    True
    """
    nodes, weights = gauss_legendre(_POINTS, breaks)

    def panel_sums(left: Tensor, right: Tensor) -> Tensor:
        width = (right - left).unsqueeze(-1)
        values = f((left.unsqueeze(-1) + width * nodes).flatten())
        values = values.reshape(*left.shape, _POINTS, *values.shape[1:])
        return torch.einsum("pn,pn...->p...", (width * weights).to(values), values)

    left, right = breaks[:-1], breaks[1:]
    whole = panel_sums(left, right)
    tolerance = 64 * torch.finfo(whole.dtype).eps * (1 + whole.abs().sum(0).max())
    total = torch.zeros_like(whole[0])
    for _ in range(_HALVINGS):
        if len(left) > _PANELS:
            break
        middle = (left + right) / 2
        halves = panel_sums(left, middle), panel_sums(middle, right)
        error = (halves[0] + halves[1] - whole).abs().reshape(len(left), -1).amax(1)
        done = (error <= tolerance) | (middle <= left) | (middle >= right)
        total = total + (halves[0] + halves[1])[done].sum(0)
        if done.all():
            return total
        whole = torch.cat([half[~done] for half in halves])
        left, right = torch.cat([left[~done], middle[~done]]), torch.cat([middle[~done], right[~done]])
    raise AssertionError(f"integrate: expected an integral that exists, got {len(left)} panels that do not settle.")
