"""The n-particle bound and its gradient."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from pyro_sparse.estimators.base import Estimator, Site
from pyro_sparse.estimators.score_function import check_count


class VIMCO(Estimator):
    r"""
    The gradient of the tighter bound

    .. math:: L = E \log \frac1n \sum_{k=1}^n w_k, \qquad w_k = \frac{p(x, z_k)}{q(z_k)}, \qquad
        \nabla L \approx \sum_k \bigl(\log \tfrac1n \textstyle\sum_j w_j - L_{-k}\bigr) \nabla \log q(z_k)
        + \sum_k \tilde w_k \nabla \log w_k,

    where :math:`L_{-k}` has the geometric mean of the other weights in place of :math:`w_k`, and :math:`\tilde w` are
    the weights, normalised. One bound for each data-plate element.

    **Bias:** none for its own bound, which is not the ELBO. **Extra model evaluations:** n - 1, vectorised.
    **Needs from the guide:** ``log_prob``, and all latent sites in the data plate. It is the whole ELBO: no other
    estimator can stand beside it.

    Args:
        n: particles of the whole program, at least 2.

    Reference: A. Mnih, D. Rezende, *Variational inference for Monte Carlo objectives*, ICML 2016, Eq. 8-11.
    """

    objective: ClassVar[str] = "bound"

    def __init__(self, n: int) -> None:
        super().__init__()
        check_count("VIMCO", n)
        self.num_particles = n

    @property
    def n(self) -> int:
        """The number of particles."""
        return self.num_particles

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        """
        Here ``cost`` is :math:`\\log w`, ``(n, *batch)``, attached, and ``site.log_prob`` that of all sampled sites
        together; the surrogate has shape ``batch``.
        """
        with torch.no_grad():
            others = (cost.sum(0) - cost) / (self.num_particles - 1)
            own = torch.eye(self.num_particles, dtype=torch.bool, device=cost.device)
            own = own.reshape(own.shape + (1,) * (cost.dim() - 1))
            signal = self.bound(cost) - self.bound(torch.where(own, others[None], cost[:, None]))
        return self.bound(cost) + (signal * site.log_prob).sum(0), 0.0

    def bound(self, log_weights: Tensor) -> Tensor:
        r""":math:`\log \frac1n \sum_k w_k`, from ``(n, ...)``."""
        return log_weights.logsumexp(0) - math.log(self.num_particles)
