"""The base of the sparse families: probabilities over K outcomes, made from scores by a projection."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from torch import Size, Tensor

from pyro_sparse._autograd import is_tracing, is_true, unwrapped
from pyro_sparse._numerics import safe_log
from pyro_sparse._precision import categorical, unrounded
from pyro_sparse._relaxation import one_hot_at_max
from pyro_sparse.distributions.discrete.sparse_support import SparseDistribution
from pyro_sparse.projections import sparsemax

Projection = Callable[[Tensor], Tensor]


class ProjectedDistribution(SparseDistribution):
    r"""
    .. math:: \Pr(Z = z_k) = p_k, \qquad p = \mathrm{projection}(\mathrm{scores}) \in \Delta^{K-1}.

    A family says what its K values :math:`z_k` are; number k stands for :math:`z_k` in the methods here.

    Args:
        scores: unnormalised real scores, shape ``(*batch, K)``; -inf masks an outcome.
        projection: maps scores to the simplex along the last dim.
        probs: instead of scores: probabilities whose zeros are kept as they are.
        logits: instead of scores: log-probabilities up to a constant, as of stock distributions, which Pyro rebuilds so
            (``compute_marginals``); -inf is an exact zero.
        validate_args: as in torch; checks the probabilities (:math:`|\sum_k p_k - 1| \le 8 K \epsilon`).
    """

    arg_constraints = {
        "scores": constraints.real_vector,
        "probs": constraints.simplex,
        "logits": constraints.real_vector,
    }
    #: 0 where a value is a number, 1 where it is a vector of length K
    _value_dim: ClassVar[int] = 0
    #: of probabilities in place of scores, in this process
    _has_warned: ClassVar[bool] = False

    def __init__(
        self,
        scores: Tensor | None = None,
        projection: Projection = sparsemax,
        *,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        given = {n: x for n, x in (("scores", scores), ("probs", probs), ("logits", logits)) if x is not None}
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValueError(f"{type(self).__name__}: expected scores, probs or logits, got {got}. Give exactly one.")
        ((name, source),) = given.items()
        self._source = self._checked_source(name, source)
        self.projection: Projection | None = {"scores": projection, "probs": None, "logits": _softmax}[name]
        self._rows = self._project()  # (*rows, K): never expanded, broadcasts against batch_shape
        event_shape = self._rows.shape[-1:] if self._value_dim else Size()
        super().__init__(self._rows.shape[:-1], event_shape, validate_args=False)
        self._validate_args = type(self)._validate_args if validate_args is None else validate_args
        if self._validate_args:
            self._check_probs(name)
            if name == "scores" and not ProjectedDistribution._has_warned:
                self._warn_of_probabilities()

    def _checked_source(self, name: str, source: Any) -> Tensor:
        here = f"{type(self).__name__}.{name}"
        if not isinstance(source, Tensor) or not source.is_floating_point():
            got = source.dtype if isinstance(source, Tensor) else type(source).__name__
            raise TypeError(f"{here}: expected a floating-point tensor, got {got}. Convert it, e.g. by .float().")
        if source.dim() < 1 or source.shape[-1] < 1:
            raise ValueError(
                f"{here}: expected shape (*batch, K) with K >= 1, got {tuple(source.shape)}. "
                "The last dim holds the outcomes."
            )
        # Probabilities that are given are as rounded as they are, and checked as such.
        return source if name == "probs" else unrounded(source)

    def _project(self) -> Tensor:
        if self.projection is None:
            return self._source
        probs = self.projection(self._source)
        if not isinstance(probs, Tensor) or probs.shape != self._source.shape:
            got = tuple(probs.shape) if isinstance(probs, Tensor) else f"a {type(probs).__name__}"
            raise ValueError(
                f"{type(self).__name__}.projection: expected a tensor of shape {tuple(self._source.shape)}, got {got}. "
                "A projection maps scores to probabilities of the same shape."
            )
        return probs

    def _check_probs(self, name: str) -> None:
        p, here = self._rows.detach(), type(self).__name__
        least, off = p.amin(-1), (p.sum(-1) - 1).abs()
        if is_true((least >= 0) & (off <= 8 * p.shape[-1] * torch.finfo(p.dtype).eps)):
            return
        if name != "probs":
            scores = self._source.detach()
            if not is_true(scores < math.inf):
                raise ValueError(f"{here}.{name}: expected finite {name} or -inf, got NaN or +inf. Check the encoder.")
            if not is_true((scores > -math.inf).any(-1)):
                raise ValueError(
                    f"{here}.{name}: expected one above -inf in every row, got a row of -inf only. "
                    "A mask must leave at least one outcome."
                )
            name = "projection"
        raise ValueError(
            f"{here}.{name}: expected non-negative rows that sum to one, got minimum {unwrapped(least).min():.3g} "
            f"and a sum off by up to {unwrapped(off).max():.3g}. Project the scores, or normalise the probabilities."
        )

    def _warn_of_probabilities(self) -> None:
        """Scores that are a softmax's output are so close together that the projection makes no zero of any."""
        p, K = self._source.detach(), self.num_outcomes
        close = (p.sum(-1) - 1).abs() <= 8 * K * torch.finfo(p.dtype).eps
        if (
            K > 1
            and p.numel()
            and not is_tracing()
            and is_true(close & (torch.minimum(p, self._rows.detach()) > 0).all(-1))
        ):
            ProjectedDistribution._has_warned = True
            warnings.warn(
                f"{type(self).__name__}.scores: expected unnormalised scores, got rows that are positive and sum to "
                "one, of which the projection makes no zero. Leave the softmax out, or pass probs=.",
                stacklevel=4,
            )

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

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ProjectedDistribution:
        """A view with a larger batch shape; the projection is not called again."""
        new = self._get_checked_instance(ProjectedDistribution, _instance)
        batch_shape = self.probs.expand(*batch_shape, -1).shape[:-1]  # raises where the shapes do not fit
        new._source, new.projection, new._rows = self._source, self.projection, self._rows
        super(ProjectedDistribution, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def narrowed(self, keep: Tensor) -> ProjectedDistribution:
        new = self.expand(self._batch_shape)
        new._source = new._rows = torch.where(keep.unsqueeze(-1), self.probs, one_hot_at_max(self.probs.detach()))
        new.projection = None
        return new

    @property
    def num_outcomes(self) -> int:
        return self._rows.shape[-1]

    @property
    def support_size(self) -> Tensor:
        return _count_positive(self._rows).expand(self._batch_shape)

    def entropy(self) -> Tensor:
        r""":math:`-\sum_k p_k \log p_k` in nats, with :math:`0 \log 0 = 0`."""
        p = self._rows
        return -(p * safe_log(p, at_zero=0.0)).sum(-1).expand(self._batch_shape)

    def _draw(self, sample_shape: Size) -> Tensor:
        """Numbers of outcomes, shape ``sample_shape + batch_shape``."""
        return categorical(self.probs.detach(), sample_shape)

    def _log_prob_of(self, index: Tensor) -> Tensor:
        """The log-probabilities of outcomes by number: memory O(index), where broadcasting takes K times as much."""
        index = index.expand(torch.broadcast_shapes(index.shape, self._batch_shape))
        dims, rows = range(index.dim()), self._rows.shape[:-1]
        rows = (1,) * (index.dim() - len(rows)) + rows
        # One row of probabilities for each position in `own`; along the dims in `shared` it serves all positions.
        own, shared = [d for d in dims if rows[d] != 1], [d for d in dims if rows[d] == 1]
        order = own + shared
        moved = index.permute(order)
        flat = moved.reshape(math.prod(self._rows.shape[:-1]), math.prod(index.shape[d] for d in shared))
        probs = self._rows.reshape(-1, self.num_outcomes).gather(1, flat).reshape(moved.shape)
        return safe_log(probs.permute([order.index(d) for d in dims]))

    def _support_of(self, union_dims: Sequence[int]) -> Tensor:
        """:meth:`support_values` by number."""
        rows = self._rows.detach()
        rows = rows.reshape((1,) * (len(self._batch_shape) + 1 - rows.dim()) + rows.shape)
        if union_dims:
            rows = rows.sum([dim - 1 for dim in union_dims], keepdim=True)
        sizes = _count_positive(rows)
        longest = max(int(unwrapped(sizes).max()), 1) if sizes.numel() else 1
        # topk lists the support first and then zeros, each outcome once: the padding is distinct by construction.
        return rows.topk(longest, dim=-1).indices.movedim(-1, 0)

    def __getstate__(self) -> dict[str, Any]:
        # The projected rows are rebuilt, so that a copy is connected to its own scores and to its own learnable alpha.
        return {k: v for k, v in self.__dict__.items() if k != "_rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = self._project()

    def __repr__(self) -> str:
        if self.projection is None:
            return f"{type(self).__name__}(probs: {tuple(self.param_shape)})"
        if self.projection is _softmax:
            return f"{type(self).__name__}(logits: {tuple(self.param_shape)})"
        return f"{type(self).__name__}(scores: {tuple(self.param_shape)}, projection={_describe(self.projection)})"


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _count_positive(rows: Tensor) -> Tensor:
    # Summing signs is three to five times faster than summing a boolean mask; exact, in float32 to 2**24 outcomes.
    return rows.detach().sign().sum(-1, dtype=torch.promote_types(rows.dtype, torch.float32)).long()


def _describe(projection: Projection) -> str:
    if isinstance(projection, functools.partial):
        options = [*map(repr, projection.args), *(f"{k}={v!r}" for k, v in projection.keywords.items())]
        return f"{_describe(projection.func)}({', '.join(options)})"
    return getattr(projection, "__name__", repr(projection)).strip("_")
