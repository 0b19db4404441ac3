r"""Dirichlet distributions on the faces of the simplex, and their expectations over a random face."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_sparse._relaxation import exponential
from pyro_sparse.distributions.checks import check_positive
from pyro_sparse.distributions.simplex.face_expectations import Sums
from pyro_sparse.distributions.simplex.within_face import WithinFace


class FaceDirichlet(WithinFace):
    r"""
    .. math:: p(y \mid f) = \frac{\Gamma(\sum_{k \in f} \alpha_k)}{\prod_{k \in f} \Gamma(\alpha_k)}
        \prod_{k \in f} y_k^{\alpha_k - 1}, \qquad y_k = 0 \text{ for } k \notin f

    the Dirichlet distribution of the coordinates of a face f; at a vertex, a point mass. In float32 the gradient of a
    draw overflows for concentrations below 1e-18.

    **Base measure:** Lebesgue in all coordinates of the face but one, as torch's Dirichlet; counting at a vertex;
    **rsample:** yes; **enumerable:** no.

    ========== ================================== ===============
    shape      ``concentration``, ``face``        a value
    ========== ================================== ===============
    batch      ``(*batch, K)``, broadcast         ``(*batch, K)``
    event                                         ``(K,)``
    ========== ================================== ===============

    >>> within = FaceDirichlet(torch.tensor([2.0, 2.0, 5.0]))
    >>> edge = within.on(torch.tensor([1.0, 1.0, 0.0]))
    >>> edge.log_prob(torch.tensor([0.5, 0.5, 0.0])).exp(), edge.mean
    (tensor(1.5000), tensor([0.5000, 0.5000, 0.0000]))

    Args:
        concentration: :math:`\alpha > 0`.
        face: bits, at least one in each row; None for the whole simplex.
        validate_args: as in torch.

    Raises:
        ValueError: ``concentration <= 0``, NaN or infinite; K = 1; an empty face.

    Reference: A. Farinhas et al., *Sparse communication via mixed distributions*, ICLR 2022, §4.2.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"concentration": constraints.independent(constraints.positive, 1)}
    _tensors = ("concentration",)

    concentration: Tensor

    def __init__(self, concentration: Tensor, face: Tensor | None = None, *, validate_args: bool | None = None) -> None:
        super().__init__(face, validate_args, concentration=concentration)

    def _check_parameters(self) -> None:
        check_positive(type(self).__name__, "concentration", self.concentration)

    def _log_weights(self, shape: Size) -> Tensor:
        # log Gamma(a) = log Gamma(a + 1) + log(U) / a in distribution, which does not underflow for small a.
        a = self.concentration.expand(shape)
        return torch._standard_gamma(a + 1).log() - exponential(a.shape, a) / a

    def _log_density(self, log_y: Tensor) -> Tensor:
        a, here = self.concentration, self.here
        return here.linear((a - 1) * log_y - torch.lgamma(a)) + here.of(a).log_gamma()

    def entropy_over(self, sums: Sums) -> Tensor:
        r""":math:`\sum_k [\ln\Gamma(\alpha_k) - (\alpha_k - 1)\psi(\alpha_k)] - \ln\Gamma(\alpha_0)
        + (\alpha_0 - n)\psi(\alpha_0)`, sums over the n vertices of the face."""
        a = self.concentration
        total = sums.of(a)
        return sums.linear(torch.lgamma(a) - (a - 1) * torch.digamma(a)) - total.log_gamma() + total.digamma(a - 1)

    def mean_over(self, sums: Sums) -> Tensor:
        return self.concentration * sums.of(self.concentration).reciprocal()

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        return mean * (1 - mean) / (self.here.linear(self.concentration).unsqueeze(-1) + 1)
