"""check_projection passes what is right and names what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_sparse.projections import entmax, entmax15, sparsemax, topk_sparsemax
from pyro_sparse.testing import check_projection


@pytest.mark.parametrize(
    "f",
    [sparsemax, entmax15, partial(entmax, alpha=1.2), partial(entmax, alpha=3.0), lambda x, dim=-1: x.softmax(dim)],
    ids=["sparsemax", "entmax15", "entmax1.2", "entmax3", "softmax"],
)
def test_passes(f: Callable[..., Tensor]) -> None:
    check_projection(f)


def test_passes_for_the_sizes_that_are_asked_for() -> None:
    f = partial(topk_sparsemax, k=3)
    check_projection(f, sizes=(3, 5, 20))
    with pytest.raises(ValueError, match="expected k to be an integer from 1 to 1"):
        check_projection(f)


def test_leaves_dtype_and_random_numbers_alone() -> None:
    torch.set_default_dtype(torch.float32)
    before = torch.get_rng_state()
    check_projection(sparsemax, sizes=(4,))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32


def test_passes_a_learnable_parameter() -> None:
    alpha = torch.tensor(1.5, requires_grad=True)
    check_projection(partial(entmax, alpha=alpha.double()), sizes=(4,))
    assert alpha.grad is None


def test_no_size_raises() -> None:
    with pytest.raises(ValueError, match="expected at least one size, got none"):
        check_projection(sparsemax, sizes=())


def with_detached_threshold(x: Tensor, dim: int = -1) -> Tensor:
    tau = (x - sparsemax(x, dim=dim)).amax(dim, keepdim=True)
    at_most = x.amax(dim, keepdim=True) - sparsemax(x, dim=dim).amax(dim, keepdim=True)
    return torch.relu(x - torch.minimum(tau, at_most).detach())


def leaks(x: Tensor, dim: int = -1) -> Tensor:
    least = x.masked_fill(x == -torch.inf, torch.inf).amin(dim, keepdim=True)
    return sparsemax(torch.where(x == -torch.inf, least, x), dim=dim)


def shares_the_mask(x: Tensor, dim: int = -1) -> Tensor:
    finite = (x > -torch.inf).sum(dim, keepdim=True)
    return sparsemax(x * finite / x.shape[dim], dim=dim)


class MovesMasked(torch.autograd.Function):
    """Zero, with gradient one at scores of -inf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (ctx.saved_tensors[0] == -torch.inf).to(gradient)


def jumps_everywhere(x: Tensor, dim: int = -1) -> Tensor:
    """All on the largest or all on the smallest score: moving any by 0.001 changes which."""
    peak = x.amax(dim, keepdim=True)
    unmasked = peak - x < 100
    below = torch.where(unmasked, peak - x, 0)
    odd = (below / 1e-3).round().sum(dim, keepdim=True) % 2
    return (unmasked & (below == odd * below.amax(dim, keepdim=True))).to(x) + 0 * peak


BROKEN: dict[str, tuple[Callable[..., Tensor], str]] = {
    "shape": (lambda x, dim=-1: sparsemax(x, dim=dim).sum(dim), "the shape and dtype of the scores"),
    "dtype": (lambda x, dim=-1: sparsemax(x, dim=dim).double(), "the shape and dtype of the scores"),
    "negative": (lambda x, dim=-1: 10 * (x - x.mean(dim, keepdim=True)) + 1 / x.shape[dim], "that are not negative"),
    "not normalised": (lambda x, dim=-1: torch.relu(x - x.amax(dim, keepdim=True) + 0.9), "that sum to 1"),
    "low precision": (lambda x, dim=-1: sparsemax(x.half(), dim=dim).to(x), "that sum to 1"),
    "shift": (lambda x, dim=-1: sparsemax(x * x.abs(), dim=dim), "after adding a constant"),
    "permutation": (lambda x, dim=-1: sparsemax(x + torch.arange(x.shape[dim]).to(x), dim=dim), "permute with"),
    "batch": (lambda x, dim=-1: sparsemax(x / (x - x.mean()).abs().max(), dim=dim), "for a row alone and in a batch"),
    "dim": (lambda x, dim=-1: sparsemax(x), "dim=0 to project columns"),
    "default dim": (lambda x, dim=0: sparsemax(x, dim=dim), "that sum to 1"),
    "mask leaks": (leaks, "probability 0 where the score is -inf"),
    "mask counts": (shares_the_mask, "a score of -inf to act as one of -10000"),
    "mask gradient": (lambda x, dim=-1: sparsemax(x, dim=dim) + 0 * x.exp().sqrt(), "finite gradients beside"),
    "mask moves": (lambda x, dim=-1: sparsemax(x, dim=dim) + MovesMasked.apply(x), "gradient 0 where"),
    "threshold detached": (with_detached_threshold, "gradients that agree with finite differences"),
    "gradient off": (
        lambda x, dim=-1: sparsemax(x, dim=dim) + 1e-6 * (x - x.detach()).nan_to_num(),
        "Jacobian rows, one per probability, that sum to 0",
    ),
    "no smooth point": (jumps_everywhere, "a row whose support stays the same"),
    "nan hidden": (lambda x, dim=-1: sparsemax(x, dim=dim).nan_to_num(), "NaN in a row with a NaN"),
    "nan spreads": (lambda x, dim=-1: sparsemax(x - x.max(), dim=dim), "invalid rows to leave the others"),
}


@pytest.mark.parametrize(("f", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_catches(f: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(AssertionError, match=f"check_projection: expected .*({message})"):
        check_projection(f)
