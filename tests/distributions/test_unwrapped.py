"""One way to look through Pyro's wrappers, whichever they are and in whatever order."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution

from pyro_sparse.distributions import BernoulliST, HardConcrete, SparseCategorical
from pyro_sparse.distributions.discrete.straight_through import is_straight_through
from pyro_sparse.distributions.unwrapped import unwrapped
from pyro_sparse.infer.expansion.law import is_point_mass, jumps

FAMILIES: dict[str, Callable[[], Any]] = {
    "Bernoulli": lambda: dist.Bernoulli(torch.full((3, 2), 0.4)),
    "Delta": lambda: dist.Delta(torch.zeros(3, 2)),
    "SparseCategorical": lambda: SparseCategorical(torch.randn(3, 2, 4)),
    "BernoulliST": lambda: BernoulliST(torch.full((3, 2), 0.4)),
    "HardConcrete": lambda: HardConcrete(0.5, torch.zeros(3, 2)),
    "HardConcrete, pathwise": lambda: HardConcrete(0.5, torch.zeros(3, 2)).has_rsample_(True),
}
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "to_event": lambda d: d.to_event(1),
    "mask": lambda d: d.mask(torch.ones(d.batch_shape, dtype=torch.bool)),
    "MaskedDistribution": lambda d: MaskedDistribution(d, torch.ones(d.batch_shape, dtype=torch.bool)),
    "ExpandedDistribution": lambda d: ExpandedDistribution(d, d.batch_shape),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_inside(name: str) -> None:
    for wrappers in itertools.chain(*(itertools.product(WRAPPERS.values(), repeat=n) for n in range(3))):
        d = FAMILIES[name]()
        family = type(d)
        for wrap in wrappers:
            d = wrap(d)
        assert type(unwrapped(d)) is family, d
        assert is_point_mass(d) == (name == "Delta"), d
        assert is_straight_through(d) == (name == "BernoulliST"), d
        assert jumps(d) == (name == "HardConcrete, pathwise"), d
