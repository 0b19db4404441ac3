"""A categorical distribution over integers whose probabilities may be exactly zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Size, Tensor

from pyro_sparse.distributions.constraints import nan_where
from pyro_sparse.distributions.discrete.projected import ProjectedDistribution


class SparseCategorical(ProjectedDistribution):
    r"""
    .. math:: \Pr(Z = k) = p_k, \qquad p = \mathrm{projection}(\mathrm{scores}) \in \Delta^{K-1},

    where a sparse projection such as :func:`~pyro_sparse.projections.sparsemax` gives most :math:`p_k = 0` exactly.

    **Base measure:** counting on :math:`\{0, \dots, K-1\}`; **rsample:** no; **enumerable:** densely
    (:meth:`enumerate_support`) and sparsely (:meth:`sparse_support`).

    ========== ======================== =============
    shape      ``scores`` or ``probs``  a value
    ========== ======================== =============
    batch      ``(*batch, K)``          ``(*batch,)``
    event                               ``()``
    ========== ======================== =============

    >>> d = SparseCategorical(torch.tensor([1.0, 0.4, -2.0]))
    >>> [round(p, 6) for p in d.probs.tolist()]
    [0.8, 0.2, 0.0]
    >>> d.support_size.item(), d.sparse_support()[0].tolist()
    (2, [0, 1])

    Args:
        scores: unnormalised real scores, shape ``(*batch, K)``; -inf masks an outcome.
        projection: maps scores to the simplex along the last dim. Give parameters by ``functools.partial``; a lambda
            works but cannot be pickled.
        probs: instead of scores: probabilities whose zeros are kept as they are (never clamped, never renormalised).
        logits: instead of scores: log-probabilities up to a constant; -inf is an exact zero. So is, silently, a finite
            one whose probability underflows: in float32 about 100 below the largest.
        validate_args: as in torch; checks the probabilities (:math:`|\sum_k p_k - 1| \le 8 K \epsilon`).

    Raises:
        TypeError: scores or probs that are no floating-point tensor.
        ValueError: for other than one of scores, probs and logits; scores with NaN, +inf, a row of -inf only or no
            outcomes; a projection that changes the shape or leaves the simplex.

    Reference: A. Martins and R. Astudillo, *From softmax to sparsemax*, ICML 2016, §2; G. Correia et al., *Efficient
    marginalization of discrete and structured latent variables via sparsity*, NeurIPS 2020, §3.
    """

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.num_outcomes - 1)

    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        return self._draw(Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if not value.is_floating_point():
            return self._log_prob_of(value.long())
        nan = value.isnan()
        return nan_where(nan, self._log_prob_of(torch.where(nan, 0.0, value).long()))

    @property
    def mean(self) -> Tensor:
        """NaN: outcomes are labels, not numbers (as in torch)."""
        return self._rows.new_full(self._batch_shape, math.nan)

    @property
    def variance(self) -> Tensor:
        """NaN, as :attr:`mean`."""
        return self.mean

    @property
    def mode(self) -> Tensor:
        return self.probs.argmax(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All K outcomes, shape ``(K,) + batch_shape`` (``expand=False``: ``(K,) + (1,) * len(batch_shape)``)."""
        values = torch.arange(self.num_outcomes, device=self._rows.device)
        values = values.reshape((-1, *(1,) * len(self._batch_shape)))
        return values.expand((-1, *self._batch_shape)) if expand else values

    def support_values(self, union_dims: Sequence[int] = ()) -> Tensor:
        return self._support_of(union_dims)

    def to_dense(self) -> dist.Categorical:
        """The stock distribution with the same probabilities (logits of -inf where they are zero)."""
        return dist.Categorical(logits=self.logits, validate_args=self._validate_args)
