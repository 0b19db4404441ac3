r"""
Control variates from the model's own derivative: first-order expansions, of which the mean gradient is known.

A linear function :math:`d^\top (h - \mu)` of a one-hot draw h with mean :math:`\mu` has the mean zero and the gradient
:math:`E[d^\top (h - \mu)\,\nabla \log q(h)] = d^\top \nabla \mu`, for every d that does not depend on h.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyro_sparse.estimators.base import Estimator, Site, Slots
from pyro_sparse.estimators.one_hot import (
    OneHotView,
    derivative,
    draw_and_relaxed,
    in_first_slot,
    norm_loss,
    one_hot_view,
)
from pyro_sparse.estimators.score_function import check_count


class MuProp(Estimator):
    r"""
    .. math:: \nabla E_q f \approx \bigl(f(h) - f(\mu) - f'(\mu)^\top (h - \mu)\bigr)\,\nabla \log q(h)
        + f'(\mu)^\top \nabla \mu, \qquad \mu = E_q h:

    the model's first-order expansion at the mean is the control variate.

    **Bias:** none (any slope would do). **Extra model evaluations:** 1; sites multiply. **Needs from the guide:**
    ``Bernoulli`` or ``OneHotCategorical``, alone or under ``to_event``, with a prior of the same kind, and a model that
    can run on their mean.

    Reference: S. Gu et al., *MuProp: unbiased backpropagation for stochastic neural networks*, ICLR 2016, §3.
    """

    draws_slots = True
    relaxes: ClassVar[bool] = True

    def draw(self, site: Site) -> Slots:
        """The draw, and the mean."""
        view = _view(self, site)
        mean = view.value(view.probs).clone().requires_grad_()
        return draw_and_relaxed(site.fn.sample(), mean, mean, site)

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        if not torch.is_grad_enabled():
            return torch.zeros_like(cost), 0.0
        assert site.slots is not None and site.slots.memo is not None and site.attached_cost is not None
        view, at_mean = _view(self, site), site.attached_cost()[1]
        hard, slope = view.one_hot(site.slots.values[0]), view.as_cotangent(derivative(at_mean, site.slots.memo))
        linear = at_mean.detach() + view.sum_elements(slope * (hard - view.probs))
        gradient = view.gradient(view.spread(cost[0] - linear) * hard + view.probs * slope)
        return in_first_slot(view.surrogate(gradient), cost), 0.0


class DoubleControlVariate(Estimator):
    r"""
    Leave-one-out over n draws of its own site, of which the costs are corrected by the model's derivative at the other
    draws,

    .. math:: \nabla E_q f \approx \frac1n \sum_k \Bigl(g_k - \frac{1}{n - 1} \sum_{j \ne k} g_j\Bigr)\,
        \nabla \log q(h_k) - \frac{\alpha}{n} \sum_k f'(h_k)^\top \nabla \mu, \qquad
        g_k = f(h_k) + \frac{\alpha}{n - 1} \sum_{j \ne k} f'(h_j)^\top (h_k - \mu);

    :math:`\alpha` is trained by the same ``svi.step`` to lessen the variance.

    **Bias:** none. **Extra model evaluations:** n - 1; sites multiply. **Needs from the guide:** ``Bernoulli`` or
    ``OneHotCategorical``, alone or under ``to_event``, with a prior of the same kind, and a model with a derivative by
    the value.

    Args:
        n: draws, at least 2.
        scale: where :math:`\alpha` begins; 0 is plain leave-one-out.

    Reference: M. Titsias, J. Shi, *Double control variates for gradient estimation in discrete latent variable models*,
    AISTATS 2022, §3.
    """

    draws_slots = True
    relaxes: ClassVar[bool] = True

    def __init__(self, n: int, scale: float = 0.0) -> None:
        super().__init__()
        check_count("DoubleControlVariate", n)
        self.n = n
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def draw(self, site: Site) -> Slots:
        """n independent draws."""
        _view(self, site)
        values = site.fn.sample((self.n,)).requires_grad_()
        log_weights = values.detach().new_full((), -math.log(self.n)).expand(self.n, *site.fn.batch_shape)
        return Slots(values, log_weights, memo=values)

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        if not torch.is_grad_enabled():
            return torch.zeros_like(cost), 0.0
        assert site.slots is not None and site.slots.memo is not None and site.attached_cost is not None
        view, values = _view(self, site), site.slots.memo
        hard, scale = view.one_hot(values.detach()), self.scale.to(cost)
        slope = view.as_cotangent(derivative(site.attached_cost(), values))
        others = (slope.sum(0) - slope) / (self.n - 1)
        corrected = cost.reshape(self.n, *site.fn.batch_shape) + scale * view.sum_elements(others * (hard - view.probs))
        signal = (corrected - corrected.mean(0)) / (self.n - 1)
        gradient = view.gradient((view.spread(signal) * hard).sum(0) - scale * view.probs * slope.mean(0))
        return in_first_slot(view.surrogate(gradient), cost), norm_loss(view, gradient, self)


def _view(estimator: Estimator, site: Site) -> OneHotView:
    fix = "Use OneHotCategorical, or RELAX or LeaveOneOut."
    return one_hot_view(type(estimator).__name__, site, indices=False, fix=fix)
