r"""
The split estimator in programs that ``test_mixed_gradients.py``, which has it among its routes, does not have.

Exactly where a draw can be placed at the nodes of a quadrature; else by z-tests of 10^5 draws, which ask for less than
4 standard errors in every parameter. The fast ones make 34 such comparisons, the slow ones 36: with everything right
and seeds that are not fixed, one run in 220 would have a failure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_sparse.distributions import (
    GaussianSparsemax,
    HardConcrete,
    MixedDirichlet,
    RectifiedNormal,
    SpikeAndSlab,
    ZeroOneInflated,
)
from pyro_sparse.estimators import (
    REBAR,
    Baseline,
    Exact,
    LeaveOneOut,
    MovingAverage,
    MuProp,
    RaoBlackwell,
    SampleBaseline,
    Scaled,
    ScoreFunction,
    SelfCritic,
    Site,
    SplitPathwise,
    TrainableConstant,
)
from pyro_sparse.infer import BaselineELBO, EstimatorELBO, config_estimators
from tests.infer.mixed_programs import (
    DATA,
    FAMILIES,
    NOISE,
    log_lik,
    one_site,
    one_site_elbo,
    place,
    sampler,
    shifted,
    theta,
    two_sites,
    two_sites_elbo,
)
from tests.known_gradients import Program, estimates, exact_gradient, standard_errors

DRAWS = 100_000
NORMAL = FAMILIES["RectifiedNormal"]
GATE = FAMILIES["HardConcrete"]
plain = sampler(False)


def sampled(make_elbo: Callable[[], Any], program: Callable[[int], Program], particles: int = 1) -> Tensor:
    """Estimates from so many draws, after a step that teaches the ELBO what it keeps."""
    elbo = make_elbo()
    estimates(elbo, program(64))
    return estimates(elbo, program(DRAWS // particles))


def assert_unbiased(errors: Tensor) -> None:
    assert standard_errors(errors).max() < 4


# What it is for.


def test_the_jump_is_seen() -> None:
    """By its own share of the gradient: without it the same draws are 20 standard errors off."""
    exact = exact_gradient(lambda t: one_site_elbo(NORMAL, t), NORMAL.q())
    naive = sampled(Trace_ELBO, lambda n: one_site(NORMAL, n, sampler(True)))
    assert standard_errors(naive - exact).max() > 20
    assert_unbiased(sampled(lambda: EstimatorELBO(SplitPathwise()), lambda n: one_site(NORMAL, n, plain)) - exact)


def test_less_variance_where_many_latents_share_a_likelihood() -> None:
    """By a factor of nearly five here: the score function's cost of each has the terms of all."""

    def program(n: int) -> Program:
        def plates() -> Any:
            return pyro.plate("copies", n, dim=-2), pyro.plate("gates", 10, dim=-1)

        def model() -> None:
            copies, gates = plates()
            with copies:
                with gates:
                    z = pyro.sample("z", GATE.make(GATE.p()))
                x = dist.Normal(z.sum(-1, keepdim=True), 1.0)
                pyro.sample("x", x, obs=torch.full((n, 1), 4.0))

        def guide() -> None:
            t = theta(GATE.q(), n, 10)
            copies, gates = plates()
            with copies, gates:
                pyro.sample("z", GATE.make(t))

        return model, guide

    rows = [sampled(lambda e=e: EstimatorELBO(e(MovingAverage())), program, 10) for e in (SplitPathwise, ScoreFunction)]
    split, score = (r.var(0).sum() for r in rows)
    assert split < score / 3


def triangle(n: int) -> Program:
    """On the edge between two vertices, where the density has a closed form in the first coordinate."""

    def model() -> None:
        with pyro.plate("copies", n):
            y = pyro.sample("y", GaussianSparsemax(torch.tensor([0.1, 0.3]), 0.8))
            pyro.sample("x", dist.Normal(y @ torch.tensor([2.0, -1.0]), NOISE), obs=DATA[0].expand(n))

    def guide() -> None:
        t = theta(torch.tensor([[0.4, -0.1], [-0.5, -0.2]]), n)
        with pyro.plate("copies", n):
            pyro.sample("y", GaussianSparsemax(t[:, 0], t[:, 1].exp()))

    return model, guide


def triangle_elbo(t: Tensor) -> Tensor:
    z, w = NORMAL.points(400)

    def log_prob(loc: Tensor, scale: Tensor) -> Tensor:
        return RectifiedNormal((loc[0] - loc[1] + 1) / 2, scale.square().sum().sqrt() / 2).log_prob(z)

    log_q, log_p = log_prob(t[0], t[1].exp()), log_prob(torch.tensor([0.1, 0.3]), torch.tensor([0.8, 0.8]))
    return (w * log_q.exp() * (log_lik(2 * z - (1 - z), DATA[0]) + log_p - log_q)).sum()


@pytest.mark.slow
def test_a_gaussian_sparsemax() -> None:
    exact = exact_gradient(triangle_elbo, torch.tensor([[0.4, -0.1], [-0.5, -0.2]]))
    rows = sampled(lambda: EstimatorELBO(SplitPathwise(MovingAverage())), triangle, 5)
    assert_unbiased((rows - exact).flatten(1))


# Exactly: a draw is placed at each node.


def placing(values: dict[str, Tensor]) -> Callable[[str, Any], Tensor]:
    def draw(name: str, d: Any) -> Tensor:
        place(d, values[name])
        return pyro.sample(name, d)

    return draw


def test_parameters_of_the_prior_and_of_the_likelihood() -> None:
    """They have the gradient of log p at the draw."""
    start = torch.tensor([*NORMAL.guide, *NORMAL.prior, 0.3])
    z, w = NORMAL.points(400)

    def model() -> None:
        t = theta(start, len(z))
        with pyro.plate("copies", len(z)):
            value = pyro.sample("z", NORMAL.make(t[:, 2:4]))
            pyro.sample("x", dist.Normal(t[:, 4] * value, NOISE), obs=DATA[0].expand(len(z)))

    def guide() -> None:
        t = theta(start, len(z))
        with pyro.plate("copies", len(z)):
            placing({"z": z})("z", NORMAL.make(t[:, :2]))

    def exact(t: Tensor) -> Tensor:
        log_q, log_p = NORMAL.make(t[:2]).log_prob(z), NORMAL.make(t[2:4]).log_prob(z)
        return (w * log_q.exp() * (log_lik(t[4] * z, DATA[0]) + log_p - log_q)).sum()

    rows = estimates(EstimatorELBO(SplitPathwise()), (model, guide))
    weights = w * NORMAL.make(NORMAL.q()).log_prob(z).exp()
    torch.testing.assert_close(weights @ rows, exact_gradient(exact, start), rtol=0, atol=1e-7)


def test_a_mask_of_the_guide_alone() -> None:
    """The prior counts, and its expectation depends on the guide."""
    z, w = NORMAL.points(400)

    def guide() -> None:
        with pyro.plate("copies", len(z)):
            pyro.sample("z", masked(NORMAL.make(theta(NORMAL.q(), len(z)))))

    def masked(d: Any) -> Any:
        place(d, z)
        return d.mask(False)

    rows = estimates(EstimatorELBO(SplitPathwise()), (one_site(NORMAL, len(z), plain)[0], guide))
    log_p = NORMAL.make(NORMAL.p()).log_prob(z) + log_lik(z, DATA[0])
    exact = exact_gradient(lambda t: (w * NORMAL.make(t).log_prob(z).exp() * log_p).sum(), NORMAL.q())
    weights = w * NORMAL.make(NORMAL.q()).log_prob(z).exp()
    torch.testing.assert_close(weights @ rows, exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize("costs", ["plates", "graph"])
@pytest.mark.parametrize("first", [True, False])
def test_beside_a_stratified_site(first: bool, costs: str) -> None:
    """A site with the split before and after one with the score function."""
    nodes, w = NORMAL.points(24)
    z1, z2 = nodes.repeat_interleave(len(nodes)), nodes.repeat(len(nodes))
    log_q = NORMAL.make(NORMAL.q()).log_prob(z1) + NORMAL.make(shifted(NORMAL.q(), z1)).log_prob(z2)
    elbo = EstimatorELBO({"z1" if first else "z2": SplitPathwise(), "*": ScoreFunction()}, costs=costs)
    rows = estimates(elbo, two_sites(NORMAL, len(z1), placing({"z1": z1, "z2": z2})))
    exact = exact_gradient(lambda t: two_sites_elbo(NORMAL, t), NORMAL.both())
    weights = torch.outer(w, w).flatten() * log_q.exp()
    torch.testing.assert_close(torch.tensordot(weights, rows, 1), exact, rtol=0, atol=1e-6)


def test_the_divergence_in_closed_form_takes_the_place_of_the_score() -> None:
    """The same numbers as with pathwise draws, and nothing for a baseline to learn."""

    def run(elbo: Any, pathwise: bool) -> tuple[float, Tensor, Tensor]:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        loss = elbo.loss_and_grads(*two_sites(GATE, 50, sampler(pathwise)))
        return loss, pyro.param("theta").grad, torch.random.get_rng_state()

    average = MovingAverage()
    elbo = EstimatorELBO({"z1": SplitPathwise(average), "*": SplitPathwise()}, analytic_kl=True)
    loss, gradient, state = run(elbo, False)
    expected = run(BaselineELBO(analytic_kl=True), True)
    torch.testing.assert_close(torch.tensor(loss), torch.tensor(expected[0]), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-11, atol=1e-12)
    assert torch.equal(state, expected[2])
    assert average.weight == 0


def test_baselines_see_the_log_ratio_of_their_own_site() -> None:
    """Those of sites before it see everything."""
    seen: dict[str, list[Tensor]] = {"z1": [], "z2": []}

    class Record(Baseline):
        def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, float]:
            seen[site.name].append(cost)
            return torch.zeros(()), 0.0

        def update(self, cost: Tensor, site: Site) -> None:
            seen[site.name].append(cost)

    model, guide = two_sites(GATE, 6, plain)
    traced = poutine.trace(model)
    EstimatorELBO({"z1": ScoreFunction(Record()), "z2": SplitPathwise(Record())}).loss_and_grads(traced, guide)
    z1, z2 = (traced.trace.nodes[name]["value"].detach() for name in ("z1", "z2"))
    log_r = GATE.make(shifted(GATE.p(), -z1)).log_prob(z2) - GATE.make(shifted(GATE.q(), z1)).log_prob(z2)
    whole = log_r + GATE.make(GATE.p()).log_prob(z1) - GATE.make(GATE.q()).log_prob(z1)
    for cost in seen["z2"]:
        torch.testing.assert_close(cost, log_r)
    for cost in seen["z1"]:
        torch.testing.assert_close(cost, whole + log_lik(z1 + 1.5 * z2, DATA[0]))
    assert [len(costs) for costs in seen.values()] == [2, 2]


def test_the_mode_has_a_log_ratio_of_its_own() -> None:
    found: list[Tensor] = []

    class Spy(SelfCritic):
        def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
            value, loss = super().forward(cost, site)
            found.append(value)
            return value, loss

    estimates(EstimatorELBO(SplitPathwise(Spy())), one_site(GATE, 3, plain))
    q = GATE.make(GATE.q())
    expected = GATE.make(GATE.p()).log_prob(q.mode) - q.log_prob(q.mode)
    torch.testing.assert_close(found[0], expected.expand(3))


@pytest.mark.parametrize(
    "make",
    [MovingAverage, TrainableConstant, SelfCritic, SampleBaseline, lambda: Scaled(SampleBaseline())],
    ids=["MovingAverage", "TrainableConstant", "SelfCritic", "SampleBaseline", "Scaled"],
)
def test_every_baseline_is_unbiased(make: Callable[[], Baseline]) -> None:
    rows = sampled(lambda: EstimatorELBO(SplitPathwise(make())), lambda n: two_sites(NORMAL, n, plain))
    assert_unbiased((rows - exact_gradient(lambda t: two_sites_elbo(NORMAL, t), NORMAL.both())).flatten(1))


# Beside discrete sites, with plates inside plates, and in several particles.

START = torch.tensor([0.3, *NORMAL.guide, -0.4])


def between_bits(n: int | None, infer: dict[str, Any] | None = None) -> Program:
    """A bit before z, on which z depends, and one after it; with None a single copy without a plate."""

    def copies() -> Any:
        return nullcontext() if n is None else pyro.plate("copies", n)

    def model() -> None:
        with copies():
            c = pyro.sample("c", dist.Bernoulli(0.4))
            z = pyro.sample("z", NORMAL.make(shifted(NORMAL.p(), -c)))
            d = pyro.sample("d", dist.Bernoulli(logits=2 * z - c))
            pyro.sample("x", dist.Normal(z * (1 + d) - c * z, NOISE), obs=DATA[0] if n is None else DATA[0].expand(n))

    def guide() -> None:
        t = theta(START) if n is None else theta(START, n)
        with copies():
            c = pyro.sample("c", dist.Bernoulli(logits=t[..., 0]))
            z = pyro.sample("z", NORMAL.make(shifted(t[..., 1:3], c)))
            pyro.sample("d", dist.Bernoulli(logits=t[..., 3] * (1 + 3 * z)), infer=infer)

    return model, guide


def between_bits_elbo(t: Tensor) -> Tensor:
    z, w = NORMAL.points(200)
    total = torch.zeros(())
    for c, d in itertools.product(torch.tensor([0.0, 1.0]), repeat=2):
        pairs = [
            (dist.Bernoulli(logits=t[0]), dist.Bernoulli(0.4), c),
            (NORMAL.make(shifted(t[1:3], c)), NORMAL.make(shifted(NORMAL.p(), -c)), z),
            (dist.Bernoulli(logits=t[3] * (1 + 3 * z)), dist.Bernoulli(logits=2 * z - c), d),
        ]
        log_q = sum(q.log_prob(value) for q, _, value in pairs)
        log_p = sum(p.log_prob(value) for _, p, value in pairs) + log_lik(z * (1 + d) - c * z, DATA[0])
        total = total + (w * log_q.exp() * (log_p - log_q)).sum()
    return total


SLOW = pytest.mark.slow
BESIDE = {
    "leave-one-out": ({"c": LeaveOneOut(4), "d": LeaveOneOut(4)}, {}, 4),
    "exact": ({"c": Exact(), "d": Exact()}, {}, 1),
    "score function": ({"c": ScoreFunction(), "d": ScoreFunction(MovingAverage())}, {}, 1),
    "graph": ({"c": ScoreFunction(), "d": Exact()}, {"costs": "graph"}, 1),
    "one by one": ({"c": LeaveOneOut(2, vectorized=False), "d": LeaveOneOut(2, vectorized=False)}, {}, 2),
    "relaxed": ({"c": REBAR(), "d": REBAR()}, {}, 1),
    "Taylor": ({"c": MuProp(), "d": MuProp()}, {}, 1),
    "sums": ({"c": RaoBlackwell(1), "d": ScoreFunction()}, {}, 1),
    "vectorised": (
        {"c": Exact(), "d": ScoreFunction()},
        {"num_particles": 4, "vectorize_particles": True},
        4,
    ),
}


@pytest.mark.parametrize("name", [n if i < 2 else pytest.param(n, marks=SLOW) for i, n in enumerate(BESIDE)])
def test_beside_discrete_sites(name: str) -> None:
    others, options, particles = BESIDE[name]
    rows = sampled(
        lambda: EstimatorELBO({"z": SplitPathwise(MovingAverage()), **others}, **options), between_bits, particles
    )
    assert_unbiased(rows - exact_gradient(between_bits_elbo, START))


@pytest.mark.slow
def test_before_a_site_that_is_enumerated_sequentially() -> None:
    elbo = EstimatorELBO({"z": SplitPathwise(), "*": ScoreFunction()})
    program = between_bits(None, {"enumerate": "sequential"})
    rows = torch.stack([estimates(elbo, program) for _ in range(800)])
    assert_unbiased(rows - exact_gradient(between_bits_elbo, START))


@pytest.mark.slow
def test_a_whole_program_in_a_subsampled_plate() -> None:
    """A global vector, and for each datum gates that depend on it, masked for one of them: as by the score function."""
    n, loc = DRAWS // 2, torch.tensor([0.4, -0.2])
    keep = torch.tensor([True, False, True, True])

    def latents(t: Tensor) -> tuple[Tensor, Tensor, Any]:
        data = pyro.plate("data", 4, subsample=index, dim=-1)
        g = pyro.sample("g", RectifiedNormal(t[..., :2], 0.6).expand((n, 1, 2)).to_event(1))
        with data, poutine.mask(mask=keep[index]):
            y = pyro.sample("y", HardConcrete(0.6, (t[..., 2:4] + g).expand(n, 2, 2)).to_event(1))
        return g, y, data

    def guide() -> None:
        t = theta(torch.zeros(4), n, 1)
        with pyro.plate("copies", n, dim=-2):
            latents(t)

    def model() -> None:
        with pyro.plate("copies", n, dim=-2):
            g, y, data = latents(torch.tensor([0.3, 0.1, 0.5, -0.2]).expand(n, 1, 4))
            with data:
                pyro.sample("x", dist.Normal((y * g) @ loc, NOISE), obs=DATA[index].expand(n, -1))

    means, errors = {}, {}
    estimators = {"split": SplitPathwise(MovingAverage()), "score": ScoreFunction(MovingAverage())}
    for name, e in estimators.items():
        rows = []
        for pair in itertools.combinations(range(4), 2):
            index = torch.tensor(pair)
            rows.append(estimates(EstimatorELBO(e), (model, guide)))
        stacked = torch.stack(rows).mean(0).flatten(1)
        means[name], errors[name] = stacked.mean(0), stacked.var(0) / len(stacked)
    assert (((means["split"] - means["score"]) / (errors["split"] + errors["score"]).sqrt()).abs() < 4).all()


# State.


@pytest.mark.slow
def test_a_baseline_learns_the_mean_log_ratio() -> None:
    """At a fixed guide."""
    constant, average = TrainableConstant(), MovingAverage(0.99)
    q, p = NORMAL.make(NORMAL.q()), NORMAL.make(NORMAL.p())
    z, w = NORMAL.points(200)
    expected = (w * q.log_prob(z).exp() * (p.log_prob(z) - q.log_prob(z))).sum()
    for baseline in (constant, average):
        pyro.clear_param_store()
        optimizer = pyro.optim.Adam(lambda name: {"lr": 0.0 if name == "theta" else 0.05})
        svi = SVI(*one_site(NORMAL, 500, plain), optimizer, loss=EstimatorELBO(SplitPathwise(baseline)))
        for _ in range(100):
            svi.step()
    torch.testing.assert_close(constant.constant.detach(), expected, rtol=0, atol=0.05)
    torch.testing.assert_close(average.mean, expected, rtol=0, atol=0.05)


def test_running_means_are_loaded_for_each_site() -> None:
    """A copy for each, with its own."""
    program = two_sites(GATE, 4, plain)
    trained, resumed = (EstimatorELBO(SplitPathwise(MovingAverage())) for _ in range(2))
    for _ in range(3):
        estimates(trained, program)
    resumed.load_state_dict(trained.state_dict())
    means = [trained.assignment[name].baseline.mean for name in ("z1", "z2")]
    assert means[0] != means[1] and 0 not in means
    random = pyro.util.get_rng_state()
    expected = estimates(trained, program)
    pyro.util.set_rng_state(random)
    assert torch.equal(estimates(resumed, program), expected)


def test_the_loss_has_no_gradient_where_none_is_asked_for() -> None:
    elbo = EstimatorELBO(SplitPathwise(SelfCritic()))
    program = two_sites(GATE, 5, plain)
    assert math.isfinite(elbo.loss(*program))
    with torch.no_grad():
        assert not elbo.differentiable_loss(*program).requires_grad
    pyro.set_rng_seed(2)
    expected = estimates(elbo, program)
    pyro.clear_param_store()
    pyro.set_rng_seed(2)
    elbo.differentiable_loss(*program).backward()
    assert torch.equal(-pyro.param("theta").grad, expected)


def test_sites_with_a_derivative_need_no_estimator() -> None:
    """Given for all, or by config_estimators, it serves those that have none."""

    def model() -> None:
        z = pyro.sample("z", GATE.make(GATE.p()))
        h = pyro.sample("h", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(h, 1.0), obs=DATA[0])

    def guide() -> None:
        z = pyro.sample("z", GATE.make(theta(GATE.q())))
        pyro.sample("h", dist.Normal(z + pyro.param("loc", torch.tensor(0.2)), 0.7))

    found = []
    for elbo, own in (
        (EstimatorELBO(SplitPathwise()), guide),
        (EstimatorELBO({}, max_plate_nesting=0), config_estimators(guide, SplitPathwise())),
    ):
        pyro.set_rng_seed(4)
        found.append(estimates(elbo, (model, own)))
    assert torch.equal(*found)


# What cannot be served, before anything changes.


def refused(program: Program, message: str, e: Any = None, **options: Any) -> None:
    average = MovingAverage()
    elbo = EstimatorELBO({"z": SplitPathwise(average)} if e is None else e, **options)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=message):
        elbo.loss_and_grads(*program)
    assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())
    assert average.weight == 0


def simple(
    q: Callable[[Tensor], Any], p: Any, use: Callable[[Tensor], Tensor] = lambda z: z, infer: Any = None
) -> Program:
    def model() -> None:
        z = pyro.sample("z", p)
        pyro.sample("x", dist.Normal(use(z).sum(), 1.0), obs=DATA[0])

    def guide() -> None:
        pyro.sample("z", q(theta(torch.zeros(3))), infer=infer)

    return model, guide


SLAB = dist.Beta(2.0, 2.0)


@pytest.mark.parametrize(
    ("q", "p"),
    [
        (lambda t: dist.Categorical(logits=t), dist.Categorical(torch.ones(3))),
        (lambda t: dist.OneHotCategorical(logits=t), dist.OneHotCategorical(torch.ones(3))),
        (lambda t: dist.Bernoulli(logits=t).to_event(1), dist.Bernoulli(torch.ones(3) / 2).to_event(1)),
        (lambda t: dist.Poisson(t[0].exp()), dist.Poisson(1.0)),
        (lambda t: MixedDirichlet(t, torch.ones(3)), MixedDirichlet(torch.zeros(3), torch.ones(3))),
        (lambda t: ZeroOneInflated(SLAB, t), ZeroOneInflated(SLAB, torch.zeros(3))),  # the slab has no cdf
    ],
    ids=["Categorical", "OneHotCategorical", "Bernoulli", "Poisson", "MixedDirichlet", "ZeroOneInflated"],
)
def test_a_distribution_without_a_pathwise_draw(q: Callable[[Tensor], Any], p: Any) -> None:
    refused(simple(q, p), r"^SplitPathwise, site 'z': expected a mixed distribution.*rsample.*got .*LeaveOneOut")


@pytest.mark.parametrize(
    "q", [lambda t: dist.Normal(t[0], 1.0), lambda t: RectifiedNormal(t[0], 1.0).has_rsample_(True)]
)
def test_a_reparameterised_site(q: Callable[[Tensor], Any]) -> None:
    refused(simple(q, RectifiedNormal(0.0, 1.0)), r"site 'z': expected a site without reparameterised gradient")


@pytest.mark.parametrize(
    "use",
    [lambda z: (z > 0).double(), lambda z: torch.arange(2.0)[z.long()]],
    ids=["comparison", "index"],
)
def test_a_model_without_a_derivative(use: Callable[[Tensor], Tensor]) -> None:
    program = simple(lambda t: RectifiedNormal(t[0], 1.0), RectifiedNormal(0.0, 1.0), use)
    message = r"^EstimatorELBO, site 'z' \(SplitPathwise\): expected a model that takes the value as a number.*LeaveOne"
    refused(program, message)


def test_sites_in_another_order() -> None:
    """A term of the site itself would depend on it through a later draw, too."""

    def model() -> None:
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", RectifiedNormal(h, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=DATA[0])

    def guide() -> None:
        z = pyro.sample("z", RectifiedNormal(theta(torch.zeros(1))[0], 1.0))
        pyro.sample("h", dist.Normal(z, 1.0))

    refused(
        (model, guide),
        r"site 'z': expected for SplitPathwise a prior that does not depend on what the guide draws after",
    )


def test_two_mechanisms() -> None:
    program = simple(lambda t: HardConcrete(0.5, t[0]), HardConcrete(0.5, 0.0), infer={"enumerate": "parallel"})
    refused(program, r"site 'z': expected one mechanism, got infer\['enumerate'\] and SplitPathwise")


def test_a_site_that_the_first_run_does_not_reach() -> None:
    """Its draw is the one that its terms are for."""
    runs = itertools.count()
    own = SplitPathwise()

    def late() -> bool:
        return next(runs) > 1

    def guide() -> None:
        t = theta(torch.zeros(1))[0]
        branch.append(late())
        if branch[-1]:
            pyro.sample("z", RectifiedNormal(t, 1.0), infer={"estimator": own})
        else:
            pyro.sample("h", dist.Normal(t, 1.0))

    def model() -> None:
        loc = pyro.sample("z", RectifiedNormal(0.0, 1.0)) if branch[-1] else pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=DATA[0])

    branch: list[bool] = []
    elbo = EstimatorELBO({})
    elbo.loss(model, guide)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss = elbo.loss_and_grads(model, guide)
    pyro.set_rng_seed(0)
    assert branch[-1] and loss == EstimatorELBO({}, max_plate_nesting=0).loss_and_grads(model, guide)


def test_no_baseline() -> None:
    with pytest.raises(TypeError, match=r"^SplitPathwise: expected a Baseline or None, got 0\.5"):
        SplitPathwise(0.5)  # type: ignore[arg-type]


def test_an_instance_without_a_gradient_is_served() -> None:
    """What counts is that there is a pathwise draw: a slab's own choice does not matter."""
    slab = dist.Normal(0.0, 1.0).has_rsample_(False)
    program = simple(lambda t: SpikeAndSlab(slab, logits=t[0]), SpikeAndSlab(slab, logits=torch.zeros(())))
    assert estimates(EstimatorELBO(SplitPathwise()), program)[0] != 0


def test_unknown_divergences_are_drawn_where_that_is_right() -> None:
    """analytic_kl beside a pair of mixed distributions without a formula; pathwise draws of it would be biased."""

    def model() -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", GaussianSparsemax(torch.zeros(3), 1.0))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=torch.tensor(0.7))

    def guide(pathwise: bool = False) -> None:
        pyro.sample("w", dist.Normal(pyro.param("a", torch.tensor(0.3)), 0.5))
        loc = pyro.param("loc", torch.tensor([0.5, 0.1, 0.0]))
        pyro.sample("z", GaussianSparsemax(loc, 1.0).has_rsample_(pathwise))

    for estimator in (LeaveOneOut(2), SplitPathwise()):
        pyro.clear_param_store()
        EstimatorELBO({"z": estimator, "*": ScoreFunction()}, analytic_kl=True).loss_and_grads(model, guide)
        torch.testing.assert_close(pyro.param("a").grad, torch.tensor(0.3))  # of the KL divergence of w, without noise
        assert pyro.param("loc").grad.abs().sum() > 0
    with pytest.raises(TypeError, match="Use an ELBO that draws it"):
        BaselineELBO(analytic_kl=True).loss_and_grads(model, lambda: guide(pathwise=True))
