"""What `check_distribution` checks of many draws: log_prob and its gradient there, and the law in half precision."""

from __future__ import annotations

import copy
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Size, Tensor
from torch.distributions import Distribution

from pyro_sparse._precision import HALF
from pyro_sparse.distributions import MixedDistribution
from pyro_sparse.distributions.half_precision import HalfPrecision, in_float32
from pyro_sparse.testing.properties import leaves, offered, require

#: standard errors by which two frequencies may differ; normal variables are beyond once in 10^9
_LIMIT = 6.0


def own_draws(d: TorchDistributionMixin, count: int) -> None:
    """Where a distribution draws, log_prob and its gradient are finite: also at draws that are rounded to an end."""
    value = d.sample(_per_element(d, count))
    require(not value.isnan().any(), "a draw", "numbers", value)
    log_prob = offered(lambda: d.log_prob(value))
    if log_prob is None:
        return
    bad = ~log_prob.isfinite()
    where = value[bad][:3] if bad.any() else value
    require(not bad.any(), f"log_prob of {count} own draws", "finite values", f"{log_prob[bad][:3]} at {where}")
    parameters = list(leaves(log_prob))
    for gradient in torch.autograd.grad(log_prob.float().mean(), parameters) if parameters else ():
        require(gradient.isfinite().all(), f"gradient of log_prob of {count} own draws", "finite values", gradient)


def law_in_half(d: TorchDistributionMixin, count: int) -> None:
    """Draws in half precision are those of the same parameters in float32, rounded: atoms and faces as often."""
    shape, wide = _per_element(d, count), _in_float32(d)
    got, expected = (_statistics(d, x.sample(shape)) for x in (d, wide))
    spread = torch.stack([got.var(1), expected.var(1)]).amax(0)
    error = (got.mean(1) - expected.mean(1)).abs()
    # Rare events are no normal variables; the moments are of rounded numbers.
    slack = _LIMIT * (2 * spread / shape[0]).sqrt() + 10 / shape[0]
    slack[-2:] += torch.finfo(torch.bfloat16).eps
    off = error > slack
    require(
        not off.any(),
        f"law of {shape[0]} draws in half precision (frequencies of atoms and zeros, bounded moments)",
        expected.mean(1)[off][:3],
        got.mean(1)[off][:3],
    )


def _per_element(d: TorchDistributionMixin, count: int) -> Size:
    return Size((max(count // max(d.batch_shape.numel(), 1), 100),))


def _statistics(d: TorchDistributionMixin, draws: Tensor) -> Tensor:
    """Whether a draw is at an atom (zero, of a distribution without), and bounded functions of it."""
    z = draws.double()
    atoms = d.support.atoms if isinstance(d, MixedDistribution) else (0.0,)
    return torch.stack([*(z == a for a in atoms), z.tanh(), z.tanh().square()]).to(z)


def in_half(d: Any) -> bool:
    """Whether a distribution, or what it is made of, has parameters in half precision."""
    values = vars(d).values()
    nested = any(in_half(value) for value in values if isinstance(value, Distribution))
    return nested or any(isinstance(value, Tensor) and value.dtype in HALF for value in values)


def _in_float32(d: Any) -> Any:
    """A copy with all its tensors in float32, and those of the distributions that it is made of."""
    if isinstance(d, HalfPrecision):
        return in_float32(d)  # it knows which of its tensors were made from others
    new = copy.copy(d)
    for name, value in vars(d).items():
        if isinstance(value, Tensor) and value.dtype in HALF:
            new.__dict__[name] = value.detach().float()
        elif isinstance(value, Distribution):
            new.__dict__[name] = _in_float32(value)
    return new
