r"""
Control variates from the model's own derivative: first-order expansions, of which the mean gradient is known.

A linear function :math:`d^\top (h - \mu)` of a one-hot draw h with mean :math:`\mu` has the mean zero and the gradient
:math:`E[d^\top (h - \mu)\,\nabla \log q(h)] = d^\top \nabla \mu`, for every d that does not depend on h.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_sparse.estimators.base import Site, Slots
from pyro_sparse.estimators.one_hot import OneHotView
from pyro_sparse.estimators.score_function import check_count
from pyro_sparse.estimators.smooth import SmoothEstimator, derivative, draw_and_relaxed


class MuProp(SmoothEstimator):
    r"""
    .. math:: \nabla E_q f \approx \bigl(f(h) - f(\mu) - f'(\mu)^\top (h - \mu)\bigr)\,\nabla \log q(h)
        + f'(\mu)^\top \nabla \mu, \qquad \mu = E_q h:

    the model's first-order expansion at the mean is the control variate.

    **Bias:** none (any slope would do). **Extra model evaluations:** 1; sites multiply. **Needs from the guide:**
    ``Bernoulli`` or ``OneHotCategorical``, alone or under ``to_event``, with a prior of the same kind, and a model that
    can run on their mean.

    Reference: S. Gu et al., *MuProp: unbiased backpropagation for stochastic neural networks*, ICLR 2016, §3.
    """

    def draw(self, site: Site) -> Slots:
        """The draw, and the mean."""
        view = self.view(site)
        mean = view.value(view.probs).clone().requires_grad_()
        return draw_and_relaxed(site.fn.sample(), mean, mean, site)

    def gradient(self, view: OneHotView, cost: Tensor, attached: Tensor, site: Site, memo: Tensor) -> Tensor:
        assert site.slots is not None
        hard, slope = view.one_hot(site.slots.values[0]), view.as_cotangent(derivative(attached[1], memo))
        linear = attached[1].detach() + view.sum_elements(slope * (hard - view.probs))
        return view.gradient(view.spread(cost[0] - linear) * hard + view.probs * slope)


class DoubleControlVariate(SmoothEstimator):
    r"""
    Leave-one-out over n draws of its own site, of which the costs are corrected by the model's derivative at the other
    draws,

    .. math:: \nabla E_q f \approx \frac1n \sum_k \Bigl(g_k - \frac{1}{n - 1} \sum_{j \ne k} g_j\Bigr)\,
        \nabla \log q(h_k) - \frac{\alpha}{n} \sum_k f'(h_k)^\top \nabla \mu, \qquad
        g_k = f(h_k) + \frac{\alpha}{n - 1} \sum_{j \ne k} f'(h_j)^\top (h_k - \mu);

    :math:`\alpha` is trained by the same ``svi.step`` to lessen the variance.

    **Bias:** none. **Extra model evaluations:** n - 1; sites multiply. **Needs from the guide:** ``Bernoulli`` or
    ``OneHotCategorical``, alone or under ``to_event``, with a prior of the same kind, and a model with a derivative
    with respect to the value.

    Args:
        n: draws, at least 2.
        scale: where :math:`\alpha` begins; 0 is plain leave-one-out.

    Reference: M. Titsias, J. Shi, *Double control variates for gradient estimation in discrete latent variable models*,
    AISTATS 2022, §3.
    """

    def __init__(self, n: int, scale: float = 0.0) -> None:
        super().__init__()
        check_count("DoubleControlVariate", n)
        self.n = n
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def draw(self, site: Site) -> Slots:
        """n independent draws."""
        self.view(site)
        values = site.fn.sample((self.n,)).requires_grad_()
        log_weights = values.detach().new_full((), -math.log(self.n)).expand(self.n, *site.fn.batch_shape)
        return Slots(values, log_weights, memo=values)

    def gradient(self, view: OneHotView, cost: Tensor, attached: Tensor, site: Site, memo: Tensor) -> Tensor:
        hard, scale = view.one_hot(memo.detach()), self.scale.to(cost)
        slope = view.as_cotangent(derivative(attached, memo))
        others = (slope.sum(0) - slope) / (self.n - 1)
        corrected = cost.reshape(self.n, *site.fn.batch_shape) + scale * view.sum_elements(others * (hard - view.probs))
        signal = (corrected - corrected.mean(0)) / (self.n - 1)
        return view.gradient((view.spread(signal) * hard).sum(0) - scale * view.probs * slope.mean(0))
