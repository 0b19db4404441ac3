"""Values between the outcomes of a discrete site: log-probabilities there, and models that cannot take them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping
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
from pyro_sparse.distributions.discrete.straight_through import is_straight_through, unwrapped
from pyro_sparse.estimators import Estimator
from pyro_sparse.infer.law import full_score_parts, law


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
    view = copy.copy(fn)
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
    """A view of ``fn`` whose log-probability has no derivative by the value, and is the score function in full."""
    view = copy.copy(fn)
    view.__dict__["log_prob"] = lambda value: fn.log_prob(value.detach())
    view.__dict__["score_parts"] = lambda value: full_score_parts(fn, value.detach())
    return view


def smooth_sites(trace: Any, estimators: Mapping[str, Estimator]) -> dict[str, Any]:
    """The guide's sites whose values have a pretended or a relaxed derivative: estimators, and the families' own."""
    found: dict[str, Any] = {name: e for name, e in estimators.items() if e.relaxes or e.reparameterizes}
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and is_straight_through(node["fn"]):
            found[name] = node["fn"]
    return found


def not_relaxed(sites: Mapping[str, Any], got: str) -> ValueError:
    """What to raise where a model cannot be differentiated by these sites' values."""
    where = " or ".join(f"'{name}' ({type(what).__name__})" for name, what in sites.items())
    takes = "one-hot vectors and bits as numbers"
    fix = "Multiply the one-hot vector by an embedding's weights (z @ embedding.weight); or use RELAX, whose control "
    fix += "variate is a network."
    if any(getattr(what, "relaxes", False) for what in sites.values()):
        takes += ", and numbers between 0 and 1 in their place"
    if all(getattr(what, "splits", False) for what in sites.values()):
        takes, fix = "the value as a number", "Use LeaveOneOut or ScoreFunction."
    return ValueError(f"EstimatorELBO, site {where}: expected a model that takes {takes}, got one {got}. {fix}")
