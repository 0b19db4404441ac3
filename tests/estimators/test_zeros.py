r"""
Guides that rule outcomes out: an outcome of probability zero is as if it were not there, for every estimator.

Where the noise can be enumerated, unbiased by enumeration; where it is Gumbel noise, the same numbers as without the
outcome, for the same noise of the others. Everything is finite, in float32 too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_sparse import _relaxation
from pyro_sparse._relaxation import tempered_softmax
from pyro_sparse.distributions import BernoulliST, GumbelSoftmaxST, OneHotCategoricalST, SparseCategorical
from pyro_sparse.estimators import (
    ARMS,
    REBAR,
    RELAX,
    VIMCO,
    DisARM,
    DoubleControlVariate,
    Exact,
    LeaveOneOut,
    LocalExpectation,
    MuProp,
    RaoBlackwell,
    ScoreFunction,
    SelfCritic,
    Site,
    StraightThrough,
    UnorderedSet,
    rebar,
)
from pyro_sparse.infer import EstimatorELBO
from pyro_sparse.testing import check_estimator
from pyro_sparse.testing.estimator_models import EstimatorModel

INF = math.inf
WEIGHTS = torch.tensor([0.1, 1.0, -1.0, 0.5], dtype=torch.float64)
LATER = torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.0, 0.0], [0.0, 2.0, 2.1], [0.3, 0.2, 0.1]], dtype=torch.float64)


def network(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, 1))


ENUMERATED: dict[str, Callable[[], Any]] = {
    "score function": ScoreFunction,
    "self-critic": lambda: ScoreFunction(SelfCritic()),
    "leave one out": lambda: LeaveOneOut(2),
    "VIMCO": lambda: VIMCO(2),
    "Rao-Blackwell 1": RaoBlackwell,
    "Rao-Blackwell 2": lambda: RaoBlackwell(2, 2),
    "set of 2": lambda: UnorderedSet(2),
    "set of 3": lambda: UnorderedSet(3),
    "local expectation": LocalExpectation,
    "exact": Exact,
    "MuProp": MuProp,
    "double control variate": lambda: DoubleControlVariate(2, 0.3),
}
RELAXED: dict[str, Callable[[], Any]] = {
    "REBAR": REBAR,
    "REBAR, cold": lambda: REBAR(0.05),
    "RELAX": lambda: RELAX(network(4)),
    **{
        f"straight-through, {j}": functools.partial(lambda j: StraightThrough(j, nn.Parameter(torch.tensor(0.7))), j)
        for j in _relaxation.JACOBIANS
    },
}
ROWS = {
    "a zero": [0.5, 0.2, 0.3, 0.0],
    "a one": [0.0, 1.0, 0.0, 0.0],
    "subnormal": [0.6, 0.4, 1e-310, 0.0],
    "subnormal in float32": [1.0, 1e-41, 3e-42, 6e-45],
}


def one_hot(row: list[float], form: str, theta: Tensor) -> Any:
    """The row, reweighted by the parameters; "lowest" masks by the dtype's lowest number."""
    p = torch.tensor(row, dtype=torch.float64)
    if form == "probs":
        return dist.OneHotCategorical(probs=p.to(theta) * (1 + theta))
    if form == "logits":
        return dist.OneHotCategorical(logits=p.log().to(theta) + theta)
    return dist.OneHotCategorical(logits=torch.where(p > 1e-9, p.log().to(theta) + theta, torch.finfo(theta.dtype).min))


def programs(row: list[float], form: str, later: bool, dtype: torch.dtype) -> tuple[Any, Any]:
    """A one-hot site and, perhaps, a sparse one that depends on it and is summed over."""
    weights, table, exact = WEIGHTS.to(dtype), LATER.to(dtype), Exact()

    def guide() -> None:
        z = pyro.sample("z", one_hot(row, form, pyro.param("theta", torch.tensor([0.1, -0.2, 0.3, 0.05], dtype=dtype))))
        if later:
            scores = z @ table + pyro.param("phi", torch.zeros(3, dtype=dtype))
            pyro.sample("y", SparseCategorical(scores), infer={"estimator": exact})

    def model() -> None:
        z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(4, dtype=dtype)))
        loc = (z @ weights) ** 2 + pyro.param("shift", torch.zeros((), dtype=dtype))
        if later:
            loc = loc + weights[pyro.sample("y", dist.Categorical(torch.ones(3, dtype=dtype)))]
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(0.3, dtype=dtype))

    return model, guide


def all_finite(elbo: Any, model: Any, guide: Any, steps: int = 2) -> None:
    for seed in range(steps):
        pyro.set_rng_seed(seed)
        elbo.zero_grad()
        loss = elbo.loss_and_grads(model, guide)
        found = {**dict(pyro.get_param_store().named_parameters()), **dict(elbo.named_parameters())}
        gradients = {name: p.grad for name, p in found.items() if p.grad is not None}
        assert math.isfinite(loss) and gradients
        assert all(g.isfinite().all() for g in gradients.values()), gradients
        assert all(state.isfinite().all() for state in elbo.state_dict().values())
        for p in found.values():
            p.grad = None


FIRST = ("REBAR", "RELAX", "MuProp", "straight-through, gumbel-softmax", "set of 3")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(n, d, marks=[] if n in FIRST and d == torch.float32 else [pytest.mark.slow])
        for n in (*ENUMERATED, *RELAXED)
        for d in (torch.float32, torch.float64)
    ],
)
def test_everything_is_finite(name: str, dtype: torch.dtype) -> None:
    make = {**ENUMERATED, **RELAXED}[name]
    torch.set_default_dtype(dtype)
    for kind, row in ROWS.items():
        for form in ("probs", "logits", "lowest") if kind == "a zero" else ("probs", "logits"):
            for later in (False, True):
                if not (later and name == "VIMCO"):
                    pyro.clear_param_store()
                    all_finite(EstimatorELBO(make(), max_plate_nesting=0), *programs(row, form, later, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["DisARM", "ARMS", "REBAR", "RELAX", "MuProp", "straight-through, gumbel-rao"])
def test_everything_is_finite_for_bits(name: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    make = {**ENUMERATED, **RELAXED, "DisARM": DisARM, "ARMS": lambda: ARMS(4), "RELAX": lambda: RELAX(network(3))}[
        name
    ]
    for p in ([0.0, 0.5, 1.0], [1e-41, 1 - 1e-7, 1e-310]):
        pyro.clear_param_store()

        def guide(p: Any = p) -> None:
            theta = pyro.param("theta", torch.zeros(3))
            pyro.sample("z", dist.Bernoulli(torch.tensor(p) * (1 + theta)).to_event(1))

        def model() -> None:
            z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3, 0.4, 0.5])).to_event(1))
            pyro.sample("x", dist.Normal((z.sum(-1) - 0.7) ** 2, 1.0), obs=torch.tensor(0.3))

        all_finite(EstimatorELBO(make(), max_plate_nesting=0), model, guide)


@pytest.mark.slow
@pytest.mark.parametrize("later", [False, True], ids=["", "before a sparse site"])
@pytest.mark.parametrize("name", ENUMERATED)
def test_unbiased(name: str, later: bool) -> None:
    """The expected gradient, with outcomes that are never drawn, by enumeration."""
    if later and name == "VIMCO":
        pytest.skip("it stands alone")
    models = []
    for kind in ("a zero", "a one"):
        for form in ("probs", "logits"):
            model, guide = programs(ROWS[kind], form, later, torch.float64)
            models.append(EstimatorModel(f"{kind}, {form}", model, guide))
    check_estimator(ENUMERATED[name](), models=models)


# The Gumbel noise of an outcome that is ruled out does not matter.


def same_noise(monkeypatch: pytest.MonkeyPatch, noise: Tensor) -> None:
    """Noise of as many outcomes as are asked for, the first ones."""
    own = lambda x: noise[: x.shape[-1]].expand_as(x)  # noqa: E731
    for module in (_relaxation, rebar):
        monkeypatch.setattr(module, "gumbel_like", own)


@pytest.mark.parametrize("name", RELAXED)
def test_an_outcome_that_is_ruled_out_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value, the gradient and that of the estimator's own parameters are those of the smaller variable."""
    same_noise(monkeypatch, torch.tensor([0.3, 1.9, -0.4, 0.8]))
    found = []
    for size in (3, 4):
        torch.manual_seed(5)
        e: Any = RELAXED[name]()
        if name == "RELAX":
            e.net[0].weight.data = torch.arange(16.0).reshape(4, 4).cos()[:, :size].clone()
        theta = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
        logits = torch.cat([theta, torch.full((size - 3,), -INF)])
        site = Site("z", dist.OneHotCategorical(logits=logits))
        cost = lambda z: (z @ WEIGHTS[: z.shape[-1]] - 0.2) ** 3  # noqa: E731
        if isinstance(e, StraightThrough):
            z = e.reparameterized(site)
            cost(z).backward()
            found.append([z.detach()[:3], theta.grad, *(p.grad for p in e.parameters() if p.grad is not None)])
            continue
        if e.draws_slots:
            site.slots = e.draw(site)
            attached = cost(site.slots.values)
            site.attached_cost = lambda attached=attached: attached
        else:
            site.value, attached = torch.tensor([0.0, 1.0, 0.0, 0.0])[:size], torch.tensor(1.3)
        surrogate, loss = e(attached.detach(), site)
        (surrogate.sum() + loss).backward()
        own = [p.grad[:, :3] if name.startswith("net.0.w") else p.grad for name, p in e.named_parameters()]
        found.append([surrogate.detach(), theta.grad, *own])
    assert all(torch.isfinite(t).all() for t in found[0])
    for three, four in zip(*found, strict=True):
        torch.testing.assert_close(three, four, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("jacobian", _relaxation.JACOBIANS)
def test_families_with_a_trained_temperature(jacobian: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    same_noise(monkeypatch, torch.tensor([0.3, 1.9, -0.4, 0.8]))
    found = []
    for size in (3, 4):
        temperature = torch.tensor(0.7, requires_grad=True)
        p = torch.cat([torch.tensor([0.2, 0.5, 0.3]), torch.zeros(size - 3)]).requires_grad_()
        z = OneHotCategoricalST(p, jacobian=jacobian, temperature=temperature).rsample()
        ((z @ WEIGHTS[:size]) ** 2).backward()
        found.append((z.detach()[:3], p.grad[:3], temperature.grad))
    for three, four in zip(*found, strict=True):
        assert three is four is None or (three.isfinite().all() and torch.allclose(three, four, atol=1e-14))


def test_temperatures_of_certain_bits() -> None:
    for make in (
        lambda t: BernoulliST(torch.tensor([0.0, 1.0]), jacobian="gumbel-softmax", temperature=t),
        lambda t: BernoulliST(torch.tensor([0.0, 1.0]), jacobian="gumbel-rao", temperature=t),
        lambda t: GumbelSoftmaxST(t, logits=torch.tensor([-INF, 0.0, -INF])),
    ):
        temperature = torch.tensor(0.7, requires_grad=True)
        make(temperature).rsample().square().sum().backward()
        assert temperature.grad == 0


# How it was, as a control.


def test_the_derivative_by_a_temperature_of_a_plain_quotient_is_nan() -> None:
    for softmax in (lambda x, t: (x / t).softmax(-1), tempered_softmax):
        temperature = torch.tensor(0.5, requires_grad=True)
        softmax(torch.tensor([0.1, -INF, 0.4]), temperature)[0].backward()
        assert temperature.grad.isfinite() == (softmax is tempered_softmax)


def products(own: Tensor, others: Tensor) -> Tensor:
    """Weights of the sets of two, by probabilities themselves."""
    first = own[[1, 0]] / (own[[1, 0]] + others)  # the other one next
    total = (own * first).sum(0)
    return own * first / total


def test_weights_of_sets_in_peaked_rows() -> None:
    """One in a thousand rows of float32 had NaN: all parts of a ratio had underflowed together."""
    lowest = math.log(torch.finfo(torch.float32).tiny)
    rows = torch.cat([torch.zeros(4000, 1), lowest + 30 * torch.rand(4000, 3) - 5, torch.full((4000, 1), -INF)], -1)
    for dtype in (torch.float32, torch.float64):
        for k in (2, 3, 4, 5):
            site = Site("z", dist.Categorical(logits=rows.to(dtype)))
            slots = UnorderedSet(k).draw(site)
            rounding = 10 * torch.finfo(dtype).eps
            assert slots.memo is not None
            for weights in (slots.log_weights.exp().sum(0), slots.memo.sum(1)):
                assert (weights - 1).abs().max() < rounding
            assert (slots.log_weights.exp()[slots.values == 4] == 0).all()
    own = torch.tensor([1e-30, 3e-31], dtype=torch.float32)
    assert products(own * 1e-15, torch.tensor(1.0)).isnan().any()


def test_a_tail_that_underflows_is_drawn_from_all_the_same() -> None:
    """What weighs anything is an outcome that is possible: another's cost may be infinite."""
    rows = torch.tensor([0.0, -INF, -102.0, -103.0, -INF], dtype=torch.float32).expand(3000, 5)
    for e in (RaoBlackwell(1), RaoBlackwell(1, 3)):
        slots = e.draw(Site("z", dist.Categorical(logits=rows)))
        assert slots.log_weights.isfinite().all()
        assert ((slots.values[1:] == 2) | (slots.values[1:] == 3)).all()
        assert 0.2 < (slots.values[1:] == 3).double().mean() < 0.34  # 1 / (1 + e)


def test_a_later_site_with_slots_of_probability_zero_needs_its_mask() -> None:
    """log 0 less log 0 in the score of the later site was NaN at 14 to 20 of 20 draws."""
    model, guide = programs(ROWS["a zero"], "logits", True, torch.float64)
    pyro.param("phi", torch.tensor([0.0, 0.3, 0.0]))
    for make in (REBAR, MuProp):
        all_finite(EstimatorELBO({"z": make()}, max_plate_nesting=0), model, guide, steps=10)
