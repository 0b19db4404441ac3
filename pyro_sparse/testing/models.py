"""A grid of small models and guides on which an exact ELBO must agree with dense enumeration.

:class:`Options` lists everything in which two cases can differ, :func:`grid_options` picks the combinations,
:class:`Program` is the Pyro model and guide that read them, and :func:`grid` makes the cases.

Every number in a program comes from :func:`table`, a tensor fixed by its name, so that two runs of a case start from
the same parameters. Random draws *before* the first sparse site are Pyro's own (same seed, same shape, same noise);
those *after* it are :class:`~pyro_sparse.testing.noise.TableNormal`, indexed by outcome and example.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from torch import Tensor

from pyro_sparse.distributions import SparseCategorical, SparseOneHotCategorical
from pyro_sparse.projections import entmax15, sparsemax
from pyro_sparse.testing.noise import TableNormal

MakeSite = Callable[..., Any]

OUTCOMES = (4, 4, 3)  # of the first, second and third sparse site
PLATES = (4, 3, 2)  # sizes; the first equals a number of outcomes, where a mix-up of dims would not be a shape error
WIDTH = {"one": 1e3, "mixed": 1.0, "full": 0.02}  # of the scores: wide scores have small supports
# How far the data lie from the outcome that the guide rules out. Its log-likelihood of -1e12 vanishes under an exact
# zero; under a mass of 2e-16, float64's eps, it would still count.
REFUTED = 1e6


@dataclass(frozen=True)
class Options:
    """What can vary between cases; the type of each field lists its levels, the default is the plainest one."""

    sites: Literal[1, 2, 3] = 1
    #: how a sparse site depends on the one before: not at all, through its scores, through a mask, by ``torch.where``,
    #: or through its scores in a ``pyro.markov`` chain, where enumeration dims are recycled
    link: Literal["independent", "hierarchical", "mask", "where", "markov"] = "independent"
    plates: Literal[0, 1, 2, 3] = 1
    #: all sites in the innermost plate, or each site one plate further in than the one before
    layout: Literal["together", "nested"] = "together"
    subsample: Literal["none", "fixed", "random"] = "none"
    support: Literal["one", "mixed", "full"] = "mixed"
    projection: Literal["sparsemax", "entmax15"] = "sparsemax"
    values: Literal["integer", "one-hot"] = "integer"
    #: one row of guide scores per example, or one row that the plates expand
    scores: Literal["own", "shared"] = "own"
    prior: Literal["dense", "sparse"] = "dense"
    #: a neighbour of the sparse sites in the guide: upstream of the first, downstream of the last
    before: Literal["none", "reparameterized", "monte carlo", "enumerated"] = "none"
    after: Literal["none", "reparameterized", "monte carlo", "enumerated"] = "none"
    #: a site that only the model has, summed out there
    marginal: Literal["none", "dense", "sparse"] = "none"
    #: data that see all sparse sites together, or data for each alone (then sites can be eliminated one by one)
    data: Literal["joint", "separate"] = "joint"
    scale: Literal["none", "everything", "sparse sites"] = "none"
    mask: Literal["none", "poutine", "method", "data"] = "none"
    particles: Literal["one", "looped", "vectorized"] = "one"
    max_plate_nesting: Literal["given", "guessed"] = "given"
    #: what the guide asks for at its sparse sites
    infer: Literal["nothing", "parallel", "expand", "dense support"] = "nothing"

    def __str__(self) -> str:
        """The options that differ from the defaults, short enough for a test's name."""
        changed = (f.name for f in fields(self) if getattr(self, f.name) != f.default)
        return ",".join(f"{name}={getattr(self, name)}" for name in changed).replace(" ", "_") or "plain"

    def are_meaningful(self) -> bool:
        """Whether each option has something to act on."""
        return not (
            (self.sites == 1 and (self.link != "independent" or self.layout == "nested"))
            or (self.plates == 0 and (self.layout, self.subsample, self.mask) != ("together", "none", "none"))
            or (self.plates == 0 and self.scores == "shared")
            or (self.support == "full" and self.prior == "sparse")  # the prior must cover the guide
            # in a chain, nothing but the next site may look back
            or (self.link == "markov" and (self.data, self.after, self.marginal) != ("separate", "none", "none"))
        )


@dataclass(frozen=True)
class Case:
    """One model and guide to compare two ELBOs on.

    Args:
        name: names the case in failures.
        model: a Pyro model; its parameters are in the param store (``pyro.param``, ``pyro.module``).
        guide: the guide for the ELBO under test.
        args: positional arguments of model and guide.
        elbo_options: keywords with which the ELBOs are made, such as ``num_particles``.
        reference_guide: the guide for the dense reference, if it is not ``guide``.
    """

    name: str
    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...] = ()
    elbo_options: dict[str, Any] = field(default_factory=dict)
    reference_guide: Callable[..., Any] | None = None


def sparse_site(scores: Tensor, projection: Callable[[Tensor], Tensor], one_hot: bool) -> Any:
    """The distribution of a sparse site: this library's."""
    return (SparseOneHotCategorical if one_hot else SparseCategorical)(scores, projection)


def table(name: str, *shape: int) -> Tensor:
    """Standard normal numbers that depend on the name and the shape only."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def param(name: str, *shape: int) -> Tensor:
    """A Pyro parameter that starts at :func:`table`."""
    value: Tensor = pyro.param(name, lambda: table(name, *shape))
    return value


@contextmanager
def within(contexts: list[Any]) -> Iterator[None]:
    """Enters all contexts, the first outermost."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


class Program:
    r"""The model and the guide of one case.

    With sparse sites :math:`z_1, \dots, z_n`, neighbours :math:`u` (before) and :math:`y` (after), and a site
    :math:`m` that only the model has, the model is

    .. math:: p(u)\, \prod_j p(z_j \mid z_{j-1})\; p(y)\, p(m)\, p(x \mid u, z_1, \dots, z_n, y, m)

    and the guide :math:`q(u)\, \prod_j q(z_j \mid z_{j-1}, u)\; q(y \mid z_1, \dots, z_n)`. With separate data, each
    :math:`z_j` has data :math:`x_j` of its own and :math:`x` does not see it.

    Args:
        options: which sites there are, and how they depend on each other.
        make_site: ``(scores, projection, one_hot) -> distribution`` for the guide's sparse sites.
    """

    def __init__(self, options: Options, make_site: MakeSite = sparse_site) -> None:
        self.options = options
        self.make_site = make_site
        nested = options.layout == "nested"
        last = options.sites - 1
        #: in how many plates each sparse site sits
        self.depths = [max(0, options.plates - (last - j if nested else 0)) for j in range(options.sites)]
        self.projection = {"sparsemax": sparsemax, "entmax15": entmax15}[options.projection]

    def model(self) -> None:
        with self._scaled_everything():
            plates = self._plates()
            u = self._before(plates, "model")
            zs = self._sparse_sites(plates, "model", u)
            with within(plates):
                y = self._after(plates, "model", zs)
                m = self._marginal(zs)
                self._observe("x", plates, zs if self.options.data == "joint" else {}, u + y + m)

    def guide(self) -> None:
        with self._scaled_everything():
            plates = self._plates()
            u = self._before(plates, "guide")
            zs = self._sparse_sites(plates, "guide", u)
            with within(plates):
                self._after(plates, "guide", zs)

    # Plates, masks and scales.

    def _plates(self) -> list[Any]:
        """Plate ``d`` lies at dim ``-1 - d``."""
        how: Any = {
            "none": {},
            "fixed": {"subsample": torch.tensor([3, 0, 2])},
            "random": {"subsample_size": 3},
        }[self.options.subsample]
        return [
            pyro.plate(f"plate{d}", size, dim=-1 - d, **(how if d == 0 else {}))
            for d, size in enumerate(PLATES[: self.options.plates])
        ]

    def _positions(self, plates: list[Any]) -> tuple[Tensor, ...]:
        """The index of every example in each of its plates, shaped to broadcast."""
        return tuple(plate.indices.reshape((-1,) + (1,) * d) for d, plate in enumerate(plates))

    def _scaled_everything(self) -> AbstractContextManager[None]:
        return within([poutine.scale(scale=0.7)] if self.options.scale == "everything" else [])

    def _mask(self, plates: list[Any]) -> Any:
        """Three of every four examples."""
        return torch.tensor([True, False, True, True])[plates[0].indices]

    # The sparse sites.

    def _sparse_sites(self, plates: list[Any], side: str, u: Tensor) -> dict[int, Tensor]:
        zs: dict[int, Tensor] = {}
        sites = range(self.options.sites)
        for j in pyro.markov(sites) if self.options.link == "markov" else sites:
            inside, previous = plates[: self.depths[j]], zs.get(j - 1)
            scores = self._scores(inside, side, j, previous, u)
            fn = self._guide_site(scores) if side == "guide" else self._prior(scores)
            with within(inside):
                zs[j] = self._sample(f"z{j}", fn, inside, previous)
                if side == "model" and self.options.data == "separate":
                    self._observe(f"x{j}", inside, {j: zs[j]}, u)
        return zs

    def _scores(self, plates: list[Any], side: str, j: int, previous: Tensor | None, u: Tensor) -> Tensor:
        o, name, K = self.options, f"{side}.z{j}", OUTCOMES[j]
        if side == "guide" and o.scores == "own":
            scores = param(f"{name}.own", *PLATES[: len(plates)], K)[self._positions(plates)]
        else:
            scores = param(f"{name}.shared", K)
        if previous is not None and o.link in ("hierarchical", "markov"):
            scores = scores + self._embed(param(f"{name}.link", OUTCOMES[j - 1], K), previous)
        if previous is not None and o.link == "where":
            scores = torch.where(self._even(previous)[..., None], scores, param(f"{name}.odd", K))
        if side == "guide" and o.before != "none":
            scores = scores + u[..., None] * param(f"{name}.before", K)
        return scores

    def _guide_site(self, scores: Tensor) -> Any:
        scores = WIDTH[self.options.support] * scores
        if self.options.support != "full":
            scores = self._without_last(scores)
        return self.make_site(scores, self.projection, self.options.values == "one-hot")

    def _prior(self, scores: Tensor) -> Any:
        one_hot = self.options.values == "one-hot"
        if self.options.prior == "sparse":
            return sparse_site(self._without_last(WIDTH["full"] * scores), self.projection, one_hot)
        return (dist.OneHotCategorical if one_hot else dist.Categorical)(logits=scores)

    def _without_last(self, scores: Tensor) -> Tensor:
        last = torch.arange(scores.shape[-1]) == scores.shape[-1] - 1
        return scores.masked_fill(last, -torch.inf)

    def _sample(self, name: str, fn: Any, plates: list[Any], previous: Tensor | None) -> Tensor:
        o = self.options
        contexts: list[Any] = []
        if o.scale == "sparse sites":
            contexts.append(poutine.scale(scale=0.3))
        if o.mask == "poutine" and plates:
            contexts.append(poutine.mask(mask=self._mask(plates)))
        if o.mask == "method" and plates:
            fn = fn.mask(self._mask(plates))
        if o.link == "mask" and previous is not None:
            contexts.append(poutine.mask(mask=self._even(previous)))
        request: Any = {
            "nothing": {},
            "parallel": {"enumerate": "parallel"},
            "expand": {"enumerate": "parallel", "expand": True},
            "dense support": {"enumerate_support": "dense"},
        }[o.infer]
        with within(contexts):
            value: Tensor = pyro.sample(name, fn, infer=request)
        return value

    def _code(self, z: Tensor) -> Tensor:
        return z.argmax(-1) if self.options.values == "one-hot" else z

    def _even(self, z: Tensor) -> Any:
        return self._code(z) % 2 == 0

    def _embed(self, rows: Tensor, z: Tensor) -> Tensor:
        return z @ rows if self.options.values == "one-hot" else rows[z]

    # Neighbours and data.

    def _before(self, plates: list[Any], side: str) -> Tensor:
        """``u``, beside the first sparse site; its noise is Pyro's own."""
        kind = self.options.before
        if kind == "none":
            return torch.zeros((), dtype=torch.float64)
        loc = param(f"{side}.u")
        if kind == "enumerated":
            fn = dist.Bernoulli(logits=loc)
        else:
            normal = NonreparameterizedNormal if kind == "monte carlo" else dist.Normal
            fn = normal(loc, param(f"{side}.u.scale").exp())
        with within(plates[: self.depths[0]]):
            u: Tensor = pyro.sample("u", fn, infer={"enumerate": "parallel"} if kind == "enumerated" else {})
        return u

    def _after(self, plates: list[Any], side: str, zs: dict[int, Tensor]) -> Tensor:
        """``y``, whose guide sees every sparse site; its noise is looked up by outcome and example."""
        kind = self.options.after
        if kind == "none":
            return torch.zeros((), dtype=torch.float64)
        loc = param(f"{side}.y")
        if side == "guide":
            loc = loc + self._sum_of_embeddings("guide.y", zs)
        if kind == "enumerated":
            fn = dist.Bernoulli(logits=loc)
        elif side == "model":
            fn = dist.Normal(loc, param("model.y.scale").exp())
        else:
            noise = table("noise", *OUTCOMES[: len(zs)], *PLATES[: len(plates)])
            index = (*map(self._code, zs.values()), *self._positions(plates))
            reparameterized = kind == "reparameterized"
            fn = TableNormal(loc, param("guide.y.scale").exp(), noise, index, reparameterized=reparameterized)
        y: Tensor = pyro.sample("y", fn, infer={"enumerate": "parallel"} if kind == "enumerated" else {})
        return y

    def _marginal(self, zs: dict[int, Tensor]) -> Tensor:
        """The contribution of ``m``, a site that the guide lacks and the model sums out."""
        if self.options.marginal == "none":
            return torch.zeros((), dtype=torch.float64)
        scores = param("model.m", 3) + self._embed(param("model.m.link", OUTCOMES[0], 3), zs[0])
        sparse = self.options.marginal == "sparse"
        fn = SparseCategorical(scores) if sparse else dist.Categorical(logits=scores)
        return param("model.m.embed", 3)[pyro.sample("m", fn, infer={"enumerate": "parallel"})]

    def _observe(self, name: str, plates: list[Any], zs: dict[int, Tensor], offset: Tensor) -> None:
        loc = self._sum_of_embeddings(f"model.{name}", zs) + offset
        if self.options.support != "full":
            for j, z in zs.items():
                loc = loc + REFUTED * (self._code(z) == OUTCOMES[j] - 1)
        data = table(name, *PLATES[: len(plates)])[self._positions(plates)]
        masked = self.options.mask == "data" and plates
        with within([poutine.mask(mask=self._mask(plates))] if masked else []):
            pyro.sample(name, dist.Normal(loc, param(f"model.{name}.scale").exp()), obs=data)

    def _sum_of_embeddings(self, name: str, zs: dict[int, Tensor]) -> Tensor:
        parts = (self._embed(param(f"{name}.embed{j}", OUTCOMES[j]), z) for j, z in zs.items())
        return sum(parts, torch.zeros((), dtype=torch.float64))


def make_case(options: Options, make_site: MakeSite = sparse_site) -> Case:
    """The case with the given options; the reference guide always uses this library's distributions."""
    elbo_options: dict[str, Any] = {}
    if options.max_plate_nesting == "given":
        elbo_options["max_plate_nesting"] = options.plates
    if options.particles != "one":
        elbo_options.update(num_particles=2, vectorize_particles=options.particles == "vectorized")
    ours, reference = Program(options, make_site), Program(options)
    return Case(str(options), ours.model, ours.guide, (), elbo_options, reference.guide)


def grid(make_site: MakeSite = sparse_site) -> list[Case]:
    """All cases.

    Args:
        make_site: ``(scores, projection, one_hot) -> distribution``, the distribution of the sparse sites in the
            tested guide. The reference keeps this library's, so a family of your own can be checked against it.
    """
    return [make_case(options, make_site) for options in grid_options()]


def grid_options() -> list[Options]:
    """Every structure, every option on its own, and random combinations of everything; the same at every call."""
    chosen = itertools.chain(_structures(), _single_options(), _random_options(40))
    return list(dict.fromkeys(options for options in chosen if options.are_meaningful()))


def packable(options: Options) -> bool:
    """
    Whether there are packed rows: a sparse site in one plate alone, none outside of all plates or in a chain, and a
    plate that can have another number of elements than the guide's.
    """
    depths = Program(options).depths
    return 1 in depths and 0 not in depths and options.link != "markov" and options.subsample != "random"


def packed_grid(count: int = 200) -> list[Case]:
    """So many random combinations of everything that have packed rows; the same at every call."""
    return [make_case(options) for options in _random_options(count, packable)]


def levels() -> dict[str, tuple[Any, ...]]:
    """The levels of each option."""
    return {name: get_args(hint) for name, hint in get_type_hints(Options).items()}


def _structures() -> Iterator[Options]:
    """Every number of sites, link and depth of plates."""
    names = ("sites", "link", "plates")
    for sites, link, plates in itertools.product(*(levels()[name] for name in names)):
        yield Options(sites=sites, link=link, plates=plates, data="separate" if link == "markov" else "joint")


def _single_options() -> Iterator[Options]:
    """Every level of every option, where one sparse site depends on another in an outer plate."""
    base = Options(sites=2, link="hierarchical", plates=2, layout="nested")
    for name, values in levels().items():
        yield from (replace(base, **{name: value}) for value in values)


def _random_options(count: int, keep: Callable[[Options], bool] = lambda options: True) -> Iterator[Options]:
    """Different meaningful combinations of everything."""
    choose = random.Random(0).choice
    draws = (Options(**{name: choose(values) for name, values in levels().items()}) for _ in itertools.count())
    found: set[Options] = set()
    for options in draws:
        if options.are_meaningful() and options not in found and keep(options):
            found.add(options)
            yield options
        if len(found) == count:
            return
