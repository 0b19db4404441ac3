r"""Sums of log-normal variables over a random set of them: what a logistic-normal point of the simplex is made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_sparse._numerics import decaying_rule, panels
from pyro_sparse.distributions.face_sums import Sums

_BREAKS = 330  # at most; with up to 64 variables each has its own
_NODES = 14  # on each panel: 1e-10
_CHUNK = 1 << 15  # numbers at a time: what a processor's cache holds


class LogNormalSums:
    r"""
    Expectations over :math:`S = \sum_k f_k e^{x_k}`, f a face, known or random, and x independent normal variables, by

    .. math:: \ln S = c + \int \bigl[\exp(-e^{s + c}) - \exp(-e^s S)\bigr] ds, \qquad
        e^{x_k} / S = \int e^{s + x_k} \exp(-e^s S) \, ds.

    Inside, :math:`E \exp(-e^s S)` is a product over the vertices of integrals over one normal variable. In float64
    whatever the dtype, to 1e-8 for scales between 1e-3 and 1e3 side by side. O(K^2) for up to 64 vertices; beyond,
    O(K), and as good only where their locs are not many scales apart. It looks at the scales, which waits for a GPU.

    Args:
        face: f.
        loc: of x, ``(*batch, K)``.
        scale: of x, positive, ``(*batch, K)``.
    """

    def __init__(self, face: Sums, loc: Tensor, scale: Tensor) -> None:
        self.dtype, loc, scale = loc.dtype, loc.double(), scale.double()  # what is summed below cancels
        self.face = face
        self.centre = loc.detach().mean(-1)
        self.s, self.weights = self._nodes(loc.detach(), scale.detach())
        m = self.s.unsqueeze(-1) + loc.unsqueeze(-2)
        self._x, self._first = _laplace(m, scale.unsqueeze(-2).expand_as(m))
        _, self._others = face.tilted(self._x.clamp(min=torch.finfo(m.dtype).tiny).log())

    def _nodes(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """On panels that end where a factor bends: it is 1 below s = -loc - 8.5 scale - 37, and 0 above the last."""
        ends = [(-8.5, -37.0), (-4.25, -12.0), (-1.5, -3.0), (1.5, 1.0), (8.5, 4.0)]
        # The first factor has the scale zero.
        loc, scale = torch.cat([self.centre.unsqueeze(-1), loc], -1), torch.nn.functional.pad(scale, (1, 0))
        breaks = torch.cat([-loc + a * scale + b for a, b in ends], -1).sort(-1).values.movedim(-1, 0)
        if len(breaks) > _BREAKS:
            breaks = breaks[torch.linspace(0, len(breaks) - 1, _BREAKS, device=loc.device).round().long()]
        s, weights = panels(breaks, _NODES)
        return s.movedim(0, -1), weights.movedim(0, -1)

    def size_times_log(self) -> Tensor:
        r""":math:`E |f| \ln S`, ``batch_shape``."""
        size = self.face.linear(torch.ones_like(self._x[..., 0, :]))
        one = (-(self.s + self.centre.unsqueeze(-1)).exp()).exp()
        ours = (self._x * self._others).sum(-1)
        total = self.centre * size + (self.weights * (size.unsqueeze(-1) * one - ours)).sum(-1)
        return total.to(self.dtype)

    def share(self) -> Tensor:
        r""":math:`E f_k e^{x_k} / S`, ``(*batch, K)``."""
        return (self.weights.unsqueeze(-1) * self._first * self._others).sum(-2).to(self.dtype)


class _Laplace(torch.autograd.Function):
    r"""
    :math:`E \exp(-e^u)` and :math:`E e^u \exp(-e^u)` for :math:`u = m + \sigma \epsilon`, elementwise: node by node, so
    that memory does not grow with their number.
    """

    @staticmethod
    def forward(ctx: Any, m: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        zero, first, *slopes = _expectations(m, scale, any(ctx.needs_input_grad))
        ctx.save_for_backward(first, *slopes)
        return zero, first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_zero: Tensor, grad_first: Tensor) -> tuple[Tensor, Tensor]:
        first, zero_by_scale, first_by_m, first_by_scale = ctx.saved_tensors
        return -grad_zero * first + grad_first * first_by_m, grad_zero * zero_by_scale + grad_first * first_by_scale


def _laplace(m: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _Laplace.apply(m, scale)
    return result


def _expectations(m: Tensor, scale: Tensor, slopes: bool) -> Tensor:
    """The two, and with slopes the derivatives of the first by scale, of the second by m and by scale: stacked."""
    flat_m, flat_scale = m.flatten(), scale.flatten()
    result = m.new_empty(5 if slopes else 2, m.numel())
    for rule, chosen in ((_narrow, flat_scale <= 1), (_wide, flat_scale > 1)):
        for part in chosen.nonzero().squeeze(-1).split(_CHUNK):
            values = rule(flat_m[part], flat_scale[part])
            result[:, part] = sum(torch.stack(list(itertools.islice(v, len(result)))) for v in values)
    return result.unflatten(-1, m.shape)


def _narrow(m: Tensor, scale: Tensor) -> Iterator[Iterator[Tensor]]:
    r"""For scales up to 1: the trapezoid rule over :math:`\epsilon`, a summand of each of the five at every node."""

    def summands(eps: float) -> Iterator[Tensor]:
        u = (m + scale * eps).clamp(max=6.0).exp()  # beyond, exp(-e^u) is nothing
        zero = (step * math.exp(-eps * eps / 2) / math.sqrt(2 * math.pi)) * (-u).exp()
        first = u * zero
        yield from (zero, first)
        second = first * (1 - u)
        yield from (-eps * first, second, eps * second)

    step = 0.35
    return (summands(i * step) for i in range(-25, 26))


def _wide(m: Tensor, scale: Tensor) -> Iterator[Iterator[Tensor]]:
    r"""
    For scales above 1: :math:`\exp(-e^u)` is the probability that a Gumbel variable G is above u, so that the normal
    variable may be integrated first. It leaves :math:`E\,\Phi((G - m) / \sigma)`.
    """

    def summands(log_t: Tensor, weight: Tensor) -> Iterator[Tensor]:
        z = (log_t - m) / scale
        density = weight * (-z.square() / 2).exp() / (math.sqrt(2 * math.pi) * scale)
        yield from (weight * torch.special.ndtr(z), density)
        by_m = density * z / scale
        yield from (-density * z, by_m, by_m * z - density / scale)

    # The density of G = log t is t exp(-t), with respect to dt / t.
    t, weights = decaying_rule(m.new_tensor(45.0), 72)
    return (summands(*node) for node in zip(t.log(), weights * t * (-t).exp(), strict=True))
