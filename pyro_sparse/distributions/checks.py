"""What families check, parameters and values, in the house's form of errors; and parameters of one dtype."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution
from torch.distributions.utils import broadcast_all

from pyro_sparse._autograd import is_true, unwrapped
from pyro_sparse._numerics import as_like
from pyro_sparse.distributions.constraints import mixed_simplex, nan_where


def check_floating(owner: str, name: str, value: Any) -> None:
    """Raises where a parameter is a tensor of integers, into which broadcasting would turn a number beside it."""
    if isinstance(value, Tensor) and not value.is_floating_point():
        raise TypeError(f"{owner}.{name}: expected a floating-point tensor, got {value.dtype}. Use .float().")


def aligned(owner: str, other: Tensor | None = None, **parameters: Any) -> tuple[Any, ...]:
    """
    Parameters with the dtype and device of the first that is a tensor: a family names its main one first, and draws
    have its dtype, whatever a temperature beside it has. Numbers stay numbers.

    Args:
        owner: whose parameters they are.
        other: whose dtype and device to take instead.
        parameters: by name, the main one first.

    Raises:
        TypeError: for a tensor that is not floating-point.
    """
    for name, value in parameters.items():
        check_floating(owner, name, value)
    other = next((v for v in parameters.values() if isinstance(v, Tensor)), None) if other is None else other
    if other is None:
        return tuple(parameters.values())
    return tuple(v.to(other.device, other.dtype) if isinstance(v, Tensor) else v for v in parameters.values())


def broadcast(owner: str, **parameters: Any) -> tuple[Tensor, ...]:
    """The same, as tensors of one shape."""
    values = aligned(owner, **parameters)
    tensor = next((v for v in values if isinstance(v, Tensor)), None)
    return tuple(broadcast_all(*(v if tensor is None else as_like(v, tensor) for v in values)))


def first_tensor(d: Any) -> Tensor | None:
    """Some parameter of a distribution, which knows the dtype and the device; None where it has none."""
    for value in vars(d).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach()
        if isinstance(value, Distribution) and (tensor := first_tensor(value)) is not None:
            return tensor
    return None


def checked(owner: str, name: str, value: Tensor | float, ok: Tensor | bool, expected: str, fix: str) -> None:
    """Raises in the house's form where a parameter is not ok."""
    if not (ok if isinstance(ok, bool) else is_true(ok)):
        got = value if not isinstance(value, Tensor) else _example(value.detach(), ok)
        raise ValueError(f"{owner}.{name}: expected {expected}, got {got}. {fix}")


def refuse_logits(owner: str, given: Collection[str]) -> None:
    """Raises where Pyro rebuilds, by logits of its outcomes, a distribution that is not made of those."""
    if "logits" in given:
        raise TypeError(
            f"{owner}: expected its own parameters, got logits, by which Pyro's compute_marginals and sample_posterior "
            "make distributions. Use those of SparseEnumELBO."
        )


def check_finite(owner: str, name: str, value: Tensor) -> None:
    """Raises unless a parameter on the whole line is a number throughout."""
    checked(owner, name, value, value.isfinite(), "a finite number", "Check the network.")


def check_positive(owner: str, name: str, value: Tensor, fix: str = "Use e.g. softplus of a network.") -> None:
    """Raises unless a parameter is positive and finite throughout."""
    checked(owner, name, value, (value > 0) & value.isfinite(), "a positive number", fix)


def _example(value: Tensor, ok: Tensor | bool) -> float:
    if isinstance(ok, bool):
        return float(unwrapped(value))
    value, ok = unwrapped(value.expand(ok.shape)), unwrapped(ok)
    return float(value.expand(ok.shape)[~ok][0])


def check_expand(owner: str, old: Size, new: Sequence[int]) -> Size:
    """The new batch shape; raises unless the old one broadcasts to it."""
    padded = (1,) * (len(new) - len(old)) + old
    if len(padded) > len(new) or any(a not in (1, b) for a, b in zip(padded, new, strict=True)):
        raise ValueError(
            f"{owner}.expand: expected a shape that {tuple(old)} broadcasts to, got {tuple(new)}. Only dims of size "
            "one, or new ones on the left, can grow."
        )
    return Size(new)


def given(owner: str, logits: Any, probs: Any) -> tuple[Tensor, bool]:
    """The one of two parametrisations that was given, as a tensor, and whether it is the logits."""
    if (logits is None) == (probs is None):
        what = "neither" if logits is None else "both"
        raise ValueError(f"{owner}: expected either logits or probs, got {what}. Give exactly one.")
    value = probs if logits is None else logits
    check_floating(owner, "probs" if logits is None else "logits", value)
    value = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.get_default_dtype())
    return value, logits is not None


def check_given(owner: str, value: Tensor, from_logits: bool) -> None:
    """Finite logits, or probabilities."""
    if from_logits:
        checked(owner, "logits", value, value.isfinite(), "a finite number", "Check the network, or use probs.")
    else:
        ok = (value >= 0) & (value <= 1)
        checked(owner, "probs", value, ok, "a number in [0, 1]", "Use logits for unconstrained values.")


def num_vertices(owner: str, shape: Sequence[int]) -> int:
    """How many vertices the simplex of a parameter of this shape has; raises unless there are two at least."""
    if not shape or shape[-1] < 2:
        raise ValueError(
            f"{owner}: expected at least two vertices in the last dim, got shape {tuple(shape)}. Add one: a simplex of "
            "one vertex is a point."
        )
    return shape[-1]


def check_compositions(owner: str, value: Tensor, num_classes: int) -> None:
    """Raises unless the rows of a value are compositions of so many parts, to the constraint's tolerance."""
    if not value.is_floating_point():
        raise ValueError(
            f"{owner}.log_prob: expected a floating-point value, got {value.dtype}. Convert it, e.g. by .float()."
        )
    if value.shape[-1:] != (num_classes,):
        raise ValueError(
            f"{owner}.log_prob: expected {num_classes} coordinates in the last dim, got shape {tuple(value.shape)}. "
            "Give each row one for each vertex."
        )
    ok = mixed_simplex.check(value)
    if not is_true(ok):
        row = unwrapped(value.detach())[~unwrapped(ok)][0]
        raise ValueError(
            f"{owner}.log_prob: expected rows that are non-negative and sum to one, got one with minimum "
            f"{row.min():.4g} and sum {row.sum():.8g}. Divide amounts by their sum: y / y.sum(-1, keepdim=True)."
        )


def on_simplex_only(log_prob: Tensor, value: Tensor, ok: Tensor) -> Tensor:
    """The log-probabilities where the rows of a value are ok, -inf elsewhere, NaN where they have one."""
    return nan_where(value.isnan().any(-1), torch.where(ok, log_prob, -math.inf))
