r"""
REBAR, RELAX, MuProp, unordered sets and local expectations in whole programs.

z-tests: a plate of 5 x 10^4 copies of a program, each with its own parameters, gives as many estimates in one backward
pass; their mean must be within 4.5 standard errors of the enumerated gradient, in every parameter. There are about 600
comparisons, 200 of them in the fast suite: with everything right and seeds that are not fixed, one run in 250 has a
failure.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_sparse.distributions import SparseCategorical
from pyro_sparse.estimators import (
    REBAR,
    RELAX,
    DisARM,
    DoubleControlVariate,
    Exact,
    LeaveOneOut,
    LocalExpectation,
    MuProp,
    RaoBlackwell,
    ScoreFunction,
    SelfCritic,
    StraightThrough,
    UnorderedSet,
)
from pyro_sparse.infer import EstimatorELBO
from pyro_sparse.infer.exact import EnumeratedELBO

COPIES = 50_000
SEVERAL = 4.5
K = 3
PREFIX = "pyro_sparse.estimators"


def net(seed: int = 0, inputs: int = K) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def table(name: str, *shape: int) -> Tensor:
    seed = sum(map(ord, name))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# z-tests against enumeration.

FAMILIES: dict[str, Callable[[Tensor], Any]] = {
    "one-hot": lambda logits: dist.OneHotCategorical(logits=logits),
    "bits": lambda logits: dist.Bernoulli(logits=logits).to_event(1),
    "bit": lambda logits: dist.Bernoulli(logits=logits[..., :1]).to_event(1),
}


def two_sites(kind: str, n: int, rows: Tensor | None = None, scale: float = 1.0) -> tuple[Any, Any]:
    """
    y, z that depends on y, and x, in a plate of copies; perhaps in another one too, of which some rows are seen. Every
    number of the guide has a gradient for each copy.
    """
    family = FAMILIES[kind]
    size = () if rows is None else (4,)

    def param(name: str, *shape: int) -> Tensor:
        value = pyro.param(name, lambda: table(name, *size, 1, *shape).expand(*size, n, *shape).clone())
        return value if rows is None else value[rows]

    def plates(program: Callable[[], None]) -> None:
        with poutine.scale(scale=scale), pyro.plate("copies", n, dim=-1):
            if rows is None:
                program()
            else:
                with pyro.plate("data", 4, subsample=rows, dim=-2):
                    program()

    def guide() -> None:
        y = pyro.sample("y", family(param("q.y", K)))
        shift = (y.unsqueeze(-2) @ param("q.w", K, K)[..., : y.shape[-1], :]).squeeze(-2)
        pyro.sample("z", family(param("q.z", K) + shift))

    def model() -> None:
        y = pyro.sample("y", family(torch.tensor([0.3, -0.5, 0.1])))
        z = pyro.sample("z", family(torch.tensor([0.3, 0.5, 0.1]) + 0.4 * y))
        loc = (y * torch.tensor([1.0, -1.0, 2.0])[: y.shape[-1]]).sum(-1) + (y * z).sum(-1) ** 2 + z[..., 0]
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(1.3))

    return (lambda: plates(model)), (lambda: plates(guide))


def copies_of(elbo: Any, programs: tuple[Any, Any], copy_dim: int) -> dict[str, Tensor]:
    """The gradient of each copy, copies first."""
    pyro.clear_param_store()
    elbo.loss_and_grads(*programs)
    store = pyro.get_param_store().named_parameters()
    return {name: p.grad.movedim(copy_dim, 0).flatten(1) for name, p in store if name.startswith("q.")}


def assert_unbiased(estimators: Any, kind: str, rows: Tensor | None = None, scale: float = 1.0, **options: Any) -> None:
    nesting, dim = (1, 0) if rows is None else (2, 1)
    exact = copies_of(EnumeratedELBO(max_plate_nesting=nesting), two_sites(kind, 1, rows, scale), dim)
    pyro.set_rng_seed(3)
    elbo = EstimatorELBO(estimators, max_plate_nesting=nesting, **options)
    found = copies_of(elbo, two_sites(kind, COPIES, rows, scale), dim)
    assert found.keys() == {"q.y", "q.z", "q.w"}
    for name, gradient in found.items():
        error = gradient.std(0) / math.sqrt(COPIES)
        difference = (gradient.mean(0) - exact[name][0]).abs()
        assert (difference < SEVERAL * error + 1e-10).all(), (name, difference / error)
    assert found["q.y"].std(0).max() > 1e-3


SINGLE: dict[str, Callable[[], Any]] = {
    "REBAR": REBAR,
    "REBAR, hot": lambda: REBAR(2.0, 0.5),
    "RELAX": lambda: RELAX(net()),
    "MuProp": MuProp,
    "double": lambda: DoubleControlVariate(3, -0.7),
    "set": lambda: UnorderedSet(2),
    "local": LocalExpectation,
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("REBAR", "one-hot"), ("RELAX", "one-hot"), ("REBAR", "bits"), ("RELAX", "bits")),
        *(pytest.param(name, "one-hot", marks=SLOW) for name in ("REBAR, hot", "MuProp", "double", "set")),
        *(pytest.param(name, "bits", marks=SLOW) for name in ("REBAR, hot", "MuProp", "double", "local")),
        pytest.param("REBAR", "bit", marks=SLOW),
    ],
)
def test_two_dependent_sites(name: str, kind: str) -> None:
    assert_unbiased(SINGLE[name](), kind)


@pytest.mark.parametrize(
    "estimators",
    [
        lambda: {"y": REBAR(), "z": RELAX(net())},
        lambda: {"y": RELAX(net()), "z": REBAR()},
        lambda: {"y": REBAR(), "z": Exact()},
        pytest.param(lambda: {"y": Exact(), "z": REBAR()}, marks=SLOW),
        pytest.param(lambda: {"y": REBAR(), "z": LeaveOneOut(2)}, marks=SLOW),
        pytest.param(lambda: {"y": LeaveOneOut(2), "z": RELAX(net())}, marks=SLOW),
        pytest.param(lambda: {"y": REBAR(), "z": UnorderedSet(2)}, marks=SLOW),
        pytest.param(lambda: {"y": RaoBlackwell(), "z": REBAR()}, marks=SLOW),
        pytest.param(lambda: {"y": REBAR(), "z": LocalExpectation()}, marks=SLOW),
        pytest.param(lambda: {"y": MuProp(), "z": RELAX(net())}, marks=SLOW),
        pytest.param(lambda: {"y": DoubleControlVariate(2, -0.5), "z": REBAR()}, marks=SLOW),
        pytest.param(lambda: {"y": REBAR(), "z": ScoreFunction(SelfCritic())}, marks=SLOW),
    ],
)
def test_mixtures(estimators: Callable[[], Any]) -> None:
    assert_unbiased(estimators(), "one-hot")


@pytest.mark.slow
def test_a_mixture_with_pairs_of_bits() -> None:
    assert_unbiased({"y": REBAR(), "z": DisARM()}, "bits")


@pytest.mark.parametrize("name", ["REBAR", "RELAX", pytest.param("MuProp", marks=SLOW)])
def test_in_a_subsampled_and_scaled_plate(name: str) -> None:
    assert_unbiased(SINGLE[name](), "one-hot", rows=torch.tensor([3, 1]), scale=0.3)


@pytest.mark.parametrize("name", ["REBAR", pytest.param("RELAX", marks=SLOW)])
def test_with_closed_form_kl(name: str) -> None:
    assert_unbiased(SINGLE[name](), "one-hot", analytic_kl=True)


@pytest.mark.parametrize("name", ["REBAR", "RELAX"])
@pytest.mark.slow
def test_with_vectorised_particles(name: str) -> None:
    assert_unbiased(SINGLE[name](), "one-hot", num_particles=2, vectorize_particles=True)


def chain(n: int) -> tuple[Any, Any]:
    """y, for each of two rows z (masked out at one), a normal h and a bit w, each dependent on those before."""

    def param(name: str, *shape: int) -> Tensor:
        return pyro.param(name, lambda: table(name, 1, *shape).expand(n, *shape).clone())

    def guide() -> None:
        with pyro.plate("copies", n, dim=-2):
            y = pyro.sample("y", one_hot(param("q.y", 1, K)))
            with pyro.plate("data", 2, dim=-1):
                with poutine.mask(mask=torch.tensor([True, False])):
                    z = pyro.sample("z", one_hot(param("q.z", 2, K) + y @ table("w", K, K)))
                h = pyro.sample("h", dist.Normal(z[..., 0] + y[..., 1], 1.0))
                pyro.sample("w", dist.Bernoulli(logits=param("q.w", 2) + z[..., 1] - y[..., 0] + 0.3 * h))

    def model() -> None:
        with pyro.plate("copies", n, dim=-2):
            y = pyro.sample("y", one_hot(torch.tensor([0.1, 0.5, 0.2])))
            with pyro.plate("data", 2, dim=-1):
                with poutine.mask(mask=torch.tensor([True, False])):
                    z = pyro.sample("z", one_hot(1.2 * y))
                h = pyro.sample("h", dist.Normal(0.0, 1.0))
                w = pyro.sample("w", dist.Bernoulli(logits=0.4 * z[..., 2] + 0.1))
                loc = (y * z).sum(-1) ** 2 + w * z[..., 1] + 0.4 * h
                pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor([0.7, -0.4]))

    return model, guide


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"analytic_kl": True}], ids=["", "kl"])
@pytest.mark.parametrize(
    "estimators",
    [
        REBAR,
        lambda: DoubleControlVariate(2, -0.7),
        lambda: {"y": MuProp(), "z": REBAR(), "w": RELAX(net(2, 1))},
        lambda: {"y": UnorderedSet(2), "z": REBAR(), "w": DisARM()},
        lambda: {"y": REBAR(), "z": Exact(), "w": LeaveOneOut(2)},
    ],
)
def test_three_sites_and_a_normal_in_nested_plates(estimators: Callable[[], Any], options: dict[str, Any]) -> None:
    """The normal's noise is left to both sides: the difference of two means."""
    found = []
    for elbo in (EnumeratedELBO(max_plate_nesting=2), EstimatorELBO(estimators(), max_plate_nesting=2, **options)):
        pyro.set_rng_seed(1)
        found.append(copies_of(elbo, chain(COPIES), 0))
    for name, exact in found[0].items():
        got = found[1][name]
        error = ((got.var(0) + exact.var(0)) / COPIES).sqrt()
        assert ((got.mean(0) - exact.mean(0)).abs() < SEVERAL * error + 1e-10).all(), name


@pytest.mark.parametrize("vectorize", [True, False])
def test_particles_are_averaged(vectorize: bool) -> None:
    """Gradients are half as variable with four of them."""
    spreads = []
    for particles in (1, 4):
        options = {"num_particles": particles, "vectorize_particles": vectorize and particles > 1}
        elbo = EstimatorELBO(REBAR().requires_grad_(False), max_plate_nesting=1, **options)
        spreads.append(copies_of(elbo, two_sites("one-hot", 5000), 0)["q.y"].std(0))
    torch.testing.assert_close(spreads[1] / spreads[0], torch.full((K,), 0.5), atol=0.05, rtol=0)


# A small program with parameters in the decoder.

X = torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=torch.float64)


def model(x: Tensor = X) -> None:
    slope = pyro.param("p.slope", lambda: table("slope", K))
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.OneHotCategorical(logits=pyro.param("p.y", lambda: table("p.y", K))))
        b = pyro.sample(
            "b", dist.Bernoulli(logits=pyro.param("p.b", lambda: table("p.b", 2)).expand(len(x), 2)).to_event(1)
        )
        pyro.sample("x", dist.Normal(torch.tanh(y @ slope) * b.sum(-1) + b[..., 0], 1.0), obs=x)


def guide(x: Tensor = X) -> None:
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.OneHotCategorical(logits=x[:, None] * pyro.param("q.y", lambda: table("q.y", K))))
        logits = y @ pyro.param("q.b", lambda: table("q.b", K, 2)) + x[:, None]
        pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))


def make_relax(**options: Any) -> dict[str, Any]:
    return {"y": RELAX(net(0, K), **options), "b": RELAX(net(1, 2), **options)}


def double() -> DoubleControlVariate:
    return DoubleControlVariate(2)


def gradients(elbo: Any, seed: int = 7, model: Any = model, guide: Any = guide) -> dict[str, Tensor]:
    """Of the program's parameters, and the loss."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    loss = elbo.loss_and_grads(model, guide)
    store = pyro.get_param_store().named_parameters()
    return {"loss": torch.tensor(loss), **{n: p.grad for n, p in store if p.grad is not None and PREFIX not in n}}


def zeroed(estimators: dict[str, Any]) -> dict[str, Any]:
    for e in estimators.values():
        for parameter in e.net[-1].parameters():
            nn.init.zeros_(parameter)
    return estimators


@pytest.mark.parametrize(
    "options", [{}, {"analytic_kl": True}, {"num_particles": 2, "vectorize_particles": True}], ids=str
)
def test_relax_with_zero_networks_is_the_score_function(options: dict[str, Any]) -> None:
    """From the same seed, for every parameter: the values are drawn before the estimator's own noise."""
    expected = gradients(EstimatorELBO(ScoreFunction(), max_plate_nesting=1, **options))
    found = gradients(EstimatorELBO(zeroed(make_relax()), max_plate_nesting=1, **options))
    assert found.keys() == expected.keys() and len(found) == 6
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_rebar_of_scale_zero_is_the_score_function_at_its_draws() -> None:
    """Replayed."""
    drawn: dict[str, Tensor] = {}

    def spied(x: Tensor = X) -> None:
        nodes = poutine.trace(guide).get_trace(x).nodes
        drawn.update((name, nodes[name]["value"].detach()) for name in ("y", "b"))

    found = gradients(EstimatorELBO(REBAR(scale=0.0), max_plate_nesting=1), guide=spied)
    # The draw is in the first slot of each site's dim.
    values = {"y": drawn["y"].reshape(2, 4, K)[0], "b": drawn["b"][0].reshape(-1, 4, 2)[0]}

    class Fixed(poutine.messenger.Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            if msg["name"] in values:
                msg["value"] = values[msg["name"]]

    expected = gradients(EstimatorELBO(ScoreFunction(), max_plate_nesting=1), guide=Fixed()(guide))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [REBAR, make_relax], ids=["REBAR", "RELAX"])
def test_the_objective_of_what_is_learnt_reaches_nothing_else(make: Callable[[], Any]) -> None:
    """Encoder and decoder get the same gradients whether anything is learnt or not; the rest does get one."""
    found = []
    for learnt in (True, False):
        elbo = EstimatorELBO(make(), max_plate_nesting=1)
        elbo.requires_grad_(learnt)
        found.append(gradients(elbo))
        if learnt:
            got = [p.grad for name, p in pyro.get_param_store().named_parameters() if PREFIX in name]
            assert len(got) == (4 if make is REBAR else 10) and all(g is not None and (g != 0).any() for g in got)
    assert found[0].keys() == found[1].keys() and len(found[0]) == 6
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("e", [REBAR, MuProp, make_relax, lambda: DoubleControlVariate(2, -0.5)])
def test_a_subsample_is_scaled_up(e: Callable[[], Any]) -> None:
    """The control variate is that of the rows, the gradient is scaled: twice that of a plate without further rows."""

    def side(program: Callable[[], None], size: int) -> Callable[[], None]:
        def run() -> None:
            with pyro.plate("data", size, subsample=torch.arange(4)):
                program()

        return run

    def model() -> None:
        y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(K)))
        b = pyro.sample("b", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
        pyro.sample("x", dist.Normal(torch.tanh(y @ table("slope", K)) * b.sum(-1) + b[..., 0], 1.0), obs=X)

    def guide() -> None:
        pyro.sample("y", dist.OneHotCategorical(logits=pyro.param("q.y", lambda: table("q.y", 4, K))))
        pyro.sample("b", dist.Bernoulli(logits=pyro.param("q.b", lambda: table("q.b", 4, 2))).to_event(1))

    found = [
        gradients(EstimatorELBO(e(), max_plate_nesting=1), model=side(model, size), guide=side(guide, size))
        for size in (4, 8)
    ]
    for name in ("loss", "q.y", "q.b"):
        torch.testing.assert_close(found[1][name], 2 * found[0][name])


def test_the_decoder_sees_hard_values_only() -> None:
    """Its gradient is that of the draw, whatever scale and temperature are."""
    found = [gradients(EstimatorELBO(REBAR(t, scale), max_plate_nesting=1)) for t, scale in ((0.5, 1.0), (3.0, -2.0))]
    for name in ("loss", "p.slope", "p.y", "p.b"):
        assert torch.equal(found[0][name], found[1][name])
    assert not torch.equal(found[0]["q.y"], found[1]["q.y"])


def sets_and_local() -> dict[str, Any]:
    return {"y": UnorderedSet(2), "b": LocalExpectation()}


@pytest.mark.parametrize(
    "make",
    [REBAR, make_relax, StraightThrough, *(pytest.param(m, marks=SLOW) for m in (MuProp, double, sets_and_local))],
)
def test_a_step_leaves_nothing_to_collect(make: Callable[[], Any]) -> None:
    """Without the garbage collector: the second derivatives of what is learnt make no cycle."""
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), loss=EstimatorELBO(make()))

    def tensors() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    svi.step(X)
    svi.step(X)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        svi.step(X)
        svi.step(X)
        assert tensors() == before
    finally:
        gc.enable()


def test_looking_at_the_program_draws_nothing() -> None:
    """The state of the generator after a first step is that after a step that did not have to look."""
    for make in (REBAR, make_relax, MuProp):
        states = []
        for warm in (False, True):
            elbo = EstimatorELBO(make(), max_plate_nesting=1)
            if warm:
                gradients(elbo)
            gradients(elbo)
            states.append(torch.random.get_rng_state())
        assert torch.equal(*states)


# Training.


def test_svi_trains_what_is_learnt() -> None:
    """Temperature, scale and network, each site its own, in the param store."""
    elbo = EstimatorELBO({"y": REBAR(), "b": RELAX(net(1, 2))})
    before = {name: value.clone() for name, value in elbo.state_dict().items()}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=elbo)
    for _ in range(3):
        assert math.isfinite(svi.step(X))
    store = dict(pyro.get_param_store().named_parameters())
    names = [name for name in store if name.startswith(PREFIX)]
    assert sorted(names) == sorted(
        [
            f"{PREFIX}$y$log_temperature",
            f"{PREFIX}$y$scale",
            f"{PREFIX}$b$log_temperature",
            *(f"{PREFIX}$b$net.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
        ]
    )
    after = elbo.state_dict()
    assert after.keys() == before.keys() and len(after) == 7
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(before)


def test_one_object_for_several_sites_is_copied() -> None:
    elbo = EstimatorELBO(REBAR())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=elbo)
    svi.step(X)
    y, b = elbo.assignment["y"], elbo.assignment["b"]
    assert y is not b and y.scale != b.scale


@pytest.mark.parametrize("make", [REBAR, make_relax], ids=["REBAR", "RELAX"])
def test_training_resumes_with_the_same_numbers(make: Callable[[], Any], tmp_path: Path) -> None:
    def start() -> tuple[EstimatorELBO, Any]:
        return EstimatorELBO(make()), pyro.optim.Adam({"lr": 0.05})

    def steps(elbo: EstimatorELBO, optimizer: Any) -> list[float]:
        svi = SVI(model, guide, optimizer, loss=elbo)
        return [svi.step(X) for _ in range(3)]

    elbo, optimizer = start()
    steps(elbo, optimizer)
    pyro.get_param_store().save(str(tmp_path / "params"))
    optimizer.save(str(tmp_path / "optimizer"))
    torch.save(elbo.state_dict(), tmp_path / "elbo")
    random = pyro.util.get_rng_state()
    expected, state = steps(elbo, optimizer), elbo.state_dict()
    pyro.clear_param_store()
    resumed, again = start()
    pyro.get_param_store().load(str(tmp_path / "params"))
    again.load(str(tmp_path / "optimizer"))
    resumed.load_state_dict(torch.load(tmp_path / "elbo"))
    pyro.util.set_rng_state(random)
    assert steps(resumed, again) == expected
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in state.items())


@pytest.mark.slow
def test_learning_lowers_the_variance_of_a_program() -> None:
    """That of the guide's gradient, beside the score function's, after a few hundred steps at fixed model and guide."""

    def variance(elbo: EstimatorELBO) -> float:
        return sum(float(g.var(0).sum()) for g in copies_of(elbo, two_sites("one-hot", 5000), 0).values())

    plain = variance(EstimatorELBO(ScoreFunction(), max_plate_nesting=1))
    for e, below in ((REBAR(), 0.5), ({"y": RELAX(net(0)), "z": RELAX(net(1))}, 0.5)):
        elbo = EstimatorELBO(e, max_plate_nesting=1)
        before = variance(elbo)
        programs = two_sites("one-hot", 200)
        optimizer = torch.optim.Adam(elbo.parameters(), lr=0.03)
        pyro.clear_param_store()
        for _ in range(150):
            optimizer.zero_grad()
            elbo.differentiable_loss(*programs).backward()
            optimizer.step()
        after = variance(elbo)
        assert after < before and after < below * plain


def test_torch_optimisers_train_it_too() -> None:
    elbo = EstimatorELBO(REBAR(), max_plate_nesting=1)
    gradients(elbo)
    found = {name: p.grad.clone() for name, p in elbo.named_parameters()}
    elbo.zero_grad()
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    elbo.differentiable_loss(model, guide).backward()
    assert all(torch.equal(p.grad, found[name]) for name, p in elbo.named_parameters())


# Networks with inputs.


def test_inputs_have_the_rows_of_the_plate() -> None:
    """In a subsampled plate, with particles and beside slots of another site."""
    seen: list[tuple[torch.Size, Tensor]] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.4))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            seen.append((z.shape, x))
            return (self.weight * z).square().sum(-1) * x[..., 0]

    def rows(side: str, x: Tensor) -> None:
        with pyro.plate("data", 4, subsample=torch.tensor([2, 0])) as i:
            y = pyro.sample("y", dist.OneHotCategorical(logits=table(side, 4, K)[i] + pyro.param(side, torch.zeros(K))))
            z = pyro.sample("z", dist.OneHotCategorical(logits=y + pyro.param(side, torch.zeros(K))))
            if side == "p":
                pyro.sample("x", dist.Normal((y * z).sum(-1), 1.0), obs=x[i])

    for options in ({}, {"num_particles": 3, "vectorize_particles": True}):
        for other in (ScoreFunction(), Exact(), REBAR()):
            estimators = {"y": other, "z": RELAX(Net().double(), inputs=lambda x: x[:, None])}
            elbo = EstimatorELBO(estimators, max_plate_nesting=1, **options)
            pyro.clear_param_store()
            elbo.loss_and_grads(lambda x: rows("p", x), lambda x: rows("q", x), X)
            shape, x = seen.pop()
            particles = (3,) if options else ()
            assert shape[-2:] == (2, K) and x.shape[-2:] == (2, 1)
            assert math.prod(shape[:-2]) in (math.prod(particles), 2 * math.prod(particles), 3 * math.prod(particles))
            assert torch.equal(x.reshape(-1, 2)[-1], X[[2, 0]])


# What cannot be served.


def program(
    prior: Any, decoder: Callable[[Tensor], Tensor], posterior: Any
) -> tuple[Callable[[], None], Callable[[], None]]:
    def model() -> None:
        with pyro.plate("data", 5):
            value = pyro.sample("y", prior)
            pyro.sample("x", dist.Normal(decoder(value), 1.0), obs=torch.zeros(5))

    def guide() -> None:
        with pyro.plate("data", 5):
            pyro.sample("y", posterior(pyro.param("q", lambda: table("q", 5, K))))

    return model, guide


def one_hot(logits: Tensor) -> Any:
    return dist.OneHotCategorical(logits=logits)


UNIFORM = dist.OneHotCategorical(logits=torch.zeros(K, dtype=torch.float64))
EMBEDDING = nn.Embedding(K, 2)


relaxing = pytest.mark.parametrize("e", [REBAR, MuProp, double], ids=lambda e: type(e()).__name__)


def refused(e: Any, match: str, programs: Any, **options: Any) -> None:
    """Before any gradient."""
    elbo = EstimatorELBO(e, max_plate_nesting=1, **options)
    with pytest.raises(ValueError, match=match):
        elbo.loss_and_grads(*programs)
    assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())
    assert all(p.grad is None for p in elbo.parameters())


@relaxing
@pytest.mark.parametrize(
    "decoder",
    [
        lambda y: EMBEDDING.double()(y).sum(-1),
        lambda y: EMBEDDING.double()(y.argmax(-1)).sum(-1),
        lambda y: torch.arange(3.0)[y],
        lambda y: torch.arange(3.0)[y.argmax(-1)],
        lambda y: (y > 0.5).to(y) @ table("w", K),
        lambda y: y.long().to(y) @ table("w", K),
    ],
    ids=["embedding", "argmax", "look-up", "constant", "rounded", "cast"],
)
def test_a_decoder_that_takes_indices(e: Any, decoder: Any) -> None:
    """It names RELAX, which serves that decoder."""
    name = type(e()).__name__
    match = rf"^EstimatorELBO, site 'y' \({name}\): expected a model that takes one-hot.*between 0 and 1.*RELAX"
    refused(e(), match, program(UNIFORM, decoder, one_hot))


def test_relax_serves_a_decoder_that_takes_indices() -> None:
    programs = program(UNIFORM, lambda y: EMBEDDING.double()(y.argmax(-1)).sum(-1), one_hot)
    elbo = EstimatorELBO(RELAX(net()), max_plate_nesting=1)
    assert math.isfinite(elbo.loss_and_grads(*programs))
    categorical = program(
        dist.Categorical(torch.ones(K)), lambda y: EMBEDDING.double()(y).sum(-1), lambda t: dist.Categorical(logits=t)
    )
    assert math.isfinite(EstimatorELBO(RELAX(net()), max_plate_nesting=1).loss_and_grads(*categorical))


@relaxing
def test_categorical_sites(e: Any) -> None:
    programs = program(dist.Categorical(torch.ones(K)), lambda y: y.to(X), lambda t: dist.Categorical(logits=t))
    match = rf"^{type(e()).__name__}, site 'y': expected Bernoulli, OneHotCategorical, alone or .*, got Cat.*RELAX"
    refused(e(), match, programs)


@relaxing
def test_a_prior_of_another_kind(e: Any) -> None:
    """Which has no log-probability between the outcomes."""
    prior = dist.Multinomial(1, probs=torch.ones(K) / K)
    refused(
        e(),
        r"^EstimatorELBO, site 'y': .*in the model, too, got Mult.*RELAX",
        program(prior, lambda y: y[..., 0], one_hot),
    )
    assert math.isfinite(
        EstimatorELBO(RELAX(net()), max_plate_nesting=1).loss_and_grads(*program(prior, lambda y: y[..., 0], one_hot))
    )


@relaxing
def test_costs_by_graph(e: Any) -> None:
    match = rf"^EstimatorELBO, site 'y': expected costs='plates' with {type(e()).__name__}, got 'graph'"
    refused(e(), match, program(UNIFORM, lambda y: y[..., 0], one_hot), costs="graph")


def test_a_network_of_another_output_shape() -> None:
    wrong = nn.Linear(K, 2).double()
    match = r"^RELAX, site 'y': expected an output of shape \(5,\) or \(5, 1\), got \(5, 2\)\. Use one output unit\."
    refused(RELAX(wrong), match, program(UNIFORM, lambda y: y[..., 0], one_hot))


def test_sets_larger_than_the_support() -> None:
    match = r"^UnorderedSet, site 'y': expected k of at most 3, the number of outcomes, got 4\. .*Exact"
    refused(UnorderedSet(4), match, program(UNIFORM, lambda y: y[..., 0], one_hot))


@pytest.mark.parametrize("e", [LocalExpectation(), UnorderedSet(2), RELAX(net())], ids=lambda e: type(e).__name__)
def test_an_infinite_support(e: Any) -> None:
    prior = dist.Poisson(torch.tensor(1.0))
    programs = program(prior, lambda y: y, lambda t: dist.Poisson(t[..., 0].exp()))
    refused(e, rf"^{type(e).__name__}, site 'y': expected .*Poisson.*LeaveOneOut", programs)


def test_a_sparse_site() -> None:
    programs = program(SparseCategorical(torch.ones(K)), lambda y: y.to(X), SparseCategorical)
    for e in (REBAR(), MuProp(), RELAX(net()), StraightThrough()):
        refused(e, rf"^{type(e).__name__}, site 'y': expected Bernoulli.*got Sparse", programs)


def test_infinite_costs_of_ruled_out_values() -> None:
    """A relaxed value has mass where the model has none: the cost is infinite, and no gradient may be NaN unsaid."""
    prior = dist.OneHotCategorical(torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))

    def posterior(logits: Tensor) -> Any:
        return dist.OneHotCategorical(
            logits=torch.cat([logits[..., :2], torch.full_like(logits[..., :1], -math.inf)], -1)
        )

    for e in (REBAR(), MuProp(), double(), RELAX(net()), UnorderedSet(2), LocalExpectation()):
        pyro.clear_param_store()
        elbo = EstimatorELBO(e, max_plate_nesting=1)
        loss = elbo.loss_and_grads(*program(prior, lambda y: y @ torch.arange(3.0), posterior))
        assert math.isfinite(loss), e
        assert pyro.param("q").grad.isfinite().all(), e
        assert (pyro.param("q").grad[:, :2] != 0).any(), e
