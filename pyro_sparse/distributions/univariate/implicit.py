"""Draws and quantiles whose derivative is that of the equation which they solve."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_sparse._autograd import is_tracing, only_again


def implicit(
    z: Tensor,
    inner: Tensor,
    inside: Tensor,
    below: Tensor,
    log_mass: Callable[[Tensor], Tensor],
    log_density: Tensor,
    log_level: Tensor | None = None,
) -> Tensor:
    r"""
    Gives draws the derivatives that keep their mass constant, :math:`M(z(\theta), \theta) = c`:

    .. math:: \frac{dz}{d\theta} = -\frac{\partial_\theta M}{\partial_z M}
       = \mp \frac{M}{f}\, \partial_\theta \log M,

    M the mass below the draw (:math:`\partial_z M = f`) or above it (:math:`\partial_z M = -f`). M. Figurnov et al.,
    *Implicit reparameterization gradients*, NeurIPS 2018, eq. 5.

    A step of the chord method from the solution, :math:`z \mp \frac{M}{f} (\log M(z, \theta) - \log M)`, moves no value
    and has this derivative; one more step, from there, has the second derivative, too.

    Args:
        z: draws.
        inner: the same, with harmless points where a draw has no derivative.
        inside: where it has.
        below: where ``log_mass`` is of what lies below the draw; elsewhere of what lies above.
        log_mass: of a point.
        log_density: at ``inner``, normalised as the mass is.
        log_level: :math:`\log c` at ``inner``, where it has a derivative of its own.
    """
    level: Tensor | float = 0.0 if log_level is None else _zero_of(log_level)
    first = log_mass(inner)
    # The exponent is masked first: where a draw has no gradient the ratio may be inf, and 0 * inf is NaN.
    exponent = torch.where(inside, first - log_density, 0.0).detach()
    largest = torch.finfo(exponent.dtype).max
    ratio = torch.where(inside, exponent.exp().clamp(max=largest), 0.0)
    slope = torch.where(below, -ratio, ratio)
    moved = inner + slope * (_zero_of(first) - level)
    if moved.requires_grad or is_tracing():  # a trace may be run with a gradient later
        moved = moved + only_again(slope * (_zero_of(log_mass(moved)) - level))
    return torch.where(inside, moved, z)


def _zero_of(x: Tensor) -> Tensor:
    """Zero, with the derivatives of x."""
    x = torch.where(x.isfinite(), x, 0.0)
    return x - x.detach()
