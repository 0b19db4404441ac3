"""outcomes() lists every draw, and check_estimator() passes what is unbiased and fails what is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import Tensor

from pyro_sparse.estimators import DisARM, Estimator, LeaveOneOut, MovingAverage, SampleBaseline, ScoreFunction, Site
from pyro_sparse.infer import EstimatorELBO
from pyro_sparse.testing import check_estimator
from pyro_sparse.testing.estimator import WARM_UP
from pyro_sparse.testing.estimator_models import EstimatorModel, estimator_models
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
    check_estimator(Trace_ELBO)


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
    assert len(MODELS) == len(estimator_models())
    for model in MODELS.values():
        pyro.clear_param_store()
        trace = poutine.trace(model.guide).get_trace()
        latent = [
            site for site in trace.nodes.values() if site["type"] == "sample" and site["name"] in ("y", "z", "bits")
        ]
        assert latent
        for site in latent:
            probs = site["fn"].log_prob(site["value"]).exp()
            assert ((probs > 0.01) & (probs < 0.99)).all() or model.name == "categorical, sparse site"
    pyro.clear_param_store()
    sparse = poutine.trace(MODELS["categorical, sparse site"].guide).get_trace().nodes["z"]["fn"]
    assert sparse.support_size == 2
