"""The shared numerical pieces, against 60-digit arithmetic over the whole range of floating-point numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from pyro_sparse._numerics import entropy_terms, gauss_legendre, log1mexp, log1mexpexp, log_ndtr, panels, safe_log

INF = math.inf
NEGATIVE = [-700.0, -100.0, -40.0, -20.0, -18.0, -17.99, -8.0, -7.99, -1.0, -0.6931, -0.6932, -1e-3, -1e-9, -1e-30]
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Any], list[float]]] = {
    "log1mexp": (log1mexp, lambda x: mpmath.log1p(-mpmath.exp(x)), NEGATIVE),
    "log1mexpexp": (
        log1mexpexp,
        lambda y: mpmath.log(-mpmath.expm1(-mpmath.exp(y))),
        [-1e4, *NEGATIVE, 0.0, 1.0, 3.0, 3.5],
    ),
    "log_ndtr": (
        log_ndtr,
        lambda x: mpmath.log(mpmath.erfc(-x / mpmath.sqrt(2)) / 2),
        [-1e4, -300.0, -30.01, -30.0, -29.99, -14.0, -5.0, -1.0, 0.0, 1.0, 5.0],
    ),
    "entropy_terms": (entropy_terms, lambda x: -mpmath.exp(x) * x, [*NEGATIVE, 0.0]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_derivative(name: str, dtype: torch.dtype) -> None:
    f, exact, points = FUNCTIONS[name]
    x = torch.tensor(points, dtype=dtype, requires_grad=True)
    got = f(x)
    assert got.dtype == dtype
    (slope,) = torch.autograd.grad(got.sum(), x)
    with mpmath.workdps(60):
        numbers = [mpmath.mpf(v) for v in x.tolist()]
        value = torch.tensor([float(exact(v)) for v in numbers])
        derivative = torch.tensor(
            [float(mpmath.diff(exact, v, h=mpmath.mpf(10) ** -25 * abs(v or 1))) for v in numbers]
        )
    tol = 2e-13 if dtype == torch.float64 else 2e-5
    smallest = torch.finfo(dtype).tiny
    torch.testing.assert_close(got.detach().double(), value, rtol=tol, atol=smallest)
    torch.testing.assert_close(slope.double(), derivative, rtol=10 * tol, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_limits(dtype: torch.dtype) -> None:
    def at(f: Callable[[Tensor], Tensor], x: float) -> tuple[float, float]:
        leaf = torch.tensor(x, dtype=dtype, requires_grad=True)
        value = f(leaf)
        return value.item(), torch.autograd.grad(value, leaf)[0].item()

    assert at(safe_log, 0.0) == (-INF, 0.0)
    assert at(lambda x: safe_log(x, at_zero=0.0), 0.0) == (0.0, 0.0)
    assert at(safe_log, 1.0) == (0.0, 1.0)
    assert at(log1mexp, 0.0) == (-INF, 0.0)
    assert at(log1mexp, -INF) == (0.0, 0.0)
    assert at(log1mexpexp, 50.0) == (0.0, 0.0)
    assert at(entropy_terms, -INF) == (0.0, 0.0)
    assert at(log_ndtr, 40.0)[0] == 0.0


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 64, 101])
def test_gauss_legendre(count: int) -> None:
    nodes, weights = gauss_legendre(count, torch.zeros((), dtype=torch.float64))
    assert nodes.shape == weights.shape == (count,)
    assert ((nodes > 0) & (nodes < 1)).all() and (weights > 0).all()
    assert (nodes.diff() > 0).all()
    torch.testing.assert_close(nodes + nodes.flip(0), torch.ones(count), rtol=0, atol=1e-16)
    # Exact up to degree 2 n - 1, and no further.
    for degree in (0, 1, count, 2 * count - 1):
        assert abs((weights * nodes**degree).sum().item() - 1 / (degree + 1)) < 1e-14
    if count < 10:
        assert abs((weights * nodes ** (2 * count)).sum().item() - 1 / (2 * count + 1)) > 1e-14
    single = gauss_legendre(count, torch.zeros((), dtype=torch.float32))
    assert all(v.dtype == torch.float32 for v in single)


def test_panels() -> None:
    breaks = torch.tensor([[0.0, -1.0], [0.5, -1.0], [2.0, 3.0]])
    nodes, weights = panels(breaks, 4)
    assert nodes.shape == weights.shape == (8, 2)
    for degree in range(8):
        got = (weights * nodes**degree).sum(0)
        expected = (breaks[-1] ** (degree + 1) - breaks[0] ** (degree + 1)) / (degree + 1)
        torch.testing.assert_close(got, expected)
    # An empty panel weighs nothing.
    assert (weights[:4, 1] == 0).all()
    assert (nodes[:4, 0] < 0.5).all() and (nodes[4:, 0] > 0.5).all()
