"""Distributions on one face of the simplex, the base of families that have one on each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor

from pyro_sparse._numerics import as_like, safe_log
from pyro_sparse._precision import widened
from pyro_sparse.distributions.checks import aligned, check_compositions, check_expand, checked, num_vertices
from pyro_sparse.distributions.constraints import mixed_simplex, nan_where, rounded_composition, widened_composition
from pyro_sparse.distributions.half_precision import HalfPrecision
from pyro_sparse.distributions.simplex.face_expectations import OneFace, Sums


class WithinFace(HalfPrecision, TorchDistribution):
    """
    A distribution on the relative interior of a face, the whole simplex by default.

    A family has parameters for all K vertices; :meth:`on` says which of them take part, and the others become 1. It
    implements :meth:`_log_weights`, the logarithms of unnormalised positive coordinates, :meth:`_log_density`, and its
    entropy and mean by sums over the vertices of a face, known or random.
    """

    has_rsample = True
    support = mixed_simplex
    _widened_value = staticmethod(widened_composition)
    _rounded = staticmethod(rounded_composition)
    #: the parameters, each ``(*batch, K)``
    _tensors: ClassVar[tuple[str, ...]] = ()
    #: the vertices of the face, as bits; None for all
    face: Tensor | None

    def __init__(self, face: Tensor | None, validate_args: bool | None, **parameters: Any) -> None:
        name = type(self).__name__
        parameters = dict(zip(parameters, aligned(name, **parameters), strict=True))
        like = next((p for p in parameters.values() if isinstance(p, Tensor)), None)
        if like is None:
            raise TypeError(
                f"{name}: expected a floating-point tensor of K parameters, got numbers. Say torch.ones(K)."
            )
        tensors = {key: as_like(p, like) for key, p in parameters.items()}
        shapes = {key: p.shape for key, p in tensors.items()} | ({} if face is None else {"face": face.shape})
        try:
            shape = torch.broadcast_shapes(*shapes.values())
        except RuntimeError as error:
            got = ", ".join(f"{key} {tuple(x)}" for key, x in shapes.items())
            raise ValueError(f"{name}: expected shapes that broadcast, got {got}. Give all the same K.") from error
        num_vertices(name, shape)
        face = None if face is None else face.expand(shape)
        self.face = face
        for key, p in tensors.items():
            p = p.expand(shape)
            # Off the face they do not matter: where nothing holds them there, their derivatives may overflow.
            setattr(self, key, p if face is None else torch.where(face > 0, p, 1.0))
        super().__init__(shape[:-1], shape[-1:], validate_args=False)
        self._validate_args = type(self)._validate_args if validate_args is None else validate_args
        if self._validate_args:
            self._check_parameters()
            if face is not None:
                self._check_face(face)

    def _check_face(self, face: Tensor) -> None:
        bits = ((face == 0) | (face == 1)) & (face > 0).any(-1, keepdim=True)
        checked(type(self).__name__, "face", face, bits, "bits, some of them one in each row", "Use GibbsFaces.")

    def _check_parameters(self) -> None:
        raise NotImplementedError

    def on(self, face: Tensor) -> Any:
        """The distribution of this family on a face: bits ``(*batch, K)``, at least one of them in each row."""
        if self.face is not None:
            raise ValueError(
                f"{type(self).__name__}.on: expected a family on the whole simplex, got one on a face, whose other "
                "parameters are gone. Keep the family, and ask it for each face."
            )
        new = self.at(face)
        if self._validate_args:
            new._check_face(new.face)
        return new

    def at(self, face: Tensor) -> Any:
        """As :meth:`on`, for a face that is known to be one."""
        return self._with(face, lambda p: p)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        """A view with a larger batch shape."""
        shape = check_expand(type(self).__name__, self.batch_shape, batch_shape) + self.event_shape
        return self._with(self.face, lambda p: p.expand(shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def widened(self) -> Any:
        return self._with(None if self.face is None else widened(self.face), Tensor.float)

    def double(self) -> Any:
        """The same in float64."""
        return self if self.like.dtype == torch.float64 else self._with(self.face, Tensor.double)

    def _with(self, face: Tensor | None, change: Callable[[Tensor], Tensor]) -> Any:
        parameters = {name: change(getattr(self, name)) for name in self._tensors}
        new: WithinFace = object.__new__(type(self))
        WithinFace.__init__(new, face, False, **parameters)
        new._validate_args = self._validate_args
        return new

    # On this face.

    def _log_weights(self, shape: Size) -> Tensor:
        """log w of a draw :math:`y_k = w_k / \\sum_j w_j`, of this shape and with pathwise gradient."""
        raise NotImplementedError

    def _log_density(self, log_y: Tensor) -> Tensor:
        """The log-density, where the logarithms of the face's coordinates are these (zero off the face)."""
        raise NotImplementedError

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """
        A draw with the pathwise gradient. A coordinate of the face that underflows is the smallest normal number, so
        that the draw stays on its face; it has no gradient then.
        """
        log_w = self._log_weights(self._extended_shape(Size(sample_shape)))
        if self.face is not None:
            log_w = log_w.masked_fill(self.face == 0, -math.inf)
        y = log_w.softmax(-1)
        tiny = torch.finfo(y.dtype).tiny
        under = y < tiny if self.face is None else (y < tiny) & (self.face > 0)
        return torch.where(under, tiny, y)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density; -inf where the positive coordinates are not those of the face."""
        if self._validate_args:
            check_compositions(type(self).__name__, value, self._event_shape[0])
        return nan_where(value.isnan().any(-1), self.log_density(value))

    def log_density(self, value: Tensor) -> Tensor:
        """As :meth:`log_prob`, of what is known to be on the simplex."""
        positive = value > 0
        right = positive.all(-1) if self.face is None else (positive == (self.face > 0)).all(-1)
        log_prob = self._log_density(safe_log(torch.where(positive, value, 0.0), at_zero=0.0))
        return torch.where(right, log_prob, -math.inf)

    # On this face, or over a distribution of faces.

    @property
    def here(self) -> OneFace:
        """Sums over the vertices of the face."""
        return OneFace(self.like.new_ones(self.event_shape) if self.face is None else self.face)

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device of values."""
        tensor: Tensor = getattr(self, self._tensors[0])
        return tensor

    def entropy_over(self, sums: Sums) -> Tensor:
        """The entropy on a known face, or on average over a random one, ``batch_shape``."""
        raise NotImplementedError

    def mean_over(self, sums: Sums) -> Tensor:
        """The mean on a known face, or on average over a random one, ``(*batch, K)``."""
        raise NotImplementedError

    def entropy(self) -> Tensor:
        """On the face, in nats; zero at a vertex."""
        entropy: Tensor = self.double().entropy_over(self.here)  # its terms cancel
        return entropy.to(self.like.dtype)

    @property
    def mean(self) -> Tensor:
        return self.mean_over(self.here)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(getattr(self, name).shape)}" for name in self._tensors)
        return f"{type(self).__name__}({shapes}{'' if self.face is None else ', face'})"
