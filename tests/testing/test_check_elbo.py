"""The grid covers what it says, check_elbo passes what is exact, and it catches what is not."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

from pyro_sparse.distributions import SparseCategorical, SparseDistribution
from pyro_sparse.infer import SparseEnumELBO
from pyro_sparse.testing.elbo import check_elbo
from pyro_sparse.testing.models import OUTCOMES, Case, Options, Program, grid, grid_options, levels, make_case
from pyro_sparse.testing.noise import TableNormal

ALL_OPTIONS = grid_options()
PLAIN = Options()


def failing_cases(elbo: Any, cases: list[Case]) -> set[str]:
    failing = set()
    for case in cases:
        try:
            check_elbo(elbo, cases=[case])
        except AssertionError as error:
            assert case.name in str(error)
            failing.add(case.name)
    return failing


# The grid.


def test_grid_has_enough_cases_with_names_of_their_own() -> None:
    names = [case.name for case in grid()]
    assert len(set(names)) == len(names) == len(ALL_OPTIONS) >= 60


def test_grid_has_every_structure() -> None:
    structures = {(o.sites, o.link, o.plates) for o in ALL_OPTIONS}
    assert len(structures) == 4 + 2 * 5 * 4  # one site; two or three, linked in five ways; each in zero to three plates


@pytest.mark.parametrize("name", levels())
def test_grid_has_every_level_of_every_option_with_several_others(name: str) -> None:
    for level in levels()[name]:
        others = {replace(o, **{name: levels()[name][0]}) for o in ALL_OPTIONS if getattr(o, name) == level}
        assert len(others) >= 5, level


def support_sizes(options: Options) -> list[tuple[Tensor, int]]:
    """The support sizes at each sparse site of the guide, with its number of outcomes."""
    with pyro.get_param_store().scope():
        trace = poutine.trace(Program(options).guide).get_trace()
    return [(trace.nodes[f"z{j}"]["fn"].support_size, OUTCOMES[j]) for j in range(options.sites)]


def test_supports_are_as_the_options_say() -> None:
    for options in ALL_OPTIONS:
        for sizes, K in support_sizes(options):
            low, high = {"one": (1, 1), "mixed": (1, K - 1), "full": (K, K)}[options.support]
            assert low <= sizes.min() and sizes.max() <= high, options


def test_mixed_supports_differ_between_examples() -> None:
    mixed = [o for o in ALL_OPTIONS if o.support == "mixed" and o.scores == "own" and o.plates]
    assert sum(any(sizes.unique().numel() > 1 for sizes, _ in support_sizes(o)) for o in mixed) > len(mixed) / 2


@pytest.mark.slow
def test_every_parameter_matters() -> None:
    """A gradient that is zero throughout would compare nothing."""
    seen, moved = set(), set()
    for options in ALL_OPTIONS:
        case = make_case(options)
        pyro.clear_param_store()
        TraceEnum_ELBO(**case.elbo_options).loss_and_grads(case.model, config_enumerate(case.guide))
        for name, parameter in pyro.get_param_store().named_parameters():
            seen.add(name)
            if parameter.grad is not None and parameter.grad.abs().max() > 1e-3:
                moved.add(name)
    assert seen == moved


# What is exact passes.


def test_dense_enumeration_passes() -> None:
    cases = [replace(case, guide=config_enumerate(case.guide)) for case in grid()[::8]]
    check_elbo(TraceEnum_ELBO, cases=cases)


def test_a_case_of_ones_own_with_modules_and_random_initial_values() -> None:
    encoder, decoder = nn.Linear(3, 5), nn.Embedding(5, 3)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", lambda: torch.rand(()), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(5)))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", SparseCategorical(encoder(x)))

    check_elbo(SparseEnumELBO, cases=[Case("clusters", model, guide, (torch.randn(4, 3),))])
    assert encoder.weight.grad is None


# What is not exact fails.


def stock_categorical(scores: Tensor, projection: Any, one_hot: bool) -> Any:
    """torch clamps and renormalises: zeros become eps of mass."""
    return (dist.OneHotCategorical if one_hot else dist.Categorical)(probs=projection(scores))


def test_stock_categorical_in_place_of_ours_fails() -> None:
    options = [o for o in ALL_OPTIONS if o.support != "full"][::8]
    cases = [make_case(o, stock_categorical) for o in options]
    cases = [replace(case, guide=config_enumerate(case.guide)) for case in cases]  # enumerated: only its mass is wrong
    elbo = partial(SparseEnumELBO, strict_enumeration_warning=False)
    assert failing_cases(elbo, cases) == {case.name for case in cases}


def test_duplicated_padding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots beyond a smaller support must hold outcomes of probability zero: a repeated one counts twice."""
    original = SparseCategorical.support_values

    def duplicated(self: SparseCategorical, union_dims: Any = ()) -> Tensor:
        values = original(self, union_dims)
        return torch.where(self.log_prob(values) == -math.inf, values[:1], values)

    fixed = ("independent", "integer", "none", "none")  # supports that are the same in every run
    options = [o for o in ALL_OPTIONS if (o.link, o.values, o.before, o.subsample) == fixed]
    uneven = {str(o) for o in options if any(sizes.unique().numel() > 1 for sizes, _ in support_sizes(o))}
    assert len(options) > len(uneven) >= 6
    monkeypatch.setattr(SparseCategorical, "support_values", duplicated)
    assert failing_cases(SparseEnumELBO, [make_case(o) for o in options]) == uneven


class WithoutScale(SparseEnumELBO):
    """Forgets plates that are subsampled, and poutine.scale."""

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        class DropScale(poutine.messenger.Messenger):
            def _pyro_sample(self, msg: Any) -> None:
                msg["scale"] = 1.0

        return super()._get_traces(DropScale()(model), DropScale()(guide), args, kwargs)


@pytest.mark.slow
def test_dropped_scale_fails() -> None:
    options = ALL_OPTIONS[::6]
    scaled = {str(o) for o in options if (o.scale, o.subsample) != ("none", "none")}
    assert len(options) > len(scaled) >= 4
    assert failing_cases(WithoutScale, [make_case(o) for o in options]) == scaled


class SlightlyWrongGradient(SparseEnumELBO):
    factor = 1 + 1e-8

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().loss_and_grads(*args, **kwargs)
        pyro.get_param_store()._params["guide.z0.own"].grad *= self.factor
        return loss


class NanGradient(SlightlyWrongGradient):
    factor = math.nan


@pytest.mark.parametrize("elbo", [SlightlyWrongGradient, NanGradient])
def test_one_wrong_gradient_fails_and_is_named(elbo: type[ELBO]) -> None:
    message = r"case plain: 1 quantities differ, first the gradient of guide\.z0\.own by loss_and_grads"
    with pytest.raises(AssertionError, match=message):
        check_elbo(elbo, cases=[make_case(PLAIN)])


def test_unbiased_is_not_exact() -> None:
    with pytest.raises(AssertionError, match="1 of 1 cases differ"):
        check_elbo(Trace_ELBO, cases=[make_case(PLAIN)])


def test_failures_are_counted_and_the_first_few_shown() -> None:
    cases = [make_case(PLAIN)] * 7
    with pytest.raises(AssertionError, match="7 of 7 cases differ") as raised:
        check_elbo(NanGradient, cases=cases)
    assert str(raised.value).count("case plain") == 5


def test_an_elbo_that_raises_is_reported_with_its_case() -> None:
    with pytest.raises(AssertionError, match="case plain: the ELBO raised ValueError") as raised:
        check_elbo(partial(SparseEnumELBO, max_support=1), cases=[make_case(PLAIN)])
    assert isinstance(raised.value.__cause__, ValueError)


def test_no_case_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected at least one case"):
        check_elbo(SparseEnumELBO, cases=[])


# Nothing is left behind.


@pytest.mark.parametrize("elbo", [SparseEnumELBO, NanGradient])
def test_state_is_put_back(elbo: type[ELBO]) -> None:
    torch.set_default_dtype(torch.float32)
    pyro.enable_validation(False)
    mine = pyro.param("mine", torch.ones(2))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    failing_cases(elbo, [make_case(PLAIN)])
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_default_dtype() == torch.float32
    assert not pyro.infer.util.is_validation_enabled()
    assert not dist.Normal(0.0, 1.0)._validate_args
    assert list(pyro.get_param_store()) == ["mine"] and pyro.param("mine") is mine


# Noise from a table.


def test_table_normal_reads_the_noise_of_outcome_and_example() -> None:
    table = torch.randn(5, 3)
    loc, scale = torch.randn(3, requires_grad=True), torch.rand(())
    every, some = torch.arange(5)[:, None], torch.tensor([[4, 0, 4], [2, 2, 1]])
    example = torch.arange(3)
    dense = TableNormal(loc, scale, table, (every, example)).rsample()
    sparse = TableNormal(loc, scale, table, (some, example)).rsample()
    assert torch.equal(sparse, dense.gather(0, some))
    assert torch.equal(dense, loc + scale * table)


def test_table_normal_is_a_normal_otherwise() -> None:
    index = (torch.tensor([2, 0]),)
    d = TableNormal(torch.randn(()), torch.rand(()), torch.randn(4), index).expand([3, 2])
    assert d.batch_shape == (3, 2) and d.rsample().shape == (3, 2)
    value = torch.randn(3, 2)
    assert torch.equal(d.log_prob(value), dist.Normal(d.loc, d.scale).log_prob(value))


@pytest.mark.parametrize("reparameterized", [True, False])
def test_table_normal_carries_gradients_only_if_reparameterized(reparameterized: bool) -> None:
    loc = torch.zeros((), requires_grad=True)
    d = TableNormal(loc, torch.ones(()), torch.randn(4), (torch.arange(4),), reparameterized=reparameterized)
    assert d.expand([2, 4])().requires_grad is reparameterized
    assert not d.sample().requires_grad


def test_table_normal_refuses_what_the_table_lacks() -> None:
    zero, one = torch.zeros(()), torch.ones(())
    with pytest.raises(ValueError, match="one index per dimension"):
        TableNormal(zero, one, torch.randn(4, 2), (torch.arange(4),))
    with pytest.raises(ValueError, match="empty sample_shape"):
        TableNormal(zero, one, torch.randn(4), (torch.arange(4),)).sample((3,))


def test_sparse_site_of_the_grid_is_sparse() -> None:
    """Guards the other tests: a grid of dense distributions would pass everything."""
    trace = poutine.trace(Program(PLAIN).guide).get_trace()
    assert isinstance(trace.nodes["z0"]["fn"], SparseDistribution)
