"""Masked and multivariate forms of mixed distributions: they forward draws and score parts, which stock ones lose."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import is_identically_zero, scale_and_mask, sum_rightmost
from torch import Size, Tensor


class Forwarding:
    """A wrapper around a mixed distribution: its base draws, and knows which way."""

    base_dist: Any
    batch_shape: Size

    def __call__(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        return self.base_dist(Size(sample_shape))

    @property
    def has_rsample(self) -> bool:
        return bool(self.base_dist.has_rsample)

    @has_rsample.setter
    def has_rsample(self, value: bool) -> None:
        self.base_dist = copy.copy(self.base_dist).has_rsample_(value)

    def has_rsample_(self, value: bool) -> Any:
        """As the base's; in place, but not on the distribution that was wrapped."""
        self.has_rsample = value
        return self

    def mask(self, mask: bool | Tensor) -> Any:
        return MaskedMixed.of(self, mask)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        return IndependentMixed.of(self, reinterpreted_batch_ndims)


class MaskedMixed(Forwarding, MaskedDistribution):
    """:class:`~pyro.distributions.MaskedDistribution` of a mixed distribution; draws are those of the base."""

    @classmethod
    def of(cls, base: Any, mask: bool | Tensor) -> Any:
        """The masked form; that of ``True``, which masks nothing, is a copy of the base."""
        return copy.copy(base) if mask is True else cls(base, mask)

    def score_parts(self, value: Tensor) -> ScoreParts:
        """As stock with a tensor: log_prob and entropy term are masked, the score function is not."""
        return self.base_dist.score_parts(value).scale_and_mask(mask=self._mask)

    @property
    def mode(self) -> Tensor:
        return self.base_dist.mode

    def entropy(self) -> Tensor:
        """The entropy of the base, zero where the mask is False."""
        return scale_and_mask(self.base_dist.entropy(), mask=self._mask)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_dist})"


class IndependentMixed(Forwarding, Independent):  # type: ignore[override]  # torch's own has a property there
    """:class:`~pyro.distributions.Independent` of a mixed distribution; draws are those of the base."""

    @classmethod
    def of(cls, base: Any, reinterpreted_batch_ndims: int | None) -> Any:
        ndims = len(base.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        while isinstance(base, IndependentMixed):
            ndims += base.reinterpreted_batch_ndims
            base = base.base_dist
        if ndims < 0:
            raise ValueError(
                f"to_event: expected as many event dims as {base} has at least, got {ndims} after removal. "
                "Remove fewer dims."
            )
        return cls(base, ndims) if ndims else base

    def score_parts(self, value: Tensor) -> ScoreParts:
        n = self.reinterpreted_batch_ndims
        parts = self.base_dist.score_parts(value)
        return ScoreParts(*(part if is_identically_zero(part) else sum_rightmost(part, n) for part in parts))
