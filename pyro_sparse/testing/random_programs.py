"""Small random programs, one for each seed, on which sums over all outcomes must agree with stock enumeration.

A :class:`RandomProgram` is data: plates, latent sites, data; which site depends on which; and how each site is to be
summed. So a failure can be read, and cut down to fewer sites by :func:`dataclasses.replace`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_sparse.distributions import SparseCategorical
from pyro_sparse.estimators import Estimator, Exact, LocalExpectation, RaoBlackwell, UnorderedSet
from pyro_sparse.testing.estimator_models import EstimatorModel
from pyro_sparse.testing.estimator_programs import DATUM, Family
from pyro_sparse.testing.models import param, within

MOST_VALUES = 60  # of all latent sites together, in one element of the plates
SHAPES = ("unconnected", "chain", "tree", "any two")  # a diamond needs a site with two parents


class RandomPlate(NamedTuple):
    """A plate at a dim, and the rows that are seen of it: all, or a fixed subsample."""

    name: str
    dim: int
    full_size: int
    rows: tuple[int, ...] | None = None

    def __str__(self) -> str:
        seen = "" if self.rows is None else f", rows {list(self.rows)} of"
        return f"{self.name} (dim {self.dim}{seen} {self.full_size})"


class RandomSite(NamedTuple):
    """A latent site: what it depends on in the guide and in the model, and how its outcomes are summed."""

    name: str
    family: str
    outcomes: int
    plates: tuple[str, ...] = ()
    guide_parents: tuple[str, ...] = ()
    model_parents: tuple[str, ...] = ()
    mask: str = ""  # "poutine", "method", or the name of a parent, whose first outcome masks it out
    scale: float = 1.0
    how: str = "Exact"  # a key of HOW; or "parallel", by infer["enumerate"]
    by_infer: bool = False  # whether the estimator is in infer["estimator"]

    def __str__(self) -> str:
        where = f" in {'+'.join(self.plates)}" if self.plates else ""
        parents = f" given {list(self.guide_parents)} in the guide and {list(self.model_parents)} in the model"
        mask = f", mask by {self.mask}" if self.mask else ""
        scale = f", scale {self.scale}" if self.scale != 1 else ""
        how = self.how + (" by infer" if self.by_infer else "")
        return f"{self.name} ~ {self.family}({self.outcomes}){where}{parents}{mask}{scale}: {how}"


class RandomData(NamedTuple):
    """A term of the model: data, or a ``pyro.factor``."""

    name: str
    plates: tuple[str, ...]
    parents: tuple[str, ...]
    masked: bool = False
    scale: float = 1.0
    factor: bool = False

    def __str__(self) -> str:
        where = f" in {'+'.join(self.plates)}" if self.plates else ""
        rest = (", masked" if self.masked else "") + (f", scale {self.scale}" if self.scale != 1 else "")
        return f"{'factor' if self.factor else 'data'} {self.name}{where} of {list(self.parents)}{rest}"


FAMILIES: dict[str, Callable[[int], Family]] = {
    "Categorical": lambda k: Family(k, lambda scores: dist.Categorical(logits=scores)),
    "Bernoulli": lambda k: Family(2, lambda scores: dist.Bernoulli(logits=scores[..., 1] - scores[..., 0])),
    "OneHotCategorical": lambda k: Family(
        k, lambda scores: dist.OneHotCategorical(logits=scores), lambda value: value.argmax(-1)
    ),
    "SparseCategorical": lambda k: Family(k, lambda scores: SparseCategorical(1.5 * scores)),
}

# Estimators without noise where each element of a site is one variable: they sum over all of its K outcomes.
HOW: dict[str, Callable[[int], Estimator]] = {
    "Exact": lambda k: Exact(),
    "UnorderedSet": UnorderedSet,
    "RaoBlackwell": RaoBlackwell,
    "LocalExpectation": lambda k: LocalExpectation(),
}


@dataclass(frozen=True)
class RandomProgram:
    """
    A model and guide, and the sums that an ELBO is to take.

    Args:
        seed: what it was made from; the parameters' first values depend on it, too.
        plates, sites, data: the program. Sites come in an order in which each can be drawn.
        options: of the ELBO.
    """

    seed: int
    plates: tuple[RandomPlate, ...]
    sites: tuple[RandomSite, ...]
    data: tuple[RandomData, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: plates {', '.join(map(str, self.plates)) or 'none'}"]
        lines += [f"    {part}" for part in (*self.sites, *self.data)]
        return "\n".join([*lines, f"    ELBO's options {dict(self.options)}"])

    @property
    def nesting(self) -> int:
        """How many dims the plates take."""
        return max((-plate.dim for plate in self.plates), default=0)

    def model(self) -> None:
        plates = self._plates()
        values = self._latent(plates, "model")
        for datum in self.data:
            self._datum(datum, plates, values)

    def guide(self) -> None:
        self._latent(self._plates(), "guide")

    def served_guide(self) -> Callable[[], None]:
        """The guide, with what its sites ask for in ``infer``."""
        return poutine.infer_config(self.guide, self._infer)

    def estimators(self) -> dict[str, Estimator]:
        """Those of the sites that do not ask for one in ``infer``."""
        return {site.name: HOW[site.how](site.outcomes) for site in self.sites if site.how in HOW and not site.by_infer}

    def _infer(self, msg: Any) -> Any:
        for site in self.sites:
            if site.name == msg["name"] and site.how == "parallel":
                return {"enumerate": "parallel"}
            if site.name == msg["name"] and site.by_infer:
                return {"estimator": HOW[site.how](site.outcomes)}
        return {}

    def as_model(self) -> EstimatorModel:
        """For :func:`~pyro_sparse.testing.check_estimator`, whose estimators need not be noise-free."""
        return EstimatorModel(f"seed {self.seed}", self.model, self.guide, (), self.nesting)

    def _plates(self) -> dict[str, Any]:
        return {
            plate.name: pyro.plate(
                plate.name,
                plate.full_size,
                subsample=None if plate.rows is None else torch.tensor(plate.rows),
                dim=plate.dim,
            )
            for plate in self.plates
        }

    def _latent(self, plates: Mapping[str, Any], side: str) -> dict[str, Tensor]:
        """The numbers of the outcomes drawn."""
        values: dict[str, Tensor] = {}
        for site in self.sites:
            family = FAMILIES[site.family](site.outcomes)
            sparse_prior = side == "model" and site.family == "SparseCategorical"
            make = FAMILIES["Categorical"](site.outcomes).make if sparse_prior else family.make
            parents = site.guide_parents if side == "guide" else site.model_parents
            fn = make(self._look_up(f"{side}.{site.name}", plates, site.plates, parents, values, site.outcomes))
            contexts = [plates[name] for name in site.plates]
            mask = self._mask(site, plates, values)
            if site.mask == "method":
                fn = fn.mask(mask)
            elif mask is not None:
                contexts.append(poutine.mask(mask=mask))
            if site.scale != 1:
                contexts.append(poutine.scale(scale=site.scale))
            with within(contexts):
                values[site.name] = family.number(pyro.sample(site.name, fn))
        return values

    def _datum(self, datum: RandomData, plates: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
        loc = self._look_up(f"model.{datum.name}", plates, datum.plates, datum.parents, values)
        contexts: list[AbstractContextManager[Any]] = [plates[name] for name in datum.plates]
        if datum.masked:
            contexts.append(poutine.mask(mask=_even(datum.plates, plates)))
        if datum.scale != 1:
            contexts.append(poutine.scale(scale=datum.scale))
        with within(contexts):
            if datum.factor:
                pyro.factor(datum.name, loc)
            else:
                pyro.sample(datum.name, dist.Normal(2 * loc, 1.0), obs=DATUM)

    def _mask(self, site: RandomSite, plates: Mapping[str, Any], values: Mapping[str, Tensor]) -> Any:
        if not site.mask:
            return None
        if site.mask in values:
            return values[site.mask] > 0
        return _even(site.plates, plates) if site.plates else torch.tensor(False)

    def _look_up(
        self,
        name: str,
        plates: Mapping[str, Any],
        inside: Sequence[str],
        parents: Sequence[str],
        values: Mapping[str, Tensor],
        size: int | None = None,
    ) -> Tensor:
        """Rows of a table of parameters, one for each position in the plates and for each outcome of the parents."""
        sizes = [p.full_size for p in self.plates if p.name in inside]
        outcomes = {site.name: site.outcomes for site in self.sites}
        sizes += [outcomes[parent] for parent in parents]
        rows = param(f"{self.seed}.{name}", *sizes, *(() if size is None else (size,)))
        where = [_position(plates[p.name]) for p in self.plates if p.name in inside]
        return rows[(*where, *(values[parent] for parent in parents))] if sizes else rows


def _position(plate: Any) -> Tensor:
    """The index of each row of a plate, shaped to broadcast."""
    index: Tensor = plate.indices.reshape((-1,) + (1,) * (-1 - plate.dim))
    return index


def _even(inside: Sequence[str], plates: Mapping[str, Any]) -> Any:
    """True at about half of the elements."""
    total: Any = torch.zeros((), dtype=torch.long)
    for name in inside:
        total = total + _position(plates[name])
    return total % 2 == 0


def random_program(seed: int) -> RandomProgram:
    """
    The program of a seed; the same at every call.

    Plates to depth 3, also side by side, also subsampled; one to five sites of 2, 3 or 5 outcomes in chains, trees,
    diamonds and apart, each in any of the plates around its parents' dependents; masks and scales (the same in model
    and guide); data and factors that see some of the sites. Where a site depends on another, it is in all of that
    one's plates: else enumeration would be wrong.
    """
    rng = random.Random(seed)
    plates = _random_plates(rng)
    sites = _random_sites(rng, [plate.name for plate in plates])
    data = _random_data(rng, [plate.name for plate in plates], sites)
    options: dict[str, Any] = {}
    if rng.random() < 0.8:
        options["max_plate_nesting"] = max((-plate.dim for plate in plates), default=0)
    if rng.random() < 0.3:
        options["analytic_kl"] = True
    if rng.random() < 0.3:
        options["costs"] = "graph"
    if rng.random() < 0.15:
        options.update(num_particles=2, vectorize_particles=rng.random() < 0.5)
    return RandomProgram(seed, plates, sites, data, options)


def _random_plates(rng: random.Random) -> tuple[RandomPlate, ...]:
    plates = []
    for name, dim in zip("abc"[: rng.choice((0, 1, 1, 2, 2, 3))], (-1, -2, -3), strict=False):
        size = rng.choice((1, 2, 2, 3))
        full = size + rng.choice((0, 0, 1, 2))
        rows = tuple(rng.sample(range(full), size)) if full > size else None
        plates.append(RandomPlate(name, dim, full, rows))
    return tuple(plates)


def _random_sites(rng: random.Random, plates: Sequence[str]) -> tuple[RandomSite, ...]:
    sites: list[RandomSite] = []
    layout = rng.choice(("together", "inwards", "anywhere", "anywhere"))
    shapes = {side: rng.choice(SHAPES) for side in ("guide", "model")}
    count, values = rng.choice((1, 2, 2, 3, 3, 4, 5)), 1
    for j in range(count):
        family = rng.choice(tuple(FAMILIES))
        outcomes = 2 if family == "Bernoulli" else rng.choice((2, 3, 3, 5))
        values *= outcomes
        if values > MOST_VALUES:
            break
        inside = {
            "together": tuple(plates),
            "inwards": tuple(plates[: (j + 1) * len(plates) // count]),
            "anywhere": _some(rng, plates),
        }[layout]
        eligible = [site.name for site in sites if set(site.plates) <= set(inside)]
        guide_parents = _random_parents(rng, shapes["guide"], eligible)
        model_parents = _random_parents(rng, shapes["model"], eligible)
        by_a_parent = [name for name in guide_parents if name in model_parents] or [""]
        how = rng.choice(("parallel", *HOW))
        sites.append(
            RandomSite(
                f"z{j}",
                family,
                outcomes,
                inside,
                guide_parents,
                model_parents,
                mask=rng.choice(("", "", "", "", "", "poutine", "method", rng.choice(by_a_parent))),
                scale=rng.choice((1.0, 1.0, 1.0, 0.3)),
                how=how,
                by_infer=how != "parallel" and rng.random() < 0.2,
            )
        )
    return tuple(sites)


def _random_parents(rng: random.Random, shape: str, eligible: Sequence[str]) -> tuple[str, ...]:
    if not eligible or shape == "unconnected":
        return ()
    if shape == "chain":
        return (eligible[-1],)
    if shape == "tree":
        return (rng.choice(eligible),)
    return tuple(sorted(rng.sample(eligible, min(2, len(eligible)))))


def _random_data(rng: random.Random, plates: Sequence[str], sites: Sequence[RandomSite]) -> tuple[RandomData, ...]:
    """One term that sees up to three of all sites, and up to two more that see less."""
    terms = []
    for j in range(rng.choice((1, 1, 2, 3))):
        inside = tuple(plates) if j == 0 else _some(rng, plates)
        eligible = [site.name for site in sites if set(site.plates) <= set(inside)]
        parents = tuple(sorted(rng.sample(eligible, min(len(eligible), rng.choice((1, 2, 3))))))
        masked, scale, factor = rng.random() < 0.2, rng.choice((1.0, 1.0, 0.7)), rng.random() < 0.25
        terms.append(RandomData(f"x{j}", inside, parents, masked, scale, factor))
    return tuple(terms)


def _some(rng: random.Random, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if rng.random() < 0.5)
