"""Pyro distributions with exact zeros, one family per file; and straight-through ones."""

from __future__ import annotations

import pyro_sparse.distributions.kl
import pyro_sparse.distributions.kl_faces
import pyro_sparse.distributions.kl_mixed
import pyro_sparse.distributions.kl_on_faces
import pyro_sparse.distributions.stock_wrappers  # noqa: F401  (these register KL divergences, and forms of ours)
from pyro_sparse.distributions.constraints import mixed_simplex, mixed_unit_interval
from pyro_sparse.distributions.face_dirichlet import FaceDirichlet
from pyro_sparse.distributions.face_logistic_normal import FaceLogisticNormal
from pyro_sparse.distributions.faces import FaceDistribution
from pyro_sparse.distributions.gaussian_sparsemax import GaussianSparsemax
from pyro_sparse.distributions.gibbs_faces import GibbsFaces
from pyro_sparse.distributions.hard_concrete import HardConcrete
from pyro_sparse.distributions.hard_concrete_simplex import HardConcreteSimplex
from pyro_sparse.distributions.hard_kumaraswamy import HardKumaraswamy
from pyro_sparse.distributions.max_entropy_faces import MaxEntropyFaces
from pyro_sparse.distributions.mixed import MixedDistribution
from pyro_sparse.distributions.mixed_simplex import MixedDirichlet, MixedLogisticNormal, MixedSimplex
from pyro_sparse.distributions.one_hot import SparseOneHotCategorical
from pyro_sparse.distributions.rectified_normal import RectifiedNormal
from pyro_sparse.distributions.sparse_categorical import SparseCategorical
from pyro_sparse.distributions.sparse_support import MaskedSparseDistribution, SparseDistribution
from pyro_sparse.distributions.spike_and_exponential import SpikeAndExponential
from pyro_sparse.distributions.spike_and_slab import SpikeAndSlab
from pyro_sparse.distributions.straight_through import BernoulliST, GumbelSoftmaxST, OneHotCategoricalST
from pyro_sparse.distributions.stretched_rectified import Rectified, StretchedRectified
from pyro_sparse.distributions.zero_one_inflated import ZeroOneInflated

__all__ = [
    # sparse: a projection of scores onto the simplex
    "SparseCategorical",
    "SparseOneHotCategorical",
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
    # extrinsic: a dense sample, projected onto the simplex
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
