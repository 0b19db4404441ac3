"""outcomes() lists every draw, and check_estimator() passes what is unbiased and fails what is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_sparse.estimators import (
    DisARM,
    Estimator,
    LeaveOneOut,
    LocalExpectation,
    MovingAverage,
    SampleBaseline,
    ScoreFunction,
    Site,
    Slots,
)
from pyro_sparse.infer import EstimatorELBO
from pyro_sparse.testing import check_estimator
from pyro_sparse.testing.comparison import drawn_log_prob, sampled
from pyro_sparse.testing.estimator import WARM_UP
from pyro_sparse.testing.estimator_models import EstimatorModel, estimator_grid, estimator_models
from pyro_sparse.testing.outcomes import outcomes

MODELS = {model.name: model for model in estimator_models()}
ONE, TWO = MODELS["categorical, one site"], MODELS["categorical, two dependent sites"]
BRANCH = MODELS["branch, another site in one branch"]
HALF = torch.tensor([0.5, 0.5], dtype=torch.float64)


# Outcomes.


def law(function: Callable[[], Tensor]) -> dict[Any, float]:
    """The probability of each value."""
    found: dict[Any, float] = {}
    for probability, value in outcomes(function):
        key = tuple(value.flatten().tolist())
        found[key] = found.get(key, 0.0) + probability
    return found


def test_an_urn_with_fewer_outcomes_than_draws() -> None:
    """torch adds some that have no probability; which, nothing says."""
    p = torch.tensor([0.25, 0.0, 0.75, 0.0])
    assert law(lambda: torch.multinomial(p, 3)[:2]) == {(0, 2): 0.25, (2, 0): 0.75}
    assert all(value.unique().numel() == 3 for _, value in outcomes(lambda: torch.multinomial(p, 3)))


@pytest.mark.parametrize(
    "draw",
    [
        lambda p: torch.bernoulli(p),
        lambda p: torch.bernoulli(torch.empty(2), p=0.25),
        lambda p: torch.empty(2).bernoulli_(0.25),
        lambda p: torch.empty(2).bernoulli_(p),
        lambda p: dist.Bernoulli(p).sample(),
        lambda p: 0.75 * torch.nn.functional.dropout(torch.ones(2), 0.75) / 3,
    ],
)
def test_bernoulli(draw: Callable[[Tensor], Tensor]) -> None:
    p = torch.tensor([0.25, 0.25])
    assert law(lambda: (draw(p) != 0).double()) == {
        (0.0, 0.0): 9 / 16,
        (0.0, 1.0): 3 / 16,
        (1.0, 0.0): 3 / 16,
        (1.0, 1.0): 1 / 16,
    }


def test_multinomial() -> None:
    weights = torch.tensor([[4.0, 2.0, 2.0, 0.0]])
    assert law(lambda: torch.multinomial(weights, 1)) == {(0,): 0.5, (1,): 0.25, (2,): 0.25}
    without = law(lambda: torch.multinomial(weights, 2))
    sixth, twelfth = pytest.approx(1 / 6), pytest.approx(1 / 12)
    assert without == {(0, 1): 0.25, (0, 2): 0.25, (1, 0): sixth, (1, 2): twelfth, (2, 0): sixth, (2, 1): twelfth}
    put_back = law(lambda: torch.multinomial(weights, 2, replacement=True))
    assert len(put_back) == 9 and put_back[0, 0] == 0.25 and put_back[1, 2] == put_back[2, 2] == 1 / 16
    assert law(lambda: torch.multinomial(weights.expand(2, -1), 1))[0, 2] == 1 / 8


def test_permutations_and_subsamples() -> None:
    assert law(lambda: torch.randperm(3)) == pytest.approx(dict.fromkeys(law(lambda: torch.randperm(3)), 1 / 6))
    assert law(lambda: torch.randperm(1)) == {(0,): 1.0}

    def subsample() -> Tensor:
        with pyro.plate("data", 3, subsample_size=2) as i:
            return i

    assert len(law(subsample)) == 6


@pytest.mark.parametrize(
    "draw",
    [
        lambda: 1 + 2 * torch.randn(1),
        lambda: 1 + 2 * torch.randn_like(torch.zeros(1)),
        lambda: torch.zeros(1).normal_(1, 2),
        lambda: torch.normal(1.0, 2.0, (1,)),
        lambda: torch.normal(torch.ones(1), 2.0),
        lambda: torch.normal(1.0, torch.full((1,), 2.0)),
        lambda: torch.normal(torch.ones(1), torch.full((1,), 2.0)),
        lambda: dist.Normal(torch.ones(1), 2.0).rsample(),
    ],
)
def test_normals_are_one_standard_deviation_from_their_mean(draw: Callable[[], Tensor]) -> None:
    assert law(draw) == {(-1.0,): 0.5, (3.0,): 0.5}


def test_a_draw_can_decide_what_is_drawn_next() -> None:
    def geometric() -> Tensor:
        count = 0
        while count < 3 and torch.bernoulli(HALF[:1]) == 1:
            count += 1
        return torch.tensor(count)

    assert law(geometric) == {(0,): 0.5, (1,): 0.25, (2,): 0.125, (3,): 0.125}


def test_a_generator_put_back_draws_the_same_again() -> None:
    def twice(p: float) -> Tensor:
        state = torch.get_rng_state()
        first = torch.bernoulli(HALF[:1])
        torch.set_rng_state(state)
        return torch.cat([first, torch.bernoulli(torch.tensor([p])), torch.bernoulli(HALF[:1])])

    assert law(lambda: twice(0.5)) == {(a, a, b): 0.25 for a in (0.0, 1.0) for b in (0.0, 1.0)}
    with pytest.raises(ValueError, match="two with different probabilities from one state of the generator"):
        law(lambda: twice(0.3))


@pytest.mark.parametrize("draw", [torch.rand, torch.empty(2).exponential_, partial(torch.randint, 3, (2,))])
def test_other_random_operations_are_refused_by_name(draw: Callable[..., Tensor]) -> None:
    arguments = (2,) if draw is torch.rand else ()
    with pytest.raises(NotImplementedError, match=r"got aten\.(rand|exponential_|randint)"):
        list(outcomes(lambda: draw(*arguments)))


def test_too_many_paths_and_functions_of_more_than_their_draws() -> None:
    with pytest.raises(ValueError, match="expected at most 100 paths"):
        list(outcomes(lambda: torch.bernoulli(torch.full((7,), 0.5)), max_paths=100))
    state = [0.1]

    def drifts() -> Tensor:
        state[0] += 0.1
        return torch.bernoulli(torch.tensor([state[0]]))

    with pytest.raises(ValueError, match=r"expected probabilities that sum to 1, got 1\.1"):
        list(outcomes(drifts))


# Stock ELBOs.


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO,
        TraceGraph_ELBO,
        partial(Trace_ELBO, num_particles=2),
        partial(Trace_ELBO, num_particles=2, vectorize_particles=True),
    ],
)
def test_stock_elbos_are_unbiased(elbo: Callable[..., ELBO]) -> None:
    names = ["categorical, two dependent sites", "Bernoulli, subsampled plate", "Bernoulli, masked and scaled"]
    check_estimator(elbo, models=[MODELS[name] for name in names])


@pytest.mark.slow
def test_trace_elbo_is_unbiased_on_all_models() -> None:
    """But those that ask for enumeration, which it has not: it warns."""
    check_estimator(Trace_ELBO, models=[model for model in estimator_models() if "sequential" not in model.name])


def test_another_objective_fails() -> None:
    with pytest.raises(AssertionError, match="1 of 1 models differ"):
        check_estimator(partial(RenyiELBO, alpha=0.0, num_particles=2), models=[ONE])


class SlightlyWrong(Trace_ELBO):
    def loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().loss_and_grads(*args, **kwargs)
        pyro.get_param_store()._params["guide.z"].grad *= 1 + 1e-5
        return loss


class WrongLoss(Trace_ELBO):
    def loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        return super().loss_and_grads(*args, **kwargs) + 1e-5


def test_one_wrong_quantity_fails_and_is_named() -> None:
    with pytest.raises(
        AssertionError, match=r"model categorical, one site: 1 quantities differ, first the gradient of guide\.z"
    ):
        check_estimator(SlightlyWrong, models=[ONE])
    with pytest.raises(AssertionError, match="1 quantities differ, first the loss: expected"):
        check_estimator(WrongLoss, models=[ONE])
    check_estimator(SlightlyWrong, models=[ONE], tol=1e-4)


def test_failures_are_counted_and_the_first_few_shown() -> None:
    with pytest.raises(AssertionError, match="7 of 7 models differ") as raised:
        check_estimator(WrongLoss, models=[ONE] * 7)
    assert str(raised.value).count("model categorical, one site") == 5


# What may be refused.


class Refuses(ScoreFunction):
    """Refuses the models that have a site of a given name."""

    def __init__(self, site: str, message: str) -> None:
        super().__init__()
        self.site, self.message = site, message

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        if site.name == self.site:
            raise ValueError(self.message)
        return super().forward(cost, site)


def test_a_kind_may_be_refused_by_an_error_that_names_a_site() -> None:
    y, z = replace(TWO, kind="has y"), replace(ONE, kind="has z only")
    check_estimator(Refuses("y", "site 'y': expected something else."), models=[y, z])
    with pytest.raises(AssertionError, match=r"model .*two dependent sites: the estimator raised ValueError"):
        check_estimator(Refuses("y", "something is wrong"), models=[y, z])


def test_part_of_a_kind_may_not_be_refused() -> None:
    with pytest.raises(AssertionError, match=r"two dependent sites: the estimator raised ValueError") as raised:
        check_estimator(Refuses("y", "site 'y': expected something else."), models=[ONE, TWO])
    assert isinstance(raised.value.__cause__, ValueError)


@pytest.mark.parametrize("models", [[TWO], [ONE, replace(TWO, kind="")]])
def test_everything_and_what_has_no_kind_may_not_be_refused(models: list[EstimatorModel]) -> None:
    with pytest.raises(AssertionError, match="the estimator raised ValueError"):
        check_estimator(Refuses("y", "site 'y': expected something else."), models=models)


def test_a_biased_estimator_fails_though_it_refuses_a_kind() -> None:
    class Wrong(DisARM):
        def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
            return 2 * super().forward(cost, site)[0], 0.0

    with pytest.raises(AssertionError, match="1 of 1 models differ"):
        check_estimator(Wrong(), models=[ONE, MODELS["Bernoulli, one site"]])


# Other input.


@pytest.mark.parametrize("e", [Trace_ELBO(), EstimatorELBO(ScoreFunction()), 3])
def test_what_makes_no_elbo_is_an_error(e: Any) -> None:
    with pytest.raises(TypeError, match="expected an Estimator, a Baseline or something that makes an ELBO"):
        check_estimator(e)


def test_no_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected at least one model"):
        check_estimator(Trace_ELBO, models=[])


def test_draws_that_cannot_be_listed_are_an_error() -> None:
    def program() -> None:
        pyro.sample("z", dist.Gamma(pyro.param("shape", torch.tensor(2.0)), 1.0))

    with pytest.raises(AssertionError, match=r"model gamma: the estimator raised NotImplementedError.*_standard_gamma"):
        check_estimator(Trace_ELBO, models=[EstimatorModel("gamma", program, program)])


def test_a_model_of_ones_own_with_arguments_and_modules() -> None:
    encoder, decoder = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), subsample_size=1) as i:
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x[i, :1])

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), subsample_size=1) as i:
            pyro.sample("z", dist.OneHotCategorical(logits=encoder(x[i])))

    mine = EstimatorModel("clusters", model, guide, (torch.randn(2, 2),), max_plate_nesting=1)
    check_estimator(SampleBaseline(), models=[mine])
    check_estimator(LeaveOneOut(2), models=[mine])
    assert encoder.weight.grad is None or not encoder.weight.grad.any()


def test_guides_that_are_enumerated() -> None:
    check_estimator(TraceEnum_ELBO, models=[replace(ONE, guide=poutine.infer_config(ONE.guide, enumerate_parallel))])


def enumerate_parallel(msg: Any) -> dict[str, str]:
    return {"enumerate": "parallel"} if msg["name"] == "z" else {}


# State.


class Counts(ScoreFunction):
    """Right only at the state in which the steps before the check leave it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        return (self.steps == WARM_UP) * cost * site.log_prob, 0.0

    def update(self, cost: Tensor, site: Site) -> None:
        self.steps += 1


def test_buffers_are_put_back_before_every_step_and_the_object_is_untouched() -> None:
    estimator = Counts()
    check_estimator(estimator, models=[ONE, TWO])
    assert estimator.steps == 0


@pytest.mark.parametrize("e", [MovingAverage(), SlightlyWrong])
def test_state_is_put_back(e: Estimator | type[ELBO]) -> None:
    torch.set_default_dtype(torch.float32)
    pyro.enable_validation(False)
    mine = pyro.param("mine", torch.ones(2))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    try:
        check_estimator(e, models=[ONE])
    except AssertionError:
        assert e is SlightlyWrong
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_default_dtype() == torch.float32
    assert not pyro.infer.util.is_validation_enabled()
    assert list(pyro.get_param_store()) == ["mine"] and pyro.param("mine") is mine


def test_the_models_are_what_they_say() -> None:
    """Guards the other tests: a model whose guide is trivial would pass everything."""
    grid = estimator_grid()
    assert len(MODELS) == len(estimator_models()) and not MODELS.keys() & {model.name for model in grid}
    for model in (*MODELS.values(), *grid):
        pyro.clear_param_store()
        sites = sampled(poutine.trace(model.guide).get_trace())
        latent = [site for site in sites if not site["fn"].has_rsample]
        assert latent
        for site in latent:
            probs = drawn_log_prob(site).exp()
            edge = "zero" in model.name or "spars" in model.name
            assert ((probs > 0.01) & (probs < 0.99)).all() or edge
    pyro.clear_param_store()
    sparse = poutine.trace(MODELS["categorical, sparse site"].guide).get_trace().nodes["z"]["fn"]
    assert sparse.support_size == 2
    beside = poutine.trace(MODELS["categorical beside sequential, a zero"].guide).get_trace().nodes["b"]
    assert beside["infer"]["enumerate"] == "sequential" and beside["fn"].logits.isneginf().any()
    tiny = poutine.trace(MODELS["categorical with zeros, subnormal"].guide).get_trace().nodes["z"]["fn"].logits
    assert 0 < math.exp(tiny.detach().min()) < torch.finfo(torch.float64).tiny


@pytest.mark.parametrize("seed", range(2))
def test_first_steps_may_miss_a_branch(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Half of all seeds do, and which ones is torch's affair: the branch's running mean is put back all the same."""
    set_rng_seed = pyro.set_rng_seed
    monkeypatch.setattr(pyro, "set_rng_seed", lambda _: set_rng_seed(seed))
    check_estimator(lambda **kwargs: EstimatorELBO(ScoreFunction(MovingAverage()), **kwargs), models=[BRANCH])


# What the models catch: each mechanism, kept apart from the package's own code.


class Enumerated(Trace_ELBO):
    """Sums over all outcomes; wrong where a site's weight lacks those of ancestors that are not its parents."""

    def __init__(self, with_ancestors: bool, max_plate_nesting: int) -> None:
        super().__init__(max_plate_nesting=max_plate_nesting)
        self.with_ancestors = with_ancestors

    def loss_and_grads(self, model: Any, guide: Any) -> Tensor:
        enumerated = poutine.enum(config_enumerate(guide), first_available_dim=-1)
        guide_trace = poutine.trace(enumerated).get_trace()
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
        model_trace.compute_log_prob()
        log_qs = {site["infer"]["_enumerate_dim"]: drawn_log_prob(site) for site in sampled(guide_trace)}
        elbo = sum(site["log_prob"] for site in sampled(model_trace)) - sum(log_qs.values())
        weight = sum(log_qs.values()).exp().detach()
        surrogate = (weight * elbo).sum()
        for log_q in log_qs.values():
            dims = [dim for dim in log_qs if log_q.dim() >= -dim and log_q.shape[dim] > 1]
            if self.with_ancestors:
                surrogate = surrogate + (weight * elbo.detach() * log_q).sum()
                continue
            cost = elbo.detach()
            for dim in sorted(log_qs):  # the last site first
                if dim not in dims and cost.dim() >= -dim:
                    cost = (cost * log_qs[dim].detach().exp()).sum(dim, keepdim=True)
            surrogate = surrogate + (sum(log_qs[dim] for dim in dims).exp().detach() * cost * log_q).sum()
        (-surrogate).backward()
        return -(weight * elbo).sum().detach()


def test_weights_without_ancestors_fail_in_a_chain() -> None:
    chain = MODELS["categorical, three in a row"]
    check_estimator(partial(Enumerated, True), models=[TWO, chain])
    check_estimator(partial(Enumerated, False), models=[TWO])
    with pytest.raises(AssertionError, match=r"1 quantities differ, first the gradient of guide\.z2"):
        check_estimator(partial(Enumerated, False), models=[chain])


class DrawsFromTheMaskedDensity(Messenger):
    """Takes the log-probability under a mask, which is zero, for that of the draw."""

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], MaskedDistribution) and not msg["is_observed"]:
            outcomes = msg["fn"].enumerate_support(expand=True)
            rows = msg["fn"].log_prob(outcomes).detach().exp().movedim(0, -1)
            index = torch.multinomial(rows.reshape(-1, len(outcomes)), 1).reshape(1, *rows.shape[:-1])
            msg["value"] = outcomes.gather(0, index)[0]


class UnderTheMask(Trace_ELBO):
    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        return super().loss_and_grads(model, DrawsFromTheMaskedDensity()(guide), *args, **kwargs)


def test_draws_from_the_masked_density_fail() -> None:
    check_estimator(UnderTheMask, models=[ONE, MODELS["Bernoulli, masked and scaled"]])
    for name in ("categorical, masked", "Bernoulli, masked", "categorical, masked by a parent"):
        with pytest.raises(AssertionError, match="1 of 1 models differ"):
            check_estimator(UnderTheMask, models=[MODELS[name]])


class MemoOfTheBatch(LocalExpectation):
    """One variable, whose probabilities have the shape of the batch, where costs may have dims between."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: dict[str, Tensor] = {}

    def draw(self, site: Site) -> Slots:
        outcomes = site.fn.enumerate_support(expand=False)
        drawn = (site.fn.sample() == outcomes).long().argmax(0)
        steps = torch.arange(len(outcomes)).reshape(-1, *(1,) * drawn.dim())
        index = self.indices[site.name] = (drawn + steps) % len(outcomes)
        return Slots(outcomes.flatten()[index], site.fn.log_prob(outcomes).detach().gather(0, index))

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        index = self.indices[site.name]
        log_probs = site.fn.log_prob(site.fn.enumerate_support(expand=False)).gather(0, index)
        own = log_probs.detach().exp() * log_probs * (index != index[:1])
        return (cost - cost[0]) * own.reshape(own.shape[:1] + site.batch_shape), 0.0


def test_a_memo_in_the_shape_of_the_batch_fails() -> None:
    check_estimator(MemoOfTheBatch(), models=[ONE, MODELS["Bernoulli, one site"]])
    names = [
        "categorical, outer of two plates",
        "categorical, five outcomes, outer of two plates",
        "categorical, outside of the data's plate",
        "categorical, five outcomes, outside of the data's plate",
    ]
    for name in names:
        with pytest.raises(AssertionError, match="1 of 1 models differ"):
            check_estimator(MemoOfTheBatch(), models=[replace(MODELS[name], kind="")])


class ScoresAnotherDraw(Trace_ELBO):
    """In each branch of a sequential site b, the others' values are those of the first, and their scores are not."""

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        trace = poutine.trace(guide).get_trace()
        surrogate = loss = torch.zeros(())
        for value in trace.nodes["b"]["fn"].enumerate_support():
            trace.nodes["b"]["value"] = value
            own = poutine.trace(poutine.replay(guide, trace=trace)).get_trace()
            theirs = poutine.trace(poutine.replay(model, trace=own)).get_trace()
            elbo = theirs.log_prob_sum() - own.log_prob_sum()
            q, z = own.nodes["b"]["fn"].log_prob(value).exp(), own.nodes["z"]["fn"]
            surrogate = surrogate + q * elbo + q.detach() * elbo.detach() * z.log_prob(z.sample())
            loss = loss - q.detach() * elbo.detach()
        (-surrogate).backward()
        return loss


def test_scores_of_another_draw_fail_beside_a_sequential_site() -> None:
    with pytest.raises(AssertionError, match=r"1 of 1 models differ(?s:.*)first the gradient of guide\.z"):
        check_estimator(ScoresAnotherDraw, models=[MODELS["categorical beside sequential, after"]])


class TimesZero(ScoreFunction):
    """Has a term that is zero times the entropy, by p log p."""

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        log_probs = site.fn.log_prob(site.fn.enumerate_support(expand=True))
        return cost * site.log_prob + 0 * (log_probs.exp() * log_probs).sum(), 0.0


def test_zero_times_infinity_fails_at_the_edge() -> None:
    check_estimator(TimesZero(), models=[ONE, MODELS["categorical with zeros, a zero"]])
    for name in ("categorical with zeros, a zero as a logit", "one-hot with zeros, all but one zero as logits"):
        with pytest.raises(AssertionError, match=r"1 of 1 models differ(?s:.*)got nan"):
            check_estimator(TimesZero(), models=[replace(MODELS[name], kind="")])


def test_a_set_of_outcomes_may_have_some_without_probability() -> None:
    """torch draws on, in any order: those add nothing."""
    weights = torch.tensor([[0.0, 1.0, 0.0]])
    assert law(lambda: torch.multinomial(weights, 2)) == {(1, 0): 1.0}
