"""Goodness of fit: samples have the frequencies that log_prob states.

Each test draws from fixed seeds, so it always gives the same answer; for a new seed (another torch version may draw
differently) a correct sampler fails one of the tests of this file with probability below 1e-3.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from pyro_sparse.distributions import SparseCategorical, SparseOneHotCategorical
from pyro_sparse.projections import entmax, entmax15, sparsemax

pytestmark = pytest.mark.slow

DRAWS = 100_000
FAILURE_RATE = 1e-5  # of each row; there are 2 * 4 * 2 * 6 = 96 rows


def p_values(d: Any, draws: Tensor) -> list[float]:
    """Pearson's chi-squared test of the outcomes that have probability, for each row of the batch."""
    outcomes = d.enumerate_support()
    equal = draws.unsqueeze(1) == outcomes
    counts = (equal.all(-1) if d.event_shape else equal).sum(0)
    probs = d.log_prob(outcomes).exp()
    assert (counts[probs == 0] == 0).all()
    assert (counts.sum(0) == len(draws)).all()
    results = []
    for row in range(probs.shape[1]):
        p = probs[:, row].double()
        used = p > 0
        expected = len(draws) * p[used] / p.sum()  # float32 rounding of the sum is not what is tested
        results.append(scipy.stats.chisquare(counts[used, row], expected).pvalue if used.sum() > 1 else 1.0)
    return results


@pytest.mark.parametrize("family", [SparseCategorical, SparseOneHotCategorical])
@pytest.mark.parametrize("projection", [sparsemax, entmax15, partial(entmax, alpha=1.2), partial(entmax, alpha=3.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frequencies(family: Any, projection: Any, dtype: torch.dtype) -> None:
    d = family(torch.randn(6, 10).to(dtype), projection)
    assert min(p_values(d, d.sample((DRAWS,)))) > FAILURE_RATE


def test_the_test_has_power() -> None:
    """Frequencies that are off by one hundredth are noticed."""
    d = SparseCategorical(probs=torch.tensor([[0.5, 0.0, 0.5]]))
    other = SparseCategorical(probs=torch.tensor([[0.51, 0.0, 0.49]]))
    assert max(p_values(d, other.sample((DRAWS,)))) < FAILURE_RATE
