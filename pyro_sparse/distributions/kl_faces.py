r"""
KL divergences between distributions over faces, as registered with torch: closed forms. Where one of the two knows
faces by their size only, O(K^2) for the distribution of the other's sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions.kl import register_kl

from pyro_sparse.distributions.faces import FaceDistribution
from pyro_sparse.distributions.gibbs_faces import GibbsFaces
from pyro_sparse.distributions.max_entropy_faces import MaxEntropyFaces


@register_kl(GibbsFaces, GibbsFaces)
@register_kl(MaxEntropyFaces, GibbsFaces)
def _kl_to_gibbs(p: FaceDistribution, q: GibbsFaces) -> Tensor:
    r""":math:`-H(p) - E_p \log q`, which is linear in the bits."""
    dtype, (p, q) = _checked(p, q)
    return (-p.entropy() - q.expected_log_prob(p.marginals)).to(dtype)


@register_kl(GibbsFaces, MaxEntropyFaces)
@register_kl(MaxEntropyFaces, MaxEntropyFaces)
def _kl_to_sizes(p: FaceDistribution, q: MaxEntropyFaces) -> Tensor:
    r""":math:`-H(p) - \sum_n P_p(|F| = n) \log q(n)`."""
    dtype, (p, q) = _checked(p, q)
    return (-p.entropy() - (p.size_log_probs.exp() * q.face_log_probs).sum(-1)).to(dtype)


def _checked(p: FaceDistribution, q: FaceDistribution) -> tuple[torch.dtype, tuple[Any, Any]]:
    """The dtype of the result, and both in float64: their terms cancel."""
    if p.num_classes != q.num_classes:
        raise ValueError(
            f"kl_divergence({p}, {q}): expected as many vertices in both, got {p.num_classes} and {q.num_classes}. "
            "Compare distributions over the faces of one simplex."
        )
    return torch.result_type(p.like, q.like), (p.double(), q.double())
