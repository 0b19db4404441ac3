"""
What torch's autograd graph tells, and derivatives of higher order where the first is given by hand; torch only.

torch's own ``once_differentiable`` does not do for the latter: what it returns is a constant to ``autograd.grad``, so
that a second derivative is silently wrong; only ``.backward()`` finds the error that it has planted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode


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


def is_tracing() -> bool:
    """Whether values cannot be looked at: under ``torch.compile``, ``torch.jit.trace`` and ``torch.func``."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or is_transformed()


def unwrapped(x: Tensor) -> Tensor:
    """
    The values, under ``torch.func.vmap`` of all examples, which come first. For checks, and for sizes that serve all:
    what else a result depends on must not be looked at.
    """
    if torch.compiler.is_compiling():
        return x
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        dim = functorch.maybe_get_bdim(x)
        x = functorch.get_unwrapped(x)
        x = x if dim < 0 else x.movedim(dim, 0)
    return x


def is_true(ok: Tensor) -> bool:
    """Whether all elements hold, under ``torch.func.vmap`` those of all examples."""
    return bool(unwrapped(ok).all())


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is under way."""
    # torch.func has no public way to ask; torch.autograd.Function asks it this way as well.
    return torch._C._are_functorch_transforms_active()


def has_compiled() -> bool:
    """Whether torch.compile has been in use: its modules warn of hooks. Importing it to ask would take seconds."""
    return "torch._dynamo.eval_frame" in sys.modules


class WatchingMode(TorchDispatchMode):
    """
    A mode that sees the operations of compiled networks, too, which run eagerly under it. Left to itself torch would
    compile none of them any more, also afterwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stances: list[AbstractContextManager[Any] | None] = []

    def __enter__(self) -> Any:
        stance = torch.compiler.set_stance("force_eager") if has_compiled() else None
        self._stances.append(stance)
        if stance is not None:
            stance.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if (stance := self._stances.pop()) is not None:
            stance.__exit__(*error)


@contextmanager
def not_traced() -> Iterator[None]:
    """For what an ``autograd.Function`` computes: it is one call in a trace, which would have its operations, too."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


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
    """Zeros that depend on a tensor, as far as autograd knows: their derivative is this ``RuntimeError``."""
    zeros: Tensor = _Underivable.apply(x, message)
    return zeros


def only_again(zero: Tensor) -> Tensor:
    """
    A zero that has a derivative, itself zero, whose own derivative is not: what corrects a second derivative. It costs
    nothing where the first is all that is asked for.
    """
    if is_tracing():  # which may take None for an empty tensor
        return zero
    if has_torch_function((zero,)):
        again: Tensor = handle_torch_function(only_again, (zero,), zero)
        return again
    again = _OnlyAgain.apply(zero)
    return again


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


class _OnlyAgain(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(zero: Tensor) -> Tensor:
        return torch.zeros_like(zero)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        return grad if torch.is_grad_enabled() else None
