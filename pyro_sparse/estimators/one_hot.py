"""The variables of a site as one-hot vectors, whatever form their values have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

from pyro_sparse._relaxation import exact_logits
from pyro_sparse.estimators.base import Site, element


@dataclass(frozen=True)
class OneHotView:
    """
    Bits, indices or unit vectors, alone or several under ``to_event``, as one-hot vectors.

    Attributes:
        logits: attached, ``(*batch, *elements, K)``; of a bit, those of one and of zero. In float32 at least.
        elements: how many dims there are between ``batch`` and K.
        base: the distribution of one variable.
    """

    logits: Tensor
    elements: int
    base: Any

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
        value = one_hot[..., 0] if isinstance(self.base, Bernoulli) else one_hot
        return value.to(self.base.logits.dtype)

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
        """A derivative with respect to the site's values as one by one-hot vectors."""
        return torch.stack([x, torch.zeros_like(x)], -1) if isinstance(self.base, Bernoulli) else x

    def gradient(self, weights: Tensor) -> Tensor:
        r""":math:`\sum_k w_k \nabla \log p_k`, with respect to the logits."""
        return weights - self.probs * weights.sum(-1, keepdim=True)

    def surrogate(self, gradient: Tensor) -> Tensor:
        """What has this gradient with respect to the logits, summed over the elements."""
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
    base = element(site.fn)
    if not isinstance(base, (Bernoulli, OneHotCategorical, *([Categorical] if indices else []))):
        kinds = "Bernoulli, OneHotCategorical" + (" or Categorical" if indices else "")
        raise ValueError(
            f"{estimator}, site '{site.name}': expected {kinds}, alone or under to_event, got {site.fn}. {fix}"
        )
    logits = exact_logits(base)
    return OneHotView(logits, logits.dim() - 1 - len(site.fn.batch_shape), base)
