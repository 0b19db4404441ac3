"""Exact in each element of a vector, with the others as they were drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_sparse._precision import widened
from pyro_sparse.estimators.base import Estimator, Site, Slots, element, lists_outcomes


class LocalExpectation(Estimator):
    r"""
    For a vector z of independent elements,

    .. math:: \nabla E_q f \approx \sum_i \sum_v q_i(v)\,\bigl(f(z_{-i}, v) - f(z)\bigr)\,\nabla \log q_i(v):

    each element's expectation is exact, with the others as they were drawn. The model's own gradient is the mean over
    the elements of the same expectations.

    **Bias:** none; no variance for a single element. **Extra model evaluations:** :math:`\sum_i (K_i - 1)`. **Needs
    from the guide:** a finite support, of one variable or of a vector of them under ``to_event``.

    Raises:
        ValueError: naming the site, for an infinite support, or one that is not listed.

    Reference: M. Titsias, M. Lázaro-Gredilla, *Local expectation gradients for black box variational inference*,
    NeurIPS 2015, §3.
    """

    def draw(self, site: Site) -> Slots:
        """The draw first, then it with one element after the other at each of its other outcomes."""
        base = self._base(site)
        with torch.no_grad():
            value, outcomes = site.fn.sample(), base.enumerate_support(expand=False)
            same = value == outcomes
            drawn = same.all(-1) if base.event_shape else same
            index = drawn.to(torch.uint8).argmax(0).reshape(*site.fn.batch_shape, -1)
            steps = _one_by_one(index, len(outcomes))
            index = (index + steps) % len(outcomes)
            values = outcomes.reshape(-1, *base.event_shape)[index.reshape(len(steps), *drawn.shape[1:])]
            weights = (self._log_probs(base, index).exp() * _counts(steps)).sum(-1) / index.shape[-1]
            return Slots(values, weights.log(), len(steps) if index.shape[-1] == 1 else 0, index)

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        assert site.slots is not None and site.slots.memo is not None
        index = site.slots.memo
        log_probs = self._log_probs(self._base(site), index)
        probs = log_probs.detach().exp()
        log_probs = log_probs.masked_fill(probs == 0, 0.0)
        own = (probs * log_probs * (index != index[:1])).sum(-1)
        return (cost - cost[0]) * own, 0.0

    def _base(self, site: Site) -> Any:
        base = element(site.fn)
        if not lists_outcomes(base) or len(base.event_shape) > 1:
            raise ValueError(
                f"LocalExpectation, site '{site.name}': expected a finite support, of one variable or of a vector "
                f"under to_event, got {site.fn}. Use LeaveOneOut(n), which needs draws only."
            )
        return base

    def _log_probs(self, base: Any, index: Tensor) -> Tensor:
        """``(S, *batch, elements)``, of the outcomes by number."""
        table = widened(base.log_prob(base.enumerate_support(expand=False)))
        return table.reshape(len(table), *index.shape[1:]).gather(0, index)


def _one_by_one(index: Tensor, num_outcomes: int) -> Tensor:
    """How far each element moves on: ``(1 + elements (K - 1), 1, ..., 1, elements)``, not at all in the first row."""
    elements = index.shape[-1]
    each = torch.eye(elements, dtype=index.dtype, device=index.device)
    steps = torch.cat([torch.zeros_like(each[:1]), *(step * each for step in range(1, num_outcomes))])
    return steps.reshape(len(steps), *(1,) * (index.dim() - 1), elements)


def _counts(steps: Tensor) -> Tensor:
    """Which elements' expectations a slot is in: all in the first, the one that moved in the others."""
    moved = steps != 0
    return torch.where(moved.any(-1, keepdim=True), moved, True)
