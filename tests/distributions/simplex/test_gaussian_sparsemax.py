"""
GaussianSparsemax: its density against the definition, RectifiedNormal and frequencies; its gradients against
quadrature.

The slow tests compare 22 frequencies and 24 means with exact values and ask for less than 5 standard errors: with
everything right and seeds that are not fixed, one run in 30 000 would have a failure.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import biject_to, kl_divergence

from pyro_sparse.distributions import GaussianSparsemax, RectifiedNormal
from pyro_sparse.testing import check_distribution
from pyro_sparse.testing.quadrature import integrate
from tests.distributions.simplex.projected_programs import (
    EFFECTS,
    ROUTES,
    WRAPPINGS,
    Family,
    all_faces,
    check_one_site,
    check_two_sites,
    check_wrapping,
    on_faces,
    one_site,
    one_site_elbo,
    points,
)
from tests.known_gradients import estimates, exact_gradient, standard_errors

LIMIT = 5.0  # standard errors


def random_rows(rows: int, K: int, spread: float, decades: float) -> tuple[Tensor, Tensor, Tensor]:
    """loc up to the spread, scales of so many decades on both sides of one, and points on faces of all sizes."""
    loc = spread * torch.rand(rows, 1) ** 3 * (2 * torch.rand(rows, K) - 1)
    scale = 10 ** (decades * (2 * torch.rand(rows, K) - 1))
    on = torch.rand(rows, K) < torch.rand(rows, 1)
    on[torch.arange(rows), torch.randint(K, (rows,))] = True
    y = torch.where(on, -torch.rand(rows, K).log(), 0.0)
    return loc, scale, y / y.sum(-1, keepdim=True)


# The density.


def by_definition(loc: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """Of one row: the integral over tau, adaptively, around the maximum of its integrand."""
    on = y > 0

    def log_f(tau: Tensor) -> Tensor:
        tau = tau.unsqueeze(-1)
        inside = dist.Normal(loc[on], scale[on]).log_prob(y[on] + tau).sum(-1)
        return inside + torch.special.log_ndtr((tau - loc[~on]) / scale[~on]).sum(-1)

    low, high = torch.tensor(-200.0), torch.tensor(200.0)
    for _ in range(120):  # it is concave
        third = (high - low) / 3
        left, right = log_f(torch.stack([low + third, high - third]))
        low, high = (low + third, high) if left < right else (low, high - third)
    mode = (low + high) / 2
    top = log_f(mode)
    away = scale.min() * 2.0 ** torch.arange(-20, 20)
    steps = (loc[~on] + scale[~on] * torch.arange(-8.0, 9.0).unsqueeze(-1)).flatten()
    breaks = torch.cat([mode - away, mode.unsqueeze(0), mode + away, steps])
    breaks = breaks[log_f(breaks) > top - 2000].sort().values.unique()
    rough = top + integrate(lambda tau: (log_f(tau) - top).exp(), breaks).log()
    # Tolerances are for a total of one.
    return on.sum().log() + rough + integrate(lambda tau: (log_f(tau) - rough).exp(), breaks).log()


@pytest.mark.parametrize(("spread", "decades"), [(50.0, 3.0), (1.0, 3.0), (2.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("K", [2, 3, 10])
def test_against_the_definition(K: int, spread: float, decades: float) -> None:
    loc, scale, y = random_rows(6, K, spread, decades)
    expected = torch.stack([by_definition(*row) for row in zip(loc, scale, y, strict=True)])
    torch.testing.assert_close(GaussianSparsemax(loc, scale).log_prob(y), expected, rtol=1e-9, atol=1e-9)


def test_modes_that_are_hard_to_find() -> None:
    """Wide and narrow steps, one behind the other: of 20 000 rows, those that take Newton's method longest."""
    loc = torch.tensor([[-30.42, -22.37, 14.31, 33.58], [-8.703, -15.29, 15.36, -9.078]])
    scale = torch.tensor([[1.987, 0.00164, 1.932, 143.0], [0.0731, 0.3143, 0.3256, 0.002053]])
    y = torch.eye(4)[:2]
    expected = torch.stack([by_definition(*row) for row in zip(loc, scale, y, strict=True)])
    torch.testing.assert_close(GaussianSparsemax(loc, scale).log_prob(y), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("K", [2, 3, 4])
def test_total_probability(K: int) -> None:
    d = GaussianSparsemax(torch.tensor([0.4, -0.3, 0.2, 0.0])[:K], torch.tensor([0.5, 0.9, 0.4, 0.6])[:K])
    total = sum((w * d.log_prob(y).exp()).sum() for y, w in on_faces(K, 24))
    assert abs(total - 1) < 1e-9


def test_full_face_is_a_normal_density() -> None:
    """There, Y = X - (sum X - 1) / K is linear."""
    K = 5
    loc, scale, y = torch.randn(3, K), torch.rand(3, K) + 0.1, dist.Dirichlet(torch.ones(K)).sample((3,))
    project = (torch.eye(K) - 1 / K)[:-1]
    covariance = project @ torch.diag_embed(scale.square()) @ project.mT
    expected = dist.MultivariateNormal(loc @ project.mT + 1 / K, covariance).log_prob(y[:, :-1])
    torch.testing.assert_close(GaussianSparsemax(loc, scale).log_prob(y), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("z", [0.0, 1e-38, 1e-3, 0.4, 0.9, 1.0])
def test_two_vertices_are_a_rectified_normal(z: float) -> None:
    grid = torch.tensor([1e-3, 0.3, 2.0, 1e3])
    locs = torch.tensor([-50.0, -0.9, 0.0, 0.3, 50.0])
    args = torch.meshgrid(locs, locs, grid, grid, indexing="ij")
    a, b, s, t = (x.flatten().requires_grad_() for x in args)
    ours = GaussianSparsemax(torch.stack([a, b], -1), torch.stack([s, t], -1)).log_prob(torch.tensor([z, 1 - z]))
    theirs = RectifiedNormal((a - b + 1) / 2, (s.square() + t.square()).sqrt() / 2).log_prob(torch.tensor(z))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    got, expected = (torch.stack(torch.autograd.grad(x.sum(), (a, b, s, t))) for x in (ours, theirs))
    # A derivative that is a rounding error of the others, with scales of 1e-3 and 1e3, is compared with the largest.
    assert ((got - expected).abs() <= 1e-8 * (1 + expected.abs().amax(0))).all()
    mild = ((s / t).log().abs() < 2) & (torch.maximum(a.abs(), b.abs()) < 1)
    torch.testing.assert_close(got[:, mild], expected[:, mild], rtol=1e-8, atol=1e-8)


def test_a_shift_of_loc_changes_nothing() -> None:
    loc, scale, y = random_rows(20, 4, 2.0, 1.0)
    shifted = GaussianSparsemax(loc + 8.0, scale).log_prob(y)
    torch.testing.assert_close(shifted, GaussianSparsemax(loc, scale).log_prob(y), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K", [2, 3, 10, 200])
def test_extremes(K: int, dtype: torch.dtype) -> None:
    loc, scale, y = random_rows(4 if K == 200 else 100, K, 50.0, 3.0)
    y[::2, -1] = torch.where(y[::2, -1] == 0, 1e-38, y[::2, -1])
    corner = torch.tensor([[50.0, -50.0], [-50.0, 50.0]])
    for i, s in enumerate((1e-3, 1e3)):
        loc[i, :2], scale[i, :2] = corner[i], torch.tensor([s, 1 / s])
    loc, scale, y = (x.to(dtype).requires_grad_() for x in (loc, scale, y))
    log_prob = GaussianSparsemax(loc, scale).log_prob(y)
    assert log_prob.dtype == dtype and log_prob.isfinite().all()
    for gradient in torch.autograd.grad(log_prob.sum(), (loc, scale, y)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("K", [3, 10])
def test_float32(K: int) -> None:
    rows = [x.float() for x in random_rows(50, K, 50.0, 3.0)]
    results = []
    for dtype in (torch.float32, torch.float64):
        loc, scale, y = (x.to(dtype).requires_grad_() for x in rows)
        log_prob = GaussianSparsemax(loc, scale).log_prob(y)
        results.append([log_prob, *torch.autograd.grad(log_prob.sum(), (loc, scale))])
    for single, double in zip(*results, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


def test_gradients() -> None:
    scale = torch.tensor([[0.5, 0.1, 0.8], [1.0, 0.02, 3.0]], requires_grad=True)
    loc = torch.tensor([[0.4, -0.2, 0.1], [1.0, 0.9, 0.0]], requires_grad=True)
    for y in ([1.0, 0.0, 0.0], [0.0, 0.7, 0.3], [0.2, 0.5, 0.3]):
        value = torch.tensor(y)
        assert torch.autograd.gradcheck(lambda m, s, v=value: GaussianSparsemax(m, s).log_prob(v), (loc, scale))
    value = torch.tensor([0.0, 0.7, 0.3])
    assert torch.autograd.gradgradcheck(lambda m, s: GaussianSparsemax(m, s).log_prob(value), (loc, scale))
    # In the value: along the face, as off it there is no density.
    move = torch.tensor([0.0, 1.0, -1.0])
    at = torch.tensor(0.1, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: GaussianSparsemax(loc, scale).log_prob(value + x * move), at)


# Draws.


def z_scores(d: Any, draws: int, chunk: int = 1_000_000) -> Tensor:
    """By how many standard errors the frequency of each face is off."""
    K = d.event_shape[0]
    p = torch.stack([(w * d.log_prob(y).exp()).sum() for y, w in on_faces(K, 24)])
    bits = 2 ** torch.arange(K)
    numbers = torch.tensor([sum(2**k for k in face) for face in all_faces(K)])
    counts = torch.zeros(2**K)
    for _ in range(draws // chunk):
        counts += torch.bincount(((d.sample((chunk,)) > 0) * bits).sum(-1), minlength=2**K)
    assert counts[0] == 0
    return (counts[numbers] - draws * p) / (draws * p * (1 - p)).sqrt()


THREE = ([0.6, 0.0, 0.3], [0.3, 0.8, 0.5])
FOUR = ([0.6, 0.0, 0.3, -0.2], [0.3, 0.8, 0.5, 0.4])


def test_frequencies_of_faces() -> None:
    """Fails by chance once in 250 000 runs of other seeds."""
    d = GaussianSparsemax(*map(torch.tensor, THREE))
    assert z_scores(d, 100_000, 100_000).abs().max() < LIMIT
    other = GaussianSparsemax(d.loc + torch.tensor([0.05, 0.0, 0.0]), d.scale)
    d.sample = other.sample
    assert z_scores(d, 100_000, 100_000).abs().max() > LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [THREE, FOUR])
def test_frequencies_of_faces_in_many_draws(parameters: Any) -> None:
    assert z_scores(GaussianSparsemax(*map(torch.tensor, parameters)), 10_000_000).abs().max() < LIMIT


def test_pathwise_gradient_of_a_continuous_function() -> None:
    """Of E exp(Y @ effects), 3 x 2 parameters; fails by chance once in 290 000 runs of other seeds."""
    start = torch.tensor(THREE)
    y, w = points(3, 24)

    def f(y: Tensor) -> Tensor:
        return (y @ EFFECTS).exp()

    exact = exact_gradient(lambda t: (w * GaussianSparsemax(t[0], t[1]).log_prob(y).exp() * f(y)).sum(), start)
    t = start.unsqueeze(1).expand(2, 100_000, 3).clone().requires_grad_()
    rows = torch.autograd.grad(f(GaussianSparsemax(t[0], t[1]).rsample()).sum(), t)[0]
    assert standard_errors(rows.movedim(1, 0) - exact).max() < LIMIT


def test_kinds_of_draws() -> None:
    loc = torch.randn(3, 4, requires_grad=True)
    d = GaussianSparsemax(loc, 0.5)
    assert not d.has_rsample and not d().requires_grad and not d.sample().requires_grad
    assert d.rsample((2,)).requires_grad and d.has_rsample_(True)((2,)).requires_grad and not d.sample().requires_grad
    assert d.to_event(1).has_rsample and d.expand((2, 3)).has_rsample and d.mask(False)().requires_grad
    for part in d.has_rsample_(False).score_parts(d.sample())[:2]:
        assert part.shape == (3,) and part.requires_grad


# As a site.


def family(K: int) -> Family:
    guide = (0.5, 0.1, -0.2)[:K] + (-0.7, -0.4, -0.2)[:K]
    prior = (0.0, 0.3, 0.1)[:K] + (-0.3, -0.3, -0.5)[:K]
    return Family(lambda t: GaussianSparsemax(t[..., :K], t[..., K:].exp()), guide, prior, K)


@pytest.mark.parametrize("route", ROUTES)
def test_gradient_of_one_site(route: str) -> None:
    check_one_site(family(3), route, nodes=16)


@pytest.mark.parametrize("route", ROUTES)
def test_gradient_of_two_sites(route: str) -> None:
    check_two_sites(family(2), route, nodes=16)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_gradient_of_a_wrapped_pair(wrapping: str, route: str) -> None:
    check_wrapping(family(2), route, wrapping, nodes=14)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_gradient_of_one_site_by_draws(route: str) -> None:
    f = family(3)
    rows = torch.cat([estimates(ROUTES[route](), one_site(f, 5_000)) for _ in range(10)])
    assert standard_errors(rows - exact_gradient(lambda t: one_site_elbo(f, t, 24), f.q())).max() < LIMIT


@pytest.mark.slow
def test_pathwise_draws_with_a_drawn_kl_are_biased() -> None:
    f = family(3)
    rows = torch.cat([estimates(Trace_ELBO(), one_site(f, 5_000, pathwise=True)) for _ in range(4)])
    assert standard_errors(rows - exact_gradient(lambda t: one_site_elbo(f, t, 24), f.q())).max() > 20


# The rest.


def test_conformance() -> None:
    loc = torch.randn(3, 1, 4, requires_grad=True)
    d = GaussianSparsemax(loc, (torch.rand(2, 4) + 0.1).requires_grad_())
    check_distribution(d, draws=1000)
    check_distribution(d.has_rsample_(True), draws=1000)
    check_distribution(GaussianSparsemax(torch.randn(2, 3, dtype=torch.float32), 0.3).to_event(1), draws=1000)


@pytest.mark.slow
def test_conformance_at_many_draws() -> None:
    check_distribution(GaussianSparsemax(torch.randn(3, 1, 4, requires_grad=True), torch.rand(2, 4) + 0.1))


def test_shapes() -> None:
    for loc, scale, batch in (
        (torch.zeros(3), 0.5, ()),
        (0.0, torch.ones(2, 3), (2,)),
        (torch.zeros(4, 1, 3), torch.ones(2, 1), (4, 2)),
    ):
        d = GaussianSparsemax(loc, scale)
        assert d.batch_shape == batch and d.event_shape == (3,) and d.sample((5,)).shape == (5, *batch, 3)
        assert d.log_prob(torch.tensor([0.5, 0.0, 0.5])).shape == batch
    assert GaussianSparsemax(torch.zeros(0, 3), 0.5).log_prob(torch.zeros(0, 3)).shape == (0,)


def test_what_is_not_known() -> None:
    d = GaussianSparsemax(torch.zeros(3), 1.0)
    for name, get in {"entropy": lambda: d.entropy(), "mean": lambda: d.mean, "variance": lambda: d.variance}.items():
        with pytest.raises(NotImplementedError, match=rf"^GaussianSparsemax\.{name}: expected a closed form, got none"):
            get()
    other = dist.Dirichlet(torch.ones(3))
    for p, q in ((d, d), (d, other), (other, d), (d.to_event(0), GaussianSparsemax(torch.ones(3), 1.0))):
        with pytest.raises(TypeError, match="expected a pair with a known divergence"):
            kl_divergence(p, q)
    with pytest.raises(NotImplementedError, match="expected a domain without atoms, got mixed_simplex"):
        biject_to(d.support)
    with pytest.raises(TypeError, match="known divergence"):
        TraceMeanField_ELBO().loss_and_grads(*one_site(family(3), 2, pathwise=True))


def test_parameters() -> None:
    nan, inf = math.nan, math.inf
    for args, message in {
        (torch.zeros(1), 1.0): "GaussianSparsemax: expected at least two vertices in the last dim, got shape (1,). Add",
        (0.0, 1.0): "GaussianSparsemax: expected at least two vertices in the last dim, got shape (). Add",
        (torch.tensor([0.0, nan]), 1.0): "GaussianSparsemax.loc: expected a finite number, got nan. Check",
        (torch.tensor([0.0, -inf]), 1.0): "GaussianSparsemax.loc: expected a finite number, got -inf. Check",
        (torch.zeros(2), 0.0): "GaussianSparsemax.scale: expected a positive number, got 0.0. Use",
        (torch.zeros(2), torch.tensor([1.0, -2.0])): "GaussianSparsemax.scale: expected a positive number, got -2.0.",
        (torch.zeros(2), inf): "GaussianSparsemax.scale: expected a positive number, got inf. Use",
        (torch.zeros(2), nan): "GaussianSparsemax.scale: expected a positive number, got nan. Use",
    }.items():
        with pytest.raises(ValueError) as error:
            GaussianSparsemax(*args)
        assert str(error.value).startswith(message)
    with pytest.raises(
        TypeError, match=r"^GaussianSparsemax.loc: expected a floating-point tensor, got torch.int64. Use"
    ):
        GaussianSparsemax(torch.tensor([0, 1]), 1.7)
    GaussianSparsemax(torch.zeros(2), -1.0, validate_args=False)
    with pyro.validation_enabled(False):
        GaussianSparsemax(torch.zeros(2), -1.0)


def test_values() -> None:
    d, loose = GaussianSparsemax(torch.zeros(3), 1.0), GaussianSparsemax(torch.zeros(3), 1.0, validate_args=False)
    for value in ([0.5, 0.6, 0.0], [1.1, -0.1, 0.0], [0.0, 0.0, 0.0]):
        with pytest.raises(ValueError, match="sum to one"):
            d.log_prob(torch.tensor(value))
        assert loose.log_prob(torch.tensor(value)) == -math.inf
    with pytest.raises(ValueError, match="sum to one"):
        d.log_prob(torch.tensor([math.nan, 0.5, 0.5]))
    assert loose.log_prob(torch.tensor([math.nan, 0.5, 0.5])).isnan()
    with pytest.raises(ValueError, match=r"GaussianSparsemax.log_prob: expected a floating-point value, got torch.int"):
        d.log_prob(torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError):
        d.log_prob(torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match=r"GaussianSparsemax\.expand: expected a shape that"):
        GaussianSparsemax(torch.zeros(2, 3), 1.0).expand((3,))
