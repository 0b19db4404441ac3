"""Small models and guides on which a gradient estimator is proven by enumeration.

They run in milliseconds and have so few outcomes that every tuple of an estimator's draws can be visited.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyro_sparse.testing.estimator_programs import (
    BIT,
    BIT_EDGES,
    EDGES,
    FIVE,
    SPARSE,
    THREE,
    TWO,
    across_a_gap,
    beside_plate,
    beside_sequential,
    between_normals,
    bits_at_edge,
    branch,
    chain,
    diamond,
    edge,
    masked,
    masked_and_scaled,
    masked_by_parent,
    masked_one_hot,
    masked_vector,
    mean_field,
    nested_plates,
    normal_in_plate,
    one_hot_at_edge,
    one_hot_site,
    one_hot_sites_in_plate,
    one_site,
    one_site_in_plate,
    outer_of_two,
    shared_latent,
    two_sites,
    two_sites_in_plate,
    used_outside,
    vector_in_plate,
)

Program = Callable[..., Any]


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


def estimator_models() -> list[EstimatorModel]:
    """The models that :func:`~pyro_sparse.testing.check_estimator` uses. Their kinds:

    ========================== ========================================================================================
    categorical                one site; two sites, the second dependent on the first, in the guide or in the prior
                               only; three in a row; sites in a subsampled plate, in nested plates, in the outer of
                               two, outside the plate of the data, masked, scaled, between reparameterised ones; sparse
                               outcomes
    Bernoulli                  the same with Bernoulli sites, and linear in each of their values
    one-hot                    one site, also masked; two sites in a plate, the second dependent on the first; linear in
                               the values
    categorical and Bernoulli  one of each in a subsampled plate
    vector                     bits under ``to_event(1)``, also masked
    shared                     a latent variable outside the plate of the data, and another inside
    outside                    a latent variable in a plate whose values meet outside of it
    branch                     a model that branches in Python on a discrete value
    ... with zeros             a site of each of the first three kinds with probabilities of exactly zero or one, or
                               subnormal ones
    Bernoulli, then sparse     a sparse site that depends on a bit
    ... sequential             a categorical or Bernoulli site beside, given, or before ("parent of") one that is
                               enumerated sequentially
    ========================== ========================================================================================

    Of an estimator that draws n values at a site, a model with s sites of k outcomes in r rows takes
    :math:`k^{n s r}` steps of some milliseconds each: at most 81 here for n = 2. (256 where all of a shared latent
    variable, two rows and two outcomes meet.) :func:`estimator_grid` has longer ones.
    """
    return [*_plain_models(), *_structured_models(), *_models_at_edges(), *_sequential_models()]


def estimator_grid() -> list[EstimatorModel]:
    """Longer models, up to 729 steps where an estimator draws twice: diamonds, chains, sites in all plates."""
    models = []
    for kind, small in (("categorical", TWO), ("Bernoulli", BIT)):
        models += [
            _make(kind, "diamond", diamond, small),
            _make(kind, "three of a chain", chain, small, 3),
            _make(kind, "four in a row", chain, small, 4),
            _make(kind, "nested plates, sites in every row", nested_plates, small, 2, 2, True, nesting=2),
        ]
    return [
        *models,
        _make("categorical", "five outcomes, apart in the guide only", mean_field, FIVE, TWO),
        _make("categorical", "three in a row of three outcomes", chain, THREE, 3),
        _make("categorical", "three outcomes, outer of two plates, two rows", outer_of_two, THREE, 2, nesting=2),
        _make("categorical", "three outcomes, masked", masked, THREE, nesting=1),
    ]


def _make(kind: str, what: str, program: Program, *options: Any, nesting: int = 0) -> EstimatorModel:
    model, guide = partial(program, "model", *options), partial(program, "guide", *options)
    return EstimatorModel(f"{kind}, {what}", model, guide, (), nesting, kind)


def _plain_models() -> list[EstimatorModel]:
    """A site or two in the common places."""
    models = []
    for kind, small, large in (("categorical", TWO, THREE), ("Bernoulli", BIT, BIT)):
        models += [
            _make(kind, "one site", one_site, large),
            _make(kind, "two dependent sites", two_sites, small, large),
            _make(kind, "subsampled plate", one_site_in_plate, large, nesting=1),
            _make(kind, "nested plates, sites in both", nested_plates, small, 1, 2, True, nesting=2),
            _make(kind, "nested plates, sites in the outer", nested_plates, small, 2, 2, False, nesting=2),
            _make(kind, "between reparameterised sites", between_normals, small),
        ]
    return [
        *models,
        _make("one-hot", "one site", one_hot_site),
        _make("one-hot", "two dependent sites in a plate", one_hot_sites_in_plate, nesting=1),
        _make("categorical", "sparse site", one_site, SPARSE),
        _make("Bernoulli", "after a reparameterised site in a plate", normal_in_plate, BIT, nesting=1),
        _make("Bernoulli", "masked and scaled", masked_and_scaled, BIT, nesting=1),
        _make("categorical and Bernoulli", "subsampled plate", two_sites_in_plate, TWO, BIT, nesting=1),
        _make("vector", "plate", vector_in_plate, nesting=1),
        _make("shared", "outside and inside a plate", shared_latent, BIT, nesting=1),
        _make("outside", "sum over a plate", used_outside, BIT, nesting=1),
        _make("outside", "across a gap", across_a_gap, BIT, nesting=2),
        _make("branch", "another site in one branch", branch, BIT),
    ]


def _structured_models() -> list[EstimatorModel]:
    """Plates and other sites that a cost has dims of and a site's own draws have not; ancestors; masks."""
    models = []
    for kind, small, large in (("categorical", TWO, THREE), ("Bernoulli", BIT, BIT)):
        models += [
            _make(kind, "outer of two plates", outer_of_two, large, 1, nesting=2),
            _make(kind, "outer of two plates, two rows", outer_of_two, small, 2, nesting=2),
            _make(kind, "apart in the guide only", mean_field, large, small),
            _make(kind, "masked", masked, small, nesting=1),
            _make(kind, "masked by a parent", masked_by_parent, small, large),
        ]
    return [
        *models,
        _make("categorical", "three in a row", chain, TWO, 3),
        _make("categorical", "five outcomes", one_site, FIVE),
        _make("categorical", "five outcomes, outer of two plates", outer_of_two, FIVE, 1, nesting=2),
        _make("categorical", "masked, sparse", masked, SPARSE, nesting=1),
        _make("one-hot", "masked", masked_one_hot, nesting=1),
        _make("vector", "masked", masked_vector, nesting=1),
        _make("Bernoulli", "outside of the data's plate", beside_plate, BIT, nesting=1),
        _make("categorical", "outside of the data's plate", beside_plate, THREE, nesting=1),
        _make("categorical", "five outcomes, outside of the data's plate", beside_plate, FIVE, nesting=1),
    ]


def _models_at_edges() -> list[EstimatorModel]:
    """Probabilities of exactly zero or one, and subnormal ones."""
    return [
        *(_make("categorical with zeros", name, one_site, edge(name)) for name in EDGES),
        *(_make("one-hot with zeros", name, one_hot_at_edge, name) for name in EDGES),
        *(_make("Bernoulli with zeros", name, bits_at_edge, name, nesting=1) for name in BIT_EDGES),
        _make("Bernoulli, then sparse", "two dependent sites", two_sites, BIT, SPARSE),
    ]


def _sequential_models() -> list[EstimatorModel]:
    models = []
    for kind, family in (("categorical", THREE), ("Bernoulli", BIT)):
        zero = edge("a zero as a logit")
        models += [
            _make(f"{kind} beside sequential", "before", beside_sequential, family, TWO, "after", False),
            _make(f"{kind} beside sequential", "after", beside_sequential, family, TWO, "before", False),
            _make(f"{kind} beside sequential", "a zero", beside_sequential, family, zero, "before", False),
            _make(f"{kind} given sequential", "two sites", beside_sequential, family, TWO, "before", True),
            _make(f"{kind} parent of sequential", "two sites", beside_sequential, family, TWO, "after", True),
        ]
    return models
