"""Modules for users' networks: gates that learn to close, layers that learn to shrink, constraints. Pyro not needed."""

from __future__ import annotations

from pyro_sparse.nn.gates import Gate, HardConcreteGate
from pyro_sparse.nn.l0 import L0Linear
from pyro_sparse.nn.l0_convolutions import L0Conv1d, L0Conv2d, L0ConvTranspose1d, L0ConvTranspose2d
from pyro_sparse.nn.lagrangian import ConstraintLagrangian
from pyro_sparse.nn.other_gates import HardKumaraswamyGate, RectifiedNormalGate
from pyro_sparse.nn.pruning import prune

__all__ = [
    # gates
    "HardConcreteGate",
    "HardKumaraswamyGate",
    "RectifiedNormalGate",
    "Gate",
    # layers with gates, and the smaller ordinary network at the end
    "L0Linear",
    "L0Conv1d",
    "L0Conv2d",
    "L0ConvTranspose1d",
    "L0ConvTranspose2d",
    "prune",
    # a quantity at a target
    "ConstraintLagrangian",
]
