"""The transitions of a Markov chain that have positive probability, as a graph; sums and choices along its edges."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Edges(NamedTuple):
    r"""
    E transitions between N nodes, ordered by target. What passes along them has shape ``(N, C)``, for C chains.

    With more than one group of nodes (each chain of a batch has its own transitions) no edge joins two groups.
    """

    source: Tensor  #: ``(E,)``
    target: Tensor  #: ``(E,)``
    logits: Tensor  #: log-probabilities, ``(E,)``
    first: Tensor  #: the first edge into each node, ``(N,)``
    degree: Tensor  #: how many edges lead into each node, ``(N,)``

    def log_sum(self, messages: Tensor) -> Tensor:
        r""":math:`\log \sum_i e^{m_i} P_{ij}` for each node j; -inf where nothing arrives, with gradient zero."""
        total: Tensor = _LogSumExp.apply(messages, self.logits, self.source, self.target)
        return total

    def maximum(self, messages: Tensor) -> Tensor:
        r""":math:`\max_i m_i + \log P_{ij}` for each node j, -inf where nothing arrives."""
        return _maximum(_along(messages, self.logits, self.source), messages, self.target)

    def log_origins(self, messages: Tensor, total: Tensor) -> Tensor:
        r"""Of each edge, the log-probability that its target was reached along it; ``total`` is :meth:`log_sum`."""
        return _log_origins(messages, total, self.logits, self.source, self.target)

    def arrivals(self, messages: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        r"""
        The edges into some nodes, padded to the largest in-degree D of the graph, which is read from the device.

        Args:
            messages: ``(N, C)``.
            nodes: ``(*M, C)``, a node for each chain.

        Returns:
            Their sources and :math:`m_i + \log P_{ij}` (-inf for padding), both of shape ``(D, *M, C)``.
        """
        most = int(self.degree.max()) if len(self.degree) else 1
        number = torch.arange(most, device=nodes.device).reshape(most, *(1,) * nodes.dim())
        edge = (self.first[nodes] + number).clamp_max(len(self.source) - 1)
        source = self.source[edge]
        scores = messages[source, torch.arange(nodes.shape[-1], device=nodes.device)] + self.logits[edge]
        return source, scores.masked_fill(number >= self.degree[nodes], -math.inf)


def edges_of(probs: Tensor) -> list[Edges]:
    r"""
    The edges of transition matrices, step by step.

    Args:
        probs: ``(T, G, S, S)``, rows sum to one; for T steps (or one that serves all) and G groups of S nodes each.

    Returns:
        T graphs of G · S nodes. How many edges each has is read from the device, which is waited for twice.
    """
    steps, groups, states = probs.shape[:3]
    step, group, target, source = (probs.detach().transpose(-1, -2) != 0).nonzero(as_tuple=True)  # NaN stays
    logits = probs[step, group, source, target].log()
    offset = group * states
    nodes = (step, offset + target)
    degree = torch.zeros(steps, groups * states, dtype=torch.long, device=probs.device)
    degree = degree.index_put(nodes, torch.ones_like(target), accumulate=True)
    sizes = degree.sum(1).tolist()
    columns = (x.split(sizes) for x in (offset + source, offset + target, logits))
    return [Edges(a, b, c, n.cumsum(0) - n, n) for a, b, c, n in zip(*columns, degree, strict=True)]


def _along(messages: Tensor, logits: Tensor, source: Tensor) -> Tensor:
    return messages.index_select(0, source) + logits.unsqueeze(1)


def _log_origins(messages: Tensor, total: Tensor, logits: Tensor, source: Tensor, target: Tensor) -> Tensor:
    total = total.clamp_min(torch.finfo(total.dtype).min)  # a difference of infinities would be NaN
    return _along(messages, logits, source) - total.index_select(0, target)


def _maximum(along: Tensor, messages: Tensor, target: Tensor) -> Tensor:
    index = target.unsqueeze(1).expand_as(along)
    return torch.full_like(messages, -math.inf).scatter_reduce(0, index, along, "amax")


class _LogSumExp(torch.autograd.Function):
    """By hand, for what is kept of each step: numbers for each node here, three for each edge by autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(messages: Tensor, logits: Tensor, source: Tensor, target: Tensor) -> Tensor:
        along = _along(messages, logits, source)
        # The largest of each node's own edges: one for all nodes would lose those that are far below it.
        top = _maximum(along, messages, target).clamp_min(torch.finfo(messages.dtype).min)
        parts = (along - top.index_select(0, target)).exp()
        return torch.zeros_like(messages).index_add(0, target, parts).log() + top

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        messages, logits, source, target, total = ctx.saved_tensors
        flow = _log_origins(messages, total, logits, source, target).exp() * grad.index_select(0, target)
        return torch.zeros_like(messages).index_add(0, source, flow), flow.sum(1), None, None
