"""Small models and guides on which a gradient estimator is proven by enumeration.

Each program below is the model or the guide: ``side`` says which. It runs in milliseconds and has so few outcomes that
every tuple of an estimator's draws can be visited. Every number comes from a table fixed by its name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_sparse.distributions import SparseCategorical
from pyro_sparse.testing.models import param

Program = Callable[..., Any]

DATUM = torch.tensor(0.7, dtype=torch.float64)  # at every observed site; its location tells the examples apart
ROOM = 3  # the size of each axis of a table that is looked up: no plate and no parent has more values


@dataclass(frozen=True)
class EstimatorModel:
    """One model and guide on which to prove an estimator.

    Args:
        name: names the model in failures.
        model: a Pyro model; its parameters are in the param store (``pyro.param``, ``pyro.module``).
        guide: its guide, with discrete and normal sites and few outcomes.
        args: positional arguments of model and guide.
        max_plate_nesting: how many plates are nested in them.
        kind: an estimator may refuse to serve the models of one kind, all of them, by errors that name a site. A model
            of the empty kind must be served.
    """

    name: str
    model: Program
    guide: Program
    args: tuple[Any, ...] = ()
    max_plate_nesting: int = 0
    kind: str = ""


class Family(NamedTuple):
    """A discrete distribution: its number of outcomes, how to make it from scores, and what a table is looked up at."""

    outcomes: int
    make: Callable[[Tensor], Any]
    number: Callable[[Tensor], Tensor] = lambda value: value.long()


TWO = Family(2, lambda scores: dist.Categorical(logits=scores))
THREE = Family(3, lambda scores: dist.Categorical(logits=scores))
SPARSE = Family(3, lambda scores: SparseCategorical(1.5 * scores))
BIT = Family(2, lambda scores: dist.Bernoulli(logits=scores[..., 1] - scores[..., 0]), lambda value: value)


def estimator_models() -> list[EstimatorModel]:
    """The models that :func:`~pyro_sparse.testing.check_estimator` uses. Their kinds:

    ========================== ========================================================================================
    categorical                one site; two sites, the second dependent on the first; sites in a subsampled plate, in
                               nested plates, masked, scaled, between reparameterised ones; sparse outcomes
    Bernoulli                  the same with Bernoulli sites, and linear in each of their values
    one-hot                    one site; two sites in a plate, the second dependent on the first; linear in the values
    categorical and Bernoulli  one of each in a subsampled plate
    vector                     bits under ``to_event(1)``
    shared                     a latent variable outside the plate of the data, and another inside
    outside                    a latent variable in a plate whose values meet outside of it
    branch                     a model that branches in Python on a discrete value
    ========================== ========================================================================================
    """

    def make(kind: str, what: str, program: Program, *options: Any, nesting: int = 0) -> EstimatorModel:
        model, guide = partial(program, "model", *options), partial(program, "guide", *options)
        return EstimatorModel(f"{kind}, {what}", model, guide, (), nesting, kind)

    models = []
    for kind, small, large in (("categorical", TWO, THREE), ("Bernoulli", BIT, BIT)):
        models += [
            make(kind, "one site", one_site, large),
            make(kind, "two dependent sites", two_sites, small, large),
            make(kind, "subsampled plate", one_site_in_plate, large, nesting=1),
            make(kind, "nested plates, sites in both", nested_plates, small, 1, 2, True, nesting=2),
            make(kind, "nested plates, sites in the outer", nested_plates, small, 2, 2, False, nesting=2),
            make(kind, "between reparameterised sites", between_normals, small),
        ]
    return [
        *models,
        make("one-hot", "one site", one_hot_site),
        make("one-hot", "two dependent sites in a plate", one_hot_sites_in_plate, nesting=1),
        make("categorical", "sparse site", one_site, SPARSE),
        make("Bernoulli", "after a reparameterised site in a plate", normal_in_plate, BIT, nesting=1),
        make("Bernoulli", "masked and scaled", masked_and_scaled, BIT, nesting=1),
        make("categorical and Bernoulli", "subsampled plate", two_sites_in_plate, TWO, BIT, nesting=1),
        make("vector", "plate", vector_in_plate, nesting=1),
        make("shared", "outside and inside a plate", shared_latent, BIT, nesting=1),
        make("outside", "sum over a plate", used_outside, BIT, nesting=1),
        make("branch", "another site in one branch", branch, BIT),
    ]


# The programs.


def one_site(side: str, family: Family) -> None:
    observe(side, latent(side, "z", family))


def two_sites(side: str, first: Family, second: Family) -> None:
    y = latent(side, "y", first)
    z = latent(side, "z", second, y)
    observe(side, y, z)


def one_hot_site(side: str) -> None:
    observe(side, shift=one_hot(side, "z") @ param(f"{side}.weights", 3))


def one_hot_sites_in_plate(side: str) -> None:
    with plate("data", 3, subsample=torch.tensor([2])) as i:
        y = one_hot(side, "y", i)
        z = one_hot(side, "z", i, shift=y @ param(f"{side}.weights", 3))
        observe(side, i, shift=(y @ param("model.joint", 3, 3) * z).sum(-1))


def one_site_in_plate(side: str, family: Family) -> None:
    with plate("data", 3, subsample=torch.tensor([2, 0])) as i:
        z = latent(side, "z", family, i)
        observe(side, i, z)


def two_sites_in_plate(side: str, first: Family, second: Family) -> None:
    with plate("data", 3, subsample=torch.tensor([2, 0])) as i:
        y = latent(side, "y", first, i)
        z = latent(side, "z", second, i, y)
        observe(side, i, y, z)


def nested_plates(side: str, family: Family, outer: int, inner: int, both: bool) -> None:
    """A site in the outer plate and, perhaps, one in both; two of three rows are seen."""
    with plate("outer", 3, subsample=torch.tensor([2, 0])[:outer], dim=-2) as i:
        y = latent(side, "y", family, i[:, None])
        with plate("inner", inner, dim=-1) as j:
            z = latent(side, "z", family, i[:, None], j, y) if both else j
            observe(side, i[:, None], j, y, z)


def between_normals(side: str, family: Family) -> None:
    u = normal(side, "u")
    z = latent(side, "z", family, shift=u)
    v = normal(side, "v", z)
    observe(side, z, shift=u + v)


def normal_in_plate(side: str, family: Family) -> None:
    with plate("data", 2) as i:
        u = normal(side, "u", i)
        z = latent(side, "z", family, i, shift=u)
        observe(side, i, z, shift=u)


def masked_and_scaled(side: str, family: Family) -> None:
    """The latent sites are scaled, as annealing does, and masked out at one element; another has no data."""
    with plate("data", 2) as i:
        with poutine.scale(scale=0.3), poutine.mask(mask=i == 0):
            z = latent(side, "z", family, i)
        with poutine.mask(mask=i == 1):
            observe(side, i, z)


def vector_in_plate(side: str) -> None:
    with plate("data", 2) as i:
        logits = look_up(f"{side}.bits", i, size=2)
        bits = pyro.sample("bits", dist.Bernoulli(logits=logits).to_event(1))
        observe(side, i, bits[..., 0], bits[..., 1])


def shared_latent(side: str, family: Family) -> None:
    y = latent(side, "y", family)
    with plate("data", 3, subsample=torch.tensor([2, 0])) as i:
        z = latent(side, "z", family, i, y)
        observe(side, i, y, z)


def used_outside(side: str, family: Family) -> None:
    with plate("data", 2) as i:
        z = latent(side, "z", family, i)
    observe(side, z.sum(-1, keepdim=True).long())


def branch(side: str, family: Family) -> None:
    z = latent(side, "z", family)
    if z == 0:
        observe(side, latent(side, "y", family))
    else:
        observe(side, z, shift=normal(side, "u"))


# What they are made of.


def plate(name: str, size: int, **options: Any) -> Any:
    """A plate, whose context is its indices."""
    return pyro.plate(name, size, **options)


def latent(side: str, name: str, family: Family, *where: Tensor, shift: Tensor | None = None) -> Tensor:
    """Samples a discrete site whose scores depend on positions and parents, and on a number."""
    scores = scores_at(side, name, family.outcomes, *where, shift=shift)
    make = THREE.make if family is SPARSE and side == "model" else family.make  # a prior that covers the guide
    return family.number(pyro.sample(name, make(scores)))


def one_hot(side: str, name: str, *where: Tensor, shift: Tensor | None = None) -> Tensor:
    value: Tensor = pyro.sample(name, dist.OneHotCategorical(logits=scores_at(side, name, 3, *where, shift=shift)))
    return value


def scores_at(side: str, name: str, outcomes: int, *where: Tensor, shift: Tensor | None = None) -> Tensor:
    scores = look_up(f"{side}.{name}", *where, size=outcomes)
    return scores if shift is None else scores + shift[..., None] * param(f"{side}.{name}.shift", outcomes)


def normal(side: str, name: str, *where: Tensor) -> Tensor:
    loc, scale = look_up(f"{side}.{name}", *where), look_up(f"{side}.{name}.scale", *where).exp()
    value: Tensor = pyro.sample(name, dist.Normal(loc, scale))
    return value


def observe(side: str, *where: Tensor, shift: Tensor | float = 0.0) -> None:
    """Data whose location depends on positions and latent values; the guide has none."""
    if side == "model":
        loc = look_up("model.x", *where) + shift
        pyro.sample("x", dist.Normal(loc, param("model.x.scale").exp()), obs=DATUM)


def look_up(name: str, *where: Tensor, size: int | None = None) -> Tensor:
    """Parameters at the given indices, which broadcast; at a bit, what is linear between its two."""
    table = param(name, *(ROOM,) * len(where), *(() if size is None else (size,)))
    bits = [i for i, index in enumerate(where) if index.is_floating_point()]
    total: Any = 0.0
    for corner in itertools.product((0, 1), repeat=len(bits)):
        weight: Any = 1.0
        index: list[Any] = [*where]
        for i, value in zip(bits, corner, strict=True):
            weight = weight * (where[i] if value else 1 - where[i])
            index[i] = torch.full_like(where[i], value, dtype=torch.long)
        rows = table[tuple(index)]
        total = total + rows * (weight if size is None or not bits else weight[..., None])
    return total
