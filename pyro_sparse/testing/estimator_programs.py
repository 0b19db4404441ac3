"""The programs on which gradient estimators are proven, and what they are made of.

Each program is the model or the guide: ``side`` says which. It runs in milliseconds and has few outcomes. Every number
comes from a table fixed by its name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_sparse.distributions import SparseCategorical
from pyro_sparse.testing.models import param

DATUM = torch.tensor(0.7, dtype=torch.float64)  # at every observed site; its location tells the examples apart
ROOM = 5  # the size of each axis of a table that is looked up: no plate and no parent has more values


class Family(NamedTuple):
    """A discrete distribution.

    Attributes:
        outcomes: their number.
        make: makes it from scores.
        number: what a table is looked up at.
        prior: makes the model's from scores, where the guide's rules outcomes out.
    """

    outcomes: int
    make: Callable[[Tensor], Any]
    number: Callable[[Tensor], Tensor] = lambda value: value.long()
    prior: Callable[[Tensor], Any] | None = None


def categorical(scores: Tensor) -> Any:
    return dist.Categorical(logits=scores)


TWO, THREE, FIVE = (Family(k, categorical) for k in (2, 3, 5))
SPARSE = Family(3, lambda scores: SparseCategorical(1.5 * scores), prior=categorical)
BIT = Family(2, lambda scores: dist.Bernoulli(logits=scores[..., 1] - scores[..., 0]), lambda value: value)

# Laws at the edge of the simplex: a number of scores, to which outcomes without probability are added.
TINY = -735.0  # its exponential is subnormal in float64


def zeros_as_probs(scores: Tensor, kept: int) -> Tensor:
    """Probabilities, all but the first few exactly zero."""
    return torch.cat([scores[..., :kept].softmax(-1), torch.zeros_like(scores[..., kept:])], -1)


def zeros_as_logits(scores: Tensor, kept: int) -> Tensor:
    return torch.cat([scores[..., :kept], torch.full_like(scores[..., kept:], -torch.inf)], -1)


def subnormal(scores: Tensor) -> Tensor:
    """Logits, the last of an outcome that is possible, but hardly."""
    return scores + torch.cat([torch.zeros_like(scores[..., 1:]), torch.full_like(scores[..., :1], TINY)], -1)


EDGES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a zero": ("probs", lambda scores: zeros_as_probs(scores, 2)),
    "a zero as a logit": ("logits", lambda scores: zeros_as_logits(scores, 2)),
    "all but one zero": ("probs", lambda scores: zeros_as_probs(scores, 1)),
    "all but one zero as logits": ("logits", lambda scores: zeros_as_logits(scores, 1)),
    "subnormal": ("logits", subnormal),
}
BIT_EDGES = {"a zero": 0.0, "a one": 1.0, "subnormal": 1e-310}


def edge(name: str, law: Any = dist.Categorical) -> Family:
    """Three outcomes, not all of which the guide visits."""
    keyword, arrange = EDGES[name]
    return Family(3, lambda scores: law(**{keyword: arrange(scores)}), prior=lambda scores: law(logits=scores))


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


def across_a_gap(side: str, family: Family) -> None:
    """Data in a plate, beside the dim of another that they are not in."""
    with plate("components", 2, dim=-1) as i:
        z = latent(side, "z", family, i)
    with plate("data", 2, dim=-2) as j:
        observe(side, i, j[:, None], z)


def outer_of_two(side: str, family: Family, size: int) -> None:
    """A site in a plate on the right of another, in which the data are, too."""
    with plate("docs", size, dim=-1) as i:
        z = latent(side, "z", family, i)
        with plate("words", 2, dim=-2) as j:
            observe(side, i, j[:, None], z)


def beside_plate(side: str, family: Family) -> None:
    """A site outside of the plate of the data."""
    z = latent(side, "z", family)
    with plate("data", 2) as i:
        observe(side, i, z)


def mean_field(side: str, first: Family, second: Family) -> None:
    """Two sites apart in the guide; the prior of the second is given the first."""
    y = latent(side, "y", first)
    z = latent(side, "z", second, *([y] if side == "model" else []))
    observe(side, y, z)


def chain(side: str, family: Family, length: int) -> None:
    parents: list[Tensor] = []
    for j in range(length):
        parents = [latent(side, f"z{j}", family, *parents)]
    observe(side, *parents)


def diamond(side: str, family: Family) -> None:
    y = latent(side, "y", family)
    left, right = (latent(side, name, family, y) for name in ("left", "right"))
    observe(side, latent(side, "z", family, left, right))


def masked(side: str, family: Family) -> None:
    """A site masked out at one of two elements, as a label that is known may be."""
    with plate("data", 2) as i:
        observe(side, i, latent(side, "z", family, i, mask=i == 0))


def masked_by_parent(side: str, first: Family, second: Family) -> None:
    y = latent(side, "y", first)
    observe(side, y, latent(side, "z", second, y, mask=y == 0))


def masked_one_hot(side: str) -> None:
    with plate("data", 2) as i:
        fn = dist.OneHotCategorical(logits=scores_at(side, "z", 2, i)).mask(i == 0)
        observe(side, i, shift=pyro.sample("z", fn) @ param(f"{side}.weights", 2))


def masked_vector(side: str) -> None:
    with plate("data", 2) as i:
        fn = dist.Bernoulli(logits=look_up(f"{side}.bits", i, size=1)).to_event(1).mask(i == 0)
        observe(side, i, pyro.sample("bits", fn)[..., 0])


def one_hot_at_edge(side: str, name: str) -> None:
    family = edge(name, dist.OneHotCategorical)
    make = family.prior if side == "model" and family.prior else family.make
    observe(side, shift=pyro.sample("z", make(scores_at(side, "z", 3))) @ param(f"{side}.weights", 3))


def bits_at_edge(side: str, name: str) -> None:
    """One of two bits hardly has a choice."""
    with plate("data", 2) as i:
        probs = look_up(f"{side}.z", i).sigmoid()
        if side == "guide":
            probs = torch.where(i == 0, BIT_EDGES[name], probs)
        observe(side, i, pyro.sample("z", dist.Bernoulli(probs=probs)))


def beside_sequential(side: str, family: Family, sequential: Family, order: str, dependent: bool) -> None:
    """A site b that is enumerated sequentially, before or after z, and perhaps one given the other."""
    infer = {"enumerate": "sequential"} if side == "guide" else {}
    if order == "before":
        b = latent(side, "b", sequential, infer=infer)
        z = latent(side, "z", family, *([b] if dependent else []))
    else:
        z = latent(side, "z", family)
        b = latent(side, "b", sequential, *([z] if dependent else []), infer=infer)
    observe(side, b, z)


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


def latent(
    side: str,
    name: str,
    family: Family,
    *where: Tensor,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    infer: Any = None,
) -> Tensor:
    """Samples a discrete site whose scores depend on positions and parents, and on a number."""
    make = family.prior if side == "model" and family.prior else family.make
    fn = make(scores_at(side, name, family.outcomes, *where, shift=shift))
    return family.number(pyro.sample(name, fn if mask is None else fn.mask(mask), infer=infer))


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
    if not bits:
        return table[where]
    total: Any = 0.0
    for corner in itertools.product((0, 1), repeat=len(bits)):
        weight: Any = 1.0
        index: list[Any] = [*where]
        for i, value in zip(bits, corner, strict=True):
            weight = weight * (where[i] if value else 1 - where[i])
            index[i] = torch.full_like(where[i], value, dtype=torch.long)
        rows = table[tuple(index)]
        total = total + rows * (weight if size is None else weight[..., None])
    return total
