"""Antithetic draws for Bernoulli variables."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Bernoulli

from pyro_sparse._precision import HALF, widened
from pyro_sparse.estimators.base import Estimator, Site, Slots, element
from pyro_sparse.estimators.score_function import check_count


class ARMS(Estimator):
    r"""
    Leave-one-out over n draws with negative correlation :math:`\rho`, corrected for it, for each bit with logit
    :math:`\alpha`:

    .. math:: \nabla_\alpha E_q f \approx \frac{1}{n-1} \sum_{k=1}^n
        \frac{f(b_k) - \bar f}{1 - \rho}\,\nabla_\alpha \log q(b_k)

    With r the probability of the rarer value, the draws have it where :math:`D_k > 1 - r^{1/(n-1)}`, D uniform on the
    simplex (a Dirichlet copula), so that two of n have it with probability
    :math:`J = \max(0, 2 r^{1/(n-1)} - 1)^{n-1}` and :math:`1 - \rho = (r - J) / (r (1 - r))`.

    **Bias:** none. **Extra model evaluations:** n - 1. **Needs from the guide:** ``Bernoulli``, alone or under
    ``to_event``: the bits of a vector are drawn together, n vectors in all.

    Args:
        n: draws, at least 2.

    Reference: A. Dimitriev, M. Zhou, *ARMS: antithetic-REINFORCE-multi-sample gradient for binary variables*,
    ICML 2021, Theorem 3 and Algorithm 1.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        check_count(type(self).__name__, n)
        self.n = n

    def draw(self, site: Site) -> Slots:
        with torch.no_grad():
            probs = self._bits(site).probs
            values = self.draw_bits(probs).to(element(site.fn).logits.dtype)
            shape = (self.n, *site.fn.batch_shape)
            return Slots(values, probs.new_full((), -math.log(self.n)).expand(shape))

    def draw_bits(self, probs: Tensor) -> Tensor:
        """n dependent draws for each probability, ``(n,) + probs.shape``."""
        if self.n == 2:  # the antithetic pair 1[u < p], 1[1 - u < p], the second drawn given the first
            first = torch.bernoulli(probs)
            given_one, given_zero = (2 * probs - 1).clamp(min=0) / probs, probs.clamp(max=1 - probs) / (1 - probs)
            return torch.stack([first, torch.bernoulli(torch.where(first == 1, given_one, given_zero))])
        rare = torch.minimum(probs, 1 - probs)
        exponentials = torch.empty((self.n, *probs.shape), dtype=probs.dtype, device=probs.device).exponential_()
        is_rare = exponentials / exponentials.sum(0) > 1 - rare ** (1 / (self.n - 1))
        return torch.where(probs <= 0.5, is_rare, ~is_rare).to(probs.dtype)

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        assert site.slots is not None
        bits = self._bits(site)
        with torch.no_grad():
            rare = torch.minimum(bits.probs, 1 - bits.probs)
            both = (2 * rare ** (1 / (self.n - 1)) - 1).clamp(min=0) ** (self.n - 1)
            correction = (1 - rare) / (1 - torch.where(rare > 0, both / rare, 0.0))  # 1 / (1 - rho)
        log_prob = correction * bits.log_prob(site.slots.values)
        event_dims = len(site.fn.event_shape)
        log_prob = log_prob.sum(tuple(range(-event_dims, 0))) if event_dims else log_prob
        return (cost - cost.mean(0)) / (self.n - 1) * log_prob, 0.0

    def _bits(self, site: Site) -> Bernoulli:
        fn = element(site.fn)
        if not isinstance(fn, Bernoulli):
            raise ValueError(
                f"{type(self).__name__}, site '{site.name}': expected Bernoulli, alone or under to_event, got "
                f"{site.fn}. Use LeaveOneOut or RaoBlackwell."
            )
        if fn.logits.dtype not in HALF:
            return fn
        # In half precision a probability beside one is one.
        name = "probs" if fn._param is fn.__dict__.get("probs") else "logits"
        return Bernoulli(**{name: widened(getattr(fn, name))}, validate_args=False)


class DisARM(ARMS):
    r"""
    .. math:: \nabla_\alpha E_q f \approx \tfrac12\,(f(b) - f(\tilde b))\,(-1)^{\tilde b}\,
        1[b \ne \tilde b]\;\sigma(|\alpha|)

    for an antithetic pair :math:`b = 1[u < p], \tilde b = 1[1 - u < p]`: ARMS with two draws.

    **Bias:** none. **Extra model evaluations:** 1. **Needs from the guide:** ``Bernoulli``, alone or under
    ``to_event``.

    Reference: Z. Dong, A. Mnih, G. Tucker, *DisARM: an antithetic gradient estimator for binary latent variables*,
    NeurIPS 2020, Eq. 6.
    """

    def __init__(self) -> None:
        super().__init__(2)
