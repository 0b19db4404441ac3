"""How the checks of distributions state a property, and what more than one of them needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from pyro_sparse._autograd import graph_leaves

T = TypeVar("T")


def require(holds: bool | Tensor, prop: str, expected: object, got: object) -> None:
    if not bool(holds):
        raise AssertionError(f"{prop}: expected {expected}, got {got}")


def same(prop: str, got: Tensor, expected: Tensor) -> None:
    require(got.shape == expected.shape, f"shape of {prop}", tuple(expected.shape), tuple(got.shape))
    require(got.dtype == expected.dtype, f"dtype of {prop}", expected.dtype, got.dtype)
    if not expected.is_floating_point():
        require((got == expected).all(), prop, expected, got)
        return
    # Log-probabilities of K outcomes are off by some roundings each, which summing adds up.
    tol = 1e3 * torch.finfo(expected.dtype).eps
    require(torch.allclose(got, expected, rtol=tol, atol=tol, equal_nan=True), prop, expected, got)


def offered(method: Callable[[], T]) -> T | None:
    """The result of an optional method or property; None where the family does not have it."""
    try:
        return method()
    except NotImplementedError:
        return None


def leaves(result: Tensor) -> Iterator[Tensor]:
    """The leaf tensors that a result depends on."""
    if result.requires_grad and result.is_leaf:
        yield result
    yield from graph_leaves([result.grad_fn])
