"""Estimators that draw from q itself: the score function with a baseline, and leave-one-out over particles."""

from __future__ import annotations

from torch import Tensor

from pyro_sparse.estimators.base import Baseline, Estimator, Site


class ScoreFunction(Estimator):
    r"""
    .. math:: \nabla E_q f = E_q\bigl[(f(z) - b)\,\nabla \log q(z)\bigr]

    for any baseline b that does not depend on the draw z.

    **Bias:** none. **Extra model evaluations:** those of the baseline. **Needs from the guide:** ``log_prob``.

    Args:
        baseline: b; None for b = 0.

    Reference: R. J. Williams, *Simple statistical gradient-following algorithms*, Machine Learning 1992, Eq. 4; in
    variational inference R. Ranganath et al., *Black box variational inference*, AISTATS 2014, §3.
    """

    def __init__(self, baseline: Baseline | None = None) -> None:
        super().__init__()
        if baseline is not None and not isinstance(baseline, Baseline):
            raise TypeError(
                f"{type(self).__name__}: expected a Baseline or None, got {baseline!r}. "
                "Use one of pyro_sparse.estimators, or subclass Baseline."
            )
        self.baseline = baseline

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        if self.baseline is None:
            return cost * site.log_prob, 0.0
        value, loss = self.baseline(cost, site)
        return (cost - value.detach()) * site.log_prob, loss

    def update(self, cost: Tensor, site: Site) -> None:
        if self.baseline is not None:
            self.baseline.update(cost, site)


class LeaveOneOut(Estimator):
    r"""
    .. math:: \nabla E_q f \approx \frac1n \sum_{k=1}^n
        \Bigl(f(z_k) - \frac{1}{n-1} \sum_{j \ne k} f(z_j)\Bigr)\,\nabla \log q(z_k)

    The recommended default: each of n particles has the others' mean as its baseline (RLOO).

    **Bias:** none. **Extra model evaluations:** n - 1, vectorised. **Needs from the guide:** ``log_prob``.

    Args:
        n: particles of the whole program, at least 2.
        vectorized: False runs them one by one, for programs that branch in Python on a drawn value.

    Reference: W. Kool, H. van Hoof, M. Welling, *Buy 4 REINFORCE samples, get a baseline for free!*, ICLR workshop
    2019, Eq. 8; T. Salimans, D. Knowles, *On using control variates with stochastic approximation for variational
    Bayes*, 2014, §3.
    """

    def __init__(self, n: int, vectorized: bool = True) -> None:
        super().__init__()
        check_count("LeaveOneOut", n)
        self.num_particles = n
        self.vectorized = vectorized

    @property
    def n(self) -> int:
        """The number of particles."""
        return self.num_particles

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        others = (cost.sum(0) - cost) / (self.num_particles - 1)
        return (cost - others) * site.log_prob, 0.0


def check_count(estimator: str, n: int, name: str = "n") -> None:
    """Raises unless n is an integer of at least 2."""
    if not isinstance(n, int) or n < 2:
        raise ValueError(
            f"{estimator}: expected {name} of at least 2, got {n!r}. With one draw there is no other to compare."
        )
