r"""Logistic normal distributions on the faces of the simplex, and their expectations over a random face."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_sparse.distributions.checks import check_finite, check_positive
from pyro_sparse.distributions.simplex.face_expectations import Sums
from pyro_sparse.distributions.simplex.log_normal_expectations import LogNormalSums
from pyro_sparse.distributions.simplex.within_face import WithinFace

_LOG_2PI = math.log(2 * math.pi)


class FaceLogisticNormal(WithinFace):
    r"""
    .. math:: y_k = \frac{e^{x_k}}{\sum_{j \in f} e^{x_j}} \text{ for } k \in f, \quad y_k = 0 \text{ elsewhere}, \qquad
        x_k \sim \mathcal{N}(\mu_k, \sigma_k^2),

    the softmax of independent normal variables over the vertices of a face f; at a vertex, a point mass. With
    :math:`w = \sigma^{-2}`, :math:`W = \sum_f w`, :math:`d = \mu - \ln y` and :math:`\bar d = \sum_f w d / W`,

    .. math:: \ln p(y \mid f) = -\sum_f \ln (\sqrt{2\pi}\, \sigma_k y_k) + \tfrac12 \ln \tfrac{2\pi}{W}
        - \tfrac12 \sum_f w_k (d_k - \bar d)^2 .

    All vertices are alike here, where torch's ``LogisticNormal`` has a last one.

    **Base measure:** Lebesgue in all coordinates of the face but one, as torch's Dirichlet; counting at a vertex;
    **rsample:** yes; **enumerable:** no.

    ========== ================================== ===============
    shape      ``loc``, ``scale``, ``face``       a value
    ========== ================================== ===============
    batch      ``(*batch, K)``, broadcast         ``(*batch, K)``
    event                                         ``(K,)``
    ========== ================================== ===============

    >>> within = FaceLogisticNormal(torch.zeros(3), 1.0)
    >>> edge = within.on(torch.tensor([1.0, 1.0, 0.0]))
    >>> edge.log_prob(torch.tensor([0.5, 0.5, 0.0])).exp()  # a normal variable of variance 2 at 0, times 4
    tensor(1.1284)

    Args:
        loc: :math:`\mu`, real.
        scale: :math:`\sigma > 0`, a number or ``(*batch, K)``.
        face: bits, at least one in each row; None for the whole simplex.
        validate_args: as in torch.

    Raises:
        ValueError: ``scale <= 0``, NaN or infinite parameters; K = 1; an empty face.

    Reference: J. Aitchison and S. Shen, *Logistic-normal distributions: some properties and uses*, Biometrika 1980;
    on faces A. Farinhas et al., *Sparse communication via mixed distributions*, ICLR 2022, §4.2.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    _tensors = ("loc", "scale")

    loc: Tensor
    scale: Tensor

    def __init__(
        self, loc: Tensor, scale: Tensor | float, face: Tensor | None = None, *, validate_args: bool | None = None
    ) -> None:
        super().__init__(face, validate_args, loc=loc, scale=scale)

    def _check_parameters(self) -> None:
        check_finite(type(self).__name__, "loc", self.loc)
        check_positive(type(self).__name__, "scale", self.scale)

    def _log_weights(self, shape: Size) -> Tensor:
        return self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)

    def _log_density(self, log_y: Tensor) -> Tensor:
        here, w, d = self.here, self.precision, self.loc - log_y
        total = here.linear(w)
        mean = here.linear(w * d) / total
        spread = here.linear(w * (d - mean.unsqueeze(-1)).square())
        logs = here.linear(log_y + self.scale.log() + _LOG_2PI / 2)
        return (_LOG_2PI - total.log() - spread) / 2 - logs

    def entropy_over(self, sums: Sums) -> Tensor:
        own = sums.linear(self.scale.log() + (_LOG_2PI + 1) / 2 + self.loc)
        precision = sums.of(self.precision).log()
        return own + (precision - _LOG_2PI - 1) / 2 - LogNormalSums(sums, self.loc, self.scale).size_times_log()

    def mean_over(self, sums: Sums) -> Tensor:
        return LogNormalSums(sums, self.loc, self.scale).share()

    @property
    def precision(self) -> Tensor:
        r""":math:`w = \sigma^{-2}`, ``(*batch, K)``."""
        return self.scale.square().reciprocal()

    def expected_spread(self, sums: Sums, mean: Tensor, variance: Tensor) -> Tensor:
        r"""
        :math:`E \sum_f w_k (X_k - \bar X)^2` for independent X of this mean and variance, with
        :math:`\bar X = \sum_f w_k X_k / \sum_f w_k`.
        """
        w = self.precision
        # It does not change with a shift; with this one the difference below cancels less.
        mean = mean - (sums.linear(w * mean) / sums.linear(w)).detach().unsqueeze(-1)
        total = sums.of(w, cancels=True)
        off_centre = total.square_over(w * mean) + (w.square() * variance * total.reciprocal()).sum(-1)
        return sums.linear(w * (mean.square() + variance)) - off_centre
