"""What `check_distribution` checks of Pyro's wrappers, built by their constructors, and of values that are NaN."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution, TorchDistributionMixin
from torch import Size
from torch.distributions import Distribution, OneHotCategorical

from pyro_sparse.testing.properties import offered, require, same


def constructors(d: TorchDistributionMixin) -> None:
    """Pyro's wrappers, built by their constructors, say what the methods' say."""
    value, batch = d.sample(), d.batch_shape
    mask = (torch.arange(batch.numel(), device=value.device) % 2 == 0).reshape(batch)
    pairs = {
        "MaskedDistribution(d, m)": (dist.MaskedDistribution(d, mask), d.mask(mask)),
        "ExpandedDistribution(d, shape)": (
            ExpandedDistribution(copy.copy(d), Size((2, *batch))),
            copy.copy(d).expand((2, *batch)),
        ),
    }
    if batch:
        pairs["Independent(d, 1)"] = Independent(d, 1), d.to_event(1)
    for how, (built, called) in pairs.items():
        shapes = [(tuple(x.batch_shape), tuple(x.event_shape)) for x in (called, built)]
        require(shapes[0] == shapes[1], f"batch and event shape of {how}", *shapes)
        same(f"log_prob of {how}", built.log_prob(value), called.log_prob(value))
        sparse = [getattr(x, "has_sparse_support", False) for x in (called, built)]
        require(sparse[0] == sparse[1], f"has_sparse_support of {how}", *sparse)


def nan(d: TorchDistributionMixin) -> None:
    """A value that is NaN is no value: with validation off, what is said of it is NaN, of others it is not."""
    value = d.sample(Size((2,)))
    # torch looks for the largest entry of its own one-hot vectors, which NaN is.
    known: Any = OneHotCategorical.log_prob
    if not value.is_floating_point() or type(d).log_prob is known:
        return
    quiet = pickle.loads(pickle.dumps(d))
    _switch_validation_off(quiet)
    good, value = value, value.clone()
    value.reshape(2, -1, d.event_shape.numel())[0, :, -1] = math.nan
    for name in ("log_prob", "cdf"):
        fact = offered(lambda name=name: getattr(quiet, name)(value))  # type: ignore[misc]
        if fact is not None:
            require(fact[0].isnan().all(), f"{name} of NaN, validation off", "NaN", fact[0])
            same(f"{name} beside a NaN, validation off", fact[1], getattr(quiet, name)(good)[1])


def _switch_validation_off(d: Distribution) -> None:
    d._validate_args = False
    for part in vars(d).values():
        if isinstance(part, Distribution):
            _switch_validation_off(part)
