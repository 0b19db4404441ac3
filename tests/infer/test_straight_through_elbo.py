"""Straight-through variables in whole programs: the families under every ELBO, and the estimator in their place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_sparse._relaxation import JACOBIANS
from pyro_sparse.distributions import BernoulliST, GumbelSoftmaxST, OneHotCategoricalST
from pyro_sparse.estimators import Exact, LeaveOneOut, ScoreFunction, StraightThrough
from pyro_sparse.infer import BaselineELBO, EstimatorELBO
from pyro_sparse.infer.exact import EnumeratedELBO

X = torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=torch.float64)  # the default dtype is set per test
SEVERAL = (
    4.5  # standard errors: of some 20 z-tests, one run in 7,000 would have a failure with seeds that are not fixed
)
K = 3


def param(name: str, *shape: int) -> Tensor:
    """The same values in every program."""
    seed = sum(map(ord, name))
    return pyro.param(name, lambda: torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


@dataclass
class Families:
    """Plain ones, or ours with a Jacobian."""

    jacobian: str | None = None
    temperature: float = 0.7

    def one_hot(self, logits: Tensor) -> Any:
        if self.jacobian is None:
            return dist.OneHotCategorical(logits=logits)
        return OneHotCategoricalST(logits=logits, jacobian=self.jacobian, temperature=self.temperature)

    def bits(self, logits: Tensor) -> Any:
        if self.jacobian is None:
            return dist.Bernoulli(logits=logits).to_event(1)
        return BernoulliST(logits=logits, jacobian=self.jacobian, temperature=self.temperature).to_event(1)


PLAIN = Families()


@dataclass
class Program:
    """A one-hot y, bits z that depend on it, a normal h after them, x observed; perhaps a one-hot g for all."""

    subsample: bool = False
    scale: float = 1.0
    mask: bool = False
    shared: bool = False

    def plate(self) -> Any:
        return pyro.plate("data", 9, subsample=torch.tensor([8, 0, 3, 5])) if self.subsample else pyro.plate("data", 4)

    def guide(self, families: Families, x: Tensor = X) -> None:
        g = pyro.sample("g", families.one_hot(param("q.g", K))) if self.shared else torch.zeros(K)
        masked = poutine.mask(mask=x < 1.5 if self.mask else True)
        with poutine.scale(scale=self.scale), masked, self.plate():
            y = pyro.sample("y", families.one_hot(x[:, None] * param("q.y", K) + g @ param("q.gy", K, K)))
            z = pyro.sample("z", families.bits(y @ param("q.z", K, 2) + 0.3 * x[:, None]))
            pyro.sample("h", dist.Normal(x * param("q.h") + z.sum(-1), 0.6))

    def model(self, families: Families, x: Tensor = X) -> None:
        g = pyro.sample("g", families.one_hot(torch.tensor([0.1, 0.4, -0.2]))) if self.shared else torch.zeros(K)
        masked = poutine.mask(mask=x < 1.5 if self.mask else True)
        with poutine.scale(scale=self.scale), masked, self.plate():
            y = pyro.sample("y", families.one_hot(param("p.y", K)))
            z = pyro.sample("z", families.bits(y @ param("p.z", K, 2)))
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            loc = (y @ param("p.loc", K, 2) * z).sum(-1) ** 2 + h + g @ param("p.g", K)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


PROGRAMS = {
    "plate": Program(),
    "subsampled": Program(subsample=True),
    "scaled and masked": Program(scale=0.3, mask=True),
    "shared": Program(shared=True, subsample=True),
}


def gradients(elbo: Any, model: Callable[[], Any], guide: Callable[[], Any], seed: int = 5) -> dict[str, Tensor]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    loss = elbo.loss_and_grads(model, guide)
    found = {name: p.grad for name, p in pyro.get_param_store().named_parameters() if p.grad is not None}
    return {"loss": torch.tensor(loss), **found}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() and len(got) > 6
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


PARTICLES: dict[str, dict[str, Any]] = {
    "one": {},
    "vectorised": {"num_particles": 3, "vectorize_particles": True},
    "one by one": {"num_particles": 3},
}


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_one_number_from_three_elbos(name: str, particles: str) -> None:
    """The families under TraceMeanField_ELBO and ours, and the estimator over plain sites, for every Jacobian."""
    program, options = PROGRAMS[name], {**PARTICLES[particles], "max_plate_nesting": 1}
    for jacobian in JACOBIANS if particles == "one" else ("reinmax", "gumbel-softmax"):
        smooth = Families(jacobian)
        for prior in (PLAIN, smooth):
            model, guide = lambda prior=prior: program.model(prior), lambda smooth=smooth: program.guide(smooth)
            expected = gradients(TraceMeanField_ELBO(**options), model, guide)
            assert_equal(gradients(BaselineELBO(None, analytic_kl=True, **options), model, guide), expected)
        e = StraightThrough(jacobian, 0.7)
        plain = gradients(
            EstimatorELBO(e, analytic_kl=True, **options), lambda: program.model(PLAIN), lambda: program.guide(PLAIN)
        )
        assert_equal(plain, expected)


def test_differentiable_loss_is_the_same() -> None:
    program = PROGRAMS["plate"]
    model, guide = lambda: program.model(PLAIN), lambda: program.guide(PLAIN)
    expected = gradients(EstimatorELBO(StraightThrough(), max_plate_nesting=1), model, guide)
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    loss = EstimatorELBO(StraightThrough(), max_plate_nesting=1).differentiable_loss(model, guide)
    loss.backward()
    got = {name: p.grad for name, p in pyro.get_param_store().named_parameters()}
    assert_equal({"loss": loss.detach(), **got}, expected)


def test_the_kl_is_in_closed_form_whatever_analytic_kl_says() -> None:
    """Of its own sites only: that of h is drawn unless asked for."""
    program = PROGRAMS["plate"]
    model, guide = lambda: program.model(PLAIN), lambda: program.guide(PLAIN)
    found = [
        gradients(EstimatorELBO(StraightThrough(), analytic_kl=asked, max_plate_nesting=1), model, guide)
        for asked in (False, True)
    ]
    assert torch.equal(found[0]["p.y"], found[1]["p.y"])
    torch.testing.assert_close(found[0]["q.y"], found[1]["q.y"], atol=5, rtol=1)  # h's KL depends on z, too
    assert not torch.equal(found[0]["q.h"], found[1]["q.h"])


def test_the_values_in_the_program_are_hard_and_differentiable() -> None:
    seen: list[Tensor] = []

    def model() -> None:
        y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(K)))
        seen.append(y)
        pyro.sample("x", dist.Normal(y @ torch.arange(3.0), 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        seen.append(pyro.sample("y", dist.OneHotCategorical(logits=param("q", K))))

    elbo = EstimatorELBO(StraightThrough("gumbel-softmax"))
    elbo.loss_and_grads(model, guide)
    seen.clear()
    elbo.loss_and_grads(model, guide)
    for y in seen:
        assert torch.equal(y, seen[0]) and sorted(y.tolist()) == [0.0, 0.0, 1.0] and y.requires_grad


def test_the_loss_has_no_gradient_where_none_is_asked_for() -> None:
    program = PROGRAMS["plate"]
    model, guide = lambda: program.model(PLAIN), lambda: program.guide(PLAIN)
    elbo = EstimatorELBO(StraightThrough("gumbel-rao"), max_plate_nesting=1)
    assert math.isfinite(elbo.loss(model, guide))
    with torch.no_grad():
        assert not elbo.differentiable_loss(model, guide).requires_grad


def test_the_same_random_numbers_as_the_families() -> None:
    """Nothing is left behind by the run that looks at the program."""
    program = PROGRAMS["plate"]
    states = []
    for elbo, families in (
        (TraceMeanField_ELBO(max_plate_nesting=1), Families("reinmax")),
        (EstimatorELBO(StraightThrough("reinmax", 0.7)), PLAIN),
    ):
        gradients(elbo, lambda f=families: program.model(f), lambda f=families: program.guide(f))
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)


# Beside other estimators.


COPIES = 50_000


def copies(families: Families, n: int, interaction: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """One-hot y and z, with parameters for each of n elements; the cost is affine in y, unless z depends on it."""
    rows = {name: torch.randn(K, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(["y", "z"])}
    joint = torch.randn(K, K, generator=torch.Generator().manual_seed(7))

    def guide() -> None:
        with pyro.plate("copies", n):
            y = pyro.sample("y", families.one_hot(pyro.param("q.y", lambda: rows["y"].expand(n, -1).clone())))
            shift = y @ joint if interaction else 0.0
            pyro.sample("z", PLAIN.one_hot(pyro.param("q.z", lambda: rows["z"].expand(n, -1).clone()) + shift))

    def model() -> None:
        with pyro.plate("copies", n):
            y = pyro.sample("y", PLAIN.one_hot(torch.tensor([0.5, 0.0, -0.5])))
            z = pyro.sample("z", PLAIN.one_hot(torch.tensor([0.0, 0.3, 0.1])))
            pyro.factor("x", ((y @ joint) * z).sum(-1) + (z @ torch.arange(3.0)) ** 2)

    return model, guide


def z_scores(elbo: Any, interaction: bool) -> dict[str, Tensor]:
    model, guide = copies(PLAIN, 1, interaction)
    exact = gradients(EnumeratedELBO(max_plate_nesting=1), model, guide)
    model, guide = copies(PLAIN, COPIES, interaction)
    found = gradients(elbo, model, guide)
    scores = {}
    for name in ("q.y", "q.z"):
        error = found[name].std(0) / math.sqrt(COPIES)
        scores[name] = (found[name].mean(0) - exact[name][0]).abs() / error.clamp(min=1e-9)
    return scores


@pytest.mark.parametrize("other", [LeaveOneOut(2), ScoreFunction(), Exact()], ids=lambda e: type(e).__name__)
def test_it_biases_its_own_site_only(other: Any) -> None:
    """
    The other site's gradient is unbiased, for y is drawn by its law. Its own is where the cost is affine in y, and is
    not where z depends on it.
    """
    options: dict[str, Any] = {"max_plate_nesting": 1}
    affine = z_scores(EstimatorELBO({"y": StraightThrough(), "z": other}, **options), interaction=False)
    assert (affine["q.y"] < SEVERAL).all() and (affine["q.z"] < SEVERAL).all()
    dependent = z_scores(EstimatorELBO({"y": StraightThrough(), "z": other}, **options), interaction=True)
    assert (dependent["q.z"] < SEVERAL).all()
    assert (dependent["q.y"] > 20).any()


# Training.


PATTERNS = torch.tensor(
    [[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 1, 1, 1]], dtype=torch.float64
)


class Mixture(nn.Module):
    """A VAE whose latent variable is the component of a mixture of noisy patterns."""

    def __init__(self, families: Families) -> None:
        super().__init__()
        self.families = families
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, K))
        self.decoder = nn.Linear(K, 8)
        self.prior = nn.Parameter(torch.zeros(K))

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", PLAIN.one_hot(self.prior))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.families.one_hot(self.encoder(x)))


def trained(make_elbo: Callable[[], Any], families: Families, steps: int = 300) -> float:
    """The exact negative ELBO per example at the end."""
    torch.manual_seed(1)
    clean = PATTERNS[torch.randint(3, (60,))]
    x = torch.where(torch.rand(60, 8) < 0.05, 1 - clean, clean)
    vae = Mixture(families)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.03}), loss=make_elbo())
    for _ in range(steps):
        svi.step(x)
    vae.families = PLAIN
    return EnumeratedELBO(max_plate_nesting=1).loss(vae.model, vae.guide, x) / 60


@pytest.fixture(scope="module")
def exactly_trained() -> float:
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    return trained(lambda: EstimatorELBO(Exact()), PLAIN)


@pytest.mark.parametrize(
    ("jacobian", "by", "worse"),
    [
        pytest.param("reinmax", "family", 0.1, marks=pytest.mark.slow),
        pytest.param("reinmax", "estimator", 0.1, marks=pytest.mark.slow),
        pytest.param("gumbel-rao", "estimator", 0.4, marks=pytest.mark.slow),
        pytest.param("gumbel-softmax", "family", 0.4, marks=pytest.mark.slow),
        pytest.param("softmax", "family", 1.5, marks=pytest.mark.slow),
    ],
)
def test_a_mixture_vae_trains(jacobian: Any, by: str, worse: float, exactly_trained: float) -> None:
    """In nats for each example: 5.8 before, 2.4 by the exact gradient, 5.1 where the components stay one."""
    temperature = 0.5 if "gumbel" in jacobian else 1.0
    if by == "family":
        found = trained(lambda: TraceMeanField_ELBO(max_plate_nesting=1), Families(jacobian, temperature))
    else:
        found = trained(lambda: EstimatorELBO(StraightThrough(jacobian, temperature), max_plate_nesting=1), PLAIN)
    assert exactly_trained < 2.6
    assert found < exactly_trained + worse


@pytest.mark.slow
def test_pyros_own_does_not_train_it(exactly_trained: float) -> None:
    """Its density is that of the relaxed variable, its prior's gradient by the value zero: the components stay one."""

    class Theirs(Families):
        def one_hot(self, logits: Tensor) -> Any:
            return dist.RelaxedOneHotCategoricalStraightThrough(torch.tensor(0.5), logits=logits)

    assert trained(lambda: Trace_ELBO(max_plate_nesting=1), Theirs()) > exactly_trained + 2.0


def test_svi_trains_a_temperature() -> None:
    """Registered under the site's name, by the same step."""
    program = PROGRAMS["plate"]
    temperature = nn.Parameter(torch.tensor(0.7))
    elbo = EstimatorELBO({"y": StraightThrough("gumbel-softmax", temperature), "*": StraightThrough()})
    svi = SVI(lambda: program.model(PLAIN), lambda: program.guide(PLAIN), pyro.optim.Adam({"lr": 0.01}), loss=elbo)
    svi.step()
    assert temperature != 0.7
    names = [name for name in pyro.get_param_store() if name.startswith("pyro_sparse.estimators")]
    assert names == ["pyro_sparse.estimators$y$temperature"]
    saved = elbo.state_dict()
    own = StraightThrough("gumbel-softmax", nn.Parameter(torch.tensor(1.0)))
    twin = EstimatorELBO({"y": own, "*": StraightThrough()})
    twin.load_state_dict(saved)
    assert torch.equal(twin.assignment["y"].temperature, temperature)


def test_training_resumes_with_the_same_numbers(tmp_path: Path) -> None:
    program = PROGRAMS["plate"]

    def make() -> tuple[EstimatorELBO, Any]:
        own = StraightThrough("gumbel-rao", nn.Parameter(torch.tensor(0.7)))
        return EstimatorELBO({"y": own, "*": StraightThrough()}), pyro.optim.Adam({"lr": 0.05})

    def steps(elbo: EstimatorELBO, optimizer: Any) -> list[float]:
        svi = SVI(lambda: program.model(PLAIN), lambda: program.guide(PLAIN), optimizer, loss=elbo)
        return [svi.step() for _ in range(3)]

    elbo, optimizer = make()
    steps(elbo, optimizer)
    pyro.get_param_store().save(str(tmp_path / "params"))
    optimizer.save(str(tmp_path / "optimizer"))
    torch.save(elbo.state_dict(), tmp_path / "elbo")
    random = pyro.util.get_rng_state()
    expected = steps(elbo, optimizer)
    pyro.clear_param_store()
    resumed, again = make()
    pyro.get_param_store().load(str(tmp_path / "params"))
    again.load(str(tmp_path / "optimizer"))
    resumed.load_state_dict(torch.load(tmp_path / "elbo"))
    pyro.util.set_rng_state(random)
    assert steps(resumed, again) == expected


# Models that cannot be served.


def indices(how: str, families: Families = PLAIN) -> tuple[Callable[[], None], Callable[[], None]]:
    embedding = nn.Embedding(K, 2)

    def model() -> None:
        with pyro.plate("data", 5):
            y = pyro.sample("y", PLAIN.one_hot(torch.zeros(K)))
            if how == "embedding":
                loc = embedding(y).sum(-1)
            elif how == "argmax":
                loc = embedding(y.argmax(-1)).sum(-1)
            elif how == "look-up":
                loc = torch.arange(3.0)[y]
            elif how == "rounded":
                loc = (y > 0.5).to(y) @ param("p.loc", K)
            else:
                loc = torch.arange(3.0)[y.argmax(-1)]  # nothing else has a gradient, either
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.zeros(5))

    def guide() -> None:
        with pyro.plate("data", 5):
            pyro.sample("y", families.one_hot(param("q.y", 5, K)))

    return model, guide


@pytest.mark.parametrize("how", ["embedding", "argmax", "look-up", "rounded", "constant"])
def test_a_decoder_that_takes_indices(how: str) -> None:
    """Before any gradient."""
    model, guide = indices(how)
    for loss in ("loss_and_grads", "differentiable_loss"):
        pyro.clear_param_store()
        message = r"EstimatorELBO, site 'y' \(StraightThrough\): expected a model that takes one-hot vectors.*RELAX"
        with pytest.raises(ValueError, match=message):
            getattr(EstimatorELBO(StraightThrough(), max_plate_nesting=1), loss)(model, guide)
        assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())


@pytest.mark.parametrize("how", ["embedding", "argmax"])
def test_a_decoder_that_takes_indices_from_our_families(how: str) -> None:
    model, guide = indices(how, Families("softmax"))
    message = r"EstimatorELBO, site 'y' \(OneHotCategoricalST\): expected a model that takes one-hot vectors"
    with pytest.raises(ValueError, match=message):
        BaselineELBO(None, analytic_kl=True, max_plate_nesting=1).loss_and_grads(model, guide)


def test_categorical_sites_are_told_of_one_hot_and_relax() -> None:
    def model() -> None:
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        pyro.sample("x", dist.Normal(k.to(X), 1.0), obs=torch.tensor(0.3))

    def guide() -> None:
        pyro.sample("k", dist.Categorical(logits=param("q", 3)))

    message = (
        r"StraightThrough, site 'k': expected Bernoulli, OneHotCategorical.*got Categorical.*OneHotCategorical.*RELAX"
    )
    with pytest.raises(ValueError, match=message):
        EstimatorELBO(StraightThrough()).loss_and_grads(model, guide)


def test_a_prior_without_closed_form_kl() -> None:
    def model() -> None:
        b = pyro.sample("b", dist.Beta(1.0, 2.0, validate_args=False))
        pyro.sample("x", dist.Normal(b, 1.0), obs=torch.tensor(0.3))

    def guide() -> None:
        pyro.sample("b", dist.Bernoulli(logits=param("q")))

    message = r"site 'b': .*closed-form KL.*Beta.*LeaveOneOut"
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        EstimatorELBO(StraightThrough()).loss_and_grads(model, guide)


def test_a_prior_that_sees_its_own_draw() -> None:
    """Through b, which the guide draws from a: given b, a has another distribution than the guide's."""

    def model() -> None:
        b = pyro.sample("b", dist.Bernoulli(0.4))
        pyro.sample("a", dist.Bernoulli(0.2 + 0.5 * b))

    def guide() -> None:
        a = pyro.sample("a", dist.Bernoulli(logits=param("q.a")))
        pyro.sample("b", dist.Bernoulli(logits=param("q.b") + a))

    with pytest.raises(
        ValueError, match=r"site 'a': .*closed-form KL.*depends on what the guide draws after this site"
    ):
        EstimatorELBO(StraightThrough()).loss_and_grads(model, guide)


def test_an_estimator_for_a_family_of_ours_is_refused() -> None:
    model, guide = indices("constant", Families("softmax"))
    with pytest.raises(ValueError, match=r"site 'y': expected a site without reparameterised gradient"):
        EstimatorELBO({"y": LeaveOneOut(2)}, max_plate_nesting=1).loss_and_grads(model, guide)


def test_gumbel_softmax_serves_as_guide_and_prior() -> None:
    """In a subsampled plate, for a decoder that is linear in the value: the mean gradient is exact at any temperature
    in the KL divergence, which does not depend on the draw."""

    def program(side: str) -> None:
        with pyro.plate("data", 6, subsample_size=2) as i:
            pyro.sample("y", GumbelSoftmaxST(0.1, logits=param(f"{side}.y", 6, K)[i]))

    elbo = TraceMeanField_ELBO()
    found = torch.zeros(6, K)
    for seed in range(40):
        found += gradients(elbo, lambda: program("p"), lambda: program("q"), seed).get("q.y", torch.zeros(6, K)) / 40
    p, q = (param(f"{s}.y", 6, K).detach().clone().requires_grad_() for s in ("p", "q"))
    exact = torch.autograd.grad((q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum(), q)[0]
    assert ((found - exact).abs() < 0.6 * exact.abs() + 1e-9).all()  # each row is met 13 times in 40, times 3
    assert (found.sign() == exact.sign()).all()
