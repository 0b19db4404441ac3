"""Pyro distributions with exact zeros, one family per file."""

from __future__ import annotations

import pyro_sparse.distributions.kl  # noqa: F401  (registers the KL divergences)
from pyro_sparse.distributions.one_hot import SparseOneHotCategorical
from pyro_sparse.distributions.sparse_categorical import SparseCategorical
from pyro_sparse.distributions.sparse_support import MaskedSparseDistribution, SparseDistribution

__all__ = [
    # sparse: a projection of scores onto the simplex
    "SparseCategorical",
    "SparseOneHotCategorical",
    # what every distribution with a sparse support is, and what masking one gives
    "SparseDistribution",
    "MaskedSparseDistribution",
]
