"""The one-hot form of :class:`SparseCategorical`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
from pyro.distributions import constraints
from torch import Size, Tensor
from torch.nn.functional import one_hot

from pyro_sparse.distributions.sparse_categorical import Projection, SparseCategorical
from pyro_sparse.distributions.sparse_support import SparseDistribution
from pyro_sparse.projections import sparsemax


class SparseOneHotCategorical(SparseDistribution):
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
        validate_args: as in torch.

    Raises:
        ValueError: as :class:`SparseCategorical`.
    """

    arg_constraints = {"scores": constraints.real_vector, "probs": constraints.simplex}
    support = constraints.one_hot

    def __init__(
        self,
        scores: Tensor | None = None,
        projection: Projection = sparsemax,
        *,
        probs: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self._wrap(SparseCategorical(scores, projection, probs=probs, validate_args=validate_args))

    def _wrap(self, categorical: SparseCategorical) -> None:
        self._categorical = categorical
        super().__init__(categorical.batch_shape, categorical.param_shape[-1:], validate_args=False)
        self._validate_args = categorical._validate_args

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> SparseOneHotCategorical:
        """A view with a larger batch shape; the projection is not called again."""
        new: SparseOneHotCategorical = self._get_checked_instance(SparseOneHotCategorical, _instance)
        new._wrap(self._categorical.expand(batch_shape))
        return new

    @classmethod
    def infer_shapes(cls, **arg_shapes: Size) -> tuple[Size, Size]:
        """Batch and event shape from the shape of ``scores`` or ``probs``."""
        (shape,) = arg_shapes.values()
        return Size(shape[:-1]), Size(shape[-1:])

    @property
    def projection(self) -> Projection | None:
        """The projection; None where the distribution was built from ``probs``."""
        return self._categorical.projection

    @property
    def scores(self) -> Tensor | None:
        """The scores, expanded to ``batch_shape + (K,)``; None where the distribution was built from ``probs``."""
        return self._categorical.scores

    @property
    def probs(self) -> Tensor:
        """The probabilities with exact zeros, shape ``batch_shape + (K,)``."""
        return self._categorical.probs

    @property
    def logits(self) -> Tensor:
        """Log-probabilities, -inf where the probability is zero (with gradient zero there)."""
        return self._categorical.logits

    @property
    def param_shape(self) -> Size:
        """``batch_shape + (K,)``."""
        return self._categorical.param_shape

    def _one_hot(self, index: Tensor) -> Tensor:
        return one_hot(index, self.event_shape[0]).to(self.probs.dtype)

    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        return self._one_hot(self._categorical.sample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self._categorical.log_prob(value.argmax(-1))

    def entropy(self) -> Tensor:
        r""":math:`-\sum_k p_k \log p_k` in nats, with :math:`0 \log 0 = 0`."""
        return self._categorical.entropy()

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
        return self._one_hot(self._categorical.mode)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All K unit vectors, shape ``(K,) + batch_shape + (K,)``; size one for the batch if not ``expand``."""
        values = self._one_hot(self._categorical.enumerate_support(expand=False))
        return values.expand(values.shape[:1] + self.batch_shape + self.event_shape) if expand else values

    @property
    def num_outcomes(self) -> int:
        return self.param_shape[-1]

    @property
    def support_size(self) -> Tensor:
        return self._categorical.support_size

    def support_values(self, union_dims: Sequence[int] = ()) -> Tensor:
        return self._one_hot(self._categorical.support_values(union_dims))

    def to_dense(self) -> dist.OneHotCategorical:
        """The stock distribution with the same probabilities (logits of -inf where they are zero)."""
        return dist.OneHotCategorical(logits=self.logits, validate_args=self._validate_args)

    def __repr__(self) -> str:
        return repr(self._categorical).replace("SparseCategorical", type(self).__name__, 1)
