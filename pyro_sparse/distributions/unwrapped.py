"""What is inside of Pyro's wrappers."""

from __future__ import annotations

from typing import Any

from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch.distributions import Independent


def unwrapped(d: Any) -> Any:
    """The distribution of one element, without ``to_event``, ``mask`` and ``expand``, whose shapes are lost."""
    while isinstance(d, Independent | MaskedDistribution | ExpandedDistribution):
        d = d.base_dist
    return d
