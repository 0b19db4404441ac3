r"""
Control variates that see the draw: a smooth function c of it, whose mean gradient is put back.

Perturbed log-probabilities :math:`z_k = \log p_k + g_k` with Gumbel noise have their maximum at a draw
:math:`h \sim p`. For every smooth function c of z,

.. math:: E\bigl[c(z)\,\nabla \log p_h\bigr] = E\Bigl[\sum_k e^{z_k - z_h}\,
    \frac{\partial c}{\partial z_k}\,\nabla \log p_k\Bigr],

which is the identity behind REBAR and RELAX with both of their relaxed draws, z and :math:`\tilde z \mid h`, at the
same point: the derivative of :math:`\tilde z_k` by :math:`\log p_k` at fixed noise is then :math:`1 - e^{z_k - z_h}`
(0 for k = h), that of z is 1. One relaxed evaluation serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_sparse._relaxation import conditional_gumbels, gumbel_like, one_hot_at_max
from pyro_sparse.estimators.base import Estimator, Site, Slots
from pyro_sparse.estimators.baselines import network_input
from pyro_sparse.estimators.one_hot import OneHotView, one_hot_view


class _ControlVariate(Estimator):
    """What REBAR and RELAX share: the estimate from c and its derivative, and the objective of what is learnt."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"{type(self).__name__}: expected a positive temperature, got {temperature}. Use 0.5.")
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def relax(self, z: Tensor) -> Tensor:
        r""":math:`\mathrm{softmax}(z / \tau)`."""
        return (z / self.log_temperature.exp().to(z)).softmax(-1)

    def _learnt(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _estimate(
        self, f: Tensor, c: Tensor, z: Tensor, hard: Tensor, view: OneHotView
    ) -> tuple[Tensor, Tensor | float]:
        r"""
        The surrogate with gradient :math:`\sum_k w_k \nabla \log p_k`, and the loss that trains c. The squared norm is
        that of the gradient by the logits, and only what is learnt gets its derivative.
        """
        learnt = self._learnt()
        slope = derivative(c, z, create_graph=bool(learnt))
        ratios = (z.detach() - z.detach().amax(-1, keepdim=True)).exp()
        weights = view.spread(f - c) * hard + ratios * slope
        log_probs = view.log_probs
        surrogate = view.sum_elements(weights.detach() * log_probs.masked_fill(log_probs == -math.inf, 0.0))
        if not learnt:
            return surrogate, 0.0
        gradient = weights - log_probs.detach().exp() * weights.sum(-1, keepdim=True)
        norm = view.sum_elements(gradient.square()).mean()
        gradients = torch.autograd.grad(norm, learnt, retain_graph=True, allow_unused=True, materialize_grads=True)
        return surrogate, sum((p * g).sum() for p, g in zip(learnt, gradients, strict=True))


class REBAR(_ControlVariate):
    r"""
    .. math:: \nabla E_q f \approx \bigl(f(h) - \eta\,f(u)\bigr)\,\nabla \log p_h
        + \eta \sum_k e^{z_k - z_h}\,\frac{\partial f(u)}{\partial z_k}\,\nabla \log p_k,
        \qquad u = \mathrm{softmax}(z / \tau),

    with :math:`z_k = \log p_k + g_k`, g Gumbel noise, and h the draw at its maximum: the model itself, run on a relaxed
    draw, is the control variate. It is the published estimator, but for the coupling of its two relaxed draws: here
    they are at one point, so that the model runs on two values and not on three. The temperature :math:`\tau` and the
    scale :math:`\eta` are trained by the same ``svi.step`` to lessen the variance.

    **Bias:** none. **Extra model evaluations:** 1; sites multiply. **Needs from the guide:** ``Bernoulli`` or
    ``OneHotCategorical``, alone or under ``to_event``, with a prior of the same kind, and a model that is continuous in
    the value and can run on one between 0 and 1.

    Args:
        temperature: where :math:`\tau` begins, positive.
        scale: where :math:`\eta` begins.

    Reference: G. Tucker et al., *REBAR: low-variance, unbiased gradient estimates for discrete latent variable models*,
    NeurIPS 2017, §3.1.
    """

    draws_slots = True
    relaxes: ClassVar[bool] = True

    def __init__(self, temperature: float = 0.5, scale: float = 1.0) -> None:
        super().__init__(temperature)
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def draw(self, site: Site) -> Slots:
        view = self._view(site)
        log_probs = view.log_probs.detach()
        z = (log_probs + gumbel_like(log_probs)).requires_grad_()
        hard = view.value(one_hot_at_max(z.detach()))
        return relaxed_slots(hard, view.value(self.relax(z)), z, len(site.fn.batch_shape))

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        if not torch.is_grad_enabled():
            return torch.zeros_like(cost), 0.0
        assert site.slots is not None and site.slots.memo is not None and site.attached_cost is not None
        z = site.slots.memo
        c = site.attached_cost()[1]
        surrogate, loss = self._estimate(cost[0], self.scale.to(c) * c, z, one_hot_at_max(z.detach()), self._view(site))
        return torch.stack([surrogate, torch.zeros_like(surrogate)]), loss

    def _view(self, site: Site) -> OneHotView:
        return one_hot_view("REBAR", site, indices=False, fix="Use OneHotCategorical, or RELAX or LeaveOneOut.")


class RELAX(_ControlVariate):
    r"""
    .. math:: \nabla E_q f \approx \bigl(f(h) - c(u)\bigr)\,\nabla \log p_h
        + \sum_k e^{z_k - z_h}\,\frac{\partial c(u)}{\partial z_k}\,\nabla \log p_k,
        \qquad u = \mathrm{softmax}(z / \tau),

    with a network c, and z perturbed log-probabilities whose maximum is at the draw h. Network and temperature
    :math:`\tau` are trained by the same ``svi.step`` to lessen the variance. (The paper's c may have f(u) in it, too:
    that is :class:`REBAR`'s; this one runs the model once, on any model.)

    **Bias:** none. **Extra model evaluations:** none, but those of the network and its derivatives. **Needs from the
    guide:** ``Bernoulli``, ``Categorical`` or ``OneHotCategorical``, alone or under ``to_event``.

    Args:
        net: any module, twice differentiable (no bare ReLU: use Tanh or SiLU, say). It gets the relaxed value, of shape
            ``(*batch, *event)``: numbers between 0 and 1 for bits, ``(*batch, 1)`` for a single one; points of the
            simplex, ``(..., K)``, for categories. Its output has shape ``batch`` or ``(*batch, 1)``.
        inputs: a function of the guide's arguments whose result the network gets as a second argument, with the rows
            of the plates, as in :class:`NeuralBaseline`.
        temperature: where :math:`\tau` begins, positive.

    Raises:
        ValueError: naming the site, for an output of another shape.

    Reference: W. Grathwohl et al., *Backpropagation through the void: optimizing control variates for black-box
    gradient estimation*, ICLR 2018, §3 and appendix.
    """

    def __init__(self, net: nn.Module, inputs: Callable[..., Any] | None = None, temperature: float = 0.5) -> None:
        super().__init__(temperature)
        if not isinstance(net, nn.Module):
            raise TypeError(f"RELAX: expected an nn.Module, got {net!r}. Wrap it in one.")
        self.net = net
        self.inputs = inputs

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        if not torch.is_grad_enabled():
            return torch.zeros_like(cost), 0.0
        assert site.value is not None
        view = one_hot_view("RELAX", site, indices=True, fix="Use LeaveOneOut, which serves every distribution.")
        hard = view.one_hot(site.value)
        z = conditional_gumbels(view.log_probs.detach(), hard).requires_grad_()
        return self._estimate(cost, self._c(view.value(self.relax(z)), site), z, hard, view)

    def _c(self, relaxed: Tensor, site: Site) -> Tensor:
        batch = site.fn.batch_shape
        relaxed = relaxed if relaxed.dim() > len(batch) else relaxed.unsqueeze(-1)
        if self.inputs is None:
            value = self.net(relaxed)
        else:
            x = network_input("RELAX", site, self.inputs)
            if isinstance(x, Tensor) and x.shape[: len(site.batch_shape)] == site.batch_shape:
                x = x.expand(batch + x.shape[len(site.batch_shape) :])  # one row for each particle and slot, too
            value = self.net(relaxed, x)
        value = value.squeeze(-1) if value.dim() == len(batch) + 1 and value.shape[-1] == 1 else value
        if value.shape != batch:
            raise ValueError(
                f"RELAX, site '{site.name}': expected an output of shape {tuple(batch)} or {(*batch, 1)}, got "
                f"{tuple(value.shape)}. Use one output unit."
            )
        return value


class MuProp(Estimator):
    r"""
    .. math:: \nabla E_q f \approx \bigl(f(h) - f(\mu) - f'(\mu)^\top (h - \mu)\bigr)\,\nabla \log q(h)
        + f'(\mu)^\top \nabla \mu, \qquad \mu = E_q h:

    the model's first-order expansion at the mean is the control variate.

    **Bias:** none. **Extra model evaluations:** 1; sites multiply. **Needs from the guide:** ``Bernoulli`` or
    ``OneHotCategorical``, alone or under ``to_event``, with a prior of the same kind, and a model that can run on their
    mean.

    Reference: S. Gu et al., *MuProp: unbiased backpropagation for stochastic neural networks*, ICLR 2016, §3.
    """

    draws_slots = True
    relaxes: ClassVar[bool] = True

    def draw(self, site: Site) -> Slots:
        view = self._view(site)
        mean = view.value(view.log_probs.detach().exp()).requires_grad_()
        return relaxed_slots(site.fn.sample(), mean, mean, len(site.fn.batch_shape))

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        if not torch.is_grad_enabled():
            return torch.zeros_like(cost), 0.0
        assert site.slots is not None and site.slots.memo is not None and site.attached_cost is not None
        mean = site.slots.memo
        at_mean = site.attached_cost()[1]
        slope = derivative(at_mean, mean)
        view = self._view(site)
        event = tuple(range(len(site.fn.batch_shape) - mean.dim(), 0))

        def along(x: Tensor) -> Tensor:
            return (slope * x).sum(event) if event else slope * x

        linear = at_mean.detach() + along(site.slots.values[0] - mean.detach())
        surrogate = (cost[0] - linear) * site.log_prob[0] + along(view.value(view.log_probs.exp()))
        return torch.stack([surrogate, torch.zeros_like(surrogate)]), 0.0

    def _view(self, site: Site) -> OneHotView:
        return one_hot_view("MuProp", site, indices=False, fix="Use OneHotCategorical, or RELAX or LeaveOneOut.")


def relaxed_slots(hard: Tensor, soft: Tensor, memo: Tensor, batch_dims: int) -> Slots:
    """Two slots: the draw, of weight one, and what lies between the outcomes, of weight zero."""
    log_weights = hard.new_tensor([0.0, -math.inf]).reshape(2, *(1,) * batch_dims)
    values = torch.stack(torch.broadcast_tensors(hard, soft))
    return Slots(values, log_weights.expand(2, *hard.shape[:batch_dims]), memo=memo)


def derivative(cost: Tensor, at: Tensor, create_graph: bool = False) -> Tensor:
    """That of each element's cost; the graph stays, which the model's own gradient shares."""
    (slope,) = torch.autograd.grad(
        cost.sum(), at, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return slope
