"""Mixed distributions for tests: mild ones of every family, and each family over its whole range of parameters."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_sparse.distributions import (
    HardConcrete,
    HardKumaraswamy,
    Rectified,
    RectifiedNormal,
    SpikeAndExponential,
    SpikeAndSlab,
    StretchedRectified,
    ZeroOneInflated,
)
from pyro_sparse.testing.quadrature import integrate

Parameters = list[Tensor]
#: how far the stretch reaches beyond [0, 1]
REACH = [2.0**-20, 2.0**-10, 0.125, 1.0]  # exact in float32 too

_LOGITS3 = [[0.0, -1.0, 0.5], [1.0, 0.5, 2.0]]
#: family or kind: what makes it of its parameters, and a batch of two of them
MILD: dict[str, tuple[Any, list[Any]]] = {
    "HardConcrete": (HardConcrete, [[0.5, 1.2], [-0.7, 1.5]]),
    "HardConcrete, own stretch": (HardConcrete, [[0.5, 1.2], [-0.7, 1.5], [-0.3, -0.02], [1.05, 1.4]]),
    "HardKumaraswamy": (HardKumaraswamy, [[0.6, 2.0], [1.5, 0.8]]),
    "RectifiedNormal": (RectifiedNormal, [[0.3, 1.1], [0.5, 0.2]]),
    "StretchedRectified": (lambda m, s: StretchedRectified(dist.Normal(m, s), -0.2, 1.1), [[0.3, 0.6], [0.5, 0.4]]),
    "StretchedRectified of Kumaraswamy": (
        lambda a, b: StretchedRectified(dist.Kumaraswamy(a, b), -0.1, 1.1),
        [[0.6, 2.0], [1.5, 0.8]],
    ),
    "StretchedRectified of a mixture": (
        lambda m, s, w: StretchedRectified(
            dist.MixtureSameFamily(dist.Categorical(logits=w), dist.Normal(m.unsqueeze(-1), s)), -0.2, 1.1
        ),
        [[0.3, 0.6], [0.5, 0.4, 0.9], [0.0, 1.0, 0.5]],
    ),
    "Rectified": (lambda m, s: Rectified(dist.Cauchy(m, s)), [[0.3, 0.6], [0.5, 0.4]]),
    "SpikeAndSlab": (lambda m, s, t: SpikeAndSlab(dist.Normal(m, s), logits=t), [[0.3, -1.0], [0.5, 2.0], [0.4, -1.0]]),
    "SpikeAndSlab of probs": (lambda r, p: SpikeAndSlab(dist.Exponential(r), probs=p), [[0.5, 2.0], [0.3, 0.9]]),
    "SpikeAndExponential": (lambda r, t: SpikeAndExponential(r, logits=t), [[4.0, -0.5], [0.4, -1.0]]),
    "ZeroOneInflated": (lambda a, b, t: ZeroOneInflated(dist.Beta(a, b), t), [[1.5, 3.0], [2.0, 1.2], _LOGITS3]),
    "ZeroOneInflated, Kumaraswamy": (
        lambda a, b, t: ZeroOneInflated(dist.Kumaraswamy(a, b), t),
        [[1.5, 3.0], [2.0, 1.2], _LOGITS3],
    ),
}


def leaves(name: str, dtype: torch.dtype = torch.float64) -> Parameters:
    return [torch.tensor(values, dtype=dtype, requires_grad=True) for values in MILD[name][1]]


def mild(name: str, dtype: torch.dtype = torch.float64) -> Any:
    return MILD[name][0](*leaves(name, dtype))


def _grid(*values: list[float]) -> Parameters:
    """The cartesian product, one tensor for each of its factors."""
    axes = [torch.tensor(v, dtype=torch.float64) for v in values]
    return [axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]


def extreme(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Parameters]:
    """A batch over the whole range of parameters, and the leaves that it is made of."""
    parameters = [x.to(dtype).requires_grad_() for x in _grid(*EXTREME[name][1])]
    return EXTREME[name][0](*parameters), parameters


def _rows(kind: Tensor) -> Tensor:
    """Logits of 0, of 1 and of the inside."""
    return kind.new_tensor([[0.0, 0.0, 0.0], [30.0, -30.0, 0.0], [-30.0, 0.0, 30.0], [-30.0, -30.0, 30.0]])[kind.long()]


_LOCS, _LOGITS = [-5.0, -0.2, 0.0, 0.3, 1.0, 1.2, 6.0], [-30.0, -1.0, 0.0, 4.0, 30.0]
EXTREME: dict[str, tuple[Any, list[list[float]]]] = {
    "HardConcrete": (
        lambda t, x, reach: HardConcrete(t, x, -reach, 1 + reach),
        [[0.05, 0.2, 2 / 3, 2.0, 5.0], [-30.0, -10.0, -3.0, 0.0, 0.7, 10.0, 30.0], REACH],
    ),
    "HardKumaraswamy": (
        lambda a, b, reach: HardKumaraswamy(a, b, -reach, 1 + reach),
        [[0.01, 0.1, 0.5, 1.0, 3.0, 20.0, 100.0], [0.01, 0.1, 0.5, 1.0, 3.0, 20.0, 100.0], REACH],
    ),
    "RectifiedNormal": (RectifiedNormal, [_LOCS, [1e-3, 0.05, 0.5, 2.0, 100.0, 1e4]]),
    "StretchedRectified": (
        lambda m, s: StretchedRectified(dist.Normal(m, s), -0.1, 1.1),
        [[-0.2, 0.0, 0.3, 1.0, 1.2], [0.05, 0.5, 2.0, 100.0]],
    ),
    "Rectified": (lambda m, s: Rectified(dist.Normal(m, s)), [[-0.2, 0.0, 0.3, 1.0, 1.2], [0.05, 0.5, 2.0, 100.0]]),
    "SpikeAndSlab": (
        lambda m, s, t: SpikeAndSlab(dist.Normal(m, s), logits=t),
        [[-2.0, 0.0, 3.0], [0.01, 1.0, 30.0], _LOGITS],
    ),
    "SpikeAndExponential": (
        lambda r, t: SpikeAndExponential(r, logits=t),
        [[-500.0, -30.0, -1.0, -1e-5, 0.0, 1e-3, 0.1, 1.0, 30.0, 500.0], _LOGITS],
    ),
    "ZeroOneInflated": (
        lambda a, b, kind: ZeroOneInflated(dist.Beta(a, b), _rows(kind)),
        [[1.0, 3.0, 50.0], [1.0, 3.0, 50.0], [0.0, 1.0, 2.0, 3.0]],
    ),
}

_ENDS = torch.logspace(-12, -2, 21, dtype=torch.float64)
#: panels of the integrals: the unit interval, finely divided towards its ends, and the line
UNIT = torch.cat([torch.zeros(1), _ENDS, torch.linspace(0, 1, 65, dtype=torch.float64)[1:-1], 1 - _ENDS.flip(0)])
UNIT = torch.cat([UNIT, torch.ones(1)]).unique()
LINE = torch.cat([torch.arange(-1200.0, 1201, 40, dtype=torch.float64), torch.linspace(-5, 5, 401).double()]).unique()


def expected_value(d: Any, of: Any, breaks: Tensor = UNIT) -> Tensor:
    """
    The expectation of ``of(z, log_prob(z))``: atoms exactly, the rest by adaptive quadrature of ``log_prob``;
    differentiable in the parameters.
    """
    z_dims = (-1, *(1,) * len(d.batch_shape))

    def weighted(z: Tensor) -> Tensor:
        log_p = d.log_prob(z)
        gone = log_p.exp() == 0
        log_p = log_p.masked_fill(gone, 0.0)
        return torch.where(gone, 0.0, log_p.exp() * of(z, log_p))

    total = integrate(lambda z: weighted(z.reshape(z_dims)).expand(-1, *d.batch_shape), breaks)
    for atom in d.support.atoms:
        total = total + weighted(breaks.new_tensor(atom))
    return total
