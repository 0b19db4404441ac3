"""A check that a function is fit to be the projection of a sparse distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

TOLERANCE = 1e-8  # for float64 values that should be equal but for rounding
MARGIN = 1e-3  # a row is near a kink where moving one score by this much changes the support

Projection = Callable[..., Tensor]


def check_projection(f: Projection, *, sizes: Sequence[int] = (1, 2, 5, 20)) -> None:
    r"""Checks a projection of scores onto the probability simplex, ``f(scores, dim=-1)``.

    For scores :math:`x \in \mathbb{R}^K`, seeded normal draws of several scales, :math:`p = f(x)` must be

    - of the shape and dtype of the scores, in float32 and float64;
    - a distribution: :math:`p_i \ge 0`, and :math:`|\sum_i p_i - 1| \le 8 K \epsilon`;
    - shift invariant, :math:`f(x + c) = f(x)`, and permutation equivariant, :math:`f(\pi x) = \pi f(x)`;
    - a function of its own row alone, along the dimension ``dim``;
    - exactly zero where :math:`x_i = -\infty`, with a zero gradient there, and elsewhere what it is for a score of
      :math:`-10^4` in that place;
    - NaN somewhere in a row that holds NaN or :math:`+\infty` or only :math:`-\infty`, and unchanged in all other rows;
    - differentiable by autograd: the Jacobian agrees with finite differences, zero probabilities included, and
      :math:`\sum_i \partial p_i / \partial x_j = \sum_j \partial p_i / \partial x_j = 0`.

    The Jacobian is looked at away from kinks: only where no probability becomes zero, or stops being zero, when any
    one score moves by :math:`10^{-3}`. The default dtype and the global random number generator are left alone.

    Args:
        f: The projection. Set parameters of your own by :func:`functools.partial`.
        sizes: The numbers of outcomes :math:`K` to check, for a projection that does not take just any.

    Raises:
        AssertionError: Where a property fails; it says which, for how many outcomes, and what was found.
        ValueError: If there is no size.

    Example:
        >>> from functools import partial
        >>> from pyro_sparse.projections import entmax
        >>> check_projection(partial(entmax, alpha=1.3))

        Probabilities that are cut off but not normalised again:

        >>> check_projection(lambda x, dim=-1: torch.nn.functional.threshold(x.softmax(dim), 0.2, 0.0))
        Traceback (most recent call last):
            ...
        AssertionError: check_projection: expected probabilities that sum to 1 ...
    """
    if not sizes:
        raise ValueError("check_projection: expected at least one size, got none. Leave sizes out for the usual ones.")
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        for scale in (0.1, 1.0, 10.0):
            scores = scale * torch.randn(16, size, generator=generator, dtype=torch.float64)
            _check_simplex(f, scores)
            _check_simplex(f, scores.float())
            _check_symmetries(f, scores, torch.randperm(size, generator=generator))
            _check_mask(f, scores, torch.rand(scores.shape, generator=generator, dtype=torch.float64) < 0.5)
            _check_jacobian(f, scores)
        _check_invalid_rows(f, scores)


def _check_simplex(f: Projection, scores: Tensor) -> None:
    p = f(scores).detach()
    if p.shape != scores.shape or p.dtype != scores.dtype:
        _fail(
            f"the shape and dtype of the scores, {tuple(scores.shape)} {scores.dtype}",
            scores,
            f"{tuple(p.shape)} {p.dtype}",
        )
    if not bool((p >= 0).all()):
        _fail("probabilities that are not negative", scores, f"{float(p.min()):.3g}")
    error = float((p.sum(-1) - 1).abs().max())
    if error > 8 * scores.shape[-1] * torch.finfo(scores.dtype).eps:
        _fail(f"probabilities that sum to 1 in {scores.dtype}", scores, f"a sum that is off by {error:.3g}")


def _check_symmetries(f: Projection, scores: Tensor, permutation: Tensor) -> None:
    p = f(scores)
    _check_equal(f(scores + 2), p, "the same probabilities after adding a constant to all scores", scores)
    _check_equal(f(scores[:, permutation]), p[:, permutation], "probabilities that permute with the scores", scores)
    _check_equal(f(scores[3]), p[3], "the same probabilities for a row alone and in a batch", scores)
    _check_equal(f(scores, dim=-1), p, "dim=-1 to be the default", scores)
    _check_equal(f(scores.mT, dim=0), p.mT, "dim=0 to project columns", scores)
    batch = scores.reshape(2, 8, -1)
    _check_equal(f(batch.mT, dim=1), p.reshape(batch.shape).mT, "dim=1 to project the middle dimension", scores)


def _check_mask(f: Projection, scores: Tensor, masked: Tensor) -> None:
    masked = masked & (scores < scores.amax(-1, keepdim=True))  # an outcome must remain
    x = scores.masked_fill(masked, -torch.inf).requires_grad_()
    p_with_graph = f(x)
    p = p_with_graph.detach()
    if bool((p[masked] != 0).any()):
        _fail("probability 0 where the score is -inf", scores, f"{float(p[masked].abs().max()):.3g}")
    _check_equal(p, f(scores.masked_fill(masked, -1e4)), "a score of -inf to act as one of -10000", scores)
    (gradient,) = torch.autograd.grad((p_with_graph * torch.arange(1, scores.shape[-1] + 1)).sum(), x)
    if not bool(gradient.isfinite().all()):
        _fail("finite gradients beside a score of -inf", scores, "NaN or inf")
    if bool((gradient[masked] != 0).any()):
        _fail("gradient 0 where the score is -inf", scores, f"{float(gradient[masked].abs().max()):.3g}")


def _check_jacobian(f: Projection, scores: Tensor) -> None:
    smooth = scores[_away_from_kinks(f, scores)][:2]
    if len(smooth) == 0:
        _fail(f"a row whose support stays the same when one score moves by {MARGIN}", scores, "none")
    try:
        torch.autograd.gradcheck(f, (smooth.requires_grad_(),))
    except GradcheckError as cause:
        raise AssertionError(
            f"check_projection: expected gradients that agree with finite differences for {scores.shape[-1]} outcomes, "
            f"got:\n{cause}"
        ) from cause
    jacobian = torch.stack([torch.autograd.functional.jacobian(f, row) for row in smooth])
    for dim, lines in ((-1, "rows, one per probability,"), (-2, "columns, one per score,")):
        error = float(jacobian.sum(dim).abs().max())
        if error > TOLERANCE:
            _fail(f"Jacobian {lines} that sum to 0", scores, f"a sum of {error:.3g}")


def _away_from_kinks(f: Projection, scores: Tensor) -> Tensor:
    moves = MARGIN * torch.eye(scores.shape[-1], dtype=scores.dtype)
    support = (f(scores) > 0).unsqueeze(-2)
    same = [(f(scores.unsqueeze(-2) + sign * moves) > 0) == support for sign in (1, -1)]
    return (same[0] & same[1]).flatten(1).all(-1)


def _check_invalid_rows(f: Projection, scores: Tensor) -> None:
    x = scores.clone()
    x[0, -1], x[1, -1], x[2] = torch.nan, torch.inf, -torch.inf
    p = f(x)
    for row, what in enumerate(("a NaN", "a score of +inf", "no score above -inf")):
        if not bool(p[row].isnan().any()):
            _fail(f"NaN in a row with {what}", scores, "none")
    _check_equal(p[3:], f(scores)[3:], "invalid rows to leave the others as they are", scores)


def _check_equal(p: Tensor, wanted: Tensor, what: str, scores: Tensor) -> None:
    if p.shape != wanted.shape:
        _fail(what, scores, f"shape {tuple(p.shape)}, not {tuple(wanted.shape)}")
    error = float((p - wanted).detach().abs().max())
    if not error <= TOLERANCE:
        _fail(what, scores, f"a difference of {error:.3g}")


def _fail(what: str, scores: Tensor, got: str) -> None:
    raise AssertionError(f"check_projection: expected {what} for {scores.shape[-1]} outcomes, got {got}.")
