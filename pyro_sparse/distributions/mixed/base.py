"""What every mixed variable has in common, on [0, 1] or on the simplex: how it is drawn, expanded and wrapped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor

from pyro_sparse._precision import widened
from pyro_sparse.distributions.checks import check_expand
from pyro_sparse.distributions.half_precision import HalfPrecision
from pyro_sparse.distributions.mixed.wrappers import IndependentMixed, MaskedMixed


class UnknownDivergence(TypeError):
    """
    A KL divergence between mixed variables that exists and has no formula. Not ``NotImplementedError``, which
    ``TraceMeanField_ELBO`` takes for leave to draw it, pathwise and biased.
    """


class MixedBase(HalfPrecision, TorchDistribution):
    """
    A distribution with probability on sets of measure zero, and a density on what lies between: its log-density jumps,
    so that its draws are not reparameterised, or only in part.

    A family implements :meth:`_draw`; where a draw can be purely pathwise, :meth:`_pathwise`; and where it is pathwise
    beside a score function, :meth:`_stratified`.
    """

    has_rsample = False
    #: parameters that `expand` expands
    _tensors: ClassVar[tuple[str, ...]] = ()

    def __init__(self, batch_shape: Size, event_shape: Size, validate_args: bool | None) -> None:
        # Not torch's validation, which knows no parameter that is a number: a family checks its own.
        super().__init__(batch_shape, event_shape, validate_args=False)
        self._validate_args = type(self)._validate_args if validate_args is None else validate_args

    def _draw(self, shape: Size) -> Tensor:
        """A draw of this full shape, without gradient."""
        raise NotImplementedError

    def _pathwise(self, z: Tensor) -> Tensor:
        """A draw with the gradient of the quantile function, atoms staying where they are."""
        raise NotImplementedError

    def _stratified(self, shape: Size) -> Tensor:
        """A draw of this full shape with the gradient that ``score_parts`` leaves to it: none."""
        return self._undifferentiated(shape)

    def _undifferentiated(self, shape: Size) -> Tensor:
        with torch.no_grad():
            return self._draw(shape).detach()  # torch.jit.trace does not record no_grad

    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        return self._undifferentiated(self._extended_shape(Size(sample_shape)))

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """A purely pathwise draw, whatever ``has_rsample`` says; see the class for when it is right."""
        return self._pathwise(self.sample(sample_shape))

    def __call__(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """What ``pyro.sample`` draws: pathwise in full or inside the stratum, by ``has_rsample``."""
        return (
            self.rsample(sample_shape)
            if self.has_rsample
            else self._stratified(self._extended_shape(Size(sample_shape)))
        )

    def has_rsample_(self, value: bool) -> Any:
        """Chooses, in place, the purely pathwise draw (True) or the one for ``score_parts`` (False)."""
        if value is not True and value is not False:
            raise ValueError(f"{type(self).__name__}.has_rsample_: expected True or False, got {value!r}. Give a bool.")
        self.has_rsample = value
        return self

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        """A view with a larger batch shape; flags are kept."""
        batch_shape = check_expand(type(self).__name__, self._batch_shape, batch_shape)
        new: MixedBase = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        for name in self._tensors:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(new, name, value.expand(batch_shape + self._event_of(name)))
        new._batch_shape = batch_shape
        return new

    @property
    def dtype(self) -> torch.dtype:
        tensor: Tensor = getattr(self, self._tensors[0])
        return tensor.dtype

    def widened(self) -> Any:
        new: MixedBase = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        for name in self._tensors:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(new, name, widened(value))
        return new

    def _event_of(self, name: str) -> Size:
        """The dims of a parameter to the right of the batch's."""
        return self._event_shape

    def mask(self, mask: bool | Tensor) -> Any:
        """The distribution whose log_prob is zero where ``mask`` is False, with the same draws and score parts."""
        return MaskedMixed.of(self, mask)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """The rightmost batch dims become event dims, with the same draws and score parts."""
        return IndependentMixed.of(self, reinterpreted_batch_ndims)
