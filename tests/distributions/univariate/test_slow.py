"""Goodness of fit: samples of the mixed families have the frequencies that log_prob states, atoms being cells.

Each test draws from fixed seeds, so it always gives the same answer; for a new seed (another torch version may draw
differently) a correct sampler fails one of the tests of this file with probability below 5e-3.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_sparse.distributions import HardConcrete
from pyro_sparse.testing.quadrature import integrate
from tests.distributions.univariate.mixed_zoo import EXTREME, LINE, MILD, UNIT, extreme, mild

pytestmark = pytest.mark.slow

DRAWS = 200_000
#: standard errors; a normal variable is beyond them once in a million. There are about 4000 frequencies.
LIMIT = 4.9


def z_scores(d: Any, draws: Tensor) -> Tensor:
    """By how many standard errors the frequencies of atoms and intervals are off, shape ``(*batch, cells)``."""
    unit = not d.support.check(torch.tensor(2.0)).any()
    cuts = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95] if unit else [-3.0, -1.0, -0.2, 0.0, 0.2, 1.0, 3.0])
    breaks = torch.cat([UNIT if unit else LINE, cuts]).unique()
    if not unit and not d.support.check(torch.tensor(-1.0)).any():
        breaks = breaks[breaks >= 0]
    atoms = d.support.atoms

    def cells(z: Tensor) -> Tensor:
        number = torch.bucketize(z.contiguous(), cuts.to(z))
        for i, atom in enumerate(atoms):
            number = torch.where(z == atom, len(cuts) + 1 + i, number)
        return one_hot(number, len(cuts) + 1 + len(atoms)).double()

    def density(z: Tensor) -> Tensor:
        z = z.reshape(-1, *(1,) * len(d.batch_shape))
        return d.log_prob(z).exp().double().expand(-1, *d.batch_shape).unsqueeze(-1) * cells(z)

    with torch.no_grad():
        p = integrate(density, breaks)
        for atom in atoms:
            value = d.prob_zero.new_tensor(atom)
            p = p + d.log_prob(value).exp().double().unsqueeze(-1) * cells(value)
    p, n = p.clamp(0.0, 1.0), len(draws)
    counts = sum(cells(part).sum(0) for part in draws.detach().split(5000))
    # A count of which at most ten are expected is no normal variable; it is beyond 60 once in 1e24.
    rare = n * torch.minimum(p, 1 - p) < 10
    assert (torch.minimum(counts, n - counts)[rare] < 60).all()
    return torch.where(rare, 0.0, (counts - n * p) / (n * p * (1 - p)).clamp(min=1.0).sqrt())


@pytest.mark.parametrize("name", MILD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mild_parameters(name: str, dtype: torch.dtype) -> None:
    d = mild(name)  # in float64: rounding of log_prob is not what is tested
    drawn_from = mild(name, dtype)
    assert z_scores(d, drawn_from.sample((DRAWS,))).abs().max() < LIMIT
    assert z_scores(d, drawn_from((DRAWS,))).abs().max() < LIMIT
    if name != "ZeroOneInflated":
        assert z_scores(d, drawn_from.has_rsample_(True)((DRAWS,))).abs().max() < LIMIT


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_parameters(name: str) -> None:
    d, _ = extreme(name)
    assert z_scores(d, d.sample((20_000,))).abs().max() < LIMIT


def test_the_test_has_power() -> None:
    """A logit that is off by 0.05 is noticed."""
    d, other = HardConcrete(0.5, torch.tensor([0.0, 1.0])), HardConcrete(0.5, torch.tensor([0.05, 1.05]))
    assert z_scores(d, other.sample((DRAWS,))).abs().amax(-1).min() > LIMIT
