"""Derivatives of every family: traced as in an eager run, twice by finite differences, and with a tight stretch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sparse.distributions import (
    BernoulliST,
    FaceDirichlet,
    FaceLogisticNormal,
    GaussianSparsemax,
    GibbsFaces,
    HardConcrete,
    HardConcreteSimplex,
    HardKumaraswamy,
    MaxEntropyFaces,
    MixedLogisticNormal,
    OneHotCategoricalST,
    Rectified,
    RectifiedNormal,
    SparseCategorical,
    StretchedRectified,
    ZeroOneInflated,
)
from pyro_sparse.distributions.univariate.spike_and_exponential import TruncatedExponential
from pyro_sparse.nn import HardConcreteGate
from pyro_sparse.testing.derivatives import check_second_derivatives, check_traced
from tests.distributions.simplex.simplex_zoo import KINDS, make, random_parameters
from tests.distributions.univariate.mixed_zoo import MILD

ROWS = [[1.0, 0.5, -1.0], [0.2, 0.1, 0.0]]
#: what makes a family of its parameters, and these
ZOO: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    **MILD,
    **{
        kind: (
            lambda *v, kind=kind: make(kind, dict(zip(random_parameters(3), v, strict=True))),
            [*random_parameters(3).values()],
        )
        for kind in KINDS
    },
    "GaussianSparsemax": (GaussianSparsemax, [ROWS, [0.5, 0.7, 0.4]]),
    "HardConcreteSimplex": (HardConcreteSimplex, [[0.5, 0.9], ROWS, [1.01, 1.02]]),
    "HardConcreteSimplex of two": (HardConcreteSimplex, [[0.5, 0.9], [[1.0, 0.5], [0.2, 0.1]], [1.2, 1.4]]),
    "FaceDirichlet": (FaceDirichlet, [[[1.0, 0.5, 0.1], [0.2, 0.1, 2.0]]]),
    "FaceLogisticNormal": (FaceLogisticNormal, [ROWS, [0.5, 1.0, 2.0]]),
    "GibbsFaces": (GibbsFaces, [ROWS]),
    "MaxEntropyFaces": (lambda bits: MaxEntropyFaces(3, bits), [[1.0, 0.5]]),
    "TruncatedExponential": (TruncatedExponential, [[0.0, 1e-9, 1e-5, 2e-3, 2.0, -3.0]]),
    "SparseCategorical": (SparseCategorical, [ROWS]),
    "OneHotCategoricalST": (
        lambda logits, t: OneHotCategoricalST(logits=logits, jacobian="reinmax", temperature=t),
        [ROWS, [0.7, 0.9]],
    ),
    "BernoulliST": (
        lambda logits, t: BernoulliST(logits=logits, jacobian="gumbel-rao", temperature=t),
        [[1.0, 0.5], 0.7],
    ),
}
SLOW = ("StretchedRectified", "Rectified", "MixedLogistic", "MaxEntropyFaces, ", "HardKumaraswamy")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name.startswith(SLOW) else []) for name in ZOO]


def leaves(name: str) -> list[Tensor]:
    return [torch.as_tensor(v).clone().requires_grad_() for v in ZOO[name][1]]


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_has_the_derivatives_of_an_eager_run(name: str) -> None:
    check_traced(ZOO[name][0], leaves(name))


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_right_or_refused(name: str) -> None:
    check_second_derivatives(ZOO[name][0], leaves(name))


def hessian(f: Callable[..., Tensor], *at: float) -> Tensor:
    return torch.autograd.functional.hessian(lambda x: f(*x.unbind()), torch.tensor(at))


def by_differences(f: Callable[..., Tensor], *at: float) -> Tensor:
    """Of the gradient."""

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(lambda x: f(*x.unbind()), x)

    x, step = torch.tensor(at), 1e-5 * torch.eye(len(at))
    return torch.stack([(gradient(x + e) - gradient(x - e)) / 2e-5 for e in step])


@pytest.mark.parametrize(
    "p, q",
    [
        (lambda a, b: HardConcrete(b, a, -0.2, 1.1), lambda: RectifiedNormal(0.3, 0.7)),
        (lambda a, b: RectifiedNormal(a, b), lambda: RectifiedNormal(0.1, 0.9)),
        (lambda a, b: HardKumaraswamy(b, b + a.exp()), lambda: HardConcrete(0.5, 0.2)),
        (
            lambda a, b: MixedLogisticNormal(torch.stack([a, 0 * a]), torch.stack([b, 0 * b]), b),
            lambda: MixedLogisticNormal(torch.zeros(2), torch.ones(2), 1.3),
        ),
        (lambda a, b: FaceDirichlet(torch.stack([a.exp(), b])), lambda: FaceLogisticNormal(torch.zeros(2), 1.3)),
    ],
)
def test_second_derivatives_of_divergences(p: Any, q: Any) -> None:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return kl_divergence(p(a, b), q()).sum()

    torch.testing.assert_close(hessian(kl, 0.4, 0.8), by_differences(kl, 0.4, 0.8), rtol=1e-7, atol=1e-8)


def logistic_normal_entropy(b: Tensor, s: Tensor) -> Tensor:
    return MixedLogisticNormal(torch.stack([b, 0 * b]), torch.stack([b, 0 * b]), s).entropy()


@pytest.mark.parametrize("scale", [0.6, 1.7])  # one rule for each
def test_second_derivatives_of_a_logistic_normal(scale: float) -> None:
    expected = by_differences(logistic_normal_entropy, 0.7, scale)
    torch.testing.assert_close(hessian(logistic_normal_entropy, 0.7, scale), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.slow
def test_third_derivatives_of_a_logistic_normal() -> None:
    def gradient(*x: Tensor) -> Any:
        return torch.autograd.grad(logistic_normal_entropy(*x), x, create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, tuple(torch.tensor(v, requires_grad=True) for v in (0.7, 0.6)))


def test_a_quantile_has_a_derivative_by_its_probability() -> None:
    d, u = HardConcrete(0.5, 0.3), torch.tensor([0.05, 0.3, 0.6, 0.7, 0.95], requires_grad=True)
    z = d.icdf(u)
    inside = (z > 0) & (z < 1)
    expected = torch.where(inside, (-d.log_prob(z.detach())).exp(), 0.0)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), u)[0], expected)


@pytest.mark.parametrize("jacobian", ["identity", "softmax", "reinmax", "gumbel-softmax", "gumbel-rao"])
def test_a_pretended_derivative_has_no_other(jacobian: Any) -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        z = OneHotCategoricalST(logits=torch.stack([a, b, 0 * a]), jacobian=jacobian).rsample()
        return (z * torch.arange(3.0)).sum().square()

    with pytest.raises(RuntimeError, match="straight-through draw: expected to be differentiated once"):
        hessian(f, 0.3, 0.4)


def test_a_beta_slab_has_no_second_derivative_and_torchs_first() -> None:
    def draw(a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)
        return ZeroOneInflated(dist.Beta(a.expand(50), b), torch.tensor([-40.0, -40.0, 0.0]))().sin().sum()

    with pytest.raises(RuntimeError, match="Beta slab: expected a draw to be differentiated once"):
        hessian(draw, 1.3, 0.4)
    a = torch.full((50,), 1.3, requires_grad=True)
    d = ZeroOneInflated(dist.Beta(a, 0.4), torch.tensor([-40.0, -40.0, 0.0]))
    torch.manual_seed(1)
    (got,) = torch.autograd.grad(d._slab_draw(torch.Size([50]), attached=True).sum(), a)
    torch.manual_seed(1)
    torch.testing.assert_close(got, torch.autograd.grad(dist.Beta(a, torch.tensor(0.4)).rsample().sum(), a)[0])


def test_gates_beyond_their_bound_have_no_second_derivative() -> None:
    gate = HardConcreteGate(2, max_logit=1.0)
    for logits, refused in (([0.3, -0.2], False), ([0.3, 2.0], True)):
        gate.logits.data = torch.tensor(logits)
        (first,) = torch.autograd.grad(gate.expected_l0, gate.logits, create_graph=True)
        if refused:
            with pytest.raises(RuntimeError, match="HardConcreteGate: expected logits within max_logit"):
                torch.autograd.grad(first.sum(), gate.logits)
        else:
            expected = hessian(lambda *x: HardConcrete(2 / 3, torch.stack(x)).prob_nonzero.sum(), *logits)
            torch.testing.assert_close(torch.autograd.grad(first.sum(), gate.logits)[0], expected.sum(0))


STRETCHED: dict[str, Callable[[Any, Any, torch.dtype], Any]] = {
    "HardConcrete": lambda low, high, t: HardConcrete(
        torch.tensor([0.5], dtype=t), torch.tensor([0.3], dtype=t), low, high
    ),
    "HardKumaraswamy": lambda low, high, t: HardKumaraswamy(
        torch.tensor([1.5], dtype=t), torch.tensor([0.75], dtype=t), low, high
    ),
    "Normal": lambda low, high, t: StretchedRectified(dist.Normal(torch.tensor([0.25], dtype=t), 0.5), low, high),
    "Kumaraswamy": lambda low, high, t: StretchedRectified(
        dist.Kumaraswamy(torch.tensor([1.5], dtype=t), torch.tensor([0.75], dtype=t)), low, high
    ),
}
FACTS: dict[str, Callable[[Any, torch.dtype], Tensor]] = {
    "entropy": lambda d, t: d.entropy(),
    "mean": lambda d, t: d.mean,
    "variance": lambda d, t: d.variance,
    "icdf": lambda d, t: d.icdf(torch.linspace(0.05, 0.95, 19, dtype=t).unsqueeze(-1)).sum(0),
    "log_prob": lambda d, t: d.log_prob(torch.tensor([0.0, 1e-6, 0.5, 1 - 2.0**-20, 1.0], dtype=t).unsqueeze(-1)).sum(
        0
    ),
    "kl": lambda d, t: kl_divergence(d, RectifiedNormal(torch.tensor([0.25], dtype=t), 0.5)),
    "kl of a wide one": lambda d, t: kl_divergence(HardConcrete(torch.tensor([0.5], dtype=t), 0.25), d),
}


@pytest.mark.parametrize("family", STRETCHED)
def test_tight_stretches_have_their_gradient_in_float32(family: str) -> None:
    """Against float64, relative to values above one; 1e-3 is what two terms of 1e4 that cancel leave in float32."""

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        low, high = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (-(2.0**-20), 1 + 2.0**-20))
        d = STRETCHED[family](low, high, dtype)
        return [x.double() for of in FACTS.values() for x in torch.autograd.grad(of(d, dtype).sum(), [low, high])]

    for got, expected in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rsample of RectifiedNormal": lambda a: RectifiedNormal(a, 1.0).rsample(),
    "d() of HardConcrete": lambda a: HardConcrete(0.5, a)(),
    "icdf of HardConcrete": lambda a: HardConcrete(0.5, a).icdf(torch.tensor(0.5)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_trace_made_without_a_gradient_has_one(name: str) -> None:
    """As one of a Normal has: an evaluation may come first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(DRAWS[name], (torch.zeros(3),), check_trace=False)
    results = []
    for function in (traced, DRAWS[name]):
        a = torch.full((3,), 0.4, requires_grad=True)
        torch.manual_seed(0)
        value = function(a)
        results.append((value.detach(), torch.autograd.grad(value.sum(), a)[0]))
    torch.testing.assert_close(*results)
    assert results[0][1].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch, of its own first use of forward mode
@pytest.mark.parametrize("name", DRAWS)
def test_forward_mode(name: str) -> None:
    a = torch.full((20,), 0.4)

    def seeded(a: Tensor) -> Tensor:
        torch.manual_seed(3)
        return DRAWS[name](a).sum()

    forward, reverse = torch.func.jacfwd(seeded, randomness="same")(a), torch.func.jacrev(seeded)(a)
    torch.testing.assert_close(forward, reverse)
    assert reverse.abs().sum() > 0


@pytest.mark.parametrize("of", ["mean", "variance", "entropy"])
def test_ends_of_a_base_that_learn_are_refused(of: str) -> None:
    """The derivative of a moving end would be missing: -.170 for .413, of this mean. Draws have it."""
    end = torch.tensor(0.7, requires_grad=True)
    d = Rectified(dist.Uniform(torch.tensor(-0.5), end, validate_args=False))
    with pytest.raises(ValueError, match=r"Rectified: expected a base whose support stays.*ends that learn"):
        d.entropy() if of == "entropy" else getattr(d, of)
    with torch.no_grad():
        torch.testing.assert_close(d.mean, torch.tensor(0.7**2 / 2 / 1.2))
    torch.manual_seed(0)
    (got,) = torch.autograd.grad(d.rsample((200_000,)).mean(), end)
    exact = 0.7 / 1.2 - 0.7**2 / 2 / 1.2**2
    assert abs(got - exact) < 4.5 * 0.5 / 200_000**0.5  # a derivative lies in (0, 1): one seed in 10^5 fails


def test_ends_that_a_learnt_stretch_moves_are_refused_inside_only() -> None:
    low = torch.tensor(-0.5, requires_grad=True)

    def mean(a: float, b: float) -> Tensor:
        return StretchedRectified(dist.Uniform(torch.tensor(a), torch.tensor(b)), low, 1.5).mean

    with pytest.raises(ValueError, match=r"expected a base whose support stays.*by low and high"):
        mean(0.3, 1.0)
    (got,) = torch.autograd.grad(mean(0.1, 0.9), low)  # ends at -.3 and 1.3
    # E[Z] = (h' - 1/2) / (h' - l') for Z uniform between l' = .9 l + .15 and h' = .1 l + 1.35, both outside of [0, 1]
    first, last = 0.9 * -0.5 + 0.15, 0.1 * -0.5 + 1.35
    exact = (0.1 * (last - first) - (last - 0.5) * (0.1 - 0.9)) / (last - first) ** 2
    torch.testing.assert_close(got, torch.tensor(exact))
