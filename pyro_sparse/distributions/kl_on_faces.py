r"""
KL divergences on the simplex, as registered with torch: on one face in closed form, and between mixed variables, where
the same formula in sums over a random face gives the expectation.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.distributions.kl import register_kl

from pyro_sparse.distributions.face_dirichlet import FaceDirichlet
from pyro_sparse.distributions.face_logistic_normal import FaceLogisticNormal
from pyro_sparse.distributions.face_sums import Sums
from pyro_sparse.distributions.mixed_base import UnknownDivergence
from pyro_sparse.distributions.mixed_simplex import MixedSimplex
from pyro_sparse.distributions.on_face import OnFace


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


_CLOSED_FORMS: dict[tuple[type[OnFace], type[OnFace]], Any] = {
    (FaceDirichlet, FaceDirichlet): _dirichlet,
    (FaceLogisticNormal, FaceLogisticNormal): _logistic_normal,
    (FaceDirichlet, FaceLogisticNormal): _dirichlet_logistic_normal,
}


def _on_one_face(formula: Any, p: OnFace, q: OnFace) -> Tensor:
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
