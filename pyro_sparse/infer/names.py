"""The names by which estimators are given to sites, and what is wrong with one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pyro.distributions import Unit

from pyro_sparse.infer.expansion.law import law

_LAST_NUMBER = re.compile(r"\d+((?:\D?\*)*)$")


def group(name: str, frames: Any) -> str:
    """
    What the sites of a sequential plate are called together: ``z_*`` for ``z_0``, ``z_1``, ..., in nested ones
    ``z_*_*``. Elsewhere a number may say which layer or which step it is: there the name is its own.
    """
    for frame in frames:
        if not frame.vectorized:
            name = _LAST_NUMBER.sub(r"*\1", name)
    return name


def names_in(trace: Any, sites: Iterable[str]) -> set[str]:
    """The names that entries may have for some sites of a trace."""
    return {name for site in sites for name in (site, group(site, trace.nodes[site]["cond_indep_stack"]))}


def check_names(
    unknown: Callable[[set[str]], set[str]], guide_trace: Any, found: Mapping[str, Any], run_model: Callable[[], Any]
) -> None:
    """
    Raises for entries of names that no estimator can serve; warns of those that are observed now, since they may be
    latent in other batches.

    Args:
        unknown: gives the entries that are for none of some sites.
        guide_trace, found: the guide's sites, and what serves the latent ones: None for reparameterised ones.
        run_model: gives a trace of the model, if there are other entries.
    """
    served = [name for name, estimator in found.items() if estimator is not None]
    names = names_in(guide_trace, [*served, *guide_trace.observation_nodes])
    if not (waiting := unknown(names)):
        return
    model_trace = run_model()
    observed = [name for name in model_trace.observation_nodes if _may_be_served(model_trace.nodes[name]["fn"])]
    if wrong := waiting - names_in(model_trace, observed):
        raise ValueError(
            f"EstimatorELBO: expected entries for the sites {sorted(names)} or '*', got {sorted(wrong)}. "
            "Correct the name; a site that not every run reaches names its estimator in infer."
        )
    warnings.warn(
        f"EstimatorELBO: expected entries for latent sites, got {sorted(waiting)}, observed in the first "
        "batch. They serve once the guide draws them; if it never does, leave them out.",
        stacklevel=2,
    )


def _may_be_served(fn: Any) -> bool:
    """Whether a site with this distribution, were it latent, could have an estimator."""
    return not (getattr(fn, "has_rsample", False) or isinstance(law(fn), Unit))
