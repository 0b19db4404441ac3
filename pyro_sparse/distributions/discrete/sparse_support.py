"""What it means to have a sparse support, and the masked form that keeps it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import MaskedDistribution, TorchDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_sparse.distributions.checks import refuse_logits


class SparseDistribution(TorchDistribution):
    r"""
    A discrete distribution that knows which of its outcomes carry probability.

    A family implements :meth:`support_values` and :attr:`support_size` beside the methods of any Pyro distribution.
    :meth:`~pyro.distributions.TorchDistribution.enumerate_support` stays dense, so that the same site under stock
    ``TraceEnum_ELBO`` is the exact dense reference. A family whose outcomes nobody can list, such as vectors of 40
    bits, sets ``has_enumerate_support`` to False, and leaves :attr:`num_outcomes` None and :meth:`to_dense` out.
    """

    has_enumerate_support = True
    has_sparse_support = True

    @property
    def num_outcomes(self) -> int | None:
        """K, the number of outcomes of :meth:`enumerate_support`; None where they cannot be listed."""
        if not self.has_enumerate_support:
            return None
        raise self._missing("num_outcomes")

    def _missing(self, name: str) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__}.{name}: expected a family that implements it, got one that does not. A "
            "SparseDistribution needs support_values, support_size and, where it lists its outcomes, num_outcomes."
        )

    @property
    def support_size(self) -> Tensor:
        """The number of outcomes with positive probability; integer, shape ``batch_shape``."""
        raise self._missing("support_size")

    def support_values(self, union_dims: Sequence[int] = ()) -> Tensor:
        r"""
        The outcomes with positive probability, padded with *distinct* outcomes of probability zero.

        Args:
            union_dims: batch dims (negative) along which all rows share one list of outcomes, the union of theirs.
                With all batch dims the values are those that any row of the batch uses.

        Returns:
            Shape ``(S,) + batch_shape + event_shape``, S the length of the longest list; size one along the batch
            dims where values do not vary. Reads S from the device: one host synchronisation, which no layout of
            variable size can avoid.
        """
        raise self._missing("support_values")

    def sparse_support(self, expand: bool = True) -> tuple[Tensor, Tensor]:
        r"""
        The support and its log-probabilities: :meth:`support_values`, and what :meth:`log_prob` says of them.

        Args:
            expand: False leaves at size one the batch dims along which values do not vary.

        Returns:
            ``values`` of shape ``(S,) + batch_shape + event_shape`` and ``log_probs`` of shape ``(S,) + batch_shape``,
            -inf where a value is padding.
        """
        values = self.support_values()
        log_probs = self.log_prob(values)
        return (values.expand(values.shape[:1] + self.batch_shape + self.event_shape) if expand else values), log_probs

    def support_rows(self) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        r"""
        The support without padding: one row for each element of the batch and outcome of positive probability. (The
        ELBOs make their rows of :meth:`support_values`, which is what a family implements.)

        Returns:
            ``index``, for each batch dim the element that each of the N rows belongs to, ``(N,)``; ``values``,
            ``(N,) + event_shape``; ``log_probs``, ``(N,)``. Ordered by element. Reads N from the device.
        """
        values, log_probs = self.sparse_support()
        kept = (log_probs > -math.inf).movedim(0, -1)
        index = kept.nonzero(as_tuple=True)
        slots = (index[-1], *index[:-1])
        return index[:-1], values[slots], log_probs[slots]

    def to_dense(self) -> TorchDistribution:
        """The stock distribution with the same probabilities."""
        raise NotImplementedError(
            f"{type(self).__name__}.to_dense: expected a family with a stock form, got one without. Use its own."
        )

    def narrowed(self, keep: Tensor) -> SparseDistribution:
        """
        With one outcome, the most probable, in the rows where ``keep`` is False: for rows that do not matter. A family
        that does not implement it is left as it is.
        """
        return self

    def mask(self, mask: bool | Tensor) -> MaskedSparseDistribution:
        """The distribution whose log_prob is zero where ``mask`` is False; it keeps its sparse support."""
        return MaskedSparseDistribution(self, mask)


class MaskedSparseDistribution(SparseDistribution, MaskedDistribution):
    """:class:`~pyro.distributions.MaskedDistribution` that forwards the sparse support of its base."""

    expand = MaskedDistribution.expand
    base_dist: SparseDistribution

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        refuse_logits(cls.__name__, kwargs)
        return super().__new__(cls)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        return self.base_dist.has_enumerate_support

    @property
    def mode(self) -> Tensor:
        return self.base_dist.mode

    def entropy(self) -> Tensor:
        """The entropy of the base, zero where the mask is False."""
        entropy = self.base_dist.entropy()
        return torch.zeros_like(entropy) if self._mask is False else scale_and_mask(entropy, mask=self._mask)

    @property
    def num_outcomes(self) -> int | None:
        return self.base_dist.num_outcomes

    @property
    def support_size(self) -> Tensor:
        return self.base_dist.support_size

    def support_values(self, union_dims: Sequence[int] = ()) -> Tensor:
        """The values of the base: masking changes log_prob, not which outcomes exist."""
        return self.base_dist.support_values(union_dims)

    def sparse_support(self, expand: bool = True) -> tuple[Tensor, Tensor]:
        """The sparse support of the base, with its unmasked log-probabilities."""
        return self.base_dist.sparse_support(expand)

    def support_rows(self) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Those of the base, with its unmasked log-probabilities."""
        return self.base_dist.support_rows()

    def narrowed(self, keep: Tensor) -> SparseDistribution:
        base = self.base_dist.narrowed(keep)
        return self if base is self.base_dist else base.mask(self._mask)

    def to_dense(self) -> TorchDistribution:
        return self.base_dist.to_dense().mask(self._mask)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_dist})"
