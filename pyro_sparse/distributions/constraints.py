r"""Where mixed random variables live, and why no bijection leads there."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to, transform_to

from pyro_sparse._precision import widened


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


def has_atoms(constraint: Any) -> bool:
    """Whether a domain, or what it is made of by ``to_event`` or a mixture, has points with probability."""
    parts = [getattr(constraint, name, None) for name in ("base_constraint", "constraint0", "constraint1")]
    return isinstance(constraint, MixedConstraint) or any(has_atoms(part) for part in parts if part is not None)


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


class _MixedSimplex(constraints.Constraint):
    """
    The simplex with all its faces, each of which carries probability of its own: non-negative rows with a sum of one,
    to 1e-6 as in torch, or to the rounding of K terms where that is more.
    """

    is_discrete = False
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        tolerance = max(1e-6, 8 * value.shape[-1] * torch.finfo(value.dtype).eps)
        return (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() <= tolerance)

    def __repr__(self) -> str:
        return "mixed_simplex"


def nan_where(nan: Tensor, result: Tensor) -> Tensor:
    """The result, NaN where this holds: where a value is NaN, of which a comparison knows nothing."""
    return torch.where(nan, math.nan, result)


def widened_composition(value: Tensor) -> Tensor:
    """
    Compositions in float32. Rows that sum to one but for the rounding of half precision are divided by their sum; the
    others stay, and are refused.
    """
    wide = widened(value)
    total = wide.sum(-1, keepdim=True)
    return torch.where(mixed_simplex.check(value).unsqueeze(-1), wide / torch.where(total > 0, total, 1.0), wide)


def rounded_composition(draw: Tensor, dtype: torch.dtype) -> Tensor:
    """Compositions in half precision: what is positive stays so, and the row on its face."""
    y, tiny = draw.to(dtype), torch.finfo(dtype).tiny
    return torch.where((draw > 0) & (y < tiny), y + (tiny - y).detach(), y)


#: compositions, zeros included: the simplex where all faces have probability
mixed_simplex = _MixedSimplex()


def _refuse(constraint: constraints.Constraint) -> NoReturn:
    raise NotImplementedError(
        f"biject_to, transform_to: expected a domain without atoms, got {constraint}. HMC, NUTS and the normal "
        "autoguides move through a smooth bijection, which never reaches an atom. Write a guide that samples a mixed "
        "distribution (e.g. HardConcrete, MixedDirichlet) and train it by SVI, or marginalise the atoms."
    )


def refuse_bijections(constraint: type[constraints.Constraint]) -> None:
    """Registers with torch that no bijection leads to domains of this type."""
    biject_to.register(constraint, _refuse)
    transform_to.register(constraint, _refuse)


refuse_bijections(MixedConstraint)
refuse_bijections(_MixedSimplex)


def interior_point(constraint: Any, like: Tensor) -> Tensor:
    """Some number inside a continuous domain, a scalar or one per row, where densities are harmless to evaluate."""
    # The support of a mixture is known by that of its components.
    constraint = getattr(constraint, "base_constraint", constraint)
    point: Tensor = transform_to(constraint)(torch.zeros((), dtype=like.dtype, device=like.device))
    return point
