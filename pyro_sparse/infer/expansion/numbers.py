"""
Sites by the numbers of their outcomes: what Pyro's posterior marginals and draws can hold.

They take outcomes for whole numbers, one batch dim each, and make distributions of logits by ``type(d)(logits=...)``.
So vectors of bits, say, cannot pass, and of a family whose logits are something else comes another distribution. Here
such a site is a ``Categorical`` over the rows of its ``enumerate_support()``, the program has the rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyro.distributions as dist
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

from pyro_sparse.distributions.discrete.projected import ProjectedDistribution
from pyro_sparse.infer.expansion.law import law

#: families of which ``type(d)(logits=...)`` is one again, with a logit for each outcome
_BY_LOGITS = (Categorical, OneHotCategorical, ProjectedDistribution)


class Numbers(Messenger):
    """
    In a model: puts numbers at its enumerated sites, which are seen by what is around it, and outcomes in the program.

    Args:
        held: the sites whose values come from elsewhere.
    """

    def __init__(self, held: Collection[str] = ()) -> None:
        super().__init__()
        self.held = held
        self.laws: dict[str, Any] = {}  # the family of each site, without masks
        self.in_markov = False  # whether one of them is in a pyro.markov
        self.outcomes: dict[str, Tensor] = {}  # of those that have numbers, ``(K,) + event_shape``

    def _pyro_sample(self, msg: Any) -> None:
        fn, infer, name = msg["fn"], msg["infer"], msg["name"]
        if msg["done"] or msg["is_observed"] or name in self.held or infer.get("enumerate") != "parallel":
            return
        drawn = law(fn)
        listed = getattr(drawn, "has_enumerate_support", False) and infer.get("num_samples") is None
        if not listed:  # it is for Pyro to sample it, or to say that it cannot be enumerated
            return
        self.laws[name] = drawn
        self.in_markov |= "_markov_scope" in infer
        if not isinstance(fn, Categorical | Bernoulli):
            values = drawn.enumerate_support(expand=False)
            self.outcomes[name] = values.reshape(values.shape[:1] + drawn.event_shape)
            msg["fn"] = _numbers(fn)

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.outcomes and not msg["is_observed"]:
            msg["value"] = self.outcomes[msg["name"]][msg["value"]]

    def marginal(self, name: str, logits: Tensor) -> Any:
        """The distribution of a site with one logit for each outcome."""
        drawn = self.laws[name]
        if isinstance(drawn, Bernoulli):
            return type(drawn)(logits=logits[..., 1] - logits[..., 0])
        return (type(drawn) if isinstance(drawn, _BY_LOGITS) else dist.Categorical)(logits=logits)


class Outcomes(Messenger):
    """Around what replays numbers: puts the outcomes in their place."""

    def __init__(self, outcomes: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.outcomes = outcomes

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.outcomes and msg["done"] and not msg["is_observed"]:
            msg["value"] = self.outcomes[msg["name"]][msg["value"]]


def _numbers(fn: Any) -> Any:
    if isinstance(fn, MaskedDistribution):
        return _numbers(fn.base_dist).mask(fn._mask)
    return dist.Categorical(logits=fn.log_prob(fn.enumerate_support(expand=False)).movedim(0, -1))
