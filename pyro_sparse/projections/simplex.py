r"""Sparse relatives of softmax: :func:`sparsemax`, :func:`entmax15`, :func:`entmax`, :func:`topk_sparsemax`.

They are one family. For :math:`\alpha > 1`,

.. math::
    p_i = [(\alpha - 1)\, x_i - \tau]_+^{1/(\alpha - 1)},
    \qquad \tau \text{ such that } \sum_i p_i = 1,

so scores at or below a threshold get a probability of exactly zero. As :math:`\alpha \to 1` it becomes softmax.

Each projection takes three steps:

1. shift the scores to a maximum of zero, which does not change :math:`p` and puts :math:`\tau` in :math:`[-1, 0)`;
2. search :math:`\tau`, and with it the support :math:`S = \{i : p_i > 0\}`, on detached scores;
3. solve for :math:`\tau` again *given* :math:`S`, with ordinary differentiable operations.

Autograd sees steps 1 and 3 only. While :math:`S` stays the same they are the whole function, so derivatives of every
order (of :func:`entmax`, up to the third) are right, also under ``torch.func`` and ``torch.compile``, and no backward
pass is written by hand.
At a tie, :math:`(\alpha - 1)\, x_i = \tau`, there is no derivative; these functions return a one-sided one.

Reference: Martins and Astudillo, *From softmax to sparsemax*, ICML 2016, Proposition 1 and Algorithm 1; Peters, Niculae
and Martins, *Sparse sequence-to-sequence models*, ACL 2019, Algorithms 1 and 2; Correia, Niculae and Martins,
*Adaptively sparse transformers*, EMNLP 2019, Proposition 1 (the gradient in alpha).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from pyro_sparse._autograd import is_tracing
from pyro_sparse._numerics import as_like
from pyro_sparse._precision import narrowed

__all__ = ["entmax", "entmax15", "sparsemax", "topk_sparsemax"]


def sparsemax(scores: Tensor, dim: int = -1) -> Tensor:
    r"""Euclidean projection of scores onto the probability simplex, entmax with :math:`\alpha = 2`.

    .. math::
        \operatorname{sparsemax}(x) = \operatorname*{argmin}_{p \in \Delta} \lVert p - x \rVert^2 = [x - \tau]_+,
        \qquad \tau = \frac{\sum_{i \in S} x_i - 1}{|S|}.

    With two outcomes it is the hard sigmoid, :math:`p_1 = \min(1, \max(0, (x_1 - x_2 + 1) / 2))`.
    Its Jacobian is :math:`\operatorname{diag}(s) - s s^\top / |S|`, with :math:`s` the indicator of the support.

    Args:
        scores: Real scores :math:`x`, any shape, any floating dtype; ``-inf`` rules an outcome out.
        dim: The dimension that holds the outcomes.

    Returns:
        Probabilities :math:`p`, same shape and dtype as ``scores`` (float32 under ``torch.autocast``), summing to one
        along ``dim``. Where all scores are ``-inf``, or one is NaN or ``+inf``, they are NaN.

    Raises:
        TypeError: If scores are not a floating-point tensor.
        ValueError: If there is no dimension ``dim``, or it is empty.

    Reference: Martins and Astudillo, *From softmax to sparsemax*, ICML 2016, Proposition 1 and Algorithm 1.

    Example:
        >>> sparsemax(torch.tensor([1.0, 0.5, -1.0]))
        tensor([0.7500, 0.2500, 0.0000])
    """
    x = _shifted("sparsemax", scores, dim)
    return _restored(_on_candidates(_sparsemax, x, 1.0), scores, dim)


def entmax15(scores: Tensor, dim: int = -1) -> Tensor:
    r"""Half way between softmax and sparsemax: entmax with :math:`\alpha = 1.5`.

    .. math::
        \operatorname{entmax}_{1.5}(x) = [x / 2 - \tau]_+^2,
        \qquad \tau = \mu - \sqrt{\tfrac{1}{|S|} \Bigl(1 - \sum_{i \in S} (x_i / 2 - \mu)^2\Bigr)},
        \qquad \mu = \frac{1}{|S|} \sum_{i \in S} x_i / 2.

    Smooth at the threshold, where sparsemax has a kink; supports are larger than sparsemax's.
    Its Jacobian is :math:`\operatorname{diag}(s) - s s^\top / \sum_i s_i`, with :math:`s = \sqrt{p}`.

    Args:
        scores: Real scores :math:`x`, any shape, any floating dtype; ``-inf`` rules an outcome out.
        dim: The dimension that holds the outcomes.

    Returns:
        Probabilities :math:`p`, same shape and dtype as ``scores`` (float32 under ``torch.autocast``), summing to one
        along ``dim``. Where all scores are ``-inf``, or one is NaN or ``+inf``, they are NaN.

    Raises:
        TypeError: If scores are not a floating-point tensor.
        ValueError: If there is no dimension ``dim``, or it is empty.

    Reference: Peters, Niculae and Martins, *Sparse sequence-to-sequence models*, ACL 2019, Algorithm 2.

    Example:
        >>> entmax15(torch.tensor([1.0, 0.5, -1.0]))
        tensor([0.6740, 0.3260, 0.0000])
    """
    x = _shifted("entmax15", scores, dim)
    return _restored(_on_candidates(_entmax15, x, 2.0), scores, dim)


def entmax(scores: Tensor, alpha: float | Tensor, dim: int = -1) -> Tensor:
    r"""The whole family, differentiable in :math:`\alpha` too.

    .. math::
        \operatorname{entmax}_\alpha(x) = \operatorname*{argmax}_{p \in \Delta} \; p^\top x + H_\alpha(p)
        = [(\alpha - 1)\, x - \tau]_+^{1 / (\alpha - 1)},
        \qquad H_\alpha(p) = \frac{1 - \sum_i p_i^\alpha}{\alpha (\alpha - 1)}.

    Larger :math:`\alpha` gives smaller supports. Its Jacobian is
    :math:`\operatorname{diag}(s) - s s^\top / \sum_i s_i`, with :math:`s_i = p_i^{2 - \alpha}` on the support.
    For :math:`\alpha` fixed at 2 or 1.5, :func:`sparsemax` and :func:`entmax15` are faster.

    Meant for :math:`\alpha \in (1, 4]`. Rounding errors in the scores are magnified to :math:`\epsilon / (\alpha - 1)`
    relative error as :math:`\alpha \to 1`, and to :math:`\epsilon^{1 / (\alpha - 1)}` next to the threshold for
    :math:`\alpha > 2`, where :math:`p` rises infinitely steeply.

    Args:
        scores: Real scores :math:`x`, any shape, any floating dtype; ``-inf`` rules an outcome out.
        alpha: A number, or a tensor that broadcasts to the shape of ``scores`` and has size 1 at ``dim``: for
            ``scores`` of shape ``(B, K)``, one alpha is ``()`` or ``(1,)`` and one per row is ``(B, 1)``.
        dim: The dimension that holds the outcomes.

    Returns:
        Probabilities :math:`p`, same shape and dtype as ``scores`` (float32 under ``torch.autocast``), summing to one
        along ``dim``. Where all scores are ``-inf``, or one is NaN or ``+inf``, they are NaN. Under ``torch.compile``
        and ``torch.func``, where the values of ``alpha`` cannot be looked at, ``alpha <= 1`` gives NaN too.

    Raises:
        TypeError: If scores are not a floating-point tensor, or alpha is neither a number nor a tensor.
        ValueError: If there is no dimension ``dim``, or it is empty; if an alpha is not above 1 (for a tensor on a GPU
            this check waits for its queue), or its shape is not as above.

    Reference: Peters, Niculae and Martins, *Sparse sequence-to-sequence models*, ACL 2019, Algorithm 1; Correia,
    Niculae and Martins, *Adaptively sparse transformers*, EMNLP 2019, Proposition 1.

    Example:
        >>> entmax(torch.tensor([1.0, 0.5, -1.0]), 1.2)
        tensor([0.6199, 0.3461, 0.0341])
    """
    x = _shifted("entmax", scores, dim)
    a = _checked_alpha(alpha, x, dim)
    return _restored(_on_candidates(lambda x: _entmax(x, a), x, 1 / (a.detach() - 1)), scores, dim)


@overload
def topk_sparsemax(scores: Tensor, k: int, dim: int = ..., *, return_exact: Literal[False] = ...) -> Tensor: ...


@overload
def topk_sparsemax(scores: Tensor, k: int, dim: int = ..., *, return_exact: Literal[True]) -> tuple[Tensor, Tensor]: ...


def topk_sparsemax(
    scores: Tensor, k: int, dim: int = -1, *, return_exact: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Sparsemax of the :math:`k` largest scores; every other outcome gets zero.

    .. math::
        \operatorname*{argmin}_{p \in \Delta,\; \lVert p \rVert_0 \le k} \lVert p - x \rVert^2

    This bounds the support, at the price of jumps where the :math:`k`-th and the next score change places.
    If the least of the :math:`k` gets zero, so would all others have: then the result equals :func:`sparsemax`.
    Double :math:`k` where that certificate fails to get the exact answer without sorting all scores.

    Args:
        scores: Real scores :math:`x`, any shape, any floating dtype; ``-inf`` rules an outcome out.
        k: The largest support allowed, from 1 to the number of outcomes.
        dim: The dimension that holds the outcomes.
        return_exact: Whether to return the certificate too.

    Returns:
        Probabilities :math:`p`, same shape and dtype as ``scores`` (float32 under ``torch.autocast``), summing to one
        along ``dim``; NaN where all scores are ``-inf``, or one is NaN or ``+inf``. With ``return_exact=True`` a
        pair of these and a bool tensor, of the shape of ``scores`` without ``dim``, true where :math:`p` is certain to
        equal ``sparsemax(scores)``.

    Raises:
        TypeError: If scores are not a floating-point tensor.
        ValueError: If there is no dimension ``dim``, or it is empty, or k is not an integer from 1 to its size.

    Reference: Kyrillidis, Becker, Cevher and Koch, *Sparse projections onto the simplex*, ICML 2013, Theorem 1;
    Correia, Niculae, Aziz and Martins, *Efficient marginalization of discrete and structured latent variables via
    sparsity*, NeurIPS 2020, Section 4.

    Example:
        >>> topk_sparsemax(torch.tensor([0.4, 0.3, 0.2]), 2, return_exact=True)
        (tensor([0.5500, 0.4500, 0.0000]), tensor(False))
    """
    x = _shifted("topk_sparsemax", scores, dim)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= x.shape[-1]:
        raise ValueError(
            f"topk_sparsemax: expected k to be an integer from 1 to {x.shape[-1]}, the size of dim {dim}, got {k!r}."
        )
    top, index = x.topk(k)
    p_top = _sparsemax(top)
    p = _restored(_zeros_or_nan(x).scatter(-1, index, p_top), scores, dim)
    if not return_exact:
        return p
    return p, p_top[..., -1] == 0 if k < x.shape[-1] else torch.ones_like(p_top[..., -1], dtype=torch.bool)


# The projections along the last dimension. The scores x have a maximum of zero, or of NaN in an invalid row.
# Comparisons are written so that NaN counts as support: then an invalid row is NaN as a whole.


def _sparsemax(x: Tensor) -> Tensor:
    # Algorithm 1: the support holds the j largest scores for the last j with 1 + j x_(j) > x_(1) + ... + x_(j).
    # There is no such j in a NaN row; 1 will do.
    fixed = x.detach()
    ordered = fixed.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    rank = torch.arange(1, x.shape[-1] + 1, device=x.device)
    size = (rank * ordered > excess).sum(-1, keepdim=True).clamp(min=1)
    support = ~(fixed <= excess.gather(-1, size - 1) / size)
    tau = (torch.where(support, x, 0).sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
    return torch.relu(x - tau)


def _entmax15(x: Tensor) -> Tensor:
    # Newton's method for ||(z - tau)_+||_2 = 1, starting at tau = -1. The norm is convex and decreasing in tau, so the
    # steps approach the threshold from the left and never pass it. (The paper sorts instead, which is slower.) Normal
    # scores take 6 to 9 steps; the hardest row of 10^6 scores that an adversarial search found took 15.
    z = x / 2
    fixed = z.detach()
    tau = torch.full_like(fixed[..., :1], -1.0)
    for _ in range(20):
        u = torch.relu(fixed - tau)
        norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
        step = norm * (norm - 1) / u.sum(-1, keepdim=True)
        tau = tau + step
        if _can_branch_on(x) and not (step > torch.finfo(x.dtype).eps).any():
            break
    support = ~(fixed <= tau)
    size = support.sum(-1, keepdim=True)
    mean = torch.where(support, z, 0).sum(-1, keepdim=True) / size
    spread = torch.where(support, z - mean, 0).square().sum(-1, keepdim=True)
    return torch.relu(z - (mean - ((1 - spread) / size).sqrt())).square()


def _entmax(x: Tensor, alpha: Tensor) -> Tensor:
    # Bisection, to all bits of tau: at -1 the largest score alone has probability 1; at -K^(1 - alpha) it has 1 / K.
    fixed, power = ((alpha - 1) * x).detach(), (1 / (alpha - 1)).detach()
    tau = torch.full_like(fixed[..., :1], -1.0)
    step = 1 - x.new_full((), x.shape[-1]) ** (1 - alpha.detach())  # of a number torch.export would make a constant
    for _ in range(1 - round(math.log2(torch.finfo(x.dtype).eps))):
        step = step / 2
        mass = torch.relu(fixed - tau - step).pow(power).sum(-1, keepdim=True)
        tau = torch.where(mass >= 1, tau + step, tau)

    # Given S there is no closed form either. But tau solves mass(tau, x, alpha) = constant, and a Newton step for that
    # from the solution moves no value, yet gives tau its derivatives in x and alpha: m steps those up to order 2^m - 1.
    support = ~(fixed <= tau)
    z, power = (alpha - 1) * torch.where(support, x, 0), 1 / (alpha - 1)
    for _ in range(2):
        u = torch.where(support, z - tau, 1)
        slope = torch.where(support, power * u.pow(power - 1), 0).sum(-1, keepdim=True)
        mass = torch.where(support, u.pow(power), 0).sum(-1, keepdim=True)
        tau = tau + (mass - mass.detach()) / slope
    p = torch.where(support, torch.where(support, z - tau, 1).pow(power), 0)
    # For alpha > 2 the rounding of tau shows in p_i close to the threshold, and so in the sum: divide it out.
    return p / p.sum(-1, keepdim=True)


# What they share.


def _on_candidates(project: Callable[[Tensor], Tensor], x: Tensor, reach: float | Tensor) -> Tensor:
    # Since tau >= -1, only scores within `reach` = 1 / (alpha - 1) of the maximum can be in the support. Where these
    # are few, gather them into short rows and project those. The answer is the same; from K = 1000 on it takes 3 to 20
    # times less.
    if not _can_branch_on(x) or x.numel() == 0:
        return project(x)
    candidates = x.detach() > -reach
    size = candidates.sum(-1, keepdim=True, dtype=torch.int32)
    width = int(size.max())
    if not 0 < 2 * width <= x.shape[-1]:
        return project(x)
    valid = torch.arange(width, dtype=torch.int32, device=x.device) < size
    index = torch.zeros_like(valid, dtype=torch.long).masked_scatter_(valid, candidates.nonzero()[:, -1])
    short = torch.where(valid, x.gather(-1, index), -math.inf)
    # The slots that are not valid all have index 0 and p = 0, so add, not overwrite.
    return _zeros_or_nan(x).scatter_add(-1, index, project(short))


def _zeros_or_nan(x: Tensor) -> Tensor:
    # The maximum of shifted scores is zero, or NaN in an invalid row.
    return x.detach().amax(-1, keepdim=True).expand_as(x)


def _can_branch_on(x: Tensor) -> bool:
    # Reading a value on a GPU would stall its queue, and a trace has no values.
    return x.device.type == "cpu" and not is_tracing()


def _shifted(name: str, scores: Tensor, dim: int) -> Tensor:
    # Checked, `dim` last, maximum at zero, half precision computed in single.
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{name}: expected a floating-point tensor of scores, got {got}. Use scores.float().")
    if not -scores.ndim <= dim < scores.ndim:
        raise ValueError(f"{name}: expected dim to be a dimension of scores {tuple(scores.shape)}, got {dim}.")
    if scores.shape[dim] == 0:
        raise ValueError(f"{name}: expected at least one outcome along dim {dim}, got shape {tuple(scores.shape)}.")
    x = scores.movedim(dim, -1).to(torch.promote_types(scores.dtype, torch.float32))
    return x - x.detach().amax(-1, keepdim=True)


def _restored(p: Tensor, scores: Tensor, dim: int) -> Tensor:
    return narrowed(p, scores.dtype).movedim(-1, dim)


def _checked_alpha(alpha: float | Tensor, x: Tensor, dim: int) -> Tensor:
    # Checked, and laid out as x is: outcomes last, with size 1.
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float, Tensor)):
        raise TypeError(f"entmax: expected alpha to be a number or a tensor, got {type(alpha).__name__}.")
    value = as_like(alpha, x)
    shape = (1,) * (x.ndim - value.ndim) + value.shape
    wanted = x[..., :1].movedim(-1, dim).shape
    if len(shape) > x.ndim or any(size not in (1, full) for size, full in zip(shape, wanted, strict=True)):
        raise ValueError(
            f"entmax: expected alpha to broadcast to {tuple(wanted)}, the shape of scores with size 1 at dim {dim}, "
            f"got {tuple(value.shape)}. For one alpha per row, use alpha.unsqueeze({dim})."
        )
    if not isinstance(alpha, Tensor):
        valid = alpha > 1 + torch.finfo(x.dtype).eps / 2  # otherwise it is 1 in this dtype
    elif is_tracing():
        valid, value = True, torch.where(value > 1, value, math.nan)
    else:
        valid = bool((value > 1).all())
    if not valid:
        raise ValueError(
            f"entmax: expected alpha > 1, got {float(value.detach().min())}. "
            "At alpha = 1 it is torch.softmax; to learn alpha, use 1 + torch.sigmoid(a)."
        )
    return value.reshape(shape).movedim(dim, -1)
