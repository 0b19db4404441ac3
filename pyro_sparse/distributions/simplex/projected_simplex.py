"""Extrinsic distributions on the simplex: a dense sample is projected onto it, and where it lands decides the face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor

from pyro_sparse.distributions.checks import check_compositions, num_vertices, on_simplex_only
from pyro_sparse.distributions.constraints import mixed_simplex, rounded_composition, widened_composition
from pyro_sparse.distributions.mixed.base import MixedBase
from pyro_sparse.projections import sparsemax


class ProjectedSimplex(MixedBase):
    """
    The sparsemax of a dense variable. A family implements :meth:`_dense` and :meth:`_log_density`.

    A draw has no gradient by default, so that a site has the plain score-function gradient; ``rsample`` differentiates
    through the projection.
    """

    support = mixed_simplex
    _widened_value = staticmethod(widened_composition)
    _rounded = staticmethod(rounded_composition)

    def __init__(self, shape: Size, validate_args: bool | None) -> None:
        """``shape`` is that of a draw, the vertices last."""
        num_vertices(type(self).__name__, shape)
        super().__init__(shape[:-1], shape[-1:], validate_args)

    def _dense(self, shape: Size) -> Tensor:
        """What is projected, a draw of this full shape, differentiable in the parameters."""
        raise NotImplementedError

    def _log_density(self, y: Tensor) -> Tensor:
        """The log-density of points on the simplex."""
        raise NotImplementedError

    def _draw(self, shape: Size) -> Tensor:
        return sparsemax(self._dense(shape))

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """A purely pathwise draw, whatever ``has_rsample`` says; see the class for when it is right."""
        return self._draw(self._extended_shape(Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """
        The log-density on the face of the value, -inf outside of the simplex (with validation: an error).

        Args:
            value: floating-point, ``(*batch, K)`` or what broadcasts with it. Exact zeros say which face it is on.
        """
        if self._validate_args:
            check_compositions(type(self).__name__, value, self._event_shape[0])
            log_prob = self._log_density(value)
        else:
            ok = self.support.check(value)
            log_prob = self._log_density(torch.where(ok.unsqueeze(-1), value, 1 / value.shape[-1]))
            log_prob = on_simplex_only(log_prob, value, ok)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self._batch_shape))

    def _unknown(self, name: str, instead: str) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__}.{name}: expected a closed form, got none: it is a sum over all faces of integrals. "
            f"Average {instead} over draws."
        )

    def entropy(self) -> Tensor:
        """Not known: raises ``NotImplementedError``."""
        raise self._unknown("entropy", "-log_prob")

    @property
    def mean(self) -> Any:
        """Not known: raises ``NotImplementedError``."""
        raise self._unknown("mean", "the draws")

    @property
    def variance(self) -> Any:
        """Not known: raises ``NotImplementedError``."""
        raise self._unknown("variance", "squared deviations")
