"""One run of guide and model: their traces, and what tells on which draws each part depends."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sparse.estimators import Estimator
from pyro_sparse.infer.expansion.choice import Choice
from pyro_sparse.infer.expansion.estimator_messenger import EstimatorMessenger
from pyro_sparse.infer.expansion.layouts import Layout, padded
from pyro_sparse.infer.expansion.messengers import ModelEnumMessenger, PlatesUnknownError, SparseSite
from pyro_sparse.infer.expansion.rows import Ran, Rows, rows_of
from pyro_sparse.infer.expansion.views import LinearLogProbs
from pyro_sparse.infer.refusals import smooth_sites
from pyro_sparse.infer.runs.explanations import Alone, Several, explained
from pyro_sparse.infer.runs.on_rows import Compared, OnRows
from pyro_sparse.infer.runs.provenance import LabelDraws, Provenance
from pyro_sparse.infer.runs.traces import Traces, compute_log_probs
from pyro_sparse.infer.runs.window import require_window


@dataclass
class Program:
    """
    A guide and a model with their arguments.

    Attributes:
        find: gives the estimator of a sample site, None for reparameterised ones.
        count_plates: gives the number of dims that plates may have: those to the left belong to slots.
        nesting: that number; infinite where it is not known yet.
        alone: the same without a plate of particles around guide and model.
        watched: whether what depends on which draw is noted down.
        compared: what packed rows were compared with ordinary runs.
        choice: chooses for sites with mode "auto".
        closed_form: whether closed-form divergences are taken, beside which nothing is packed.
        within: sites in ``pyro.markov`` whose window was looked at.
    """

    model: Any
    guide: Any
    args: Any
    kwargs: Any
    find: Callable[[Any], Estimator | None]
    count_plates: Callable[[], float]
    nesting: float
    alone: Alone
    watched: bool = False
    compared: Compared = field(default_factory=Compared)
    choice: Choice = field(default_factory=Choice)
    closed_form: bool = False
    within: set[frozenset[str]] = field(default_factory=set)

    def run(
        self,
        kind: str = "draw",
        subsamples: Mapping[str, Tensor] | None = None,
        wrap: Callable[[Any], Any] | None = None,
        whole: Collection[str] | None = None,
        probe: Layout | None = None,
    ) -> Traces:
        """
        Runs the guide, then the model on its values.

        Args:
            kind: "draw"; "mode" puts each score-function site without slots at its mode; "sample" as "draw".
            subsamples: the indices that plates are to reuse.
            wrap: goes around the guide, outside of what draws the slots.
            whole: the sites whose masked rows are laid out in full; None for all.
            probe: the layout of sites with mode "auto"; None for the cheapest.
        """
        auto = probe or (self.choice.layout(int(self.nesting)) if self.nesting < math.inf else padded)
        messenger = EstimatorMessenger(self.find, self.nesting, self.args, self.kwargs, subsamples, kind, whole, auto)
        guide = messenger(self.guide)
        tracer = poutine.trace(guide if wrap is None else wrap(guide))
        provenance = Provenance() if self.watched else None
        with ExitStack() as stack:
            if provenance is not None:
                stack.enter_context(provenance.watching())
            try:
                with self._explained(tracer, messenger):
                    guide_trace = self._guide_trace(tracer, provenance)
                    model_trace, rows, ran_on = self._model_trace(guide_trace, messenger, probe is not None)
                    names = guide_trace.nodes.items()
                    indices = {name: node["value"] for name, node in names if site_is_subsample(node)}
                    compute_log_probs(
                        model_trace, guide_trace, self.nesting, messenger.reparameterized, messenger.split
                    )
            except PlatesUnknownError:
                self.nesting = self.count_plates()
                begun = tracer.msngr.trace  # else the branches that lead to slots would be drawn less often
                wrap = wrap or (lambda guide: guide)
                return self.run(kind, subsamples, lambda guide: poutine.replay(wrap(guide), trace=begun), probe=probe)
        self._check_window(model_trace)
        if probe is None and rows is None and messenger.choosing:
            self.choice.learn(messenger.sites_to_choose, model_trace, guide_trace)
        return Traces(model_trace, guide_trace, messenger, indices, self, provenance, rows, ran_on)

    def _check_window(self, model_trace: Any) -> None:
        """Raises, at the first run of each chain, if a site depends on one outside of its window."""
        nodes = model_trace.nodes.items()
        sites = frozenset(
            n for n, node in nodes if {"_markov_scope", "_enumerate_dim"} <= (node.get("infer") or {}).keys()
        )
        if sites and sites not in self.within and is_validation_enabled():
            require_window(self.alone, sites)
            self.within.add(sites)

    def sites_of_probe(self, layout: Layout) -> dict[str, SparseSite]:
        """The sites with mode "auto" of a run in which they have this layout."""
        return replace(self, watched=False).run(probe=layout).expansion.sites_to_choose

    def _guide_trace(self, tracer: Any, provenance: Provenance | None) -> Any:
        with nullcontext() if provenance is None else LabelDraws(provenance):
            return tracer.get_trace(*self.args, **self.kwargs)

    def _model_trace(
        self, guide_trace: Any, messenger: EstimatorMessenger, probing: bool
    ) -> tuple[Any, Rows | None, Ran | None]:
        """The model's trace; the packed rows and their number, if it ran on such."""
        sites = [name for name, node in guide_trace.nodes.items() if node["type"] == "sample"]
        model = ModelEnumMessenger(self.nesting, sites)(self.model)
        model = LinearLogProbs(messenger.relaxed)(model) if messenger.relaxed else model
        on = self._on_rows(messenger)
        rows = rows_of("EstimatorELBO", guide_trace, messenger.packed)

        def agree(rows: Rows) -> bool:
            known_in_slots = self.closed_form or messenger.reparameterized  # of which the prior must be
            return not known_in_slots and on.agrees(model, self.alone.args, self.alone.kwargs, guide_trace, rows)

        if messenger.choosing and not probing:
            rows = rows or self.choice.rows("EstimatorELBO", guide_trace, agree)
        model_trace, ran_on = on.model_trace(model, self.alone, guide_trace, rows)
        return model_trace, rows, ran_on

    def _on_rows(self, messenger: EstimatorMessenger) -> OnRows:
        """How the model is run on packed rows, where there are any."""
        asked = messenger.packed or messenger.choosing
        if not asked:
            return OnRows("EstimatorELBO", 0)
        options = {(e.chunk_rows, e.gather, e.check) for e in asked.values()}
        if len(options) > 1:
            raise ValueError(
                f"EstimatorELBO, site {' or '.join(map(repr, asked))}: expected the same chunk_rows, gather "
                "and check at all packed sites, which share their rows, got several. Use one Exact(...) for all."
            )
        [(chunk_rows, gather, check)] = options
        nesting = int(self.nesting)
        return OnRows("EstimatorELBO", nesting, chunk_rows, gather, self.compared, check, messenger.split)

    def _explained(self, tracer: Any, messenger: EstimatorMessenger) -> AbstractContextManager[None]:
        """Around runs of guide and model."""

        def several() -> Several | None:
            particles = self.model is not self.alone.model
            return Several.of(messenger.estimators, particles) if messenger.num_laid_out or particles else None

        return explained(self.alone, several, lambda: smooth_sites(tracer.msngr.trace, messenger.estimators))
