"""Draws, at each site of the guide, the values that the site's estimator asks for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro.distributions import ExpandedDistribution
from torch import Tensor
from torch.distributions import Independent

from pyro_sparse.estimators import Estimator, Plate, Site, Slots
from pyro_sparse.estimators.base import Enumeration, lists_outcomes, require_outcomes
from pyro_sparse.infer.expansion import layouts
from pyro_sparse.infer.expansion.law import law, padded_law, with_unrounded_logits
from pyro_sparse.infer.expansion.masked_rows import MaskedRowsMessenger
from pyro_sparse.infer.expansion.messengers import PlatesUnknownError, SparseSite
from pyro_sparse.infer.expansion.views import with_linear_log_prob, with_values
from pyro_sparse.infer.pyro_internals import PARTICLES, Frame, is_subsample


class EstimatorMessenger(MaskedRowsMessenger):
    """
    Lays out slots in dims of their own, as enumeration does, where a site's estimator draws them.

    Args:
        find: gives the estimator of a sample message, None for reparameterised sites.
        nesting: dims to the left of it belong to slots; infinite where no site may have any.
        args, kwargs: the guide's arguments, which baselines may see.
        subsamples: the indices that plates are to reuse.
        kind: "mode" puts each score-function site without slots at its mode.
        whole: the enumerated sites whose masked rows take all their outcomes; None for all.
        auto: the layout of sites with mode "auto".
    """

    owner = "EstimatorELBO"

    def __init__(
        self,
        find: Callable[[Any], Estimator | None],
        nesting: float,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        subsamples: Mapping[str, Tensor] | None = None,
        kind: str = "draw",
        whole: Collection[str] | None = None,
        auto: layouts.Layout = layouts.padded,
    ) -> None:
        self.knows_plates = nesting != float("inf")
        finite = int(nesting) if self.knows_plates else 0
        super().__init__(layouts.padded, finite, first_available_dim=-1 - finite, whole=whole)
        self.find = find
        self.args, self.kwargs = args, kwargs
        self.fixed = dict(subsamples or {})
        self.kind = kind
        self.auto = auto
        self.forget()

    def __enter__(self) -> EstimatorMessenger:
        self.forget()  # sequential enumeration begins a run again at each site that it comes to
        super().__enter__()
        return self

    def forget(self) -> None:
        """Makes it new for a run."""
        self.estimators: dict[str, Estimator] = {}
        self.slots: dict[str, Slots] = {}
        self.laws: dict[str, Any] = {}  # of sites whose slots were drawn: what from
        self.num_laid_out = 0
        self.packed: dict[str, Enumeration] = {}  # sites whose outcomes are rows for the model
        self.choosing: dict[str, Enumeration] = {}  # sites whose outcomes may be
        self.masked, self.narrowed = False, {}
        self.relaxed: list[str] = []  # sites with values between the outcomes
        self.reparameterized: list[str] = []  # sites with one value, whose KL divergence is taken in closed form

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg["fn"]):
            if msg["value"] is None:
                msg["value"] = self.fixed.get(msg["name"])
            return
        estimator = None if msg["is_observed"] or msg["done"] else self.find(msg)
        if estimator is None:
            return
        self.estimators[msg["name"]] = estimator
        msg["fn"] = with_unrounded_logits(msg["fn"])
        if estimator.reparameterizes:
            self.reparameterized.append(msg["name"])
            msg["value"] = estimator.reparameterized(self._site(msg, law(msg["fn"])))
        elif estimator.draws_slots:
            self._lay_out_slots(msg, estimator)
        elif self.kind == "mode":
            msg["value"] = mode(law(msg["fn"]), msg["name"])
        elif estimator.splits:
            msg["value"] = estimator.reparameterized(self._site(msg, law(msg["fn"])))

    @property
    def sites_to_choose(self) -> dict[str, SparseSite]:
        """The sparse sites with mode "auto"."""
        return {name: site for name, site in self.sites.items() if name in self.choosing}

    @property
    def split(self) -> frozenset[str]:
        """Sites whose value is attached for all but their own log-probabilities."""
        return frozenset(name for name, estimator in self.estimators.items() if estimator.splits)

    def _lay_out_slots(self, msg: Any, estimator: Estimator) -> None:
        name = msg["name"]
        if msg["infer"].get("enumerate") == "sequential":
            return  # one run for each outcome: the ELBO sees to it
        if not self.knows_plates:
            raise PlatesUnknownError
        if "_markov_scope" in msg["infer"]:
            raise ValueError(
                f"EstimatorELBO, site '{name}': expected no pyro.markov around a site with {type(estimator).__name__}, "
                "got one. Use SparseEnumELBO or TraceEnum_ELBO, which recycle its dims, or LeaveOneOut."
            )
        if (how := estimator.enumeration) is None:
            self.laws[name] = padded_law(msg["fn"], self._dims_right_of_slots())
            slots = estimator.draw(self._site(msg, self.laws[name]))
            missing = slots.values.dim() - 1 - len(msg["fn"].batch_shape + msg["fn"].event_shape)
            msg["fn"] = with_values(msg["fn"], slots.values.flatten(0, missing))  # those dims have size one
            if estimator.relaxes:
                msg["fn"] = with_linear_log_prob(msg["fn"], name)
                self.relaxed.append(name)
        else:
            if not getattr(law(msg["fn"]), "has_sparse_support", False):  # whose support it may list without all others
                require_outcomes(type(estimator).__name__, self._site(msg, law(msg["fn"])))
            self.layout = {"union": layouts.union, "auto": self.auto}.get(how.mode, layouts.padded)
            self.max_support = how.max_support
            if how.mode in ("packed", "auto"):
                (self.packed if how.mode == "packed" else self.choosing)[name] = how
        # Without the options that would make the stock messenger sample.
        infer = {key: value for key, value in msg["infer"].items() if key not in ("num_samples", "tmc")}
        msg["infer"] = {**infer, "enumerate": "parallel"}
        super()._pyro_sample(msg)
        self.num_laid_out += 1
        if how is None:
            self.slots[name] = slots._replace(values=msg["value"])

    def _dims_right_of_slots(self) -> int:
        """Of the next site: those of the plates, and one for each site before it that has slots."""
        return self.max_plate_nesting + self.num_laid_out

    def _site(self, msg: Any, drawn: Any) -> Site:
        return Site(
            msg["name"], drawn, data_plates(msg["cond_indep_stack"], {}, msg["fn"].batch_shape), self.args, self.kwargs
        )

    def _enumerates(self, msg: Any) -> bool:
        return msg["name"] not in self.laws and super()._enumerates(msg)

    def _pyro_post_sample(self, msg: Any) -> None:
        if "_enumerate_dim" in msg["infer"]:
            super()._pyro_post_sample(msg)


def lists_by(estimators: Mapping[str, Estimator | None], mode: str) -> bool:
    """Whether the outcomes of some site are to be listed in this mode."""
    asked = (e.enumeration for e in estimators.values() if e is not None)
    return any(how is not None and how.mode == mode for how in asked)


def data_plates(
    frames: tuple[Frame, ...], subsamples: Mapping[str, Tensor], batch_shape: tuple[int, ...]
) -> tuple[Plate, ...]:
    """
    The vectorised plates among a site's frames, outermost first, without the particles'. One that was made without a
    size has that of the site's batch.
    """
    plates = []
    for f in frames:
        if f.vectorized and f.name != PARTICLES:
            own = batch_shape[f.dim] if len(batch_shape) >= -f.dim else 1
            size, full_size = (own, own) if f.size == -1 else (f.size, f.full_size)
            plates.append(Plate(f.name, f.dim, size, full_size, subsamples.get(f.name)))
    return tuple(sorted(plates, key=lambda plate: plate.dim))


def mode(fn: Any, site: str) -> Tensor:
    """The most probable outcome, the first of several; ``fn.mode`` where the outcomes cannot be listed."""
    with torch.no_grad():
        if isinstance(fn, Independent):
            return mode(fn.base_dist, site)
        if lists_outcomes(fn):
            outcomes = fn.enumerate_support(expand=True)
            best = fn.log_prob(outcomes).argmax(0, keepdim=True)
            index = best.reshape(best.shape + (1,) * len(fn.event_shape)).expand((1, *outcomes.shape[1:]))
            return outcomes.gather(0, index)[0]
        if isinstance(fn, ExpandedDistribution):
            return mode(fn.base_dist, site).expand(fn.batch_shape + fn.event_shape)
        try:
            return fn.mode
        except NotImplementedError as error:
            raise ValueError(
                f"SelfCritic, site '{site}': expected a distribution with a mode, got {fn}. Use SampleBaseline, which "
                "takes a second draw, or LeaveOneOut(n)."
            ) from error
