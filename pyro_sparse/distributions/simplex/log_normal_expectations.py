r"""Sums of log-normal variables over a random set of them: what a logistic-normal point of the simplex is made of."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_sparse._autograd import not_traced
from pyro_sparse._numerics import decaying_rule, panels
from pyro_sparse.distributions.simplex.face_expectations import Sums

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


class _Derivatives(torch.autograd.Function):
    r"""
    :math:`T_n` and :math:`T_{n+1}`, where :math:`T_n = E g^{(n)}(m + \sigma \epsilon)` and :math:`g(u) = \exp(-e^u)`,
    elementwise: node by node, so that memory does not grow with their number. As
    :math:`\partial_m T_n = T_{n+1}` and :math:`\partial_\sigma T_n = \sigma T_{n+2}`, they have all derivatives.
    """

    @staticmethod
    def forward(m: Tensor, scale: Tensor, n: int, count: int) -> tuple[Tensor, ...]:
        with not_traced():
            values = _expectations(m, scale, n, count)
        return tuple(values)  # here a trace must see where they come from

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: tuple[Tensor, ...]) -> None:
        m, scale, ctx.n, _ = inputs
        ctx.save_for_backward(m, scale, *output[1:])
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_following: Tensor, *_: Any) -> tuple[Tensor, Tensor, None, None]:
        m, scale, t1, *higher = ctx.saved_tensors
        if not higher or torch.is_grad_enabled():  # what follows will be differentiated
            higher = _derivatives(m, scale, ctx.n + 2)
        t2, t3 = higher
        return grad * t1 + grad_following * t2, scale * (grad * t2 + grad_following * t3), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, m: Tensor, scale: Tensor, n: int, count: int) -> Any:
        m, scale = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip((m, scale), in_dims, strict=False)
        )
        return _Derivatives.apply(m, scale, n, count), (0,) * count


def _derivatives(m: Tensor, scale: Tensor, n: int) -> list[Tensor]:
    """:math:`T_n` and :math:`T_{n+1}`; where a derivative may be asked for, it is prepared along with them."""
    return _Derivatives.apply(m, scale, n, 4 if m.requires_grad or scale.requires_grad else 2)[:2]


def _laplace(m: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`E \exp(-e^u)` and :math:`E e^u \exp(-e^u)` for :math:`u = m + \sigma \epsilon`."""
    zero, one = _derivatives(m, scale, 0)
    return zero, -one


def _expectations(m: Tensor, scale: Tensor, n: int, count: int) -> Tensor:
    """So many of them, from the n-th on: stacked."""
    flat_m, flat_scale = m.flatten(), scale.flatten()
    result = m.new_zeros(count, m.numel())
    for rule, chosen in ((_narrow, flat_scale <= 1), (_wide, flat_scale > 1)):
        for part in chosen.nonzero().squeeze(-1).split(_CHUNK):
            result[:, part] = rule(flat_m[part], flat_scale[part], n, count)
    return result.unflatten(-1, m.shape)


def _narrow(m: Tensor, scale: Tensor, n: int, count: int) -> Tensor:
    r"""
    For scales up to 1: the trapezoid rule over :math:`\epsilon`. With :math:`t = e^u`, the n-th derivative of g is
    :math:`p_n(t) e^{-t}`, :math:`p_{n+1} = t (p_n' - p_n)`.
    """
    moments, step = m.new_zeros(n + count, *m.shape), 0.35  # of t^k exp(-t)
    for i in range(-25, 26):
        eps = i * step
        t = torch.add(m, scale, alpha=eps).clamp_(max=6.0).exp_()  # beyond, exp(-t) is nothing
        term = (-t).exp_().mul_(step * math.exp(-eps * eps / 2) / math.sqrt(2 * math.pi))
        moments[0] += term
        for moment in moments[1:]:
            moment += term.mul_(t)
    rows = [[1.0] + [0.0] * (n + count - 1)]
    while len(rows) < n + count:
        p = rows[-1]
        rows.append([k * c - before for k, (c, before) in enumerate(zip(p, [0.0, *p], strict=False))])
    return torch.einsum("nk,k...->n...", m.new_tensor(rows[n:]), moments)


def _wide(m: Tensor, scale: Tensor, n: int, count: int) -> Tensor:
    r"""
    For scales above 1: :math:`\exp(-e^u)` is the probability that a Gumbel variable G is above u, so that the normal
    variable may be integrated first. It leaves :math:`E\,\Phi(z)`, :math:`z = (G - m) / \sigma`, and, for n > 0,
    :math:`T_n = -\sigma^{-n} E\,\mathrm{He}_{n-1}(z) \varphi(z)`.
    """
    result = m.new_zeros(n + count, *m.shape)
    # The density of G = log t is t exp(-t), with respect to dt / t.
    t, weights = decaying_rule(m.new_tensor(45.0), 72)
    for log_t, weight in zip(t.log(), weights * t * (-t).exp(), strict=True):
        z = (log_t - m) / scale
        if n == 0:
            result[0] += weight * torch.special.ndtr(z)
        before, term = 0.0, (-z.square() / 2).exp_().mul_(-weight / math.sqrt(2 * math.pi))
        for k, row in enumerate(result[1:]):
            row += term
            before, term = term, torch.addcmul(-k * before, z, term) if k else z * term
    powers = torch.arange(n + count, dtype=m.dtype, device=m.device).reshape(-1, *(1,) * m.dim())
    return result[n:] / scale.pow(powers[n:])
