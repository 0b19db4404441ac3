"""Random programs: what they hold, that their reference is stock enumeration, and that wrong sums are found."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor

from pyro_sparse.estimators import Estimator, LocalExpectation, Site, Slots
from pyro_sparse.infer import EstimatorELBO
from pyro_sparse.testing import check_random_programs
from pyro_sparse.testing.comparison import clean_room, wrong_quantities
from pyro_sparse.testing.random_check import enumerated_loss, gradients
from pyro_sparse.testing.random_programs import (
    FAMILIES,
    HOW,
    RandomData,
    RandomPlate,
    RandomProgram,
    RandomSite,
    random_program,
)

PROGRAMS = [random_program(seed) for seed in range(300)]


def test_sums_over_all_outcomes_are_enumeration() -> None:
    check_random_programs()


@pytest.mark.slow
def test_sums_over_all_outcomes_are_enumeration_in_more_programs() -> None:
    check_random_programs(programs=PROGRAMS)


# The reference.


def evaluate(program: RandomProgram, loss: Any) -> dict[str, Tensor]:
    with clean_room():
        pyro.set_rng_seed(0)
        poutine.replay(program.model, trace=poutine.trace(program.guide).get_trace())()
        parameters = dict(pyro.get_param_store().named_parameters())
        return gradients(loss(), parameters)


def stock_loss(program: RandomProgram) -> Tensor:
    elbo = TraceEnum_ELBO(max_plate_nesting=program.nesting)
    with warnings.catch_warnings():  # of sites outside of a plate that come after sites in it, which do not matter here
        warnings.simplefilter("ignore", RuntimeWarning)
        loss: Tensor = elbo.differentiable_loss(program.model, config_enumerate(program.guide))
    return loss


@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(20, 300), marks=pytest.mark.slow)])
def test_the_reference_is_stock_enumeration(seeds: range) -> None:
    crashed = 0
    for program in map(random_program, seeds):
        expected = evaluate(program, lambda program=program: enumerated_loss(program))
        try:
            found = evaluate(program, lambda program=program: stock_loss(program))
        except AttributeError as error:  # its messages do not reach sites that no term connects
            assert "_pyro_backward" in str(error)
            crashed += 1
            continue
        assert wrong_quantities(expected, found, 1e-10) == "", str(program)
    assert crashed <= 0.05 * len(seeds)


# The programs.


def test_they_are_the_same_at_every_call_and_can_be_told_apart() -> None:
    assert [random_program(seed) for seed in range(300)] == PROGRAMS
    assert len({str(program) for program in PROGRAMS}) == 300


def test_no_site_depends_on_one_in_a_plate_that_it_is_not_in() -> None:
    """Enumeration would be wrong there: combinations of the values of all elements would count."""
    for program in PROGRAMS:
        inside = {site.name: set(site.plates) for site in program.sites}
        for site in program.sites:
            masks = (site.mask,) if site.mask in inside else ()
            for parent in (*site.guide_parents, *site.model_parents, *masks):
                assert inside[parent] <= set(site.plates)
        for datum in program.data:
            assert all(inside[parent] <= set(datum.plates) for parent in datum.parents)


def ancestors(program: RandomProgram, name: str) -> set[str]:
    parents = {site.name: site.guide_parents for site in program.sites}[name]
    return set(parents).union(*(ancestors(program, parent) for parent in parents))


def test_they_have_what_can_go_wrong() -> None:
    """At least 20 of 300 programs for each."""
    sites = [site for program in PROGRAMS for site in program.sites]
    counts = {
        "a grandparent": sum(any(ancestors(p, s.name) - set(s.guide_parents) for s in p.sites) for p in PROGRAMS),
        "two parents": sum(any(len(s.guide_parents) == 2 for s in p.sites) for p in PROGRAMS),
        "a prior that is given what the guide is not": sum(
            any(set(s.model_parents) - set(s.guide_parents) for s in p.sites) for p in PROGRAMS
        ),
        "three plates": sum(len(p.plates) == 3 for p in PROGRAMS),
        "a subsample": sum(any(plate.rows for plate in p.plates) for p in PROGRAMS),
        "an outer plate": sum(any(s.plates == ("a",) and len(p.plates) > 1 for s in p.sites) for p in PROGRAMS),
        "an inner plate only": sum(any(s.plates == ("b",) for s in p.sites) for p in PROGRAMS),
        "no plate": sum(any(not s.plates and p.plates for s in p.sites) for p in PROGRAMS),
        "no plate after a plate": sum(
            any(a.plates and not b.plates for a, b in zip(p.sites, p.sites[1:], strict=False)) for p in PROGRAMS
        ),
        "a factor": sum(any(datum.factor for datum in p.data) for p in PROGRAMS),
        "masked data": sum(any(datum.masked for datum in p.data) for p in PROGRAMS),
        "a scale": sum(any(s.scale != 1 for s in p.sites) for p in PROGRAMS),
        "a mask by a parent": sum(any(s.mask.startswith("z") for s in p.sites) for p in PROGRAMS),
        **{option: sum(option in p.options for p in PROGRAMS) for option in ("costs", "analytic_kl", "num_particles")},
        **{f"mask by {how}": sum(s.mask == how for s in sites) for how in ("poutine", "method")},
        **{f"{k} outcomes": sum(s.outcomes == k for s in sites) for k in (2, 3, 5)},
        **{family: sum(s.family == family for s in sites) for family in FAMILIES},
        **{how: sum(s.how == how for s in sites) for how in (*HOW, "parallel")},
    }
    assert {what: count for what, count in counts.items() if count < 20} == {}


# What is wrong is found.


class MemoOfTheBatch(LocalExpectation):
    """One variable, whose probabilities have the shape of the batch, where costs may have dims between."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: dict[str, Tensor] = {}

    def draw(self, site: Site) -> Slots:
        outcomes, table = self._table(site)
        same = site.fn.sample() == outcomes
        drawn = (same.all(-1) if site.fn.event_shape else same).long().argmax(0)
        steps = torch.arange(len(outcomes)).reshape(-1, *(1,) * drawn.dim())
        index = self.indices[site.name] = (drawn + steps) % len(outcomes)
        values = outcomes.reshape(-1, *site.fn.event_shape)[index]
        return Slots(values, table.detach().gather(0, index))

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        index = self.indices[site.name]
        log_probs = self._table(site)[1].gather(0, index)
        own = log_probs.detach().exp() * log_probs * (index != index[:1])
        return (cost - cost[0]) * own.reshape(own.shape[:1] + site.batch_shape), 0.0

    def _table(self, site: Site) -> tuple[Tensor, Tensor]:
        outcomes = site.fn.enumerate_support(expand=False)
        return outcomes, site.fn.log_prob(outcomes)


def test_a_wrong_estimator_is_found_and_the_seed_and_the_program_are_printed() -> None:
    plain = RandomProgram(
        7, (), (RandomSite("z", "Categorical", 3, how="LocalExpectation"),), (RandomData("x", (), ("z",)),)
    )
    beside = replace(plain, plates=(RandomPlate("a", -1, 2),), data=(RandomData("x", ("a",), ("z",)),))

    def make(estimators: dict[str, Estimator], **options: Any) -> ELBO:
        return EstimatorELBO(dict.fromkeys(estimators, MemoOfTheBatch()), **options)

    nesting = {"max_plate_nesting": 0}
    check_random_programs(make, programs=[replace(plain, options=nesting)])
    with pytest.raises(AssertionError, match="1 of 1 programs differ") as raised:
        check_random_programs(make, programs=[replace(beside, options={"max_plate_nesting": 1})])
    for part in ("seed 7: plates a (dim -1 2)", "z ~ Categorical(3)", "LocalExpectation", "data x in a of ['z']"):
        assert part in str(raised.value)


def test_errors_are_failures() -> None:
    def make(estimators: dict[str, Estimator], **options: Any) -> ELBO:
        raise ValueError("not this one")

    with pytest.raises(AssertionError, match=r"5 of 5 programs differ(?s:.*)raised ValueError\('not this one'\)"):
        check_random_programs(make, programs=PROGRAMS[:5])


def test_noise_is_found() -> None:
    with pytest.raises(AssertionError, match="of 20 programs differ"):
        check_random_programs(lambda e, max_plate_nesting=0, **_: Trace_ELBO(), programs=PROGRAMS[:20])
