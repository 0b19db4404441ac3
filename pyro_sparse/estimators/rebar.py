r"""
Control variates that see the draw: a smooth function c of it, whose mean gradient is put back.

Perturbed log-probabilities :math:`z_k = \log p_k + g_k` with Gumbel noise have their maximum at a draw
:math:`h \sim p`. For every smooth function c of z,

.. math:: E\bigl[c(z)\,\nabla \log p_h\bigr] = E\Bigl[\sum_k e^{z_k - z_h}\,
    \frac{\partial c}{\partial z_k}\,\nabla \log p_k\Bigr],

which is the identity behind REBAR and RELAX with both of their relaxed draws, z and :math:`\tilde z \mid h`, at the
same point: the derivative of :math:`\tilde z_k` with respect to :math:`\log p_k` at fixed noise is then
:math:`1 - e^{z_k - z_h}` (0 for k = h), that of z is 1. One relaxed evaluation serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyro_sparse._relaxation import conditional_gumbels, gumbel_like, one_hot_at_max, tempered_softmax
from pyro_sparse.estimators.base import Estimator, Site, Slots
from pyro_sparse.estimators.baselines import network_input
from pyro_sparse.estimators.one_hot import OneHotView, one_hot_view
from pyro_sparse.estimators.smooth import SmoothEstimator, derivative, draw_and_relaxed


class _ControlVariate(Estimator):
    """The base of REBAR and RELAX: the temperature, and the estimate from c and its derivative."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"{type(self).__name__}: expected a positive temperature, got {temperature}. Use 0.5.")
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def relax(self, z: Tensor) -> Tensor:
        r""":math:`\mathrm{softmax}(z / \tau)`."""
        return tempered_softmax(z, self.log_temperature.exp().to(z))

    def _learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def _gradient(self, f: Tensor, c: Tensor, z: Tensor, hard: Tensor, view: OneHotView) -> Tensor:
        """The estimate, with respect to the logits."""
        slope = derivative(c, z, create_graph=self._learns())
        ratios = (z.detach() - z.detach().amax(-1, keepdim=True)).exp()
        return view.gradient(view.spread(f - c) * hard + ratios * slope)


class REBAR(_ControlVariate, SmoothEstimator):
    r"""
    .. math:: \nabla E_q f \approx \bigl(f(h) - \eta\,f(u)\bigr)\,\nabla \log p_h
        + \eta \sum_k e^{z_k - z_h}\,\frac{\partial f(u)}{\partial z_k}\,\nabla \log p_k,
        \qquad u = \mathrm{softmax}(z / \tau),

    with :math:`z_k = \log p_k + g_k`, g Gumbel noise, and h the draw at its maximum: the model itself, run on a relaxed
    draw, is the control variate. It is the published estimator, but for the coupling of its two relaxed draws: here
    they are at one point, so that the model runs on two values and not on three. The temperature :math:`\tau` and the
    scale :math:`\eta` are trained by the same ``svi.step`` to lessen the variance.

    **Bias:** none, unless a later site that depends on this one is straight-through: the model's derivative is then
    pretended. **Extra model evaluations:** 1; sites multiply. **Needs from the guide:** ``Bernoulli`` or
    ``OneHotCategorical``, alone or under ``to_event``, with a prior of the same kind, and a model that is continuous in
    the value and can run on one between 0 and 1.

    Args:
        temperature: where :math:`\tau` begins, positive.
        scale: where :math:`\eta` begins.

    Reference: G. Tucker et al., *REBAR: low-variance, unbiased gradient estimates for discrete latent variable models*,
    NeurIPS 2017, §3.1.
    """

    def __init__(self, temperature: float = 0.5, scale: float = 1.0) -> None:
        super().__init__(temperature)
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def draw(self, site: Site) -> Slots:
        """The draw, and the relaxed one from the same noise."""
        view = self.view(site)
        z = (view.log_probs + gumbel_like(view.log_probs)).requires_grad_()
        return draw_and_relaxed(view.value(one_hot_at_max(z.detach())), view.value(self.relax(z)), z, site)

    def gradient(self, view: OneHotView, cost: Tensor, attached: Tensor, site: Site, memo: Tensor) -> Tensor:
        c = self.scale.to(attached) * attached[1]
        return self._gradient(cost[0], c, memo, one_hot_at_max(memo.detach()), view)


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
        net: a continuous module of its own, best a smooth one (with Tanh or SiLU, say): its derivative is trained, too.
            It gets the relaxed value, of shape ``(*batch, *event)``: numbers between 0 and 1 for bits, ``(*batch, 1)``
            for a single one; points of the simplex, ``(..., K)``, for categories. Its output has shape ``batch`` or
            ``(*batch, 1)``.
        inputs: a function of the guide's arguments whose result, detached, the network gets as a second argument, with
            the rows of the plates, as in :class:`NeuralBaseline`.
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
        z = conditional_gumbels(view.log_probs, hard).requires_grad_()
        gradient = self._gradient(cost, self._c(view.value(self.relax(z)), site), z, hard, view)
        # Nothing but what is learnt gets a gradient of its squared norm: no need for norm_loss.
        loss = view.sum_elements(gradient.square()).mean() if self._learns() else 0.0
        return view.surrogate(gradient), loss

    def _c(self, relaxed: Tensor, site: Site) -> Tensor:
        batch = site.fn.batch_shape
        relaxed = relaxed if relaxed.dim() > len(batch) else relaxed.unsqueeze(-1)
        if self.inputs is None:
            value = self.net(relaxed)
        else:
            x = network_input("RELAX", site, self.inputs)
            x = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, x)
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
