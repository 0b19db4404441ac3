"""The one place that computes costs per element, and the one that applies plates and the weights of slots."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.infer.pyro_internals import Frame
from pyro_sparse.infer.terms.dependencies import with_ancestors


@dataclass(frozen=True, slots=True)
class Term:
    """
    A summand of the ELBO.

    Attributes:
        name: the site that it comes from.
        value: scaled and masked, ``(*slots, *batch)``.
        frames: the site's vectorised plates.
        path: the attached part whose gradient belongs in the surrogate as it is; None if there is none.
        upstream: the score-function sites on whose draws it may depend; None if on all.
        collapsed: whether sites of the model are summed out in it: then the name is theirs.
    """

    name: str
    value: Tensor
    frames: frozenset[Frame]
    path: Tensor | None
    upstream: frozenset[str] | None = None
    collapsed: bool = False


@dataclass(frozen=True)
class SlotDim:
    """
    The dim in which one site laid out several values: the site, its plates, the weights ``(S, ..., *batch)``, and
    whether slots of weight zero have a cost all the same, because an estimator compares it.
    """

    site: str
    frames: frozenset[Frame]
    weights: Tensor
    relaxes: bool = False


class Costs:
    """
    The terms of one run of guide and model, to be summed over plates and averaged over slots.

    Args:
        terms: the summands of the ELBO.
        slots: the slot dims, by number from the right; later sites lie further to the left.
        attached: whether the costs keep their derivatives.
    """

    def __init__(self, terms: Iterable[Term], slots: Mapping[int, SlotDim], attached: bool = False) -> None:
        self.slots = dict(sorted(slots.items()))
        self.terms = list(terms)
        groups: dict[Any, Tensor] = {}
        for term in self.terms:
            self._check_plates(term)
            value = self.mask(term.value if attached else term.value.detach(), relaxed=False)
            value = self._without_gaps(value, term.frames)
            key = (term.frames, self.slot_dims(value), term.upstream)
            groups[key] = groups[key] + value if key in groups else value
        self._groups = groups

    def _check_plates(self, term: Term) -> None:
        for dim in self.slot_dims(term.value):
            slot = self.slots[dim]
            if missing := sorted(frame.name for frame in slot.frames - term.frames):
                raise ValueError(
                    f"EstimatorELBO, site '{slot.site}': expected its values to be used inside its plates only, got "
                    f"'{term.name}' outside of plate {missing}, where combinations of the values of all elements would "
                    "count. Draw one value per element there: ScoreFunction or LeaveOneOut."
                )

    def _without_gaps(self, value: Tensor, frames: Collection[Frame]) -> Tensor:
        """Summed over dims between its plates that are no plate's: nobody says that their elements are independent."""
        known = {frame.dim for frame in frames}.union(self.slots)
        gaps = [d for d in range(-value.dim(), 0) if d not in known and value.shape[d] > 1]
        return value.sum(gaps, keepdim=True) if gaps else value

    def slot_dims(self, value: Tensor) -> frozenset[int]:
        """The slot dims along which a tensor varies."""
        if not self.slots:
            return frozenset()
        return frozenset(dim for dim in self.slots if value.dim() >= -dim and value.shape[dim] > 1)

    def with_ancestors(self, dims: Collection[int]) -> frozenset[int]:
        """With those of all sites on which the weights of these dims depend, and so on."""
        return with_ancestors(dims, {dim: self.slot_dims(slot.weights) for dim, slot in self.slots.items()})

    def average(self, value: Tensor, keep: Collection[int] = ()) -> Tensor:
        """The weighted mean of a masked tensor over all slot dims but those to keep, last site first."""
        for dim, slot in self.slots.items():
            if dim not in keep and value.dim() >= -dim and value.shape[dim] > 1:
                value = (value * slot.weights).sum(dim, keepdim=True)
        return value

    def mask(self, value: Tensor, relaxed: bool = True) -> Tensor:
        """Zero at slots of weight zero (of relaxed ones, too?), whatever is there, and its gradient: log 0, say."""
        for dim in self.slot_dims(value):
            if relaxed or not self.slots[dim].relaxes:
                value = torch.where(self.slots[dim].weights > 0, value, 0.0)
        return value

    def at(self, frames: Collection[Frame], keep: Collection[int] = (), site: str | None = None) -> Tensor:
        """
        The cost of a site: one for each element of its plates and each of the slots to keep.

        Args:
            frames: the site's plates. Terms in further plates are summed over those.
            keep: slot dims of the site itself and of all its ancestors.
            site: leaves out the terms that do not depend on this site's draw, as far as that is known.
        """
        parts = [
            sum_to(self.average(value, keep), own_frames, frames)
            for (own_frames, _, upstream), value in self._groups.items()
            if site is None or upstream is None or site in upstream
        ]
        return sum(parts[1:], parts[0]) if parts else torch.zeros(())

    def paths(self) -> list[Tensor]:
        """The attached terms, each averaged and summed: pathwise derivatives and the model's gradient."""
        paths = [term.path for term in self.terms if term.path is not None]
        return [self.average(self.mask(path)).sum() if path.dim() else path for path in paths]

    def weight(self, dims: Collection[int]) -> Tensor | None:
        """The product of the weights of some slot dims; None without any."""
        weight: Tensor | None = None
        for dim in dims:
            own = self.slots[dim].weights
            weight = own if weight is None else weight * own
        return weight


def sum_to(value: Tensor, frames: Iterable[Frame], target: Collection[Frame]) -> Tensor:
    """Sums over the plates that the target lacks, and drops leading dims of size one."""
    for frame in sorted(frames, key=lambda frame: frame.dim or 0):  # a set's order is another in every process
        if frame not in target and value.dim() >= -frame.dim and value.shape[frame.dim] != 1:
            value = value.sum(frame.dim, keepdim=True)
    while value.dim() and len(value) == 1:
        value = value.squeeze(0)
    return value


def subsampling_scale(frames: Iterable[Frame]) -> float:
    """What a site's plates multiply its log-probability by: the product of full over present sizes."""
    scale = 1.0
    for frame in sorted(frames, key=lambda frame: frame.name):  # as in sum_to
        scale *= frame.full_size / frame.size
    return scale
