"""Guides made from a model, as in :mod:`pyro.infer.autoguide`."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroParam
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor

from pyro_sparse.distributions import SparseCategorical, SparseOneHotCategorical
from pyro_sparse.infer.expansion.law import law
from pyro_sparse.infer.runs.provenance import OWN, LabelDraws, Provenance
from pyro_sparse.infer.runs.undisturbed import undisturbed
from pyro_sparse.projections import sparsemax

_FAMILIES: dict[Any, Any] = {
    **dict.fromkeys((SparseCategorical, dist.Categorical), SparseCategorical),
    **dict.fromkeys((SparseOneHotCategorical, dist.OneHotCategorical), SparseOneHotCategorical),
}


def _probs(fn: Any) -> Tensor | None:
    return getattr(law(fn), "probs", None)


class AutoSparseParallel(AutoGuide):
    r"""
    .. math:: q(z) = \prod_i q_i(z_i), \qquad q_i = \mathrm{projection}(\mathrm{scores}_i) \in \Delta^{K_i-1},

    a sparse mean-field guide, as :class:`~pyro.infer.autoguide.AutoDiscreteParallel` is a dense one, with priors that
    may be sparse: for :class:`SparseEnumELBO`, or :class:`EstimatorELBO` with ``Exact``. To begin with the scores are
    the prior's probabilities but for a constant, of which sparsemax makes the prior. What has prior probability zero,
    whatever other sites draw, is masked for good. Other latent sites are served by other guides, in an
    ``AutoGuideList``.

    Args:
        model: with latent sites that are categorical, sparse or not, integers or one-hot vectors.
        projection: maps scores to the simplex along the last dim.
        create_plates: as for :class:`~pyro.infer.autoguide.AutoGuide`.

    Raises:
        NotImplementedError: for a site of another family, or in a sequential plate.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        projection: Callable[..., Tensor] = sparsemax,
        *,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        self.projection = projection
        self._closed: dict[str, Tensor] = {}  # outcomes of prior probability zero

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        provenance = Provenance(own_draws=True)  # those of sites that are blocked
        again = poutine.trace(poutine.replay(self.model, trace=self.prototype_trace))
        with undisturbed(), poutine.block(), provenance.watching(), LabelDraws(provenance):
            trace = again.get_trace(*args, **kwargs)
            names = [name for name, _ in self._sites()]
            drawn = {n: provenance.of(_probs(trace.nodes[n]["fn"])) & {OWN, *names[:i]} for i, n in enumerate(names)}
        for name, site in self._sites():
            fn = law(site["fn"])
            if type(fn) not in _FAMILIES:
                raise NotImplementedError(
                    f"AutoSparseParallel, site '{name}': expected SparseCategorical, SparseOneHotCategorical, or the "
                    f"dense families of these, got {fn}. Block it, and add a guide for it to an AutoGuideList."
                )
            probs = fn.probs.detach()
            scores, closed = probs - probs.mean(-1, keepdim=True), (probs == 0) & (not drawn[name])
            for frame in self._subsampled(site):  # rows that are not here are as those that are
                scores = periodic_repeat(scores, frame.full_size, frame.dim - 1).contiguous()
                closed = closed.all(frame.dim - 1, keepdim=True)
            self._closed[name] = closed
            deep_setattr(self, f"scores.{name}", PyroParam(scores, event_dim=1))

    @staticmethod
    def _subsampled(site: Any) -> list[Any]:
        return [frame for frame in site["cond_indep_stack"] if frame.full_size not in (None, frame.size)]

    def _sites(self) -> list[tuple[str, Any]]:
        trace: Any = self.prototype_trace
        return list(trace.iter_stochastic_nodes())

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples each site; see :class:`~pyro.infer.autoguide.AutoGuide`."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates, result = self._create_plates(*args, **kwargs), {}
        for name, site in self._sites():
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                scores: Any = self.scores
                for part in name.split("."):
                    scores = getattr(scores, part)
                scores = scores.masked_fill(self._closed[name].to(scores.device), -math.inf)
                result[name] = pyro.sample(name, _FAMILIES[type(law(site["fn"]))](scores, self.projection))
        return result
