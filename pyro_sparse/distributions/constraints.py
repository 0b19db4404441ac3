r"""Where mixed random variables live, and why no bijection leads there."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to, transform_to


class MixedConstraint(constraints.Constraint):
    r"""
    A continuous domain some points of which, the atoms, carry probability of their own.

    A smooth bijection from :math:`\mathbb{R}` would never reach an atom, so :func:`~torch.distributions.biject_to`
    and :func:`~torch.distributions.transform_to` refuse it: HMC, NUTS and ``AutoNormal`` on such a latent raise.

    Args:
        domain: the constraint of the continuous part.
        atoms: the points with positive probability.
    """

    is_discrete = False
    event_dim = 0

    def __init__(self, domain: Any, atoms: tuple[float, ...]) -> None:
        self.domain = domain
        self.atoms = atoms
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        ok: Tensor = self.domain.check(value)
        for atom in self.atoms:
            ok = ok | (value == atom)
        return ok

    def __repr__(self) -> str:
        return f"mixed({self.domain}, atoms={self.atoms})"


class _Face(constraints.Constraint):
    """Vectors of zeros and ones that are not all zero: the vertices of a face of the simplex."""

    is_discrete = True
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return ((value == 0) | (value == 1)).all(-1) & (value > 0).any(-1)


#: non-empty sets of vertices, as bits
face = _Face()

#: [0, 1] with atoms at both ends
mixed_unit_interval = MixedConstraint(constraints.unit_interval, (0.0, 1.0))


@biject_to.register(MixedConstraint)
@transform_to.register(MixedConstraint)
def _refuse(constraint: MixedConstraint) -> NoReturn:
    raise NotImplementedError(
        f"biject_to, transform_to: expected a domain without atoms, got {constraint}. HMC, NUTS and the normal "
        "autoguides move through a smooth bijection, which never reaches an atom. Write a guide that samples a mixed "
        "distribution (e.g. HardConcrete) and train it by SVI, or marginalise the atoms."
    )


def interior_point(constraint: Any, like: Tensor) -> Tensor:
    """Some number inside a continuous domain, a scalar or one per row, where densities are harmless to evaluate."""
    # The support of a mixture is known by that of its components.
    constraint = getattr(constraint, "base_constraint", constraint)
    point: Tensor = transform_to(constraint)(torch.zeros((), dtype=like.dtype, device=like.device))
    return point
