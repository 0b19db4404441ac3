r"""
Half precision: noise, quantiles and running sums are computed in float32, and cast; torch only.

float16 has 11 bits and bfloat16 8. An exponential draw is then exactly zero once in :math:`10^7`, a uniform one beside
an end of [0, 1] does not exist, and a sum stands still once a step is less than a 256th of it.

Under ``torch.autocast`` what networks make of float32 is in half precision, and probabilities made of that are in
float32, as torch's own softmax is on a GPU: the derivative by rounded ones would be rounded before the mean is taken
from it, so that of costs around a thousand nothing but their rounding were left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Size, Tensor, nn

HALF = (torch.float16, torch.bfloat16)


def widened(x: Tensor) -> Tensor:
    """x, in float32 if it is in half precision."""
    return x.float() if x.dtype in HALF else x


def unrounded(x: Tensor) -> Tensor:
    """x, in float32 if it is in half precision under ``torch.autocast``."""
    return widened(x) if _is_under_autocast(x) else x


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this dtype, but as it is where that is half precision under ``torch.autocast``."""
    return x if dtype in HALF and _is_under_autocast(x) else x.to(dtype)


def _is_under_autocast(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


@contextmanager
def no_autocast() -> Iterator[None]:
    """Without ``torch.autocast``, in which a sum of products of float32 comes out in half precision."""
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for device in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def multinomial(weights: Tensor, count: int, replacement: bool = False) -> Tensor:
    """As torch's, which adds up the weights in their own dtype and refuses to draw none."""
    if count == 0:
        return weights[..., :0].long()
    return torch.multinomial(widened(weights), count, replacement=replacement)


def categorical(probs: Tensor, sample_shape: Size) -> Tensor:
    """Numbers of outcomes, shape ``sample_shape + (*batch,)``, for probabilities ``(*batch, K)``."""
    draws = multinomial(probs.reshape(-1, probs.shape[-1]), sample_shape.numel(), replacement=True)
    return draws.T.reshape(sample_shape + probs.shape[:-1])


class Accumulating(nn.Module):
    """A module whose own buffers are running sums, which ``.to(torch.bfloat16)`` leaves as precise as they are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in HALF:
                self._buffers[name] = widened(old).to(new.device)
        return self
