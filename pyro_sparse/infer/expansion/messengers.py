"""The messenger that makes Pyro's parallel enumeration run over a sparse support."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from pyro_sparse.distributions import SparseDistribution
from pyro_sparse.distributions.unwrapped import unwrapped
from pyro_sparse.infer.expansion.law import masks, with_unrounded_logits
from pyro_sparse.infer.expansion.layouts import Layout, dense, padded
from pyro_sparse.infer.expansion.views import with_values
from pyro_sparse.infer.pyro_internals import global_ids


class PlatesUnknownError(Exception):
    """A site that is to have slots was reached by a run that does not know how many dims plates have."""


@dataclass(frozen=True)
class SparseSite:
    """
    What one enumerated site had: the support size of each row (0 if masked), the number of outcomes, if known, and the
    name of its layout.
    """

    support_size: Tensor
    num_outcomes: int | None
    layout: str


def outside_window(owner: str, name: str, where: str) -> ValueError:
    """What to raise at a site that depends on one outside of its ``pyro.markov``'s window."""
    return ValueError(
        f"{owner}, site '{name}': expected a distribution that depends on enumerated sites within pyro.markov's window "
        f"only, got one that depends {where}, whose dim another site may have. Raise history=, or leave pyro.markov "
        "out."
    )


class SparseEnumMessenger(EnumMessenger):
    """
    :class:`~pyro.poutine.enum_messenger.EnumMessenger` that enumerates what ``layout`` says at sites whose
    distribution has a sparse support, and is the stock messenger at all others.

    Args:
        layout: see :mod:`pyro_sparse.infer.expansion.layouts`.
        max_plate_nesting: dims to the left of it belong to enumerated sites.
        guide_sites: None in a guide, where every sparse site is enumerated; in a model, the names of the guide's
            sites: the others are enumerated where ``infer`` asks for it.
        max_support: the largest support of one row that is accepted.
        first_available_dim: as in the stock messenger.
    """

    owner = "SparseEnumELBO"  # in errors

    def __init__(
        self,
        layout: Layout,
        max_plate_nesting: int,
        *,
        guide_sites: Collection[str] | None = None,
        max_support: int | None = None,
        first_available_dim: int | None = None,
    ) -> None:
        super().__init__(first_available_dim)
        self.layout = layout
        self.max_plate_nesting = max_plate_nesting
        self.guide_sites = guide_sites
        self.max_support = max_support
        self.visited: set[str] = set()
        self.sites: dict[str, SparseSite] = {}
        self.laid_out: list[str] = []  # all sites that have several values in a dim of their own

    @property
    def in_markov(self) -> bool:
        """Whether a site of the last run was in a ``pyro.markov``."""
        return bool(self._markov_depths)

    def _pyro_sample(self, msg: Any) -> None:
        if self.guide_sites is None and not msg["done"] and not msg["is_observed"]:
            msg["fn"] = with_unrounded_logits(msg["fn"])
        if not msg["done"] and not msg["is_observed"] and self._enumerates(msg):
            values = self._lay_out(msg)
            msg["infer"] = {"enumerate": "parallel", **msg["infer"]}
            msg["fn"] = with_values(msg["fn"], values)
        self.visited.add(msg["name"])
        if self.in_markov and isinstance(msg["fn"], TorchDistributionMixin) and not msg["done"]:
            self._check_dims(msg)
        super()._pyro_sample(msg)
        if "_enumerate_dim" in msg["infer"] and msg["name"] not in self.laid_out:
            self.laid_out.append(msg["name"])

    def _check_dims(self, msg: Any) -> None:
        """Raises where a dim of the distribution does not tell whose it is: ``pyro.markov`` gives dims again."""
        fn, scope = msg["fn"], msg["infer"].get("_markov_scope", {})
        steps = [self._value_dims[name] for name, depth in scope.items() if self._markov_depths[name] == depth]
        for dim in range(-len(fn.batch_shape), -self.max_plate_nesting):
            if fn.batch_shape[dim] == 1 or len({dims[dim] for dims in steps if dim in dims} | global_ids(dim)) == 1:
                continue
            if owners := [name for name, dims in self._value_dims.items() if dim in dims]:
                raise outside_window(self.owner, msg["name"], f"on one of the sites {owners}")

    def _enumerates(self, msg: Any) -> bool:
        fn, infer, name = msg["fn"], msg["infer"], msg["name"]
        if self.guide_sites is not None and (name in self.guide_sites or infer.get("enumerate") != "parallel"):
            return False
        if not isinstance(fn, SparseDistribution):
            if not isinstance(base := unwrapped(fn), SparseDistribution):
                return False
            raise ValueError(
                f"{self.owner}, site '{name}': expected one outcome per plate element, got {base} under .to_event() "
                f"or another wrapper ({type(fn).__name__}). Use a pyro.plate for its batch dims."
            )
        # With num_samples the user asks for local Monte Carlo sampling, which the stock messenger does.
        return infer.get("num_samples") is None

    def _lay_out(self, msg: Any) -> Tensor:
        fn, name = msg["fn"], msg["name"]
        asked = msg["infer"].get("enumerate_support", "sparse")
        if asked not in ("sparse", "dense"):
            raise ValueError(
                f"{self.owner}, site '{name}': expected infer['enumerate_support'] 'sparse' or 'dense', "
                f"got {asked!r}. Leave it out for the sparse support."
            )
        if self.guide_sites is not None and asked == "sparse" and not _is_open(fn):
            # Its masked rows have log-probability zero at all K outcomes, be there probability or not.
            asked = "dense"
        if asked == "dense" and not fn.has_enumerate_support:
            raise ValueError(
                f"{self.owner}, site '{name}': expected a distribution that lists its outcomes for "
                f"infer['enumerate_support'] 'dense' or under .mask() in the model, got {fn}. Leave these out."
            )
        sizes = fn.support_size
        if self.max_support is not None and asked == "sparse" and int(sizes.max()) > self.max_support:
            raise ValueError(
                f"{self.owner}, site '{name}': expected supports of at most max_support={self.max_support} outcomes, "
                f"got {int(sizes.max())}. Raise max_support, or use a sparser projection or larger scores."
            )
        layout = dense if asked == "dense" else self.layout
        self.sites[name] = SparseSite(sizes, fn.num_outcomes, layout.__name__)
        # In pyro.markov enumeration dims are recycled: values must not carry those of the site's parents.
        upstream = range(-len(fn.batch_shape), -self.max_plate_nesting)
        shared = tuple(upstream) if "_markov_scope" in msg["infer"] else ()
        return layout(name, fn, shared)


def _is_open(fn: SparseDistribution) -> bool:
    """Whether no row of it is masked: which outcomes are laid out depends on it, so a mask is read from the device."""
    return all(mask is None or bool(torch.as_tensor(mask).all()) for mask in masks(fn))


class ModelEnumMessenger(SparseEnumMessenger):
    """
    In a model: enumerates the marked sites that the guide lacks, in dims to the left of the guide's slots.

    Args:
        nesting: how many dims plates have.
        guide_sites: the guide's, which take its values.

    Raises:
        PlatesUnknownError: at a marked site, where ``nesting`` is not known yet.
    """

    owner = "EstimatorELBO"

    def __init__(self, nesting: float, guide_sites: Collection[str]) -> None:
        self.knows_plates = nesting != float("inf")
        super().__init__(padded, int(nesting) if self.knows_plates else 0, guide_sites=guide_sites)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in (self.guide_sites or ()):
            msg["infer"] = {**msg["infer"], "enumerate": None}
        elif not self.knows_plates and not msg["is_observed"] and msg["infer"].get("enumerate") == "parallel":
            raise PlatesUnknownError
        super()._pyro_sample(msg)
