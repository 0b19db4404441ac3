r"""
KL divergences on the simplex, as registered with torch.

Between distributions over faces in closed form; where one of the two knows faces by their size only, O(K^2) for the
distribution of the other's sizes. On one face in closed form, and between mixed variables, where the same formula in
sums over a random face gives the expectation.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.distributions.kl import register_kl

from pyro_sparse.distributions.mixed.base import UnknownDivergence
from pyro_sparse.distributions.simplex.face_dirichlet import FaceDirichlet
from pyro_sparse.distributions.simplex.face_expectations import Sums
from pyro_sparse.distributions.simplex.face_logistic_normal import FaceLogisticNormal
from pyro_sparse.distributions.simplex.faces import FaceDistribution
from pyro_sparse.distributions.simplex.gibbs_faces import GibbsFaces
from pyro_sparse.distributions.simplex.max_entropy_faces import MaxEntropyFaces
from pyro_sparse.distributions.simplex.mixed_simplex import MixedSimplex
from pyro_sparse.distributions.simplex.within_face import WithinFace


@register_kl(GibbsFaces, GibbsFaces)
@register_kl(MaxEntropyFaces, GibbsFaces)
def _kl_to_gibbs(p: FaceDistribution, q: GibbsFaces) -> Tensor:
    r""":math:`-H(p) - E_p \log q`, which is linear in the bits."""
    dtype, (p, q) = _same_simplex(p, q)
    return (-p.entropy() - q.expected_log_prob(p.marginals)).to(dtype)


@register_kl(GibbsFaces, MaxEntropyFaces)
@register_kl(MaxEntropyFaces, MaxEntropyFaces)
def _kl_to_sizes(p: FaceDistribution, q: MaxEntropyFaces) -> Tensor:
    r""":math:`-H(p) - \sum_n P_p(|F| = n) \log q(n)`."""
    dtype, (p, q) = _same_simplex(p, q)
    return (-p.entropy() - (p.size_log_probs.exp() * q.face_log_probs).sum(-1)).to(dtype)


def _same_simplex(p: FaceDistribution, q: FaceDistribution) -> tuple[torch.dtype, tuple[Any, Any]]:
    """The dtype of the result, and both in float64: their terms cancel."""
    if p.num_classes != q.num_classes:
        raise ValueError(
            f"kl_divergence({p}, {q}): expected as many vertices in both, got {p.num_classes} and {q.num_classes}. "
            "Compare distributions over the faces of one simplex."
        )
    return torch.result_type(p.like, q.like), (p.double(), q.double())


def _dirichlet(p: FaceDirichlet, q: FaceDirichlet, sums: Sums) -> Tensor:
    a, b = p.concentration, q.concentration
    own = torch.lgamma(b) - torch.lgamma(a) + (a - b) * torch.digamma(a)
    total = sums.of(a)
    return sums.linear(own) + total.log_gamma() - sums.of(b).log_gamma() - total.digamma(a - b)


def _logistic_normal(p: FaceLogisticNormal, q: FaceLogisticNormal, sums: Sums) -> Tensor:
    precisions = sums.of(q.precision).log() - sums.of(p.precision).log()
    spread = q.expected_spread(sums, q.loc - p.loc, p.scale.square())
    return sums.linear(q.scale.log() - p.scale.log() - 0.5) + (precisions + 1 + spread) / 2


def _dirichlet_logistic_normal(p: FaceDirichlet, q: FaceLogisticNormal, sums: Sums) -> Tensor:
    # Up to a shift, the logarithms of the coordinates are independent, as log-gamma variables.
    a = p.concentration
    total = sums.of(a)
    spread = q.expected_spread(sums, q.loc - torch.digamma(a), torch.polygamma(1, a))
    own = sums.linear(torch.digamma(a) + q.scale.log() + math.log(2 * math.pi) / 2)
    norm = (sums.of(q.precision).log() - math.log(2 * math.pi) + spread) / 2
    return own - total.digamma(torch.ones_like(a)) + norm - p.entropy_over(sums)


_CLOSED_FORMS: dict[tuple[type[WithinFace], type[WithinFace]], Any] = {
    (FaceDirichlet, FaceDirichlet): _dirichlet,
    (FaceLogisticNormal, FaceLogisticNormal): _logistic_normal,
    (FaceDirichlet, FaceLogisticNormal): _dirichlet_logistic_normal,
}


def _on_one_face(formula: Any, p: WithinFace, q: WithinFace) -> Tensor:
    """inf where the faces differ."""
    kl: Tensor = formula(p.double(), q.double(), p.here)  # its terms cancel
    kl = kl.to(torch.result_type(p.like, q.like))
    return torch.where((p.here.inside == q.here.inside).all(-1), kl, math.inf)


for _pair, _formula in _CLOSED_FORMS.items():
    register_kl(*_pair)(functools.partial(_on_one_face, _formula))


@register_kl(MixedSimplex, MixedSimplex)
def _mixed(p: MixedSimplex, q: MixedSimplex) -> Tensor:
    kl = _CLOSED_FORMS.get((type(p.within), type(q.within)))
    if kl is None:
        raise UnknownDivergence(
            f"kl_divergence({p}, {q}): expected a pair with a known divergence within the faces, got "
            f"{type(p.within).__name__} and {type(q.within).__name__}. A prior of FaceLogisticNormal serves both; "
            "or use an ELBO that draws the KL, such as Trace_ELBO."
        )
    faces, within, sums = p.precise()
    of_faces = kl_divergence(faces, q.faces)  # raises unless both have as many vertices
    total: Tensor = of_faces + kl(within, q.within.double(), sums)
    return total.to(torch.promote_types(p.dtype, q.dtype))
