"""Mixed variables on the simplex: against the sum over all faces, quadrature on each face, and torch's Dirichlet."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chisquare
from torch.distributions import biject_to, kl_divergence, transform_to

from pyro_sparse.distributions import (
    FaceDirichlet,
    FaceLogisticNormal,
    GibbsFaces,
    MaxEntropyFaces,
    MixedDirichlet,
    MixedLogisticNormal,
    MixedSimplex,
    mixed_simplex,
)
from pyro_sparse.testing import check_distribution
from tests.distributions.simplex.simplex_zoo import (
    KINDS,
    all_faces,
    attached,
    close,
    every_face,
    log_faces,
    make,
    points,
    random_parameters,
)

each_kind = pytest.mark.parametrize("kind", KINDS)
FACE = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)


# On one face.


@pytest.mark.parametrize("family", ["dirichlet", pytest.param("logistic normal", marks=pytest.mark.slow)])
def test_conventions_on_a_face(family: str) -> None:
    p = attached(random_parameters(4))
    within = FaceDirichlet(p["concentration"]) if family == "dirichlet" else FaceLogisticNormal(p["loc"], p["scale"])
    check_distribution(within)
    check_distribution(within.on(FACE))


def test_dirichlet_on_a_face_is_that_of_its_coordinates() -> None:
    p = random_parameters(4)
    a, b = p["concentration"], random_parameters(4, seed=1)["concentration"]
    ours, other, on = FaceDirichlet(a, FACE), FaceDirichlet(b).on(FACE), FACE > 0
    theirs = torch.distributions.Dirichlet(a[:, on])
    y = ours.sample(torch.Size([7]))
    close(ours.log_prob(y), theirs.log_prob(y[..., on]))
    close(ours.entropy(), theirs.entropy())
    close(ours.mean[:, on], theirs.mean)
    close(ours.variance[:, on], theirs.variance)
    close(kl_divergence(ours, other), kl_divergence(theirs, torch.distributions.Dirichlet(b[:, on])))


@pytest.mark.parametrize("family", ["dirichlet", "logistic normal"])
def test_vertices_are_point_masses(family: str) -> None:
    p = random_parameters(3)
    within = FaceDirichlet(p["concentration"]) if family == "dirichlet" else FaceLogisticNormal(p["loc"], p["scale"])
    vertex = torch.eye(3, dtype=torch.float64)
    d = within.on(vertex)
    for fact in (d.log_prob(vertex), d.entropy(), kl_divergence(d, d)):
        close(fact, torch.zeros(3, dtype=torch.float64))
    close(d.rsample(), vertex)
    close(d.mean, vertex)


def test_other_faces_have_no_density() -> None:
    d = FaceDirichlet(torch.ones(3)).on(torch.tensor([1.0, 1.0, 0.0]))
    y = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.2, 0.3, 0.5], [0.5, 0.5, 0.0]])
    assert d.log_prob(y).exp().tolist() == [0.0, 0.0, 0.0, 1.0]
    assert kl_divergence(d, FaceDirichlet(torch.ones(3))) == math.inf


def test_vertices_off_the_face_have_no_gradient() -> None:
    """Whatever their parameters: the derivative of log U / a overflows where a is small."""
    a = torch.tensor([2.0, 3.0, 1e-21], requires_grad=True)
    loc, scale = torch.tensor([1.0, 2.0, 3e38], requires_grad=True), torch.tensor([1.0, 0.5, 1e-30], requires_grad=True)
    edge, y = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.4, 0.6, 0.0])
    for d in (FaceDirichlet(a).on(edge), FaceLogisticNormal(loc, scale).on(edge)):
        for result in (d.rsample(), d.entropy(), d.log_prob(y), kl_divergence(d, d), d.mean):
            gradients = torch.autograd.grad(
                result.square().sum(), [a, loc, scale], allow_unused=True, retain_graph=True
            )
            assert all(g.isfinite().all() and g[2] == 0 for g in gradients if g is not None)


LINE = torch.linspace(-12, 12, 100_001, dtype=torch.float64)


@pytest.mark.parametrize(("loc", "scale"), [
    ((0.7, -1.0), (0.8, 1.3)), ((50.0, -50.0), (1e-3, 1e3)), ((3.0, -400.0), (1e3, 1e3)), ((0.1, 0.0), (1e-3, 1e-3)),
])  # fmt: skip
def test_logistic_normal_on_an_edge(loc: tuple[float, float], scale: tuple[float, float]) -> None:
    """Its log-ratio is normal: one integral over a line."""
    m, s = torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)
    d = FaceLogisticNormal(m, s)
    width = s.square().sum().sqrt()
    ratio = m[0] - m[1] + width * LINE
    weights = (-LINE.square() / 2).exp() / math.sqrt(2 * math.pi) * (LINE[1] - LINE[0])
    log_y = torch.stack([torch.nn.functional.logsigmoid(ratio), torch.nn.functional.logsigmoid(-ratio)], -1)
    close(d.mean, weights @ log_y.exp(), 1e-9)
    entropy = (1 + math.log(2 * math.pi)) / 2 + width.log() + weights @ log_y.sum(-1)
    close(d.entropy(), entropy, 1e-9)
    near = log_y.exp().min(-1).values > 1e-200  # the density of a point needs its coordinates
    log_normal = -LINE.square() / 2 - math.log(2 * math.pi) / 2 - width.log()
    close(d.log_prob(log_y[near].exp()), (log_normal - log_y.sum(-1))[near], 1e-8)


def test_logistic_normal_on_a_triangle() -> None:
    p = random_parameters(3)
    d = FaceLogisticNormal(p["loc"], p["scale"])
    y, w = points(3, step=0.25, reach=60.0)
    y, w = y[(y > 0).all(-1)], w[(y > 0).all(-1)]
    density = d.log_prob(y.unsqueeze(1))
    mass = w.unsqueeze(-1) * density.exp()
    close(mass.sum(0), torch.ones(3, dtype=torch.float64))
    close(-(mass * density).sum(0), d.entropy())
    close(torch.einsum("nb,nk->bk", mass, y), d.mean)


@pytest.mark.parametrize("family", ["dirichlet", "logistic normal"])
def test_pathwise_gradient_on_a_face(family: str) -> None:
    """Of E y_0^2 by 2e5 draws against the exact one: 6 comparisons at 4.5 standard errors, one failure in 24 000."""
    if family == "dirichlet":
        p = torch.tensor([0.7, 1.5, 3.0], dtype=torch.float64, requires_grad=True)
        d = FaceDirichlet(p)
        exact = d.variance[0] + d.mean[0].square()
    else:
        p = torch.tensor([0.7, -0.5, 0.4], dtype=torch.float64, requires_grad=True)
        d = FaceLogisticNormal(p, 0.8)
        y, w = points(3, step=0.25, reach=60.0)
        y, w = y[(y > 0).all(-1)], w[(y > 0).all(-1)]
        exact = (w * d.log_prob(y).exp() * y[:, 0].square()).sum()
    (expected,) = torch.autograd.grad(exact, p)
    copies = p.detach().expand(200_000, 3).clone().requires_grad_()
    many = FaceDirichlet(copies) if family == "dirichlet" else FaceLogisticNormal(copies, 0.8)
    torch.manual_seed(0)
    (rows,) = torch.autograd.grad(many.rsample()[:, 0].square().sum(), copies)
    assert ((rows.mean(0) - expected).abs() / (rows.std(0) / len(rows) ** 0.5)).max() < 4.5


# Over all faces.


@each_kind
def test_conventions(kind: str) -> None:
    check_distribution(make(kind, attached(random_parameters(4))))


LONG = [pytest.param(kind, 6, marks=pytest.mark.slow if "LogisticNormal" in kind else []) for kind in KINDS]


@pytest.mark.parametrize(("kind", "K"), [*itertools.product(KINDS, (2, 4)), *LONG])
def test_against_the_sum_over_all_faces(kind: str, K: int) -> None:
    d = make(kind, random_parameters(K))
    faces, p = every_face(d)
    close(p.sum(0), torch.ones(3, dtype=torch.float64), 1e-12)
    close(d.entropy(), d.faces.entropy() + (p * d.within.on(faces).entropy()).sum(0))
    close(d.mean, (p.unsqueeze(-1) * d.within.on(faces).mean).sum(0))
    close(d.prob_nonzero, (p.unsqueeze(-1) * faces).sum(0))
    close(d.expected_l0, (p * faces.sum(-1)).sum(0))


@pytest.mark.parametrize(("p", "q"), [*itertools.product(KINDS, repeat=2)])
@pytest.mark.parametrize("K", [2, 5])
def test_kl_against_the_sum_over_all_faces(p: str, q: str, K: int) -> None:
    first, second = make(p, random_parameters(K)), make(q, random_parameters(K, seed=1))
    if "LogisticNormal" in p and "LogisticNormal" not in q:
        with pytest.raises(TypeError, match="known divergence within the faces"):
            kl_divergence(first, second)
        return
    faces, probs = every_face(first)
    within = kl_divergence(first.within.on(faces), second.within.on(faces))
    close(kl_divergence(first, second), kl_divergence(first.faces, second.faces) + (probs * within).sum(0))
    close(kl_divergence(first, first), torch.zeros(3, dtype=torch.float64))


@each_kind
def test_gradients_against_the_sum_over_all_faces(kind: str) -> None:
    p = attached(random_parameters(4))
    d, prior = make(kind, p), make(kind, random_parameters(4, seed=1))
    faces, probs = every_face(d)
    on, prior_on = d.within.on(faces), prior.within.on(faces)
    pairs = {
        "entropy": (d.entropy(), d.faces.entropy() + (probs * on.entropy()).sum(0)),
        "mean": (d.mean[..., 0], (probs * on.mean[..., 0]).sum(0)),
        "kl": (
            kl_divergence(d, prior),
            kl_divergence(d.faces, prior.faces) + (probs * kl_divergence(on, prior_on)).sum(0),
        ),
    }
    for ours, brute in pairs.values():
        got, expected = (
            torch.autograd.grad(x.sum(), [*p.values()], allow_unused=True, retain_graph=True) for x in (ours, brute)
        )
        assert [g is None for g in got] == [g is None for g in expected]
        for a, b in zip(got, expected, strict=True):
            if a is not None:
                close(a, b, 1e-9)  # torch's trigamma is good to 1e-10


@pytest.mark.parametrize("kind", ["MixedDirichlet", "MixedLogisticNormal"])
@pytest.mark.parametrize("K", [2, 3, 4])
def test_densities_integrate_to_one(kind: str, K: int) -> None:
    p = random_parameters(K)
    p["concentration"], p["scale"] = p["concentration"] + 0.8, p["scale"] + 0.8  # what these points integrate
    d = make(kind, p)
    y, w = points(K, **({"step": 0.65, "reach": 28.0} if K == 4 else {"step": 0.4, "reach": 50.0}))
    log_prob = torch.stack([make(kind, {n: x[i] for n, x in p.items()}).log_prob(y) for i in range(3)])
    close((w * log_prob.exp()).sum(-1), torch.ones(3, dtype=torch.float64), 1e-8)
    if K < 4:
        close(-(w * log_prob.exp() * log_prob).sum(-1), d.entropy(), 1e-7)


def test_log_prob_is_that_of_the_face_and_of_the_point() -> None:
    d = make("MixedDirichlet", random_parameters(4))
    y = d.sample(torch.Size([50]))
    face = (y > 0).double()
    close(d.log_prob(y), d.faces.log_prob(face) + d.within.on(face).log_prob(y))
    parts = d.score_parts(y)
    close(parts.score_function, d.faces.log_prob(face))
    close(parts.entropy_term, parts.log_prob)


@pytest.mark.parametrize("kind", ["MixedDirichlet", "MixedLogisticNormal"])
def test_draws(kind: str) -> None:
    """Of faces, by a chi-square test at 1e-4; of means within 4.5 standard errors, one failure in 50 000."""
    torch.manual_seed(0)
    d = make(kind, {name: x[0] for name, x in random_parameters(3).items()})
    y = d.sample(torch.Size([100_000]))
    faces = all_faces(3)
    counts = ((y > 0).double().unsqueeze(1) == faces).all(-1).sum(0)
    expected = d.faces.log_prob(faces).exp() * len(y)
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-4
    assert ((y.mean(0) - d.mean).abs() / (y.std(0) / len(y) ** 0.5)).max() < 4.5
    assert not y.requires_grad
    assert make(kind, attached(random_parameters(3)))().requires_grad


def test_largest_entropy() -> None:
    """5.090 nats for ten vertices without bits, log 3 for two; no Gibbs distribution has more."""
    for K, bits in ((2, 0.0), (10, 0.0), (10, 3.0), (200, 0.0)):
        n = torch.tensor(bits, dtype=torch.float64)
        d = MixedSimplex(MaxEntropyFaces(K, n), FaceDirichlet(torch.ones(K, dtype=torch.float64)))
        with_bits = d.entropy() + bits * math.log(2) * (d.expected_l0 - 1)
        close(with_bits, torch.tensor(log_faces(K, bits), dtype=torch.float64))
    assert abs(log_faces(10, 0.0) - 5.090) < 5e-4 and abs(log_faces(2, 0.0) - math.log(3)) < 1e-12
    s = torch.linspace(-3, 3, 601, dtype=torch.float64).unsqueeze(-1).expand(-1, 10)
    best = MixedDirichlet(s, torch.ones(10, dtype=torch.float64)).entropy().max()
    assert 5.0 < best < log_faces(10, 0.0)


# What is refused.


def test_bad_input() -> None:
    ones, faces = torch.ones(3), GibbsFaces(torch.zeros(3))
    bad: list[tuple[Any, type[Exception], str]] = [
        (lambda: FaceDirichlet(torch.tensor([1.0, 0.0])), ValueError, "expected a positive number, got 0.0"),
        (lambda: FaceDirichlet(torch.tensor([1.0, math.nan])), ValueError, "expected a positive number, got nan"),
        (lambda: MixedDirichlet(torch.zeros(3), -ones), ValueError, "expected a positive number, got -1.0"),
        (lambda: FaceDirichlet(torch.ones(1)), ValueError, "FaceDirichlet: expected at least two vertices"),
        (lambda: MixedDirichlet(torch.zeros(1), torch.ones(1)), ValueError, "at least two vertices"),
        (lambda: FaceDirichlet(ones, ones).on(ones), ValueError, "expected a family on the whole simplex"),
        (lambda: FaceLogisticNormal(torch.zeros(3, dtype=torch.long), 1.7), TypeError, "got torch.int64"),
        (lambda: GibbsFaces(torch.zeros(3, dtype=torch.long)), TypeError, "expected a floating-point tensor"),
        (lambda: FaceDirichlet(1.0), TypeError, "expected a floating-point tensor of K parameters, got num"),
        (lambda: FaceDirichlet(ones, torch.zeros(3)), ValueError, "face: expected bits, some of them one in"),
        (lambda: FaceDirichlet(ones).on(torch.zeros(3)), ValueError, "face: expected bits, some of them one in"),
        (lambda: FaceDirichlet(ones, torch.tensor([0.5, 1.0, 0.0])), ValueError, "face: expected bits"),
        (lambda: FaceLogisticNormal(ones, 0.0), ValueError, "scale: expected a positive"),
        (lambda: FaceLogisticNormal(math.inf * ones, 1.0), ValueError, "loc: expected a finite number, got inf"),
        (lambda: MixedDirichlet(-math.inf * ones, ones), ValueError, "GibbsFaces.scores: expected a vertex"),
        (lambda: MixedSimplex(dist.Categorical(ones), FaceDirichlet(ones)), TypeError, "GibbsFaces or MaxEntropyFaces"),
        (lambda: MixedSimplex(faces, dist.Dirichlet(ones)), TypeError, "expected within to be a family"),
        (lambda: MixedSimplex(faces, FaceDirichlet(ones, ones)), TypeError, "without a face"),
        (lambda: MixedSimplex(faces, FaceDirichlet(torch.ones(4))), ValueError, "got 3 and 4. Give both the same K"),
        (lambda: MixedDirichlet(torch.zeros(3), ones).rsample(), NotImplementedError, "whose face is discrete"),
        (lambda: MixedDirichlet(torch.zeros(3), ones).has_rsample_(True), ValueError, "whose face is discrete"),
    ]  # fmt: skip
    for call, kind, message in bad:
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.parametrize(
    "row", [[0.5, 0.4, 0.0], [-0.1, 0.6, 0.5], [0.0, 0.0, 0.0], [math.nan, 0.5, 0.5], [2.0, 0.0, 0.0]]
)
def test_rows_that_are_no_compositions(row: list[float]) -> None:
    d = MixedDirichlet(torch.zeros(3), torch.ones(3))
    for checked in (d, FaceDirichlet(torch.ones(3)), FaceLogisticNormal(torch.zeros(3), 1.0)):
        with pytest.raises(
            ValueError, match=r"log_prob: expected rows that are non-negative and sum to one, got one with"
        ):
            checked.log_prob(torch.tensor([[0.5, 0.5, 0.0], row]))
    unchecked = MixedDirichlet(torch.zeros(3), torch.ones(3), validate_args=False)
    assert not unchecked.log_prob(torch.tensor(row)) > -math.inf
    with pytest.raises(ValueError, match="floating-point"):
        d.log_prob(torch.tensor([1, 0, 0]))
    with pytest.raises(ValueError, match=r"expected 3 coordinates in the last dim, got shape \(2,\)"):
        d.log_prob(torch.tensor([0.5, 0.5]))


def test_unknown_divergences() -> None:
    mixed, dirichlet = MixedDirichlet(torch.zeros(3), torch.ones(3)), dist.Dirichlet(torch.ones(3))
    normal = MixedLogisticNormal(torch.zeros(3), torch.zeros(3), 1.0)
    for p, q in ((mixed, dirichlet), (dirichlet, mixed), (normal, mixed), (mixed.mask(False), dirichlet)):
        with pytest.raises(TypeError, match="expected a pair with a known divergence"):
            kl_divergence(p, q)
    with pytest.raises(ValueError, match="as many vertices in both, got 3 and 4"):
        kl_divergence(mixed, MixedDirichlet(torch.zeros(4), torch.ones(4)))


def test_no_bijection_leads_there() -> None:
    for registry in (biject_to, transform_to):
        with pytest.raises(NotImplementedError, match="never reaches an atom"):
            registry(mixed_simplex)
