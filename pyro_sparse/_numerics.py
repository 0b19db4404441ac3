"""Small numerical pieces that several rooms share; torch only."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def as_like(x: object, other: Tensor) -> Tensor:
    """x as a tensor of the other's dtype and device; a number is written there, as none that is copied waits for it."""
    if isinstance(x, int | float):
        return other.new_full((), x)
    return torch.as_tensor(x, dtype=other.dtype, device=other.device)


def safe_log(x: Tensor, at_zero: float = -math.inf) -> Tensor:
    r"""
    :math:`\log x` for :math:`x \ge 0`, with the value ``at_zero`` and the gradient zero where :math:`x = 0`.

    The argument is replaced before the log: masking only the result would leave :math:`0 \cdot \infty` = NaN in the
    backward pass.
    """
    zero = x == 0
    return torch.where(zero, at_zero, torch.where(zero, 1.0, x).log())


def log1mexp(x: Tensor) -> Tensor:
    r"""
    :math:`\log(1 - e^x)` for :math:`x < 0`, to full relative precision near both ends; -inf where :math:`x = 0`.

    Each of two forms serves where it is exact, and sees a harmless argument elsewhere, so that gradients are finite.
    """
    near = x > -math.log(2)
    small, large = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, safe_log(-torch.expm1(small)), torch.log1p(-large.exp()))


def log1mexpexp(y: Tensor) -> Tensor:
    r"""
    :math:`\log(1 - e^{-e^y})`, the log-probability that a count of mean :math:`e^y` is not zero.

    For :math:`y \to -\infty` it is :math:`y - e^y / 2`, which the plain form would lose where :math:`e^y` underflows.
    """
    tiny = y < -18.0 if y.dtype == torch.float64 else y < -8.0
    rate = torch.where(tiny, 0.0, y).exp()
    return torch.where(tiny, y - torch.where(tiny, y, 0.0).exp() / 2, log1mexp(-rate))


def entropy_terms(log_p: Tensor) -> Tensor:
    r""":math:`-p \log p` from :math:`\log p`, with :math:`0 \log 0 = 0` and gradient zero there."""
    off = log_p == -math.inf
    log_p = torch.where(off, 0.0, log_p)
    return torch.where(off, 0.0, -log_p.exp() * log_p)


def log_ndtr(x: Tensor) -> Tensor:
    r"""
    :math:`\log \Phi(x)` of the standard normal. In the far left tail, by its asymptotic series (error below 1e-13 where
    x < -30): the derivative of torch's own is a difference of squares there, which float32 cannot take.
    """
    far = x < -30.0
    tail = torch.where(far, x, -30.0)
    r = tail.square().reciprocal()
    series = r * (-1 + r * (3 + r * (-15 + r * (105 - 945 * r))))
    log_tail = -tail.square() / 2 - (-tail).log() - math.log(2 * math.pi) / 2 + torch.log1p(series)
    return torch.where(far, log_tail, torch.special.log_ndtr(torch.where(far, -1.0, x)))


def _gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    # Golub and Welsch (1969): the nodes are the eigenvalues of the Jacobi matrix of the Legendre polynomials.
    n = torch.arange(1, count, dtype=torch.float64)
    off_diagonal = n / (4 * n.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    # The rule is symmetric: averaging with its mirror image halves the rounding and puts the middle node at zero.
    nodes, weights = (nodes - nodes.flip(0)) / 2, vectors[0].square()
    return (1 + nodes) / 2, (weights + weights.flip(0)) / 2


# Not functools.cache, which torch.compile warns of.
_rules: dict[int, tuple[Tensor, Tensor]] = {}


def gauss_legendre(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    The nodes and weights with :math:`\int_0^1 f \approx \sum_i w_i f(x_i)`, exact for polynomials of degree
    2 ``count`` - 1; both of shape ``(count,)``, dtype and device of ``like``.
    """
    if count not in _rules:
        _rules[count] = _gauss_legendre(count)
    nodes, weights = _rules[count]
    return nodes.to(like), weights.to(like)


def panels(breaks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    r"""
    Nodes and weights of a Gauss-Legendre rule between each two neighbours of ``breaks``, which ascend along dim 0.

    Args:
        breaks: shape ``(m + 1, *batch)``.
        count: how many nodes there are on each of the m panels.

    Returns:
        Both of shape ``(m * count, *batch)``.
    """
    nodes, weights = (v.reshape(-1, *(1,) * (breaks.dim() - 1)) for v in gauss_legendre(count, breaks))
    widths = (breaks[1:] - breaks[:-1]).unsqueeze(1)
    return (breaks[:-1].unsqueeze(1) + widths * nodes).flatten(0, 1), (widths * weights).flatten(0, 1)


def decaying_rule(span: Tensor, count: int) -> tuple[Tensor, Tensor]:
    r"""
    Nodes and weights with :math:`\int_0^\infty f(t) \, dt / t \approx \sum_i w_i f(t_i)` for smooth f that vanishes at
    zero and, like :math:`e^{-t}`, beyond about ``span``: the trapezoid rule in y, with :math:`t = \exp(y - e^{-y})`. It
    converges exponentially, because the integrand then decays doubly exponentially on both sides.

    Args:
        span: where f is negligible, positive, ``(*batch,)``.
        count: how many nodes.

    Returns:
        Both of shape ``(*batch, count)``, without gradient.

    Reference: H. Takahasi and M. Mori, *Double exponential formulas for numerical integration*, 1974.
    """
    first = -3.5  # t is then the rounding of 1 in float64
    steps = torch.linspace(0, 1, count, dtype=span.dtype, device=span.device)
    width = (span.detach().log() - first).unsqueeze(-1)
    y = first + steps * width
    below = (-y).exp()
    return (y - below).exp(), (1 + below) * (width / (count - 1))
