r"""Losses of sparse classifiers: :func:`sparsemax_loss`, :func:`entmax15_loss`, :func:`entmax_loss`.

Each projection :math:`p = \operatorname{argmax}_{p \in \Delta} p^\top x + H(p)` has its loss, as softmax has the
cross-entropy: that of Fenchel and Young,

.. math:: L(x, q) = \bigl(p^\top x + H(p)\bigr) - \bigl(q^\top x + H(q)\bigr) \ge 0,
    \qquad \nabla_x L = p - q, \qquad \nabla_x^2 L = \partial p / \partial x,

convex in :math:`x`, and zero only where :math:`p = q`. Where :math:`-\log p` of a label outside of the support is
infinite, without a gradient, this is finite, and its gradient leads back.

Autograd differentiates the formula: the terms in which p moves cancel, to all orders, since p is a maximum.

Reference: Blondel, Martins and Niculae, *Learning with Fenchel-Young losses*, JMLR 2020, Definition 2 and Proposition
2; Peters, Niculae and Martins, *Sparse sequence-to-sequence models*, ACL 2019, Eqs. 7 and 8; Martins and Astudillo,
*From softmax to sparsemax*, ICML 2016, §3.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_sparse._precision import narrowed
from pyro_sparse.projections.simplex import _can_branch_on, _checked_alpha, _shifted, entmax, entmax15, sparsemax

__all__ = ["entmax15_loss", "entmax_loss", "sparsemax_loss"]


def sparsemax_loss(scores: Tensor, target: Tensor, dim: int = -1) -> Tensor:
    r"""The loss of :func:`~pyro_sparse.projections.sparsemax`, with :math:`H(p) = \tfrac12 (1 - \lVert p \rVert^2)`.

    .. math:: L(x, q) = \tfrac12 \lVert q - x \rVert^2 - \tfrac12 \lVert p - x \rVert^2, \qquad \nabla_x L = p - q

    It is zero where the label's score leads all others by 1. In a Pyro model it is a factor in place of the likelihood
    of a label, ``pyro.factor("y", -sparsemax_loss(scores, y))``. In a guide, whose terms count as log q, the sign is
    the other one: ``pyro.factor("y", sparsemax_loss(scores, y), has_rsample=True)``.

    Args:
        scores: Real scores :math:`x`, any shape, any floating dtype; ``-inf`` rules an outcome out.
        target: Numbers of classes, of an integer dtype and the shape of ``scores`` without ``dim``; or probabilities
            :math:`q`, of a floating dtype and the shape of ``scores``. Shapes broadcast.
        dim: The dimension that holds the outcomes.

    Returns:
        The loss of each row, of the shape of ``scores`` without ``dim`` and their dtype (float32 under
        ``torch.autocast``); reduce it as you like. It is infinite where the target has an outcome that was ruled out,
        and NaN where :func:`sparsemax` is.

    Raises:
        TypeError: If scores are not a floating-point tensor, or the target is no tensor.
        ValueError: If there is no dimension ``dim``, or it is empty, or the shape of the target does not fit, or, on a
            CPU, a class is out of range.

    Reference: Blondel, Martins and Niculae, *Learning with Fenchel-Young losses*, JMLR 2020, Table 1.

    Example:
        >>> scores = torch.tensor([[1.0, 0.5, -1.0], [1.0, 0.5, -1.0]])
        >>> sparsemax_loss(scores, torch.tensor([0, 2]))
        tensor([0.0625, 2.0625])
    """
    return _loss("sparsemax_loss", sparsemax, 2.0, scores, target, dim)


def entmax15_loss(scores: Tensor, target: Tensor, dim: int = -1) -> Tensor:
    r"""The loss of :func:`~pyro_sparse.projections.entmax15`, :func:`entmax_loss` with :math:`\alpha = 1.5`.

    .. math:: L(x, q) = (p - q)^\top x + H(p) - H(q), \qquad H(p) = \tfrac43 \Bigl(1 - \sum_i p_i^{3/2}\Bigr)

    It is zero where the label's score leads all others by 2.

    Args:
        scores: As for :func:`sparsemax_loss`.
        target: As for :func:`sparsemax_loss`.
        dim: The dimension that holds the outcomes.

    Returns:
        As of :func:`sparsemax_loss`.

    Raises:
        TypeError, ValueError: As of :func:`sparsemax_loss`.

    Reference: Peters, Niculae and Martins, *Sparse sequence-to-sequence models*, ACL 2019, Eqs. 7 and 8.

    Example:
        >>> entmax15_loss(torch.tensor([1.0, 0.5, -1.0]), torch.tensor(2))
        tensor(2.1844)
    """
    return _loss("entmax15_loss", entmax15, 1.5, scores, target, dim)


def entmax_loss(scores: Tensor, target: Tensor, alpha: float | Tensor, dim: int = -1) -> Tensor:
    r"""The loss of :func:`~pyro_sparse.projections.entmax`, differentiable in :math:`\alpha` too.

    .. math:: L(x, q) = (p - q)^\top x + H_\alpha(p) - H_\alpha(q),
        \qquad H_\alpha(p) = \frac{1 - \sum_i p_i^\alpha}{\alpha (\alpha - 1)}

    It is zero where the label's score leads all others by :math:`1 / (\alpha - 1)`; as :math:`\alpha \to 1` it becomes
    the cross-entropy. To learn :math:`\alpha` by this loss alone is no use: it falls as :math:`\alpha` rises.

    Args:
        scores: As for :func:`sparsemax_loss`.
        target: As for :func:`sparsemax_loss`.
        alpha: As for :func:`~pyro_sparse.projections.entmax`.
        dim: The dimension that holds the outcomes.

    Returns:
        As of :func:`sparsemax_loss`.

    Raises:
        TypeError, ValueError: As of :func:`sparsemax_loss`, and of :func:`~pyro_sparse.projections.entmax` for alpha.

    Reference: Peters, Niculae and Martins, *Sparse sequence-to-sequence models*, ACL 2019, Eqs. 7 and 8.

    Example:
        >>> entmax_loss(torch.tensor([1.0, 0.5, -1.0]), torch.tensor(2), 1.2)
        tensor(2.3399)
    """
    x = _shifted("entmax_loss", scores, dim)
    a = _checked_alpha(alpha, x, dim)
    return _loss("entmax_loss", lambda x: entmax(x, a if isinstance(alpha, Tensor) else alpha), a, scores, target, dim)


def _loss(
    name: str,
    project: Callable[[Tensor], Tensor],
    alpha: float | Tensor,
    scores: Tensor,
    target: Tensor,
    dim: int,
) -> Tensor:
    x = _shifted(name, scores, dim)
    q = _laid_out(name, x, target, dim)
    p = project(x)
    ruled_out = x == -math.inf
    finite = torch.where(ruled_out, 0.0, x)
    mean = (p * finite).sum(-1)
    if q.is_floating_point():
        at_target = (q * finite).sum(-1) + _entropy(q, alpha)
        at_target = torch.where((ruled_out & (q > 0)).any(-1), -math.inf, at_target)
    else:
        at_target = x.expand(*q.shape, x.shape[-1]).gather(-1, q.unsqueeze(-1)).squeeze(-1)
    # Since p_i^(alpha - 1) = (alpha - 1) x_i - tau on the support, no power of a small p_i is needed.
    less = alpha - 1
    top = p.detach().argmax(-1, keepdim=True)
    tau = less * finite.gather(-1, top) - p.gather(-1, top) ** less
    power = less * mean.unsqueeze(-1) - tau  # the sum of p_i^alpha
    loss = mean + ((1 - power) / (alpha * less)).squeeze(-1) - at_target
    return narrowed(loss, scores.dtype)


def _entropy(p: Tensor, alpha: float | Tensor) -> Tensor:
    inside = torch.where(p == 0, 1.0, p)  # a zero, at which a power has no derivative, has no part
    return (inside * (1 - inside ** (alpha - 1)) / (alpha * (alpha - 1))).sum(-1)


def _laid_out(name: str, x: Tensor, target: Tensor, dim: int) -> Tensor:
    # The target in the dtype of the computation: probabilities with the outcomes last, or classes for all rows of x.
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: expected target to be a tensor, got {type(target).__name__}. Use torch.as_tensor.")
    rows, size = x.shape[:-1], x.shape[-1]
    dense = target.is_floating_point()
    fits = not dense or (target.dim() == x.dim() and target.shape[dim] == size)
    q = target.movedim(dim, -1).to(x.dtype) if dense and fits else target
    if not fits or not _broadcasts(q.shape[:-1] if dense else q.shape, rows):
        wanted = (x.movedim(-1, dim).shape, "probabilities") if dense else (rows, "class numbers")
        raise ValueError(
            f"{name}: expected a target that broadcasts to {tuple(wanted[0])}, got {wanted[1]} of shape "
            f"{tuple(target.shape)}. Give integers, one for each row of scores, or a floating-point number for each "
            "score."
        )
    if dense:
        return q
    if _can_branch_on(q) and not bool(((q >= 0) & (q < size)).all()):
        raise ValueError(
            f"{name}: expected classes from 0 to {size - 1}, got {int(q.min())} to {int(q.max())}. Select the rows "
            "that have a label."
        )
    return q.long().expand(torch.broadcast_shapes(q.shape, rows))


def _broadcasts(shape: torch.Size, rows: torch.Size) -> bool:
    try:
        torch.broadcast_shapes(shape, rows)
    except RuntimeError:
        return False
    return True
