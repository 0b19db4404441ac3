"""The variables of a site as one-hot vectors, whatever form their values have, and estimates that weight them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, OneHotCategorical

from pyro_sparse._relaxation import exact_logits
from pyro_sparse.estimators.base import Estimator, Site, Slots


@dataclass(frozen=True)
class OneHotView:
    """
    Bits, indices or unit vectors, alone or several under ``to_event``, as one-hot vectors.

    Attributes:
        logits: attached, ``(*batch, *elements, K)``; of a bit, those of one and of zero.
        elements: how many dims there are between ``batch`` and K.
        base: the distribution of one variable.
    """

    logits: Tensor
    elements: int
    base: Distribution

    @cached_property
    def log_probs(self) -> Tensor:
        """The normalised logits, detached."""
        return self.logits.detach().log_softmax(-1)

    @cached_property
    def probs(self) -> Tensor:
        """Their exponentials, detached."""
        return self.log_probs.exp()

    def value(self, one_hot: Tensor) -> Tensor:
        """One-hot vectors, or what lies between them, in the form of the site's own values; indices stay vectors."""
        return one_hot[..., 0] if isinstance(self.base, Bernoulli) else one_hot

    def one_hot(self, value: Tensor) -> Tensor:
        """The site's values as one-hot vectors."""
        if isinstance(self.base, Bernoulli):
            return torch.stack([value, 1 - value], -1)
        if isinstance(self.base, Categorical):
            return torch.nn.functional.one_hot(value, self.logits.shape[-1]).to(self.logits)
        return value

    def sum_elements(self, x: Tensor) -> Tensor:
        """Sums over K and the elements: ``(..., *elements, K)`` to ``(...)``."""
        return x.sum(tuple(range(-1 - self.elements, 0)))

    def as_cotangent(self, x: Tensor) -> Tensor:
        """A derivative by the site's values as one by one-hot vectors."""
        return torch.stack([x, torch.zeros_like(x)], -1) if isinstance(self.base, Bernoulli) else x

    def gradient(self, weights: Tensor) -> Tensor:
        r""":math:`\sum_k w_k \nabla \log p_k`, by the logits."""
        return weights - self.probs * weights.sum(-1, keepdim=True)

    def surrogate(self, gradient: Tensor) -> Tensor:
        """What has this gradient by the logits, summed over the elements."""
        return self.sum_elements(gradient.detach() * self.logits.clamp(min=torch.finfo(self.logits.dtype).min))

    def spread(self, x: Tensor) -> Tensor:
        """``(...)`` to ``(..., 1, ..., 1)``, to be multiplied by a one-hot vector for each element."""
        return x.reshape(*x.shape, *(1,) * (1 + self.elements))


def one_hot_view(estimator: str, site: Site, indices: bool, fix: str) -> OneHotView:
    """
    Args:
        estimator: whose name an error gives.
        site: the site.
        indices: whether ``Categorical`` sites are served.
        fix: what to use instead.

    Raises:
        ValueError: naming the site, for any other distribution.
    """
    base: Distribution = site.fn
    while isinstance(base, Independent):
        base = base.base_dist
    if not isinstance(base, (Bernoulli, OneHotCategorical, *([Categorical] if indices else []))):
        kinds = "Bernoulli, OneHotCategorical" + (" or Categorical" if indices else "")
        raise ValueError(
            f"{estimator}, site '{site.name}': expected {kinds}, alone or under to_event, got {site.fn}. {fix}"
        )
    logits = exact_logits(base)
    return OneHotView(logits, logits.dim() - 1 - len(site.fn.batch_shape), base)


def draw_and_relaxed(hard: Tensor, soft: Tensor, memo: Tensor, site: Site) -> Slots:
    """Two slots: a draw, of weight one, and what lies between the outcomes, of weight zero."""
    batch = site.fn.batch_shape
    log_weights = hard.new_tensor([0.0, -math.inf]).reshape(2, *(1,) * len(batch)).expand(2, *batch)
    return Slots(torch.stack([hard, soft]), log_weights, memo=memo)


def in_first_slot(surrogate: Tensor, cost: Tensor) -> Tensor:
    """In the shape of the cost: the surrogate, and zeros in all slots but one."""
    return torch.cat([surrogate.reshape(cost[:1].shape), torch.zeros_like(cost[1:])])


def derivative(cost: Tensor, at: Tensor, create_graph: bool = False) -> Tensor:
    """That of each element's cost; the graph stays, which the model's own gradient shares."""
    (slope,) = torch.autograd.grad(
        cost.sum(), at, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return slope


def norm_loss(view: OneHotView, gradient: Tensor, estimator: Estimator) -> Tensor | float:
    r"""
    A loss whose gradient is that of :math:`\lVert g \rVert^2` by what the estimator learns, and by nothing else. As g,
    the gradient by the logits, is unbiased, the mean of that is the gradient of its variance.
    """
    learnt = [parameter for parameter in estimator.parameters() if parameter.requires_grad]
    if not learnt:
        return 0.0
    norm = view.sum_elements(gradient.square()).mean()
    gradients = torch.autograd.grad(norm, learnt, retain_graph=True, allow_unused=True, materialize_grads=True)
    return sum((p * g).sum() for p, g in zip(learnt, gradients, strict=True))
