"""Which terms of the ELBO depend on which draws: for ``costs="graph"``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.infer.tracegraph_elbo import TrackNonReparam
from pyro.ops.provenance import get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_sparse.estimators.base import lists_outcomes
from pyro_sparse.infer.undisturbed import undisturbed

TermName = tuple[str, str]  # "model" or "guide", and the site
TRIES = 4  # draws by which a dependency that provenance missed may show


class Dependencies:
    """
    Finds by provenance, as :class:`~pyro.infer.TraceGraph_ELBO` does, which score-function sites each term of the ELBO
    depends on: once for each structure of the program, and not at every step.

    Provenance is lost in ``.item()``, Python branches and in-place writes. So each site is drawn again while all
    others stay, and if a term changes that should not, it raises.
    """

    def __init__(self) -> None:
        self._known: dict[Any, dict[TermName, frozenset[str]]] = {}

    def find(
        self, program: Any, model_trace: Any, guide_trace: Any, subsamples: Mapping[str, Tensor]
    ) -> Mapping[TermName, frozenset[str]]:
        """
        For each term the sites that it depends on.

        Args:
            program: the :class:`~pyro_sparse.infer.program.Program` of whose run these are the traces.
            subsamples: the indices that its plates had.
        """
        structure = (tuple(guide_trace.nodes), tuple(model_trace.nodes))
        if structure not in self._known:

            def run(trace: Any, track: Messenger | None = None) -> dict[TermName, Tensor]:
                with undisturbed(), poutine.block(), _Plates(subsamples), track or nullcontext():
                    return _log_probs(program.model, program.guide, program.args, program.kwargs, trace)

            # Drawn anew, not replayed: a draw carries the provenance of its distribution's parameters.
            terms = run(poutine.Trace(), TrackNonReparam())
            found = {name: frozenset(get_provenance(value)) for name, value in terms.items()}
            _check(found, guide_trace, run)
            self._known[structure] = found
        return self._known[structure]


class _Plates(Messenger):
    """Gives plates the indices that they had."""

    def __init__(self, subsamples: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.subsamples = subsamples

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["value"] is None:
            msg["value"] = self.subsamples.get(msg["name"])


def _log_probs(model: Any, guide: Any, args: Any, kwargs: Any, trace: Any) -> dict[TermName, Tensor]:
    guide_trace = poutine.trace(poutine.replay(guide, trace=trace)).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    terms = {}
    for kind, own in (("guide", guide_trace), ("model", model_trace)):
        own.compute_log_prob(lambda name, node: not isinstance(node["fn"], _Subsample))
        for name, node in own.nodes.items():
            if node["type"] == "sample" and not isinstance(node["fn"], _Subsample):
                terms[kind, name] = node["log_prob"]
    return terms


def _check(found: Mapping[TermName, frozenset[str]], guide_trace: Any, run: Callable[[Any], Any]) -> None:
    """Draws each site again, the others as they are: no term may change that does not depend on it."""
    before = run(guide_trace)
    if set(before) != set(found):
        raise _lost(sorted({name for _, name in set(before) ^ set(found)})[0], "it in some runs only")
    for site in guide_trace.stochastic_nodes:
        node = guide_trace.nodes[site]
        if getattr(node["fn"], "has_rsample", False):
            continue
        for value in _other_draws(node):
            changed = guide_trace.copy()
            changed.nodes[site] = {**node, "value": value}
            after = run(changed)
            if set(after) != set(before):
                raise _lost(site, f"other sites {sorted({name for _, name in set(after) ^ set(before)})}")
            for term, log_prob in before.items():
                if site not in found[term] and not torch.equal(log_prob, after[term]):
                    raise _lost(site, f"a change in the {term[0]}'s '{term[1]}', which provenance did not find")


def _other_draws(node: Any) -> list[Tensor]:
    fn, value = node["fn"], node["value"]
    if node["infer"].get("_enumerate_dim") is not None:
        return [value.roll(1, 0)]
    if lists_outcomes(fn):
        return list(fn.enumerate_support(expand=True)[:TRIES])
    with undisturbed():
        return [fn.sample() for _ in range(TRIES)]


def _lost(site: str, what: str) -> ValueError:
    return ValueError(
        f"EstimatorELBO, site '{site}': expected for costs='graph' a program of tensor operations, got {what}. "
        "Something leaves torch: .item(), a Python branch, an in-place write. Use costs='plates', always right."
    )
