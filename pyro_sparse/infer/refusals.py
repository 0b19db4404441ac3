"""What the ELBOs refuse, and which sites give a model values that it may not take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger

from pyro_sparse.distributions.discrete.straight_through import is_straight_through
from pyro_sparse.estimators import Estimator

TWICE = (
    "EstimatorELBO: expected one derivative, got a derivative of it. Where an estimator draws, its loss stands for the "
    "first alone. Use Exact at every site, or SparseEnumELBO."
)


def refuse_guide_messenger(owner: str, guide: Any) -> None:
    """
    Raises for Pyro's effect-based guides (``GuideMessenger``: ``AutoNormalMessenger`` and its like). A run of one
    is a run of its model with the guide's draws in it, so its trace holds the model's sites too, and a loss that takes
    that trace for the guide's cancels the likelihood.
    """
    guide = poutine.unwrap(guide)
    if isinstance(guide, Messenger):
        raise NotImplementedError(
            f"{owner}: expected a guide function or module, got a GuideMessenger, {type(guide).__name__}. "
            "Write the guide as a function, or use pyro.infer.Trace_ELBO."
        )


def smooth_sites(trace: Any, estimators: Mapping[str, Estimator]) -> dict[str, Any]:
    """The guide's sites whose values have a pretended or a relaxed derivative: estimators, and the families' own."""
    found: dict[str, Any] = {name: e for name, e in estimators.items() if e.relaxes or e.reparameterizes}
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and is_straight_through(node["fn"]):
            found[name] = node["fn"]
    return found


def not_relaxed(sites: Mapping[str, Any], got: str) -> ValueError:
    """What to raise where a model cannot be differentiated with respect to these sites' values."""
    where = " or ".join(f"'{name}' ({type(what).__name__})" for name, what in sites.items())
    takes = "one-hot vectors and bits as numbers"
    fix = "Multiply the one-hot vector by an embedding's weights (z @ embedding.weight); or use RELAX, whose control "
    fix += "variate is a network."
    if any(getattr(what, "relaxes", False) for what in sites.values()):
        takes += ", and numbers between 0 and 1 in their place"
    if all(getattr(what, "splits", False) for what in sites.values()):
        takes, fix = "the value as a number", "Use LeaveOneOut or ScoreFunction."
    return ValueError(f"EstimatorELBO, site {where}: expected a model that takes {takes}, got one {got}. {fix}")
