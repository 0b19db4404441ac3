"""Small numerical pieces that several rooms share; torch only."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def safe_log(x: Tensor, at_zero: float = -math.inf) -> Tensor:
    r"""
    :math:`\log x` for :math:`x \ge 0`, with the value ``at_zero`` and the gradient zero where :math:`x = 0`.

    The argument is replaced before the log: masking only the result would leave :math:`0 \cdot \infty` = NaN in the
    backward pass.
    """
    zero = x == 0
    return torch.where(zero, at_zero, torch.where(zero, 1.0, x).log())
