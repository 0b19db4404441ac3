"""What torch's autograd graph tells; torch only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge


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
