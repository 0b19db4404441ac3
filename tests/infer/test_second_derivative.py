"""Derivatives of the gradient of ``differentiable_loss``: exact where no estimator draws, an error elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn
from torch.autograd.functional import hessian

from pyro_sparse.distributions import RectifiedNormal, SparseCategorical
from pyro_sparse.estimators import (
    ARMS,
    REBAR,
    RELAX,
    VIMCO,
    DisARM,
    DoubleControlVariate,
    Estimator,
    Exact,
    LeaveOneOut,
    LocalExpectation,
    MovingAverage,
    MuProp,
    RaoBlackwell,
    ScoreFunction,
    SplitPathwise,
    StraightThrough,
    UnorderedSet,
)
from pyro_sparse.infer import EstimatorELBO

COMPLETE = {
    "exact": Exact,
    "Rao-Blackwell of all": lambda: RaoBlackwell(3),
    "set of all": lambda: UnorderedSet(3),
    "local expectation of one": LocalExpectation,
}
START = torch.tensor([0.3, -0.2, 0.1, 0.7, 0.4, -0.5], dtype=torch.float64)


def programs(theta: Tensor, estimator: Any = None) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two dependent sites, the second in a subsampled plate and scaled; model and guide share the parameters."""
    infer: dict[str, Any] = {} if estimator is None else {"estimator": estimator}
    table, data = torch.arange(9.0).cos().reshape(3, 3), torch.tensor([0.4, -1.3])

    def guide() -> None:
        y = pyro.sample("y", dist.Categorical(logits=theta[:3] * torch.tensor([1.0, 0.5, 2.0])), infer=infer)
        with pyro.plate("data", 5, subsample=torch.tensor([1, 3])), poutine.scale(scale=0.5):
            pyro.sample("z", dist.Categorical(logits=theta[3:] * table[y]), infer=infer)

    def model() -> None:
        y = pyro.sample("y", dist.Categorical(logits=theta[1:4].sin()))
        with pyro.plate("data", 5, subsample=torch.tensor([1, 3])):
            with poutine.scale(scale=0.5):
                z = pyro.sample("z", dist.Categorical(logits=table[y]))
            loc = theta[0] * z + theta[5] ** 2 * y
            pyro.sample("x", dist.Normal(loc, theta[2].exp()), obs=data)

    return model, guide


@pytest.mark.parametrize("name", COMPLETE)
def test_the_second_derivative_is_that_of_stock_enumeration(name: str) -> None:
    def ours(theta: Tensor) -> Tensor:
        elbo = EstimatorELBO(COMPLETE[name](), max_plate_nesting=1)
        return elbo.differentiable_loss(*programs(theta))

    def stock(theta: Tensor) -> Tensor:
        model, guide = programs(theta)
        return TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, config_enumerate(guide))

    start = START.clone().requires_grad_()
    torch.testing.assert_close(ours(start), stock(start), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hessian(ours, START), hessian(stock, START), rtol=1e-10, atol=1e-10)


def test_a_sparse_site_after_a_normal_one() -> None:
    """By finite differences; outcomes of probability zero are left out."""

    def loss(t: Tensor) -> Tensor:
        def guide() -> None:
            u = pyro.sample("u", dist.Normal(t[0], t[1].exp()))
            pyro.sample("z", SparseCategorical(torch.stack([u * t[2], t[0], t[1] - 9.0])))

        def model() -> None:
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(3)))
            pyro.sample("x", dist.Normal(u * z + t[2] * z**2, 1.0), obs=torch.tensor(0.7))

        pyro.set_rng_seed(4)  # the same noise: the loss is a function
        return EstimatorELBO(Exact(), max_plate_nesting=0).differentiable_loss(model, guide)

    t = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    once = torch.autograd.gradcheck(loss, t, check_undefined_grad=False)
    assert once and torch.autograd.gradgradcheck(loss, t, check_undefined_grad=False)


def test_sequential_enumeration() -> None:
    def loss(sequential: bool) -> Callable[[Tensor], Tensor]:
        def of(theta: Tensor) -> Tensor:
            model, guide = programs(theta)
            infer = {"y": {"enumerate": "sequential" if sequential else "parallel"}, "z": {"enumerate": "parallel"}}
            guide = poutine.infer_config(guide, lambda msg: infer.get(msg["name"], {}))
            return EstimatorELBO(Exact(), max_plate_nesting=1).differentiable_loss(model, guide)

        return of

    torch.testing.assert_close(hessian(loss(True), START), hessian(loss(False), START), rtol=1e-10, atol=1e-10)


# Elsewhere.


def one_hot(theta: Tensor) -> Any:
    return dist.OneHotCategorical(logits=theta)


def bit(theta: Tensor) -> Any:
    return dist.Bernoulli(logits=theta[0])


DRAWN: dict[str, tuple[Callable[[], Estimator], Any]] = {
    "score function": (ScoreFunction, one_hot),
    "moving average": (lambda: ScoreFunction(MovingAverage()), one_hot),
    "leave one out": (lambda: LeaveOneOut(2), one_hot),
    "leave one out, one by one": (lambda: LeaveOneOut(2, vectorized=False), one_hot),
    "VIMCO": (lambda: VIMCO(2), one_hot),
    "DisARM": (DisARM, bit),
    "ARMS": (lambda: ARMS(3), bit),
    "Rao-Blackwell": (lambda: RaoBlackwell(1), one_hot),
    "set": (lambda: UnorderedSet(2), one_hot),
    "local expectation": (LocalExpectation, lambda t: dist.Bernoulli(logits=t).to_event(1)),
    "REBAR": (REBAR, one_hot),
    "RELAX": (lambda: RELAX(nn.Linear(3, 1)), one_hot),
    "MuProp": (MuProp, one_hot),
    "double control variate": (lambda: DoubleControlVariate(2, 0.5), one_hot),
    "straight-through": (StraightThrough, one_hot),
}


class HalfExact(Exact):
    """All outcomes, but not their sum: what it says of its derivative is its own."""

    def forward(self, cost: Tensor, site: Any) -> tuple[Tensor, Tensor | float]:
        value, loss = super().forward(cost, site)
        return value / 2, loss


DRAWN["sums of its own"] = (HalfExact, one_hot)


def drawn(name: str) -> Callable[[Tensor], Tensor]:
    make, family = DRAWN[name]
    estimator = make()

    def loss(theta: Tensor) -> Tensor:
        def guide() -> None:
            pyro.sample("z", family(theta))

        def model() -> None:
            z = pyro.sample("z", family(torch.tensor([0.1, 0.2, -0.4])))
            z = z[..., None] if family is bit else z
            pyro.sample("x", dist.Normal((z * torch.tensor([0.1, 2.0, -1.0])[: z.shape[-1]]).sum(-1), 1.0), obs=DATUM)

        return EstimatorELBO(estimator, max_plate_nesting=0).differentiable_loss(model, guide)

    return loss


DATUM = torch.tensor(0.3, dtype=torch.float64)


@pytest.mark.parametrize("name", DRAWN)
def test_what_draws_has_one_derivative(name: str) -> None:
    loss, theta = drawn(name), START[:3].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
    assert gradient.isfinite().all()
    for again in (
        lambda: torch.autograd.grad(gradient[0], theta, retain_graph=True),
        lambda: gradient.sum().backward(),
        lambda: hessian(loss, theta.detach()),
    ):
        with pytest.raises(
            RuntimeError, match=r"^(EstimatorELBO|straight-through draw): expected .*, got a derivative of it"
        ):
            again()
    loss(theta).backward()
    assert theta.grad.isfinite().all()


def test_one_site_that_draws_is_enough() -> None:
    def loss(theta: Tensor) -> Tensor:
        estimators = {"y": Exact(), "z": ScoreFunction()}
        return EstimatorELBO(estimators, max_plate_nesting=1).differentiable_loss(*programs(theta))

    with pytest.raises(RuntimeError, match=r"^EstimatorELBO: expected one derivative"):
        hessian(loss, START)


def test_without_a_score_function_there_is_nothing_to_forbid() -> None:
    """Reparameterised sites keep all their derivatives."""

    def normal(t: Tensor) -> Tensor:
        pyro.set_rng_seed(1)
        guide = lambda: pyro.sample("u", dist.Normal(t[0], t[1].exp()))  # noqa: E731

        def model() -> None:
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(u**2, 1.0), obs=DATUM)

        return EstimatorELBO(ScoreFunction(), max_plate_nesting=0).differentiable_loss(model, guide)

    t = torch.tensor([0.3, -0.2], requires_grad=True)
    assert torch.autograd.gradgradcheck(normal, t, check_undefined_grad=False)


@pytest.mark.parametrize("analytic_kl", [False, True])
def test_a_split_site_has_one_derivative(analytic_kl: bool) -> None:
    """The derivative of a pathwise draw jumps where the variable meets its atoms, with or without a score."""

    def loss(t: Tensor) -> Tensor:
        guide = lambda: pyro.sample("z", RectifiedNormal(t[0], t[1].exp()))  # noqa: E731

        def model() -> None:
            z = pyro.sample("z", RectifiedNormal(torch.tensor(0.0), torch.tensor(1.0)))
            pyro.sample("x", dist.Normal(z**2, 1.0), obs=DATUM)

        elbo = EstimatorELBO(SplitPathwise(), max_plate_nesting=0, analytic_kl=analytic_kl)
        return elbo.differentiable_loss(model, guide)

    with pytest.raises(RuntimeError, match=r"^EstimatorELBO: expected one derivative"):
        hessian(loss, torch.tensor([0.3, -0.2]))
