"""Draws without replacement, weighted by how the set of them may have come about."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_sparse._precision import multinomial, widened
from pyro_sparse.estimators.base import Estimator, Site, Slots, require_outcomes, take_outcomes
from pyro_sparse.estimators.score_function import check_count


class UnorderedSet(Estimator):
    r"""
    For a set S of k different outcomes, drawn one after the other without replacement,

    .. math:: \nabla E_q f \approx \sum_{s \in S} q(s)\,R(S, s)\,\Bigl(f(s) - \sum_{t \in S} q(t)\,R_s(S, t)\,f(t)
        \Bigr)\,\nabla \log q(s), \qquad R(S, s) = \frac{P(S \mid \text{first is } s)}{P(S)}.

    :math:`R_s` is the same ratio where s has already been drawn, and one for t = s. All of them are exact, by a
    recursion over the :math:`2^k` subsets of S. Where k is the number of outcomes, the gradient is exact.

    **Bias:** none. **Extra model evaluations:** k - 1. **Needs from the guide:** a finite support.

    Args:
        k: how many outcomes are drawn, at least 2 and at most as many as there are. The recursion makes :math:`2^k`
            small steps: beyond 8 or so it costs more than most models.

    Raises:
        ValueError: naming the site, if there are fewer than k outcomes.

    Reference: W. Kool, H. van Hoof, M. Welling, *Estimating gradients for discrete random variables by sampling without
    replacement*, ICLR 2020, §3 and 4.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        check_count("UnorderedSet", k, name="k")
        self.k = k

    def draw(self, site: Site) -> Slots:
        require_outcomes("UnorderedSet", site)
        with torch.no_grad():
            outcomes = site.fn.enumerate_support(expand=True)
            if self.k > len(outcomes):
                raise ValueError(
                    f"UnorderedSet, site '{site.name}': expected k of at most {len(outcomes)}, the number of outcomes, "
                    f"got {self.k}. Lower it, or use Exact()."
                )
            log_q = widened(site.fn.log_prob(outcomes))
            # What is below the least normal number, a draw cannot tell from zero.
            log_q = log_q.masked_fill(log_q < math.log(torch.finfo(log_q.dtype).tiny), -math.inf)
            rows = log_q.exp().movedim(0, -1)
            drawn = multinomial(rows.reshape(-1, len(outcomes)), self.k)  # without replacement
            drawn = drawn.reshape(*rows.shape[:-1], self.k).movedim(-1, 0)
            own = log_q.gather(0, drawn)
            completed = self._completed(own, log_q.scatter(0, drawn, -math.inf).logsumexp(0))
            after = torch.stack([completed[1 << s] for s in range(self.k)])
            log_weights = own + after - completed[0]
            memo = self._second_order(own, after, completed)
            return Slots(take_outcomes(outcomes, drawn), log_weights, self.k if self.k == len(outcomes) else 0, memo)

    def _completed(self, own: Tensor, others: Tensor) -> list[Tensor]:
        """
        For each subset A of S (a bit mask): the log-probability that draws go on to complete S once A is drawn. Of
        peaked rows the probabilities themselves would underflow, all of a ratio's parts together.
        """
        completed = [torch.zeros_like(others)] * (1 << self.k)
        for mask in range((1 << self.k) - 2, -1, -1):
            missing = [s for s in range(self.k) if not mask >> s & 1]
            left = torch.stack([*(own[s] for s in missing), others]).logsumexp(0)
            ways = torch.stack([own[s] + completed[mask | 1 << s] for s in missing]).logsumexp(0)
            # With nothing left to draw, what is missing has probability zero, and so no weight.
            completed[mask] = torch.where(left > -math.inf, ways - left, 0.0)
        return completed

    def _second_order(self, own: Tensor, after: Tensor, completed: list[Tensor]) -> Tensor:
        r""":math:`q(t)\,R_s(S, t)`, in row s and column t: each row sums to one."""
        rows = []
        for s in range(self.k):
            both = [completed[1 << s | 1 << t] if t != s else after[s] for t in range(self.k)]
            rows.append((own + torch.stack(both) - after[s]).exp())
        return torch.stack(rows)

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        assert site.slots is not None and site.slots.memo is not None
        weights, second = site.slots.log_weights.exp(), site.slots.memo
        cost = cost.masked_fill(weights == 0, 0.0)  # infinite for an outcome that q rules out
        second = second.reshape(*second.shape[:2], *(1,) * (cost.dim() + 1 - second.dim()), *second.shape[2:])
        baseline = (second * cost).sum(1)
        return (weights * (cost - baseline) * site.log_prob).masked_fill(weights == 0, 0.0), 0.0
