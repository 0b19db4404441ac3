r"""Projections: real scores in, sparse points of the probability simplex out. Torch only.

Every projection is a function ``f(scores, dim=-1)``, as :func:`torch.softmax` is; a loss is one of scores and targets,
without reduction.
"""

from __future__ import annotations

from pyro_sparse.projections.losses import entmax15_loss, entmax_loss, sparsemax_loss
from pyro_sparse.projections.simplex import entmax, entmax15, sparsemax, topk_sparsemax

__all__ = [
    # fixed members of the family, softmax being its dense end
    "sparsemax",
    "entmax15",
    # the whole family, with alpha as a parameter
    "entmax",
    # a bounded number of outcomes
    "topk_sparsemax",
    # their losses, as the cross-entropy is that of softmax
    "sparsemax_loss",
    "entmax15_loss",
    "entmax_loss",
]
