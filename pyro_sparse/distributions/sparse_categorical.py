"""A categorical distribution over integers whose probabilities may be exactly zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Size, Tensor

from pyro_sparse._numerics import safe_log
from pyro_sparse.distributions.sparse_support import SparseDistribution
from pyro_sparse.projections import sparsemax

Projection = Callable[[Tensor], Tensor]


class SparseCategorical(SparseDistribution):
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
        validate_args: as in torch; checks the probabilities (:math:`|\sum_k p_k - 1| \le 8 K \epsilon`).

    Raises:
        ValueError: for both or neither of scores and probs; scores of an integer dtype, with NaN, +inf, a row of
            -inf only or no outcomes; a projection that changes the shape or leaves the simplex.

    Reference: A. Martins and R. Astudillo, *From softmax to sparsemax*, ICML 2016, §2; G. Correia et al., *Efficient
    marginalization of discrete and structured latent variables via sparsity*, NeurIPS 2020, §3.
    """

    arg_constraints = {"scores": constraints.real_vector, "probs": constraints.simplex}

    def __init__(
        self,
        scores: Tensor | None = None,
        projection: Projection = sparsemax,
        *,
        probs: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if (scores is None) == (probs is None):
            given = "neither" if scores is None else "both"
            raise ValueError(f"{type(self).__name__}: expected either scores or probs, got {given}. Give exactly one.")
        name = "probs" if scores is None else "scores"
        self._source = self._checked_source(name, probs if scores is None else scores)
        self.projection: Projection | None = projection if probs is None else None
        self._rows = self._project()  # (*rows, K): never expanded, broadcasts against batch_shape
        super().__init__(self._rows.shape[:-1], Size(), validate_args=False)
        self._validate_args = type(self)._validate_args if validate_args is None else validate_args
        if self._validate_args:
            self._check_probs(name)

    def _checked_source(self, name: str, source: Any) -> Tensor:
        here = f"{type(self).__name__}.{name}"
        if not isinstance(source, Tensor) or not source.is_floating_point():
            got = source.dtype if isinstance(source, Tensor) else type(source).__name__
            raise ValueError(f"{here}: expected a floating-point tensor, got {got}. Convert it, e.g. by .float().")
        if source.dim() < 1 or source.shape[-1] < 1:
            raise ValueError(
                f"{here}: expected shape (*batch, K) with K >= 1, got {tuple(source.shape)}. "
                "The last dim holds the outcomes."
            )
        return source

    def _project(self) -> Tensor:
        if self.projection is None:
            return self._source
        probs = self.projection(self._source)
        if probs.shape != self._source.shape:
            raise ValueError(
                f"{type(self).__name__}.projection: expected shape {tuple(self._source.shape)}, "
                f"got {tuple(probs.shape)}. A projection keeps the shape of its scores."
            )
        return probs

    def _check_probs(self, name: str) -> None:
        p, here = self._rows.detach(), type(self).__name__
        off = (p.sum(-1) - 1).abs()
        if bool(((p.amin(-1) >= 0) & (off <= 8 * p.shape[-1] * torch.finfo(p.dtype).eps)).all()):
            return
        if name == "scores":
            scores = self._source.detach()
            if bool((scores.isnan() | (scores == math.inf)).any()):
                raise ValueError(f"{here}.scores: expected finite scores or -inf, got NaN or +inf. Check the encoder.")
            if bool((scores == -math.inf).all(-1).any()):
                raise ValueError(
                    f"{here}.scores: expected a score above -inf in every row, got a row of -inf only. "
                    "A mask must leave at least one outcome."
                )
            name = "projection"
        raise ValueError(
            f"{here}.{name}: expected non-negative rows that sum to one, got minimum {p.min():.3g} and a sum off by "
            f"up to {off.max():.3g}. Project the scores, or normalise the probabilities."
        )

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self._rows.shape[-1] - 1)

    @property
    def scores(self) -> Tensor | None:
        """The scores, expanded to ``batch_shape + (K,)``; None where the distribution was built from ``probs``."""
        return None if self.projection is None else self._source.expand(self.param_shape)

    @property
    def probs(self) -> Tensor:
        """The probabilities with exact zeros, shape ``batch_shape + (K,)``."""
        return self._rows.expand(self.param_shape)

    @property
    def logits(self) -> Tensor:
        """Log-probabilities, -inf where the probability is zero (with gradient zero there)."""
        return safe_log(self._rows).expand(self.param_shape)

    @property
    def param_shape(self) -> Size:
        """``batch_shape + (K,)``."""
        return self._batch_shape + self._rows.shape[-1:]

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> SparseCategorical:
        """A view with a larger batch shape; the projection is not called again."""
        new = self._get_checked_instance(SparseCategorical, _instance)
        batch_shape = self.probs.expand(*batch_shape, -1).shape[:-1]  # raises where the shapes do not fit
        new._source, new.projection, new._rows = self._source, self.projection, self._rows
        super(SparseCategorical, new).__init__(batch_shape, Size(), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        shape = self._extended_shape(Size(sample_shape))
        rows = self.probs.detach().reshape(-1, self._rows.shape[-1])
        draws = torch.multinomial(rows, Size(sample_shape).numel(), replacement=True)
        return draws.T.reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        K, rows = self._rows.shape[-1], self._rows.shape[:-1]
        if self._validate_args:
            self._validate_sample(value)
        # One flat gather: memory O(value), where broadcasting log-probs against value would take K times as much.
        offset = torch.arange(0, rows.numel() * K, K, device=self._rows.device).reshape(rows)
        index = (offset + value.long()).expand(torch.broadcast_shapes(value.shape, self._batch_shape))
        return safe_log(self._rows.reshape(-1).index_select(0, index.reshape(-1))).reshape(index.shape)

    def entropy(self) -> Tensor:
        r""":math:`-\sum_k p_k \log p_k` in nats, with :math:`0 \log 0 = 0`."""
        p = self._rows
        return -(p * safe_log(p, at_zero=0.0)).sum(-1).expand(self._batch_shape)

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
        values = torch.arange(self._rows.shape[-1], device=self._rows.device)
        values = values.reshape((-1, *(1,) * len(self._batch_shape)))
        return values.expand((-1, *self._batch_shape)) if expand else values

    @property
    def num_outcomes(self) -> int:
        return self.param_shape[-1]

    @property
    def support_size(self) -> Tensor:
        return _count_positive(self._rows).expand(self._batch_shape)

    def support_values(self, union_dims: Sequence[int] = ()) -> Tensor:
        rows = self._rows.detach()
        rows = rows.reshape((1,) * (len(self._batch_shape) + 1 - rows.dim()) + rows.shape)
        if union_dims:
            rows = rows.amax([dim - 1 for dim in union_dims], keepdim=True)
        sizes = _count_positive(rows)
        longest = int(sizes.max()) if sizes.numel() else 1
        # topk lists the support first and then zeros, each outcome once: the padding is distinct by construction.
        return rows.topk(longest, dim=-1).indices.movedim(-1, 0)

    def to_dense(self) -> dist.Categorical:
        """The stock distribution with the same probabilities (logits of -inf where they are zero)."""
        return dist.Categorical(logits=self.logits, validate_args=self._validate_args)

    def __getstate__(self) -> dict[str, Any]:
        # The projected rows are rebuilt, so that a copy is connected to its own scores and to its own learnable alpha.
        return {k: v for k, v in self.__dict__.items() if k != "_rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = self._project()

    def __repr__(self) -> str:
        if self.projection is None:
            return f"{type(self).__name__}(probs: {tuple(self.param_shape)})"
        name = getattr(self.projection, "__name__", repr(self.projection))
        return f"{type(self).__name__}(scores: {tuple(self.param_shape)}, projection={name})"


def _count_positive(rows: Tensor) -> Tensor:
    # Summing signs is three to five times faster than summing a boolean mask; exact, in float32 to 2**24 outcomes.
    return rows.detach().sign().sum(-1, dtype=torch.promote_types(rows.dtype, torch.float32)).long()
