"""Rao-Blackwellisation: the likely outcomes are summed, the rest is sampled."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_sparse._precision import multinomial, widened
from pyro_sparse.estimators.base import Estimator, Site, Slots, require_outcomes, take_outcomes


class RaoBlackwell(Estimator):
    r"""
    With C the k most probable outcomes, :math:`\bar C` the others, and n draws :math:`z_j \sim q(z \mid \bar C)`,

    .. math:: \nabla E_q f \approx \sum_{z \in C} q(z)\,(f(z) - \bar b)\,\nabla \log q(z)
        + \frac{q(\bar C)}{n} \sum_{j=1}^n (f(z_j) - b_j)\,\nabla \log q(z_j),

    .. math:: b_j = \sum_{z \in C} q(z) f(z) + q(\bar C)\,\frac{1}{n - 1} \sum_{i \ne j} f(z_i), \qquad
        \bar b = \frac1n \sum_j b_j,

    and :math:`b_1 = \sum_C q f / q(C)` for n = 1: the enumerated outcomes are the sampled ones' baseline. Where k
    reaches all outcomes it is exact.

    **Bias:** none. **Extra model evaluations:** k + n - 1. **Needs from the guide:** a finite support.

    Args:
        k: how many outcomes are summed.
        tail_samples: n, the draws from the others.
        coverage: in place of k, the least probability of C: k is then the smallest number that gives every row of the
            batch at least this much. Reading it waits for the device.

    Reference: R. Liu, J. Regier, N. Tripuraneni, M. I. Jordan, J. McAuliffe, *Rao-Blackwellized stochastic gradients
    for discrete distributions*, ICML 2019, Eq. 5; the baseline is ours.
    """

    def __init__(self, k: int = 1, tail_samples: int = 1, coverage: float | None = None) -> None:
        super().__init__()
        for name, count in (("k", k), ("tail_samples", tail_samples)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"RaoBlackwell: expected {name} of at least 1, got {count!r}. Raise it.")
        if coverage is not None and not 0 < coverage <= 1:
            raise ValueError(f"RaoBlackwell: expected coverage in (0, 1], got {coverage!r}. Use, say, 0.95.")
        if coverage is not None and k != 1:
            raise ValueError(f"RaoBlackwell: expected k or coverage, got k={k} and coverage={coverage}. Leave one out.")
        self.k = k
        self.tail_samples = tail_samples
        self.coverage = coverage

    def draw(self, site: Site) -> Slots:
        require_outcomes("RaoBlackwell", site)
        with torch.no_grad():
            outcomes = site.fn.enumerate_support(expand=True)
            log_q = widened(site.fn.log_prob(outcomes))
            k = self._count(log_q)
            top, where_top = log_q.topk(k, 0)
            if k == len(outcomes):
                return Slots(take_outcomes(outcomes, where_top), top, k)
            tail = log_q.scatter(0, where_top, -math.inf)
            log_mass = tail.logsumexp(0)
            # A row without a tail draws from all of q: its draws have weight zero.
            rows = torch.where(log_mass > -math.inf, tail, log_q).softmax(0).movedim(0, -1)
            drawn = multinomial(rows.reshape(-1, len(outcomes)), self.tail_samples, replacement=True)
            drawn = drawn.reshape((*rows.shape[:-1], self.tail_samples)).movedim(-1, 0)
            weight = (log_mass - math.log(self.tail_samples)).expand(drawn.shape)
            return Slots(take_outcomes(outcomes, torch.cat([where_top, drawn])), torch.cat([top, weight]), k)

    def _count(self, log_q: Tensor) -> int:
        if self.coverage is None:
            return min(self.k, len(log_q))
        covered = log_q.exp().sort(0, descending=True).values.cumsum(0)
        # Rounding may leave the sum of all below a coverage of one.
        return min(int((covered < self.coverage).sum(0).max()) + 1, len(log_q))

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        assert site.slots is not None
        weights, k = site.slots.log_weights.exp(), site.slots.num_enumerated
        cost = cost.masked_fill(weights == 0, 0.0)  # infinite for an outcome that q rules out
        baseline: Tensor | float = 0.0
        if k < len(cost):
            enumerated = (weights * cost)[:k].sum(0)
            if self.tail_samples == 1:
                own = (enumerated / weights[:k].sum(0))[None]
            else:
                mass = weights[k:].sum(0)
                own = enumerated + mass * (cost[k:].sum(0) - cost[k:]) / (self.tail_samples - 1)
            baseline = torch.cat([own.mean(0, keepdim=True).expand_as(cost[:k]), own])
        return (weights * (cost - baseline) * site.log_prob).masked_fill(weights == 0, 0.0), 0.0
