"""The one-hot form of :class:`~pyro_sparse.distributions.SparseCategorical`."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Size, Tensor

from pyro_sparse.distributions.constraints import nan_where
from pyro_sparse.distributions.discrete.projected import ProjectedDistribution


class SparseOneHotCategorical(ProjectedDistribution):
    r"""
    .. math:: \Pr(Z = e_k) = p_k, \qquad p = \mathrm{projection}(\mathrm{scores}) \in \Delta^{K-1},

    :class:`SparseCategorical` over the K unit vectors :math:`e_k`, so that its mean is :math:`p`.

    **Base measure:** counting on :math:`\{e_1, \dots, e_K\}`; **rsample:** no; **enumerable:** densely and sparsely.

    ========== ======================== ==============
    shape      ``scores`` or ``probs``  a value
    ========== ======================== ==============
    batch      ``(*batch, K)``          ``(*batch, K)``
    event                               ``(K,)``
    ========== ======================== ==============

    >>> d = SparseOneHotCategorical(torch.tensor([1.0, 0.4, -2.0]))
    >>> d.sparse_support()[0].tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]

    Args:
        scores: unnormalised real scores, shape ``(*batch, K)``; -inf masks an outcome.
        projection: maps scores to the simplex along the last dim.
        probs: instead of scores: probabilities whose zeros are kept as they are.
        logits: instead of scores: log-probabilities up to a constant; -inf is an exact zero. So is, silently, a finite
            one whose probability underflows: in float32 about 100 below the largest.
        validate_args: as in torch.

    Raises:
        TypeError, ValueError: as :class:`SparseCategorical`.
    """

    support = constraints.one_hot
    _value_dim = 1

    @classmethod
    def infer_shapes(cls, **arg_shapes: Size) -> tuple[Size, Size]:
        """Batch and event shape from the shape of ``scores`` or ``probs``."""
        (shape,) = arg_shapes.values()
        return Size(shape[:-1]), Size(shape[-1:])

    def _one_hot(self, index: Tensor) -> Tensor:
        # torch's one_hot looks at its argument, which vmap does not allow.
        zeros = self._rows.new_zeros((*index.shape, self.num_outcomes))
        return zeros.scatter(-1, index.unsqueeze(-1), 1.0)

    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        return self._one_hot(self._draw(Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return nan_where(value.isnan().any(-1), self._log_prob_of(value.argmax(-1)))

    @property
    def mean(self) -> Tensor:
        """The probabilities, shape ``batch_shape + (K,)``."""
        return self.probs

    @property
    def variance(self) -> Tensor:
        r"""Elementwise :math:`p_k (1 - p_k)`, shape ``batch_shape + (K,)``."""
        return self.probs * (1 - self.probs)

    @property
    def mode(self) -> Tensor:
        return self._one_hot(self.probs.argmax(-1))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All K unit vectors, shape ``(K,) + batch_shape + (K,)``; size one for the batch if not ``expand``."""
        K = self.num_outcomes
        values = torch.eye(K, dtype=self._rows.dtype, device=self._rows.device)
        values = values.reshape((K, *(1,) * len(self._batch_shape), K))
        return values.expand((K, *self._batch_shape, K)) if expand else values

    def support_values(self, union_dims: Sequence[int] = ()) -> Tensor:
        return self._one_hot(self._support_of(union_dims))

    def to_dense(self) -> dist.OneHotCategorical:
        """The stock distribution with the same probabilities (logits of -inf where they are zero)."""
        return dist.OneHotCategorical(logits=self.logits, validate_args=self._validate_args)
