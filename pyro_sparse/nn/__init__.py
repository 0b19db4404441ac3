"""Modules for users' networks: gates that learn to close, layers that learn to shrink, constraints. Pyro not needed."""

from __future__ import annotations

from pyro_sparse.nn.gates import HardConcreteGate
from pyro_sparse.nn.l0 import L0Conv2d, L0Linear
from pyro_sparse.nn.lagrangian import ConstraintLagrangian
from pyro_sparse.nn.pruning import prune

__all__ = [
    # gates
    "HardConcreteGate",
    # layers with gates, and the smaller ordinary network at the end
    "L0Linear",
    "L0Conv2d",
    "prune",
    # a quantity at a target
    "ConstraintLagrangian",
]
