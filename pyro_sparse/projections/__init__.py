r"""Projections: real scores in, sparse points of the probability simplex out. Torch only.

Every projection is a function ``f(scores, dim=-1)``, as :func:`torch.softmax` is.
"""

from __future__ import annotations

from pyro_sparse.projections.simplex import entmax, entmax15, sparsemax, topk_sparsemax

__all__ = [
    # fixed members of the family, softmax being its dense end
    "sparsemax",
    "entmax15",
    # the whole family, with alpha as a parameter
    "entmax",
    # a bounded number of outcomes
    "topk_sparsemax",
]
