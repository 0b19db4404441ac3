r"""Points of the simplex with exact zeros: first a random face, then a point inside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Size, Tensor

from pyro_sparse.distributions.checks import check_compositions, on_simplex_only
from pyro_sparse.distributions.constraints import mixed_simplex, rounded_composition, widened_composition
from pyro_sparse.distributions.half_precision import in_float32
from pyro_sparse.distributions.mixed.base import MixedBase
from pyro_sparse.distributions.simplex.face_dirichlet import FaceDirichlet
from pyro_sparse.distributions.simplex.face_expectations import RandomFace
from pyro_sparse.distributions.simplex.face_logistic_normal import FaceLogisticNormal
from pyro_sparse.distributions.simplex.faces import FaceDistribution
from pyro_sparse.distributions.simplex.gibbs_faces import GibbsFaces
from pyro_sparse.distributions.simplex.within_face import WithinFace

_NO_RSAMPLE = (
    "expected a variable without a discrete part, got one whose face is discrete: a pathwise gradient alone would "
    "never learn it. Leave has_rsample False, which is right under Trace_ELBO, TraceGraph_ELBO and EstimatorELBO."
)


class MixedSimplex(MixedBase):
    r"""
    .. math:: F \sim P, \qquad Y \mid F = f \sim p(y \mid f), \qquad p(y) = P(f(y))\, p(y \mid f(y)),

    with :math:`f(y)` the vertices at which y is positive. Nothing is drawn and no sum is over faces, at a cost that is
    linear in K (quadratic with ``MaxEntropyFaces``, and for entropy and mean with ``FaceLogisticNormal``):

    .. math:: H(Y) = H(F) + E_F H(Y \mid F), \qquad
        \mathrm{KL}(p \| q) = \mathrm{KL}(P \| Q) + E_{F \sim P} \mathrm{KL}(p(\cdot \mid F) \| q(\cdot \mid F)).

    The face is discrete. So draws are pathwise inside their face, and ``score_parts`` has the score of the face, which
    is unbiased under ``Trace_ELBO``, ``TraceGraph_ELBO`` and ours. :func:`pyro_sparse.sample_mixed` makes two sites of
    it, where the face may be enumerated or served by an estimator of its own.

    **Base measure:** on each face Lebesgue in all its coordinates but one, as torch's Dirichlet; counting at the
    vertices; **rsample:** no; **enumerable:** no.

    ========== ================= ===============
    shape      the parts         a value
    ========== ================= ===============
    batch      broadcast         ``(*batch, K)``
    event      ``(K,)``          ``(K,)``
    ========== ================= ===============

    >>> d = MixedSimplex(GibbsFaces(torch.zeros(3)), FaceDirichlet(torch.ones(3)))
    >>> d.log_prob(torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])).exp()
    tensor([0.1429, 0.1429, 0.2857])
    >>> d.prob_nonzero, d.expected_l0
    (tensor([0.5714, 0.5714, 0.5714]), tensor(1.7143))

    Args:
        faces: of the face: ``GibbsFaces`` or ``MaxEntropyFaces``.
        within: of the point in it: ``FaceDirichlet`` or ``FaceLogisticNormal``, on the whole simplex.
        validate_args: as in torch.

    Raises:
        TypeError: parts of other kinds.
        ValueError: parts with different numbers of vertices.

    Reference: A. Farinhas et al., *Sparse communication via mixed distributions*, ICLR 2022, §4 (the intrinsic
    view).
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = mixed_simplex
    _widened_value = staticmethod(widened_composition)
    _rounded = staticmethod(rounded_composition)

    def __init__(self, faces: FaceDistribution, within: WithinFace, *, validate_args: bool | None = None) -> None:
        check_parts(type(self).__name__, faces, within)
        if not faces.like.dim():  # a number beside the parameters of the points
            faces = faces.to(within.like)
        self.faces, self.within = faces, within
        shape = torch.broadcast_shapes(faces.batch_shape, within.batch_shape)
        super().__init__(shape, faces.event_shape, validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        """A view with a larger batch shape; flags are kept."""
        new = super().expand(batch_shape)
        new.faces, new.within = self.faces.expand(batch_shape), self.within.expand(batch_shape)
        return new

    def widened(self) -> Any:
        new = super().widened()
        new.faces, new.within = in_float32(self.faces), in_float32(self.within)
        return new

    # Draws.

    def _draw(self, shape: Size) -> Tensor:
        return self._stratified(shape)

    def _stratified(self, shape: Size) -> Tensor:
        size = shape[: len(shape) - len(self._batch_shape) - 1]
        faces = self.faces.expand(self._batch_shape).sample(size)
        return self.within.at(faces).rsample()

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__}.rsample: {_NO_RSAMPLE}")

    def has_rsample_(self, value: bool) -> Any:
        if value is True:
            raise ValueError(f"{type(self).__name__}.has_rsample_: {_NO_RSAMPLE}")
        return super().has_rsample_(value)

    # Densities.

    def _parts(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The log-probability of the face of a point, and the log-density there; -inf outside of the simplex."""
        if self._validate_args:
            check_compositions(type(self).__name__, value, self._event_shape[0])
            return self._parts_on_simplex(value)
        ok = self.support.check(value)
        of_face, log_prob = self._parts_on_simplex(torch.where(ok.unsqueeze(-1), value, 1 / value.shape[-1]))
        return of_face, on_simplex_only(log_prob, value, ok)

    def _parts_on_simplex(self, value: Tensor) -> tuple[Tensor, Tensor]:
        face = (value > 0).to(value.dtype)
        of_face = self.faces.log_mass(face).to(self.dtype)
        return of_face, of_face + self.within.at(face).log_density(value)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of the face of a point and the log-density inside it; the point is ``(*batch, K)``."""
        return self._parts(value)[1]

    def score_parts(self, value: Tensor) -> ScoreParts:
        """The log-probability, which is also the entropy term, and that of the face as the score function."""
        of_face, log_prob = self._parts(value)
        return ScoreParts(log_prob, of_face.expand(log_prob.shape), log_prob)

    # Moments.

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters; of the wider ones where the parts differ. A draw has that of ``within``."""
        return torch.result_type(self.faces.like, self.within.like)

    def precise(self) -> tuple[FaceDistribution, WithinFace, RandomFace]:
        """The parts in float64, because their terms cancel, and sums over the random face, good for the dtype."""
        faces = self.faces.double()
        return faces, self.within.double(), RandomFace(faces, self.dtype)

    def entropy(self) -> Tensor:
        """Of face and point together, in nats w.r.t. the base measure; ``self.faces.entropy()`` is the face's own."""
        faces, within, sums = self.precise()
        return (faces.entropy() + within.entropy_over(sums)).to(self.dtype)

    @property
    def mean(self) -> Tensor:
        _, within, sums = self.precise()
        mean: Tensor = within.mean_over(sums)
        return mean.to(self.dtype)

    @property
    def prob_nonzero(self) -> Tensor:
        r""":math:`\Pr(Y_k > 0)`, ``(*batch, K)``."""
        return self.faces.marginals.expand(self._extended_shape())

    @property
    def expected_l0(self) -> Tensor:
        """The expected number of coordinates that are not zero, ``batch_shape``."""
        return self.faces.expected_size.expand(self._batch_shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.faces}, {self.within})"


def check_parts(owner: str, faces: Any, within: Any) -> None:
    """Raises unless these make a mixed variable on the simplex."""
    if not isinstance(faces, FaceDistribution):
        raise TypeError(
            f"{owner}: expected faces that are a distribution over faces, got {faces}. "
            "Use GibbsFaces or MaxEntropyFaces."
        )
    if not isinstance(within, WithinFace) or within.face is not None:
        raise TypeError(
            f"{owner}: expected within to be a family with a distribution on each face, got {within}. "
            "Use FaceDirichlet(concentration) or FaceLogisticNormal(loc, scale), without a face."
        )
    if faces.event_shape != within.event_shape:
        raise ValueError(
            f"{owner}: expected as many vertices in faces and within, got {faces.event_shape[0]} and "
            f"{within.event_shape[0]}. Give both the same K."
        )


class MixedDirichlet(MixedSimplex):
    """
    :class:`MixedSimplex` with faces :class:`GibbsFaces` and within them :class:`FaceDirichlet`.

    Args:
        face_scores: of the vertices, ``(*batch, K)``.
        concentration: positive, ``(*batch, K)``.
        validate_args: as in torch.

    Reference: A. Farinhas et al., *Sparse communication via mixed distributions*, ICLR 2022, §4.2. The published
    code sums over all faces; here entropy, mean and KL divergence are one-dimensional integrals.
    """

    def __init__(self, face_scores: Tensor, concentration: Tensor, *, validate_args: bool | None = None) -> None:
        faces = GibbsFaces(face_scores, validate_args=validate_args)
        within = FaceDirichlet(concentration, validate_args=validate_args)
        super().__init__(faces, within, validate_args=validate_args)


class MixedLogisticNormal(MixedSimplex):
    """
    :class:`MixedSimplex` with faces :class:`GibbsFaces` and within them :class:`FaceLogisticNormal`.

    Args:
        face_scores: of the vertices, ``(*batch, K)``.
        loc: of the logarithms of unnormalised coordinates, ``(*batch, K)``.
        scale: positive, ``(*batch, K)`` or a number.
        validate_args: as in torch.

    Reference: as :class:`MixedDirichlet`.
    """

    def __init__(
        self, face_scores: Tensor, loc: Tensor, scale: Tensor | float, *, validate_args: bool | None = None
    ) -> None:
        faces = GibbsFaces(face_scores, validate_args=validate_args)
        within = FaceLogisticNormal(loc, scale, validate_args=validate_args)
        super().__init__(faces, within, validate_args=validate_args)
