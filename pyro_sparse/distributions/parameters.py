"""The parameters of a family: floating-point, and all of one dtype."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import Distribution


def check_floating(owner: str, name: str, value: Any) -> None:
    """Raises where a parameter is a tensor of integers, into which broadcasting would turn a number beside it."""
    if isinstance(value, Tensor) and not value.is_floating_point():
        raise TypeError(f"{owner}.{name}: expected a floating-point tensor, got {value.dtype}. Use .float().")


def aligned(owner: str, like: Tensor | None = None, **parameters: Any) -> tuple[Any, ...]:
    """
    Parameters with the dtype and device of the first that is a tensor: a family names its main one first, and draws
    have its dtype, whatever a temperature beside it has. Numbers stay numbers.

    Args:
        owner: whose parameters they are.
        like: whose dtype and device to take instead.
        parameters: by name, the main one first.

    Raises:
        TypeError: for a tensor that is not floating-point.
    """
    for name, value in parameters.items():
        check_floating(owner, name, value)
    like = next((v for v in parameters.values() if isinstance(v, Tensor)), None) if like is None else like
    if like is None:
        return tuple(parameters.values())
    return tuple(v.to(like.device, like.dtype) if isinstance(v, Tensor) else v for v in parameters.values())


def first_tensor(d: Any) -> Tensor | None:
    """Some parameter of a distribution, which knows the dtype and the device; None where it has none."""
    for value in vars(d).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach()
        if isinstance(value, Distribution) and (tensor := first_tensor(value)) is not None:
            return tensor
    return None
