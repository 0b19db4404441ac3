"""
log_prob at own draws: finite everywhere, and right on average. A draw beside an end of the support is rounded to it.

The averages are statistical: with a right sampler, one fails in 10^5 seeds.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch

from pyro_sparse.distributions import (
    FaceDirichlet,
    FaceLogisticNormal,
    HardConcrete,
    HardConcreteSimplex,
    HardKumaraswamy,
    MixedDirichlet,
    MixedLogisticNormal,
    SpikeAndSlab,
    ZeroOneInflated,
)
from pyro_sparse.distributions.univariate.kumaraswamy import Kumaraswamy
from pyro_sparse.testing.own_draws import own_draws
from tests.distributions.univariate.mixed_zoo import EXTREME, MILD, extreme, leaves

FLOATS = [torch.float32, torch.float64]
#: a slab of each kind that is at an end, in the dtype, with much probability
STEEP: dict[str, Any] = {
    "Kumaraswamy": (dist.Kumaraswamy, True),
    "Beta": (dist.Beta, True),
    "Weibull": (lambda a, b: dist.Weibull(b, a.clamp(min=0.06)), False),
    "Gamma": (dist.Gamma, False),
}
SIMPLEX: dict[str, Any] = {
    "HardConcreteSimplex": lambda x: HardConcreteSimplex(0.05, 30 * x[:2], 1.001),
    "FaceDirichlet": lambda x: FaceDirichlet(x / 100),
    "FaceLogisticNormal": lambda x: FaceLogisticNormal(x, 100.0),
    "MixedDirichlet": lambda x: MixedDirichlet(30 * x, x / 100),
    "MixedLogisticNormal": lambda x: MixedLogisticNormal(30 * x, x, 100.0),
}


def mean_log_prob_is_right(d: Any, exact: Any, count: int) -> None:
    log_prob = d.log_prob(d.sample((count,))).double()
    error = log_prob.mean(0) + exact.entropy()
    assert (error.abs() < 4.5 * log_prob.std(0) / count**0.5).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", STEEP)
def test_steep_slabs(kind: str, dtype: torch.dtype) -> None:
    make, unit = STEEP[kind]
    grid = torch.tensor([0.02, 0.2, 0.5, 3.0], dtype=dtype)
    a, b = (x.flatten().requires_grad_() for x in torch.meshgrid(grid, grid, indexing="ij"))
    own_draws(SpikeAndSlab(make(a, b), logits=torch.zeros((), dtype=dtype)), 20_000)
    if unit:
        own_draws(ZeroOneInflated(make(a, b), torch.zeros(3, dtype=dtype)), 20_000)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", STEEP)
def test_steep_slabs_at_a_million_draws(kind: str, dtype: torch.dtype) -> None:
    make, unit = STEEP[kind]
    for a, b in [(0.05, 0.05), (0.5, 0.5), (3.0, 0.1), (0.1, 3.0)]:
        p = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (a, b)]
        own_draws(SpikeAndSlab(make(*p), logits=torch.zeros((), dtype=dtype)), 1_000_000)
        if unit:
            own_draws(ZeroOneInflated(make(*p), torch.zeros(3, dtype=dtype)), 1_000_000)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_parameters_at_a_million_draws(name: str, dtype: torch.dtype) -> None:
    own_draws(extreme(name, dtype)[0], 1_000_000)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", SIMPLEX)
def test_the_simplex_at_a_million_draws(kind: str, dtype: torch.dtype) -> None:
    own_draws(SIMPLEX[kind](torch.tensor([0.5, 1.0, 0.1], dtype=dtype, requires_grad=True)), 1_000_000)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", MILD)
def test_mean_log_prob_is_minus_the_entropy(name: str, dtype: torch.dtype) -> None:
    own_draws(MILD[name][0](*leaves(name, dtype)), 1_000_000)
    mean_log_prob_is_right(MILD[name][0](*leaves(name, dtype)), MILD[name][0](*leaves(name)), 500_000)


def test_the_recommended_slab() -> None:
    """Kumaraswamy(1/2, 1/2), of which one draw in 10^4 is within rounding of one: the value by quadrature is -.453."""
    torch.manual_seed(0)
    p, a = torch.tensor([0.1, 0.1, 0.8], dtype=torch.float32), torch.tensor(0.5, dtype=torch.float32)
    d = ZeroOneInflated(dist.Kumaraswamy(a, a), probs=p)
    mean_log_prob_is_right(
        d, ZeroOneInflated(dist.Kumaraswamy(a.double(), a.double()), probs=p.double() / p.double().sum()), 200_000
    )


@pytest.mark.parametrize("make", [HardConcrete, HardKumaraswamy])
def test_atoms_of_a_tight_stretch_have_their_probability_in_float32(make: Any) -> None:
    """Beside an end, float32 has too few numbers for where the draws are: an atom is told by its probability."""
    torch.manual_seed(0)
    a, b, n = torch.tensor(0.2), torch.tensor(0.01), 400_000
    exact = make(a, b, -(2.0**-20), 1 + 2.0**-20)
    z = make(a.float(), b.float(), -(2.0**-20), 1 + 2.0**-20).sample((n,))
    for atom, p in ((0.0, exact.prob_zero), (1.0, exact.prob_one)):
        assert ((z == atom).double().mean() - p).abs() < 4.5 * (p * (1 - p) / n).sqrt() + 1e-6


@pytest.mark.parametrize("a, b", [(0.3, 2.0), (2.0, 0.3), (1.0, 1.0), (3.0, 5.0)])
def test_kumaraswamy_is_the_stock_one_where_that_is_right(a: float, b: float) -> None:
    p = [torch.tensor(x, requires_grad=True) for x in (a, b)]
    stock = dist.Kumaraswamy(*p)
    ours, x = Kumaraswamy.of(stock), torch.linspace(0.1, 0.9, 9)
    for name in ("log_prob", "cdf", "icdf"):
        got, expected = getattr(ours, name)(x), getattr(stock, name)(x)
        if name == "icdf":  # the stock one has none, but a cdf
            expected = got
            torch.testing.assert_close(ours.cdf(got), x)
        torch.testing.assert_close(got, expected)
        for one, other in zip(
            *(torch.autograd.grad(y.sum(), p, retain_graph=True) for y in (got, expected)), strict=True
        ):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(ours.expand((2,)).log_prob(x[:2]), stock.log_prob(x[:2]))
    draws = ours.rsample((20_000,))
    assert (draws.mean() - stock.mean).abs() < 5 * (stock.variance / 20_000).sqrt()
    for one, other in zip(
        *(torch.autograd.grad(y, p, retain_graph=True) for y in (draws.mean(), stock.mean)), strict=True
    ):
        assert (one - other).abs() < 0.05
