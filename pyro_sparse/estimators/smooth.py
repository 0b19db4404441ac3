"""The base of estimators that differentiate the model with respect to a site's values."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from pyro_sparse.estimators.base import Estimator, Site, Slots
from pyro_sparse.estimators.one_hot import OneHotView, one_hot_view


class SmoothEstimator(Estimator):
    """
    Lays out slots by whose values the model is differentiated; what :meth:`Estimator.draw` leaves in the memo is what
    they are made of. A subclass gives the :meth:`gradient` with respect to the logits; its parameters learn to lessen
    the variance.
    """

    relaxes: ClassVar[bool] = True

    def gradient(self, view: OneHotView, cost: Tensor, attached: Tensor, site: Site, memo: Tensor) -> Tensor:
        """
        Args:
            view: of the site.
            cost: f at the slots, detached.
            attached: the same, attached to the slots' values.
            site: the site.
            memo: what the values are made of.
        """
        raise NotImplementedError

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        if not torch.is_grad_enabled():
            return torch.zeros_like(cost), 0.0
        assert site.slots is not None and site.slots.memo is not None and site.attached_cost is not None
        view = self.view(site)
        gradient = self.gradient(view, cost, site.attached_cost(), site, site.slots.memo)
        # In the shape of the cost: the surrogate is that of all slots together.
        surrogate = view.surrogate(gradient).reshape(cost[:1].shape)
        return torch.cat([surrogate, torch.zeros_like(cost[1:])]), norm_loss(view, gradient, self)

    def view(self, site: Site) -> OneHotView:
        """The site as one-hot vectors; refuses indices."""
        fix = "Use OneHotCategorical, or RELAX or LeaveOneOut."
        return one_hot_view(type(self).__name__, site, indices=False, fix=fix)


def draw_and_relaxed(hard: Tensor, soft: Tensor, memo: Tensor, site: Site) -> Slots:
    """Two slots: a draw, of weight one, and what lies between the outcomes, of weight zero."""
    batch = site.fn.batch_shape
    log_weights = (
        torch.stack([hard.new_zeros(()), hard.new_full((), -math.inf)]).reshape(2, *(1,) * len(batch)).expand(2, *batch)
    )
    return Slots(torch.stack([hard, soft]), log_weights, memo=memo)


def derivative(cost: Tensor, at: Tensor, create_graph: bool = False) -> Tensor:
    """That of each element's cost; the graph stays, which the model's own gradient shares."""
    (slope,) = torch.autograd.grad(
        cost.sum(), at, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return slope


def norm_loss(view: OneHotView, gradient: Tensor, estimator: Estimator) -> Tensor | float:
    r"""
    A loss whose gradient is that of :math:`\lVert g \rVert^2` with respect to what the estimator learns, and to nothing
    else. As g, the gradient with respect to the logits, is unbiased, the mean of that is the gradient of its variance.
    """
    learnt = [parameter for parameter in estimator.parameters() if parameter.requires_grad]
    if not learnt:
        return 0.0
    norm = view.sum_elements(gradient.square()).mean()
    try:
        gradients = torch.autograd.grad(norm, learnt, retain_graph=True, allow_unused=True, materialize_grads=True)
    except RuntimeError as error:
        if "does not currently support double backward" not in str(error):
            raise
        raise RuntimeError(
            f"{type(estimator).__name__}: expected a model that can be differentiated twice, by which it learns, got a "
            "compiled network that cannot. Freeze it: .requires_grad_(False); or compile with backend='eager'."
        ) from error
    return sum((p * g).sum().to(norm) for p, g in zip(learnt, gradients, strict=True))
