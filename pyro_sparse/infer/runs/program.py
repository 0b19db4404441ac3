"""One run of guide and model: their traces, and what tells on which draws each part depends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sparse.estimators import Estimator
from pyro_sparse.infer.expansion.estimator_messenger import EstimatorMessenger
from pyro_sparse.infer.expansion.messengers import ModelEnumMessenger, PlatesUnknownError
from pyro_sparse.infer.expansion.views import LinearLogProbs
from pyro_sparse.infer.refusals import smooth_sites
from pyro_sparse.infer.runs.explanations import Alone, Several, explained
from pyro_sparse.infer.runs.provenance import LabelDraws, Provenance
from pyro_sparse.infer.runs.traces import Traces, compute_log_probs


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

    def run(
        self,
        kind: str = "draw",
        subsamples: Mapping[str, Tensor] | None = None,
        wrap: Callable[[Any], Any] | None = None,
    ) -> Traces:
        """
        Runs the guide, then the model on its values.

        Args:
            kind: "draw"; "mode" puts each score-function site without slots at its mode; "sample" as "draw".
            subsamples: the indices that plates are to reuse.
            wrap: goes around the guide, outside of what draws the slots.
        """
        messenger = EstimatorMessenger(self.find, self.nesting, self.args, self.kwargs, subsamples, kind)
        guide = messenger(self.guide)
        tracer = poutine.trace(guide if wrap is None else wrap(guide))
        provenance = Provenance() if self.watched else None
        with ExitStack() as stack:
            if provenance is not None:
                stack.enter_context(provenance.watching())
            try:
                with self._explained(tracer, messenger):
                    model_trace, guide_trace = self._traces(tracer, messenger, provenance)
                    names = guide_trace.nodes.items()
                    indices = {name: node["value"] for name, node in names if site_is_subsample(node)}
                    compute_log_probs(
                        model_trace, guide_trace, self.nesting, messenger.reparameterized, messenger.split
                    )
            except PlatesUnknownError:
                self.nesting = self.count_plates()
                begun = tracer.msngr.trace  # else the branches that lead to slots would be drawn less often
                wrap = wrap or (lambda guide: guide)
                return self.run(kind, subsamples, lambda guide: poutine.replay(wrap(guide), trace=begun))
        return Traces(model_trace, guide_trace, messenger, indices, self, provenance)

    def _traces(self, tracer: Any, messenger: EstimatorMessenger, provenance: Provenance | None) -> tuple[Any, Any]:
        with ExitStack() as stack:
            if provenance is not None:
                stack.enter_context(LabelDraws(provenance))
            guide_trace = tracer.get_trace(*self.args, **self.kwargs)
        sites = [name for name, node in guide_trace.nodes.items() if node["type"] == "sample"]
        enumerated = ModelEnumMessenger(self.nesting, sites)(self.model)
        model = poutine.replay(enumerated, trace=guide_trace)
        model = LinearLogProbs(messenger.relaxed)(model) if messenger.relaxed else model
        return poutine.trace(model).get_trace(*self.args, **self.kwargs), guide_trace

    def _explained(self, tracer: Any, messenger: EstimatorMessenger) -> AbstractContextManager[None]:
        """Around runs of guide and model."""

        def several() -> Several | None:
            particles = self.model is not self.alone.model
            return Several.of(messenger.estimators, particles) if messenger.num_laid_out or particles else None

        return explained(self.alone, several, lambda: smooth_sites(tracer.msngr.trace, messenger.estimators))
