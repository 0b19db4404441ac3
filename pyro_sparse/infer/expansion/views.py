"""
Views of a distribution, which draw nothing else: other values in place of all outcomes, log-probabilities between the
outcomes, or without a derivative with respect to the value. Handlers put them at a site; the distribution itself stays
what it is.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Bernoulli, Independent, OneHotCategorical

from pyro_sparse._relaxation import exact_logits, linear_log_prob
from pyro_sparse.distributions import SparseOneHotCategorical
from pyro_sparse.distributions.unwrapped import unwrapped
from pyro_sparse.infer.expansion.law import full_score_parts, law


def _view(fn: Any) -> Any:
    """What shares all that ``fn`` has computed: ``copy.copy`` may compute it again."""
    view = object.__new__(type(fn))
    view.__dict__.update(fn.__dict__)
    return view


def with_values(fn: Any, values: Tensor) -> Any:
    """A view of ``fn`` whose ``enumerate_support`` gives ``values``: what Pyro's enumeration reads."""
    view = _view(fn)
    view.__dict__["enumerate_support"] = functools.partial(_enumerate, values, fn.batch_shape + fn.event_shape)
    return view


def _enumerate(values: Tensor, shape: tuple[int, ...], expand: bool = True) -> Tensor:
    return values.expand(values.shape[:1] + shape) if expand else values


def with_whole_score(fn: Any) -> Any:
    """A view of ``fn`` whose score function is the log-probability in full, without masks."""
    view = _view(fn)
    view.__dict__["score_parts"] = functools.partial(full_score_parts, fn)
    return view


class LinearLogProbs(Messenger):
    """In a model: continues log-probabilities linearly between the outcomes of the named sites."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and not msg["is_observed"]:
            msg["fn"] = with_linear_log_prob(msg["fn"], msg["name"])


def with_linear_log_prob(fn: Any, site: str) -> Any:
    """A view of ``fn`` whose ``log_prob`` is linear in the value, and that of ``fn`` at its outcomes."""
    if not isinstance(unwrapped(fn), (Bernoulli, OneHotCategorical, SparseOneHotCategorical)):
        raise ValueError(
            f"EstimatorELBO, site '{site}': expected Bernoulli or OneHotCategorical in the model, too, got {fn}, at a "
            "site whose estimator relaxes it. Use RELAX."
        )
    view = _view(fn)
    view.__dict__["log_prob"] = functools.partial(_linear_log_prob, fn)
    view.__dict__["score_parts"] = functools.partial(_linear_score_parts, fn)
    return view


def _linear_score_parts(fn: Any, value: Tensor) -> ScoreParts:
    log_prob, drawn = _linear_log_prob(fn, value), law(fn)
    score = log_prob if drawn is fn else _linear_log_prob(drawn, value)
    return ScoreParts(log_prob, score, 0)  # type: ignore[arg-type]


def _linear_log_prob(fn: Any, value: Tensor) -> Any:
    if isinstance(fn, Independent):
        return sum_rightmost(_linear_log_prob(fn.base_dist, value), fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        return scale_and_mask(_linear_log_prob(fn.base_dist, value), mask=fn._mask)
    if isinstance(fn, Bernoulli):
        return linear_log_prob(exact_logits(fn).log_softmax(-1), torch.stack([value, 1 - value], -1))
    return linear_log_prob(fn.logits if isinstance(fn, SparseOneHotCategorical) else exact_logits(fn), value)


def with_fixed_value(fn: Any) -> Any:
    """A view whose log-probability has no derivative with respect to the value, and is the score function in full."""
    view = _view(fn)
    view.__dict__["log_prob"] = lambda value: fn.log_prob(value.detach())
    view.__dict__["score_parts"] = lambda value: full_score_parts(fn, value.detach())
    return view
