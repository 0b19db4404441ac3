"""Every estimator, proven unbiased by enumeration of its draws, and its well-known wrong versions, which fail."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_sparse.estimators import (
    ARMS,
    VIMCO,
    Baseline,
    DisARM,
    DoubleControlVariate,
    Estimator,
    Exact,
    LeaveOneOut,
    LocalExpectation,
    MovingAverage,
    MuProp,
    NeuralBaseline,
    RaoBlackwell,
    SampleBaseline,
    Scaled,
    ScoreFunction,
    SelfCritic,
    Site,
    Slots,
    Sum,
    TrainableConstant,
    UnorderedSet,
)
from pyro_sparse.infer import BaselineELBO, EstimatorELBO
from pyro_sparse.testing import check_estimator
from pyro_sparse.testing.estimator_models import EstimatorModel, estimator_grid, estimator_models
from pyro_sparse.testing.estimator_programs import BIT, nested_plates
from pyro_sparse.testing.outcomes import outcomes

MODELS = {model.name: model for model in estimator_models()}
# Those with fewer outcomes, for the fast suite.
SMALL = [
    *("categorical, one site", "categorical, two dependent sites", "categorical, nested plates, sites in the outer"),
    *("one-hot, one site", "categorical, sparse site", "Bernoulli, one site", "Bernoulli, two dependent sites"),
    *("Bernoulli, subsampled plate", "Bernoulli, nested plates, sites in the outer", "Bernoulli, masked and scaled"),
    *("Bernoulli, between reparameterised sites", "shared, outside and inside a plate", "outside, sum over a plate"),
    *("outside, across a gap", "branch, another site in one branch"),
]
# With slots in more dims, masks, zeros and sequential sites: fast where few draws are enumerated.
MORE = [
    *("categorical, outer of two plates", "categorical, five outcomes, outer of two plates"),
    *("categorical, apart in the guide only", "categorical, three in a row"),
    *("categorical, masked", "categorical, masked by a parent", "categorical, masked, sparse", "one-hot, masked"),
    *("Bernoulli, masked", "Bernoulli, outer of two plates"),
    *("categorical, outside of the data's plate", "categorical with zeros, a zero as a logit"),
    *("one-hot with zeros, all but one zero as logits", "Bernoulli with zeros, a zero"),
    *("categorical beside sequential, before", "categorical beside sequential, a zero"),
]


DISTINCT = [
    *("score function", "leave-one-out", "exact", "Rao-Blackwell", "unordered set", "local expectation"),
    *("DisARM", "MuProp"),
]


TAKES_SECONDS = [
    *("after a reparameterised site in a plate", "categorical and Bernoulli, subsampled plate", "vector, plate"),
    *("two dependent sites in a plate", "sequential", "three in a row", "sites in both"),
]


class EnumerableARMS(ARMS):
    """Draws the bits by their joint probabilities in closed form, not by continuous noise.

    Of uniform D on the simplex, j given ones all exceed t with probability (1 - jt)_+^(n-1); inclusion and exclusion
    give the probability that these do and no others.
    """

    def draw_bits(self, probs: Tensor) -> Tensor:
        rare = torch.minimum(probs, 1 - probs)
        patterns = torch.tensor(list(itertools.product([0.0, 1.0], repeat=self.n)))
        law = torch.stack([probability_of_exactly(int(a), self.n, rare) for a in patterns.sum(1)], -1)
        drawn = patterns[torch.multinomial(law.reshape(-1, 2**self.n), 1)[:, 0]].T.reshape((self.n, *probs.shape))
        return torch.where(probs <= 0.5, drawn, 1 - drawn)


def probability_of_exactly(count: int, n: int, rare: Tensor) -> Tensor:
    """That ``count`` given bits of n are rare and the others are not."""
    t = 1 - rare ** (1 / (n - 1))
    signs = [(-1) ** j * math.comb(n - count, j) for j in range(n - count + 1)]
    law = sum((s * (1 - (count + j) * t).clamp(min=0) ** (n - 1) for j, s in enumerate(signs)), torch.zeros(()))
    return law.clamp(min=0)  # a zero may come out as -1e-17


# Each with the kinds of models that it refuses.
LINKS = ("beside", "given", "parent of")
SEQUENTIAL = tuple(f"{family} {link} sequential" for family in ("categorical", "Bernoulli") for link in LINKS)
WITH_INDICES = (
    *("categorical", "categorical and Bernoulli", "categorical with zeros"),
    *("Bernoulli, then sparse", *SEQUENTIAL[:3]),
)
ONE_VALUE = ()  # serves everything
ONE_RUN = ("branch", *SEQUENTIAL)
SLOTS = ("branch", "outside", "vector")
BITS = ("branch", "outside", "one-hot", "one-hot with zeros", *WITH_INDICES)
ELEMENTS = ("branch", "outside")
BETWEEN = ("branch", "outside", *WITH_INDICES)
UNBIASED: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "score function": (ScoreFunction, ONE_VALUE),
    "moving average": (MovingAverage, ONE_VALUE),
    "trainable constant": (TrainableConstant, ONE_VALUE),
    "self-critic": (SelfCritic, ONE_VALUE),
    "sample": (SampleBaseline, ONE_VALUE),
    "scaled": (lambda: Scaled(SelfCritic()), ONE_VALUE),
    "sum": (lambda: Sum(MovingAverage(), TrainableConstant()), ONE_VALUE),
    "leave-one-out": (lambda: LeaveOneOut(2), ONE_RUN),
    "leave-one-out, one by one": (lambda: LeaveOneOut(2, vectorized=False), SEQUENTIAL),
    "Rao-Blackwell": (RaoBlackwell, SLOTS),
    "Rao-Blackwell, two in the tail": (lambda: RaoBlackwell(1, 2), SLOTS),
    "Rao-Blackwell, top two": (lambda: RaoBlackwell(2), SLOTS),
    "Rao-Blackwell by coverage": (lambda: RaoBlackwell(coverage=0.6), SLOTS),
    "DisARM": (DisARM, BITS),
    "VIMCO": (lambda: VIMCO(2), ("branch", "outside", "shared", *SEQUENTIAL)),
    "exact": (Exact, SLOTS),
    "unordered set": (lambda: UnorderedSet(2), SLOTS),
    "local expectation": (LocalExpectation, ELEMENTS),
    "MuProp": (MuProp, BETWEEN),
    "double control variate": (lambda: DoubleControlVariate(2), BETWEEN),
}

# Two draws for each of two sites in each of two rows have too many outcomes; tests/infer has z-tests of such programs.
TOO_MANY = {
    "double control variate": (
        "shared, outside and inside a plate",
        "Bernoulli, nested plates, sites in both",
        "one-hot, two dependent sites in a plate",
    )
}


# These take seconds each: the slow suite has them.
LONG = (
    "leave-one-out, one by one",
    "Rao-Blackwell, two in the tail",
    "DisARM",
    "VIMCO",
    "unordered set",
    "local expectation",
    "MuProp",
    "double control variate",
    "sample",
    "self-critic",
    "scaled",
    "leave-one-out",
    "sum",
    "trainable constant",
)


@pytest.mark.parametrize("name", [name for name in UNBIASED if name not in LONG])
def test_unbiased(name: str) -> None:
    make, refused = UNBIASED[name]
    served = [m for m in SMALL if MODELS[m].kind not in refused and m not in TOO_MANY.get(name, ())]
    check_estimator(make(), models=[replace(MODELS[m], kind="") for m in served])


@pytest.mark.parametrize("name", ["exact", pytest.param("Rao-Blackwell by coverage", marks=pytest.mark.slow)])
def test_unbiased_on_more_models(name: str) -> None:
    make, refused = UNBIASED[name]
    check_estimator(make(), models=[replace(MODELS[m], kind="") for m in MORE if MODELS[m].kind not in refused])


@pytest.mark.slow
@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_on_all_models(name: str) -> None:
    """Baselines, and estimators that are others with other numbers, on some and none that takes seconds."""
    models = [m for m in MODELS.values() if m.name not in TOO_MANY.get(name, ())]
    if name not in DISTINCT:
        some = {*SMALL, *MORE}
        models = [m for m in models if m.name in some and not any(what in m.name for what in TAKES_SECONDS)]
        models = [replace(m, kind="") for m in models if m.kind not in UNBIASED[name][1]]
    check_estimator(UNBIASED[name][0](), models=models)


def five_outcomes(side: str) -> None:
    z = pyro.sample("z", dist.Categorical(logits=pyro.param(f"{side}.logits", lambda: torch.randn(5))))
    if side == "model":
        pyro.sample("x", dist.Normal(pyro.param("loc", lambda: torch.randn(5))[z], 1.0), obs=torch.tensor(0.7))


@pytest.mark.parametrize("k", [2, 3, *(pytest.param(k, marks=pytest.mark.slow) for k in (4, 5))])
def test_sets_of_every_size_are_unbiased(k: int) -> None:
    sides = [lambda side=side: five_outcomes(side) for side in ("model", "guide")]
    check_estimator(UnorderedSet(k), models=[EstimatorModel("five outcomes", *sides)])


@pytest.mark.parametrize(
    "make", [LocalExpectation, MuProp, pytest.param(lambda: DoubleControlVariate(2), marks=pytest.mark.slow)]
)
def test_bits_of_a_vector(make: Callable[[], Estimator]) -> None:
    check_estimator(make(), models=[replace(MODELS["vector, plate"], kind="")])


@pytest.mark.parametrize(("n", "names"), [(3, ["one site", "subsampled plate"]), (4, ["one site"])])
def test_arms_is_unbiased(n: int, names: list[str]) -> None:
    """With few sites: every one multiplies the outcomes by 2**n, for each row."""
    check_estimator(EnumerableARMS(n), models=[MODELS[f"Bernoulli, {name}"] for name in names])


@pytest.mark.parametrize("name", UNBIASED)
def test_what_is_refused_is_refused_by_site(name: str) -> None:
    make, refused = UNBIASED[name]
    for kind in refused:
        model = next(model for model in MODELS.values() if model.kind == kind)
        with pytest.raises(AssertionError, match=r"the estimator raised ValueError.*site '(y|z|z0|b|bits)'"):
            check_estimator(make(), models=[model])


@pytest.mark.parametrize("baseline", [ScoreFunction(), SelfCritic()])
@pytest.mark.slow
def test_unbiased_with_sites_in_every_row_of_nested_plates(baseline: Any) -> None:
    sides = [lambda side=side: nested_plates(side, BIT, 2, 2, True) for side in ("model", "guide")]
    check_estimator(baseline, models=[EstimatorModel("nested", *sides, max_plate_nesting=2)])


SUBSAMPLED = [MODELS["categorical, subsampled plate"], MODELS["Bernoulli, subsampled plate"]]


@pytest.mark.parametrize(
    "baseline",
    [
        MovingAverage(num_data=3),
        Sum(MovingAverage(), NeuralBaseline(nn.Linear(1, 1), inputs=lambda: torch.tensor([[0.3], [-1.0], [0.8]]))),
    ],
)
def test_baselines_that_tell_examples_apart(baseline: Baseline) -> None:
    check_estimator(baseline, models=SUBSAMPLED)


@pytest.mark.parametrize(
    "estimators",
    [
        {"y": RaoBlackwell(), "z": DisARM()},
        {"y": LeaveOneOut(2), "z": RaoBlackwell()},
        {"y": DisARM(), "z": ScoreFunction(SelfCritic())},
        {"y": Exact(), "*": ScoreFunction(SampleBaseline())},
        {"z": Exact(), "*": LeaveOneOut(2)},
        *(
            pytest.param(both, marks=pytest.mark.slow)
            for both in (
                {"y": MuProp(), "z": Exact()},
                {"y": Exact(), "z": MuProp()},
                {"y": MuProp(), "z": LeaveOneOut(2)},
                {"y": UnorderedSet(2), "z": MuProp()},
                {"y": MuProp(), "z": LocalExpectation()},
                {"y": DoubleControlVariate(2), "z": MuProp()},
                {"y": Exact(), "z": DoubleControlVariate(2)},
                {"y": LocalExpectation(), "z": ScoreFunction(SelfCritic())},
            )
        ),
    ],
    ids=str,
)
def test_mixtures(estimators: dict[str, Estimator]) -> None:
    check_estimator(
        lambda **options: EstimatorELBO(estimators, **options), models=[MODELS["Bernoulli, two dependent sites"]]
    )


@pytest.mark.parametrize("first", [MuProp, RaoBlackwell, lambda: DoubleControlVariate(2)])
def test_before_a_site_with_slots_of_probability_zero(first: Callable[[], Estimator]) -> None:
    model = MODELS["Bernoulli, then sparse, two dependent sites"]
    check_estimator(lambda **options: EstimatorELBO({"y": first(), "z": Exact()}, **options), models=[model])
    check_estimator(lambda **options: EstimatorELBO({"y": first(), "z": RaoBlackwell(3)}, **options), models=[model])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["score function", "exact", "Rao-Blackwell", "Rao-Blackwell, top two"])
def test_unbiased_on_longer_models(name: str) -> None:
    """Where the number of draws allows it."""
    make, refused = UNBIASED[name]
    check_estimator(make(), models=[replace(m, kind="") for m in estimator_grid() if m.kind not in refused])


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimators",
    [{"y": RaoBlackwell(), "z": DisARM()}, {"y": LocalExpectation(), "z": MuProp()}],
    ids=str,
)
def test_a_mixture_in_a_plate(estimators: dict[str, Estimator]) -> None:
    model = MODELS["categorical and Bernoulli, subsampled plate"]
    check_estimator(lambda **options: EstimatorELBO(estimators, **options), models=[model])


@pytest.mark.parametrize("options", [{"analytic_kl": True}, {"costs": "graph"}], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        *("moving average", "DisARM", "exact"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("self-critic", "leave-one-out", "Rao-Blackwell")),
        pytest.param("unordered set", marks=pytest.mark.slow),
    ],
)
def test_options_of_the_elbo(name: str, options: dict[str, Any]) -> None:
    names = ["Bernoulli, two dependent sites", "Bernoulli, nested plates, sites in the outer"]
    names.append("Bernoulli, apart in the guide only")  # the divergence of z depends on y by the prior
    if name != "DisARM":  # whose pairs have many outcomes here
        names.append("Bernoulli, between reparameterised sites")

    def make(**keywords: Any) -> ELBO:
        e = UNBIASED[name][0]()
        return (BaselineELBO if isinstance(e, Baseline) else EstimatorELBO)(e, **keywords, **options)

    check_estimator(make, models=[replace(MODELS[n], kind="") for n in names])


def test_sequential_enumeration_serves_a_branch() -> None:
    branch = MODELS["branch, another site in one branch"]
    guide = poutine.infer_config(
        branch.guide, lambda msg: {"enumerate": "sequential"} if msg["name"] in ("y", "z") else {}
    )
    check_estimator(Exact(), models=[replace(branch, guide=guide)])


# Plates.


def rows(x: Tensor, subsample_size: int, side: str) -> None:
    """A bit for each row of the data."""
    with pyro.plate("data", len(x), subsample_size=subsample_size) as i:
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param(f"{side}.logits", torch.tensor([0.3, -0.9, 0.7]))[i]))
        if side == "model":
            pyro.sample("x", dist.Normal(pyro.param("slope", torch.tensor(0.8)) * z, 1.0), obs=x[i])


def mean_gradients(elbo: ELBO, x: Tensor, subsample_size: int) -> dict[str, Tensor]:
    """The expected gradient of each parameter, over subsamples and draws."""
    mean: dict[str, Any] = {}

    def step() -> None:
        for parameter in pyro.get_param_store().values():
            parameter.grad = None
        elbo.loss_and_grads(lambda: rows(x, subsample_size, "model"), lambda: rows(x, subsample_size, "guide"))

    pyro.clear_param_store()
    step()  # in its first run an ELBO may draw for other purposes
    for probability, _ in outcomes(step):
        for name, parameter in pyro.get_param_store().items():
            mean[name] = mean.get(name, 0.0) + probability * parameter.grad
    return mean


IN_PLATES = [ScoreFunction(SelfCritic()), LeaveOneOut(2), RaoBlackwell(), DisARM(), VIMCO(2), Exact()]


@pytest.mark.parametrize("estimator", IN_PLATES, ids=lambda e: type(e).__name__)
def test_the_mean_over_subsamples_is_the_full_gradient(estimator: Estimator) -> None:
    x = torch.tensor([0.2, -1.0, 1.5])
    full = mean_gradients(EstimatorELBO(estimator, max_plate_nesting=1), x, 3)
    for size in (1, 2):
        found = mean_gradients(EstimatorELBO(estimator, max_plate_nesting=1), x, size)
        torch.testing.assert_close(found, full, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("estimator", IN_PLATES, ids=lambda e: type(e).__name__)
def test_other_elements_data_do_not_move_the_mean(estimator: Estimator) -> None:
    x = torch.tensor([0.2, -1.0, 1.5])
    before, after = (
        mean_gradients(EstimatorELBO(estimator, max_plate_nesting=1), data, 3)["guide.logits"]
        for data in (x, x + torch.tensor([0.0, 0.0, 5.0]))
    )
    torch.testing.assert_close(before[:2], after[:2], rtol=1e-10, atol=1e-10)
    assert (before[2] - after[2]).abs() > 0.1


# What is wrong fails.


class NoScore(ScoreFunction):
    """Only the pathwise part."""

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        return 0 * site.log_prob, 0.0


class UndetachedSample(ScoreFunction):
    """The cost of an independent draw, through which the model's gradient flows once more."""

    def __init__(self, model: EstimatorModel) -> None:
        super().__init__()
        self.program = model

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        with poutine.block():
            guide_trace = poutine.trace(self.program.guide).get_trace()
            model_trace = poutine.trace(poutine.replay(self.program.model, guide_trace)).get_trace()
        return (cost - model_trace.log_prob_sum() + guide_trace.log_prob_sum()) * site.log_prob, 0.0


class UpdatedBeforeUse(MovingAverage):
    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        self.update(cost, site)
        return super().forward(cost, site)


class MeanOfTheBatch(Baseline):
    """Other elements' costs, and the element's own."""

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        return cost.mean(-1, keepdim=True), 0.0


class CostOfAnotherElement(ScoreFunction):
    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        return cost.roll(1, -1) * site.log_prob, 0.0


class LossThatReachesTheGuide(TrainableConstant):
    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        value, loss = super().forward(cost, site)
        return value, loss + site.log_prob.square().sum()


class MeanOfAll(LeaveOneOut):
    """Each particle's own cost is in its baseline."""

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        return (cost - cost.mean(0)) * site.log_prob, 0.0


class SlopeFromTheSameDraws(LeaveOneOut):
    """A coefficient for the baseline, fitted to the costs that it is used on."""

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        others = (cost.sum(0) - cost) / (self.num_particles - 1)
        slope = (cost * others).mean() / others.square().mean()
        return (cost - slope * others) * site.log_prob, 0.0


class TwoBaselines(RaoBlackwell):
    """The sampled part has a baseline that the enumerated part lacks."""

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        k, weights = site.slots.num_enumerated, site.slots.log_weights.exp()
        enumerated = (weights * cost)[:k].sum(0) / weights[:k].sum(0)
        return weights * torch.cat([cost[:k], cost[k:] - enumerated]) * site.log_prob, 0.0


class WithoutTheTailsWeight(RaoBlackwell):
    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        k, weights = site.slots.num_enumerated, site.slots.log_weights.exp()
        return torch.cat([weights[:k], torch.ones_like(weights[k:])]) * cost * site.log_prob, 0.0


class WithoutTheSigmoid(DisARM):
    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        return (cost - cost.mean(0)) / (self.n - 1) * site.log_prob, 0.0


class IndependentBits(DisARM):
    """Corrected for a correlation that the draws do not have."""

    def draw_bits(self, probs: Tensor) -> Tensor:
        return torch.bernoulli(probs.expand((self.n, *probs.shape)))


class WithoutTheScore(VIMCO):
    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        return self.bound(cost), 0.0


class SignalWithItsOwnWeight(VIMCO):
    """The geometric mean that stands for a particle's weight is over all particles."""

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        own = torch.eye(self.num_particles, dtype=torch.bool)
        own = own.reshape(own.shape + (1,) * (cost.dim() - 1))
        with torch.no_grad():
            replaced = torch.where(own, cost.mean(0), cost[:, None])
            signal = self.bound(cost) - self.bound(replaced)
        return self.bound(cost) + (signal * site.log_prob).sum(0), 0.0


class EquallyWeighted(Exact):
    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        return cost * site.log_prob / len(cost), 0.0


class WithoutTheMeanGradient(MuProp):
    """The first-order expansion is taken off and not put back."""

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        mean = site.slots.memo
        at_mean = site.attached_cost()[1]
        (slope,) = torch.autograd.grad(at_mean.sum(), mean, retain_graph=True)
        linear = at_mean.detach() + slope * (site.slots.values[0] - mean.detach())
        surrogate = (cost[0] - linear) * site.log_prob[0]
        return torch.stack([surrogate, torch.zeros_like(surrogate)]), 0.0


class DerivativeOfTheSameDraws(DoubleControlVariate):
    """Each draw's cost is corrected by the derivative at that draw, too."""

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        values = site.slots.memo
        (slope,) = torch.autograd.grad(site.attached_cost().sum(), values, retain_graph=True)
        mean = site.fn.mean.detach()
        corrected = (cost + self.scale.detach() * slope.mean(0) * (values - mean)).detach()
        signal = (corrected - corrected.mean(0)) / (self.n - 1)
        put_back = self.scale.detach() * slope.mean(0) * site.fn.mean
        surrogate = (signal * site.fn.log_prob(values.detach())).sum(0) - put_back
        return torch.stack([surrogate, torch.zeros_like(surrogate)]), 0.0


class WithoutTheRatios(UnorderedSet):
    """Weights by the probabilities in the set alone, as if nobody had chosen it."""

    def draw(self, site: Site) -> Slots:
        slots = super().draw(site)
        return slots._replace(log_weights=site.fn.log_prob(slots.values).detach().log_softmax(0))


class BaselineOfTheSet(UnorderedSet):
    """The weighted mean of the set is everybody's baseline: it lacks the second-order ratio."""

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        weights = site.slots.log_weights.exp()
        return weights * (cost - (weights * cost).sum(0)) * site.log_prob, 0.0


class WithoutTheDraw(LocalExpectation):
    """Each element's expectation leaves out the outcome that was drawn."""

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        return super().forward(torch.cat([0 * cost[:1], cost[1:]]), site)


class EqualWeightsForTheModel(LocalExpectation):
    def draw(self, site: Site) -> Slots:
        slots = super().draw(site)
        return slots._replace(log_weights=torch.full_like(slots.log_weights, -math.log(len(slots.log_weights))))


ONE, PLATE = MODELS["Bernoulli, one site"], MODELS["Bernoulli, subsampled plate"]
THREE_OUTCOMES = MODELS["categorical, one site"]


@pytest.mark.parametrize(
    ("wrong", "model"),
    [
        (NoScore(), ONE),
        (UpdatedBeforeUse(), ONE),
        (Sum(TrainableConstant(), UpdatedBeforeUse()), ONE),
        (Scaled(UpdatedBeforeUse()), ONE),
        (MeanOfTheBatch(), PLATE),
        (CostOfAnotherElement(), PLATE),
        (LossThatReachesTheGuide(), ONE),
        (MeanOfAll(2), ONE),
        (MeanOfAll(2, vectorized=False), ONE),
        (SlopeFromTheSameDraws(3), ONE),
        (TwoBaselines(), THREE_OUTCOMES),
        (WithoutTheTailsWeight(), THREE_OUTCOMES),
        (WithoutTheSigmoid(), ONE),
        (IndependentBits(), ONE),
        (WithoutTheScore(2), ONE),
        (SignalWithItsOwnWeight(2), ONE),
        (EquallyWeighted(), ONE),
        (WithoutTheMeanGradient(), ONE),
        (DerivativeOfTheSameDraws(2), ONE),
        (WithoutTheRatios(2), THREE_OUTCOMES),
        (BaselineOfTheSet(2), THREE_OUTCOMES),
        (WithoutTheDraw(), THREE_OUTCOMES),
        (EqualWeightsForTheModel(), replace(MODELS["vector, plate"], kind="")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_wrong_versions_fail(wrong: Any, model: EstimatorModel) -> None:
    with pytest.raises(AssertionError, match="1 of 1 models differ"):
        check_estimator(wrong, models=[model])


def test_an_undetached_sample_baseline_fails_in_the_model_only() -> None:
    """Published code has it: the model's gradient is multiplied by one plus the guide's entropy."""
    with pytest.raises(AssertionError, match=r"3 quantities differ, first the gradient of model\.") as raised:
        check_estimator(UndetachedSample(ONE), models=[ONE])
    assert "guide" not in str(raised.value)


# ARMS draws by continuous noise what EnumerableARMS draws from a table.


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 4, 5])
def test_arms_draws_by_its_law(n: int) -> None:
    """z-tests of how many bits are one, |z| < 5: 30 at most, which fail by chance once in 50,000 runs."""
    probs = torch.tensor([0.05, 0.3, 0.5, 0.65, 0.9])
    draws = 200_000
    ones = ARMS(n).draw_bits(probs.expand(draws, -1)).sum(0)
    for j, p in enumerate(probs):
        for count in range(n + 1):
            rare = count if p <= 0.5 else n - count
            law = math.comb(n, count) * probability_of_exactly(rare, n, torch.minimum(p, 1 - p))
            found = (ones[:, j] == count).double().sum()
            if law < 1e-12:  # zero, rounded
                assert found == 0
            elif draws * law < 1:
                assert found <= 8  # a Poisson number with mean one is larger with probability 1e-6
            else:
                assert (found - draws * law).abs() / (draws * law * (1 - law)).sqrt() < 5
