"""
What torch's autograd graph tells, and derivatives of higher order where the first is given by hand; torch only.

torch's own ``once_differentiable`` does not do for the latter: what it returns is a constant to ``autograd.grad``, so
that a second derivative is silently wrong; only ``.backward()`` finds the error that it has planted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import handle_torch_function, has_torch_function


def graph_leaves(nodes: Iterable[Any]) -> Iterator[Tensor]:
    """The leaf tensors, each once, in which gradients through these nodes (``grad_fn``; None is skipped) would end."""
    todo, seen = list(nodes), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:  # here autograd accumulates a leaf's gradient
            yield leaf
        todo += [parent for parent, _ in node.next_functions]


def reaches(values: Iterable[Tensor], target: Tensor) -> bool:
    """Whether gradients of any of these values would reach ``target``."""
    end = get_gradient_edge(target).node
    todo: list[Any] = [value.grad_fn for value in values]
    seen = {None}
    while todo:
        node = todo.pop()
        if node is end:
            return True
        if node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return False


# Each function goes through handle_torch_function: TraceGraph_ELBO follows dependencies by tensors of a class of its
# own, which an autograd.Function does not see.


def differentiable_once(x: Tensor, message: str) -> Tensor:
    """
    The same tensor, whose derivative can be taken, but not differentiated again by what the tensor depends on.

    That raises ``RuntimeError`` with this message, under ``autograd.grad``, ``functional.hessian`` and ``.backward()``
    alike. By what comes after the tensor it can: a derivative is linear in what is passed back to it.
    """
    if has_torch_function((x,)):
        once: Tensor = handle_torch_function(differentiable_once, (x,), x, message)
        return once
    once = _Once.apply(x, message)
    return once


def underivable(x: Tensor, message: str) -> Tensor:
    """Zeros that depend on a tensor, as far as autograd knows: who differentiates by it gets this ``RuntimeError``."""
    zeros: Tensor = _Underivable.apply(x, message)
    return zeros


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, message: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        x, ctx.message = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # the derivative will be differentiated
            (x,) = ctx.saved_tensors
            grad = grad + underivable(x, ctx.message)
        return grad, None


class _Underivable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, message: str) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.message = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise RuntimeError(ctx.message)
