"""Estimators of gradients of expectations, and baselines: torch only, no Pyro."""

from __future__ import annotations

from pyro_sparse.estimators.arms import ARMS, DisARM
from pyro_sparse.estimators.base import Baseline, Enumeration, Estimator, Plate, Site, Slots
from pyro_sparse.estimators.baselines import (
    MovingAverage,
    NeuralBaseline,
    SampleBaseline,
    Scaled,
    SelfCritic,
    Sum,
    TrainableConstant,
)
from pyro_sparse.estimators.exact import Exact
from pyro_sparse.estimators.local_expectation import LocalExpectation
from pyro_sparse.estimators.rao_blackwell import RaoBlackwell
from pyro_sparse.estimators.rebar import REBAR, RELAX
from pyro_sparse.estimators.score_function import LeaveOneOut, ScoreFunction
from pyro_sparse.estimators.split import SplitPathwise
from pyro_sparse.estimators.straight_through import StraightThrough
from pyro_sparse.estimators.taylor import DoubleControlVariate, MuProp
from pyro_sparse.estimators.unordered_set import UnorderedSet
from pyro_sparse.estimators.vimco import VIMCO

__all__ = [
    # estimators: one draw, several draws, sums
    "ScoreFunction",
    "LeaveOneOut",
    "DisARM",
    "ARMS",
    "VIMCO",
    "RaoBlackwell",
    "UnorderedSet",
    "LocalExpectation",
    "Exact",
    # in part pathwise
    "SplitPathwise",
    # control variates that see the draw
    "REBAR",
    "RELAX",
    "MuProp",
    "DoubleControlVariate",
    # biased
    "StraightThrough",
    # baselines of ScoreFunction
    "MovingAverage",
    "TrainableConstant",
    "NeuralBaseline",
    "SelfCritic",
    "SampleBaseline",
    "Scaled",
    "Sum",
    # to write one's own
    "Baseline",
    "Enumeration",
    "Estimator",
    "Plate",
    "Site",
    "Slots",
]
