"""Pyro distributions with exact zeros, and straight-through ones: a family per file, in rooms by where values live."""

from __future__ import annotations

import pyro_sparse.distributions.discrete.kl
import pyro_sparse.distributions.mixed.kl
import pyro_sparse.distributions.simplex.kl
import pyro_sparse.distributions.stock_wrappers
import pyro_sparse.distributions.univariate.kl  # noqa: F401  (these register KL divergences, and forms of ours)
from pyro_sparse.distributions.constraints import mixed_simplex, mixed_unit_interval
from pyro_sparse.distributions.discrete.sparse_categorical import SparseCategorical
from pyro_sparse.distributions.discrete.sparse_hmm import SparseHMM
from pyro_sparse.distributions.discrete.sparse_one_hot import SparseOneHotCategorical
from pyro_sparse.distributions.discrete.sparse_support import MaskedSparseDistribution, SparseDistribution
from pyro_sparse.distributions.discrete.straight_through import BernoulliST, GumbelSoftmaxST, OneHotCategoricalST
from pyro_sparse.distributions.simplex.face_dirichlet import FaceDirichlet
from pyro_sparse.distributions.simplex.face_logistic_normal import FaceLogisticNormal
from pyro_sparse.distributions.simplex.faces import FaceDistribution
from pyro_sparse.distributions.simplex.gaussian_sparsemax import GaussianSparsemax
from pyro_sparse.distributions.simplex.gibbs_faces import GibbsFaces
from pyro_sparse.distributions.simplex.hard_concrete_simplex import HardConcreteSimplex
from pyro_sparse.distributions.simplex.max_entropy_faces import MaxEntropyFaces
from pyro_sparse.distributions.simplex.mixed_simplex import MixedDirichlet, MixedLogisticNormal, MixedSimplex
from pyro_sparse.distributions.univariate.hard_concrete import HardConcrete
from pyro_sparse.distributions.univariate.hard_kumaraswamy import HardKumaraswamy
from pyro_sparse.distributions.univariate.mixed import MixedDistribution
from pyro_sparse.distributions.univariate.rectified_normal import RectifiedNormal
from pyro_sparse.distributions.univariate.spike_and_exponential import SpikeAndExponential
from pyro_sparse.distributions.univariate.spike_and_slab import SpikeAndSlab
from pyro_sparse.distributions.univariate.stretched_rectified import Rectified, StretchedRectified
from pyro_sparse.distributions.univariate.zero_one_inflated import ZeroOneInflated

__all__ = [
    # sparse: a projection of scores onto the simplex
    "SparseCategorical",
    "SparseOneHotCategorical",
    # sums over paths of sparse chains
    "SparseHMM",
    # mixed: atoms at 0 and 1, a density between them
    "HardConcrete",
    "HardKumaraswamy",
    "RectifiedNormal",
    "StretchedRectified",
    "Rectified",
    "SpikeAndSlab",
    "SpikeAndExponential",
    "ZeroOneInflated",
    "MixedDistribution",
    "mixed_unit_interval",
    # mixed on the simplex: a face, then a point in it
    "MixedDirichlet",
    "MixedLogisticNormal",
    "MixedSimplex",
    "GibbsFaces",
    "MaxEntropyFaces",
    "FaceDistribution",
    "FaceDirichlet",
    "FaceLogisticNormal",
    "mixed_simplex",
    # projected: a dense sample, projected onto the simplex
    "GaussianSparsemax",
    "HardConcreteSimplex",
    # straight-through: discrete forward, a smooth Jacobian backward
    "GumbelSoftmaxST",
    "OneHotCategoricalST",
    "BernoulliST",
    # what every distribution with a sparse support is, and what masking one gives
    "SparseDistribution",
    "MaskedSparseDistribution",
]
