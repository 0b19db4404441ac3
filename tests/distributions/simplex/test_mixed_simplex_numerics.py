"""Mixed variables on the simplex where numbers are large, small, rare or few: values, gradients, float32, shapes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sparse import sample_mixed
from pyro_sparse.distributions import (
    FaceDirichlet,
    FaceLogisticNormal,
    GibbsFaces,
    MixedDirichlet,
    MixedLogisticNormal,
    MixedSimplex,
    mixed_simplex,
)
from pyro_sparse.distributions.simplex.face_expectations import RandomFace
from tests.distributions.simplex.simplex_zoo import KINDS, attached, close, every_face, make, random_parameters

DOUBLE = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["MixedDirichlet", "MixedLogisticNormal"])
def test_extremes_are_finite(kind: str, dtype: torch.dtype) -> None:
    scores = torch.tensor([[50.0] * 5, [-50.0] * 5, [50.0, -50.0, 0.0, 0.5, -1.0]], dtype=dtype)
    concentration = torch.tensor([1e-3, 1.0, 1e4, 30.0, 0.1], dtype=dtype)
    scale = torch.tensor([1e-3, 1e3, 1.0, 1e3, 1e-3], dtype=dtype)
    for roll, constant in itertools.product(range(5), (False, True)):
        p = {
            "scores": scores,
            "concentration": concentration.roll(roll)[:1].expand(5) if constant else concentration.roll(roll),
            "loc": torch.tensor([50.0, -50.0, 0.0, 3.0, -1.0], dtype=dtype),
            "scale": scale.roll(roll)[:1].expand(5) if constant else scale.roll(roll),
        }
        p = attached(p)
        d, prior = make(kind, p), make(kind, {n: x.to(dtype)[0] for n, x in random_parameters(5).items()})
        small = torch.full((5,), 1e-38, dtype=dtype)
        small[2] = 1.0
        results = {
            "log_prob": d.log_prob(small.requires_grad_()),
            "log_prob of a draw": d.log_prob(d().detach()),
            "entropy": d.entropy(),
            "kl": kl_divergence(d, prior),
            "reverse kl": kl_divergence(prior, d),
            "mean": d.mean,
            "draw": d(),
        }
        for name, result in results.items():
            assert result.isfinite().all(), (name, p, result)
            gradients = torch.autograd.grad(result.sum(), [*p.values()], allow_unused=True, retain_graph=True)
            assert all(not g.isnan().any() for g in gradients if g is not None), (name, p, gradients)
        assert not torch.autograd.grad(results["log_prob"].sum(), small)[0].isnan().any()


LARGE = [("MixedDirichlet", 200), ("MaxEntropyFaces, Dirichlet", 200), ("MaxEntropyFaces, LogisticNormal", 40)]
LARGE += [pytest.param("MixedLogisticNormal", 200, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kind", "K"), [*itertools.product(KINDS, (3, 10)), *LARGE])
def test_float32(kind: str, K: int) -> None:
    p = {name: x.float().double() for name, x in random_parameters(K).items()}
    if K > 10 and "LogisticNormal" in kind:
        p = {name: x[:1] for name, x in p.items()}  # an O(K^2) quadrature
    q = {name: x.float().double() for name, x in random_parameters(K, seed=1).items()}
    d, prior = make(kind, p), make(kind, q)
    d32, prior32 = (make(kind, {name: x.float() for name, x in r.items()}) for r in (p, q))
    y = d.sample().float()
    pairs = [
        (d32.log_prob(y), d.log_prob(y.double())),
        (d32.entropy(), d.entropy()),
        (kl_divergence(d32, prior32), kl_divergence(d, prior)),
        (d32.mean, d.mean),
    ]
    for a, b in pairs:
        assert a.isfinite().all() and a.dtype == torch.float32
        # An entropy is a sum over K vertices, and as precise as that.
        torch.testing.assert_close(a.detach().double(), b, rtol=1e-5, atol=1e-6 * K)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("shift", [0.0, -50.0, -400.0])
@pytest.mark.parametrize(("least", "most"), [(1e-3, 1e-2), (0.3, 3.0), (1e3, 1e4), (1e-3, 1e4)])
def test_the_integral_over_faces(least: float, most: float, shift: float, dtype: torch.dtype) -> None:
    """Relative to values above one, both ends of the range in every row; also where faces of two vertices are rare."""
    g = torch.Generator().manual_seed(0)
    a = least * (most / least) ** torch.rand(5, 8, generator=g, dtype=DOUBLE)
    a[:, 0], a[:, 1] = least, most
    c = torch.randn(5, 8, generator=g, dtype=DOUBLE)
    faces = GibbsFaces(2 * torch.randn(5, 8, generator=g, dtype=DOUBLE) + shift)
    f = faces.enumerate_support()
    p, total, weighted = faces.log_prob(f).exp(), (f * a).sum(-1), (f * c).sum(-1)
    ours = RandomFace(faces, dtype).of(a)
    tol = 1e-11 if dtype == DOUBLE else 2e-6
    close(ours.log_gamma(), (p * torch.lgamma(total)).sum(0), tol)
    close(ours.digamma(c), (p * weighted * torch.digamma(total)).sum(0), tol)
    close(ours.log(), (p * total.log()).sum(0), tol)
    close(ours.reciprocal(), (p.unsqueeze(-1) * f / total.unsqueeze(-1)).sum(0), tol)
    close(ours.square_over(c), (p * weighted.square() / total).sum(0), tol)


@pytest.mark.parametrize("kind", ["MixedDirichlet", "MixedLogisticNormal"])
def test_gradients_at_scores_of_zero(kind: str) -> None:
    """Where a network starts, and where a factor is exactly one half."""
    p = random_parameters(3)
    p["scores"] = torch.zeros(3, 3, dtype=DOUBLE, requires_grad=True)
    d, q = make(kind, p), make("MixedLogisticNormal", random_parameters(3, seed=1))
    faces, probs = every_face(d)
    on, q_on = d.within.on(faces), q.within.on(faces)
    within = (probs * kl_divergence(on, q_on)).sum(0)
    pairs = [
        (d.entropy(), d.faces.entropy() + (probs * on.entropy()).sum(0)),
        (kl_divergence(d, q), kl_divergence(d.faces, q.faces) + within),
    ]
    for pair in pairs:
        a, b = (torch.autograd.grad(x.sum(), p["scores"], retain_graph=True)[0] for x in pair)
        close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_different_batch_shapes(kind: str) -> None:
    """Faces (3, 1), within (K,), another of shape (2,): as when all are expanded."""
    p = random_parameters(3)
    p["scores"], p["bits"] = p["scores"].unsqueeze(1), p["bits"].unsqueeze(1)
    for name in ("concentration", "loc", "scale"):
        p[name] = p[name][0]
    zero, one = torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    d, normal = make(kind, p), MixedLogisticNormal(zero, zero, 1.0)
    full = d.expand((3, 2))
    close(d.entropy().expand(3, 2), full.entropy())
    close(d.mean.expand(3, 2, 3), full.mean)
    close(d.mean.sum(-1), torch.ones(3, 1, dtype=DOUBLE), 1e-9)
    others = [normal, normal.expand((2,))]
    others += [] if "LogisticNormal" in kind else [MixedDirichlet(zero.expand(2, 3), one)]
    for other in others:
        close(kl_divergence(d, other).expand(3, 2), kl_divergence(full, other))
        close(kl_divergence(full, other), kl_divergence(full, other.expand((3, 2))))


def test_float32_where_terms_cancel() -> None:
    g = torch.Generator().manual_seed(1)
    loc, scale = 3 * torch.randn(50, generator=g).float(), 10 ** (-3 + 6 * torch.rand(50, generator=g)).float()
    scores, few = torch.full((50,), -50.0), torch.full((5,), 1e4)

    def extreme(t: torch.dtype) -> tuple[Any, Any]:
        p = MixedLogisticNormal(scores.to(t), loc.to(t), scale.to(t))
        return p, MixedLogisticNormal(torch.zeros(50).to(t), -loc.to(t), scale.flip(0).to(t))

    def far(t: torch.dtype) -> tuple[Any, Any]:
        p = MixedLogisticNormal(torch.zeros(50).to(t), (loc + 1024).to(t), 0.5)
        return p, MixedLogisticNormal(torch.zeros(50).to(t), torch.zeros(50).to(t), 0.003)

    def on_a_face(t: torch.dtype) -> tuple[Any, Any]:
        return FaceDirichlet(few.to(t)), FaceDirichlet((few - 1).to(t))

    def bare(t: torch.dtype) -> tuple[Any, Any]:
        return GibbsFaces(scores.to(t)), GibbsFaces((scores - 1).to(t))

    facts: list[Callable[[Any, Any], Tensor]] = [lambda p, _: p.entropy(), kl_divergence]
    for pair, fact in itertools.product((extreme, far, on_a_face, bare), facts):
        torch.testing.assert_close(fact(*pair(torch.float32)).double(), fact(*pair(DOUBLE)), rtol=1e-5, atol=1e-5)


def test_a_certain_face_in_float32() -> None:
    """Scores of 400 beside concentrations of seven orders: what is multiplied underflows, and is divided by."""
    scores = torch.tensor([400.0, -400.0, 400.0, -400.0, 400.0, 400.0])
    concentration = torch.logspace(-3, 4, 6)
    for signs in (scores, scores.abs()):
        small = MixedDirichlet(signs.float(), concentration.float())
        large = MixedDirichlet(signs, concentration.float().double())
        torch.testing.assert_close(small.entropy().double(), large.entropy(), rtol=1e-5, atol=0)
        torch.testing.assert_close(small.mean.double(), large.mean, rtol=1e-5, atol=1e-12)


def test_draws_stay_on_their_face() -> None:
    for dtype in (torch.float32, DOUBLE):
        d = FaceDirichlet(torch.full((4,), 1e-3, dtype=dtype), torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=dtype))
        y = d.rsample(torch.Size([1000]))
        assert ((y > 0) == (d.face > 0)).all() and (y < 1e-30).any()


def test_faces_of_a_batch_are_drawn_separately() -> None:
    d = MixedSimplex(GibbsFaces(torch.zeros(4)), FaceDirichlet(torch.ones(100, 4)))
    assert len((d.sample() > 0).unique(dim=0)) > 8


@pytest.mark.parametrize("scale", [(0.8, 1.3), (0.3, 0.5), (2.0, 5.0), (1.01, 0.01)])
def test_gradient_of_a_logistic_normal_mean(scale: tuple[float, float]) -> None:
    """On an edge, by one integral over a line; also where a share is tiny."""
    line = torch.linspace(-12, 12, 20_001, dtype=DOUBLE)
    weights = (-line.square() / 2).exp() / math.sqrt(2 * math.pi) * (line[1] - line[0])
    for start in ([0.7, -1.0], [15.0, 0.0]):
        loc = torch.tensor(start, dtype=DOUBLE, requires_grad=True)
        s = torch.tensor(scale, dtype=DOUBLE, requires_grad=True)
        exact = weights @ torch.sigmoid(loc[0] - loc[1] + s.square().sum().sqrt() * line)
        ours = FaceLogisticNormal(loc, s).mean[0]
        close(ours, exact, 1e-8)
        for a, b in zip(*(torch.autograd.grad(x, [loc, s]) for x in (ours, exact)), strict=True):
            close(a, b, 1e-8)


def test_logistic_normal_means_of_many_vertices() -> None:
    """They sum to one, and are equal for equal vertices."""
    g = torch.Generator().manual_seed(0)
    loc, scale = 100 * torch.randn(20, generator=g, dtype=DOUBLE), 10 ** (2 * torch.rand(20, generator=g).double() - 1)
    close(FaceLogisticNormal(loc, scale).mean.sum(), torch.ones((), dtype=DOUBLE), 1e-8)
    d = FaceLogisticNormal(torch.zeros(80, dtype=DOUBLE), 0.5)
    close(d.mean, torch.full((80,), 1 / 80, dtype=DOUBLE), 1e-8)


def test_no_graph_without_grad() -> None:
    p, q = attached(random_parameters(3)), make("MixedLogisticNormal", random_parameters(3, seed=1))
    with torch.no_grad():
        for kind in KINDS:
            assert not kl_divergence(make(kind, p), q).requires_grad


def test_an_impossible_condition() -> None:
    def program() -> None:
        sample_mixed("y", GibbsFaces(torch.zeros(3), validate_args=False), FaceDirichlet(torch.ones(3)))

    with pytest.raises(ValueError, match="face: expected bits"):
        pyro.condition(program, data={"y_face": torch.zeros(3)})()


def test_validation_follows_the_wrappers() -> None:
    within = FaceDirichlet(torch.ones(3))
    for d in (within.on(torch.tensor([1.0, 1.0, 0.0])), within.expand((2,))):
        with pytest.raises(ValueError, match="sum to one"):
            d.log_prob(torch.tensor([0.5, 0.4, 0.0]))


def test_shapes_that_do_not_fit() -> None:
    within = FaceDirichlet(torch.ones(3, 4))
    for call in (
        lambda: within.expand(()),
        lambda: within.expand((5,)),
        lambda: GibbsFaces(torch.ones(3, 4)).expand((5,)),
    ):
        with pytest.raises(ValueError, match=r"expand: expected a shape that \(3,\) broadcasts to"):
            call()
    for shapes in (lambda: within.on(torch.ones(5)), lambda: FaceLogisticNormal(torch.ones(3), torch.ones(4))):
        with pytest.raises(ValueError, match="expected shapes that broadcast, got"):
            shapes()


def test_rounding_of_many_coordinates_is_forgiven() -> None:
    y = torch.full((200,), 1 / 200, dtype=torch.float32)
    assert mixed_simplex.check(y * (1 + 5e-6)) and not mixed_simplex.check(y * (1 + 1e-3))


def gamma_needs_data() -> bool:
    """Whether torch lacks the rule for the shape of a gamma draw, as 2.7 does."""
    try:
        torch._standard_gamma(torch.ones((), device="meta"))
    except NotImplementedError:
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_a_device_or_leaves_it(kind: str) -> None:
    """A tensor without data cannot be looked at, nor be mixed with one that is elsewhere."""
    if "Dirichlet" in kind and gamma_needs_data():
        pytest.skip("this torch cannot draw from a gamma distribution without data")
    p = {name: torch.ones_like(x, device="meta") for name, x in random_parameters(4).items()}
    with pyro.validation_enabled(False):
        d, q = make(kind, attached(p)), make("MixedLogisticNormal", p)
        y = d()
        results = [y, d.log_prob(y), kl_divergence(d, q), d.faces.sample(), d.faces.entropy()]
        if "LogisticNormal" not in kind:  # whose entropy and mean look at the scales
            results += [d.entropy(), d.mean]
        assert {result.device.type for result in results} == {"meta"}
        torch.autograd.grad(results[2].sum() + d.log_prob(y.detach()).sum(), [d.within.like])
