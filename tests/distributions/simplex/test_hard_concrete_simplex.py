"""
HardConcreteSimplex: its density against HardConcrete, torch's concrete density and frequencies; its gradients against
quadrature.

The slow tests compare 2 frequencies and 18 means with exact values and ask for less than 5 standard errors: with
everything right and seeds that are not fixed, one run in 80 000 would have a failure.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import RelaxedOneHotCategorical, biject_to, kl_divergence

from pyro_sparse.distributions import HardConcrete, HardConcreteSimplex
from pyro_sparse.projections import sparsemax
from pyro_sparse.testing import check_distribution
from tests.distributions.simplex.projected_programs import (
    EFFECTS,
    ROUTES,
    WRAPPINGS,
    Family,
    check_one_site,
    check_two_sites,
    check_wrapping,
    inside,
    one_site,
    one_site_elbo,
    points,
)
from tests.known_gradients import estimates, exact_gradient, standard_errors

LIMIT = 5.0  # standard errors


# The density.


@pytest.mark.parametrize("z", [0.0, 1e-38, 1e-3, 0.4, 0.9, 1.0])
def test_two_vertices_are_a_hard_concrete_gate(z: float) -> None:
    logits = torch.tensor([-50.0, -1.0, 0.0, 0.7, 50.0])
    grid = torch.meshgrid(
        torch.tensor([0.05, 0.5, 2.0]), logits, logits, torch.tensor([1 + 2e-6, 1.2, 9.0]), indexing="ij"
    )
    t, a, b, stretch = (x.flatten().requires_grad_() for x in grid)
    ours = HardConcreteSimplex(t, torch.stack([a, b], -1), stretch).log_prob(torch.tensor([z, 1 - z]))
    theirs = HardConcrete(t, a - b, (1 - stretch) / 2, (1 + stretch) / 2).log_prob(torch.tensor(z))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    gradients = (torch.autograd.grad(x.sum(), (t, a, b, stretch)) for x in (ours, theirs))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_two_vertices_are_symmetric() -> None:
    """Also where the larger coordinate is rounded to one, which is no atom."""
    y = torch.tensor([[1e-38, 1.0], [1e-9, 1 - 1e-9], [0.0, 1.0], [0.3, 0.7]])
    logits = torch.tensor([0.4, -0.3])
    d, mirrored = HardConcreteSimplex(0.5, logits, 1.2), HardConcreteSimplex(0.5, logits.flip(0), 1.2)
    torch.testing.assert_close(mirrored.log_prob(y.flip(1)), d.log_prob(y), rtol=1e-12, atol=1e-12)
    density = HardConcrete(0.5, -0.7, -0.1, 1.1).log_prob(torch.tensor(1e-38))
    torch.testing.assert_close(d.log_prob(torch.tensor([1.0, 1e-38])), density, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("K", [2, 3, 4, 10])
def test_full_face_is_a_concrete_density(K: int) -> None:
    logits, y = torch.randn(K), dist.Dirichlet(torch.ones(K)).sample((20,))
    for t, stretch in ((0.3, 1.1), (1.0, 1.001), (3.0, 4.0)):
        c = (y + (stretch - 1) / K) / stretch
        expected = RelaxedOneHotCategorical(torch.tensor(t), logits=logits).log_prob(c) - (K - 1) * math.log(stretch)
        ours = HardConcreteSimplex(t, logits, stretch).log_prob(y)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_total_probability_with_two_vertices() -> None:
    y, w = points(2, 60)
    d = HardConcreteSimplex(torch.tensor([0.5, 2.0]), torch.tensor([0.4, -0.3]), torch.tensor([1.2, 3.0]))
    assert ((w.unsqueeze(-1) * d.log_prob(y.unsqueeze(1)).exp()).sum(0) - 1).abs().max() < 1e-10


def full_face(K: int) -> tuple[HardConcreteSimplex, Tensor]:
    """A distribution and its exact probability of having no zeros."""
    d = HardConcreteSimplex(0.7, torch.tensor([0.4, -0.3, 0.2, 0.0])[:K], 1.3)
    y, w = inside(K, 40)
    return d, (w * d.log_prob(y).exp()).sum()


def z_score(d: Any, p: Tensor, draws: int, chunk: int) -> Tensor:
    count = sum((d.sample((chunk,)) > 0).all(-1).sum() for _ in range(draws // chunk))
    return ((count - draws * p) / (draws * p * (1 - p)).sqrt()).abs()


@pytest.mark.parametrize("K", [3, 4])
def test_frequency_of_the_full_face(K: int) -> None:
    """Fails by chance once in 870 000 runs of other seeds."""
    d, p = full_face(K)
    assert 0.1 < p < 0.9
    assert z_score(d, p, 100_000, 100_000) < LIMIT
    assert z_score(HardConcreteSimplex(0.7, d.logits, 1.33), p, 100_000, 100_000) > LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("K", [3, 4])
def test_frequency_of_the_full_face_in_many_draws(K: int) -> None:
    assert z_score(*full_face(K), 10_000_000, 1_000_000) < LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K", [2, 3, 200])
def test_extremes(K: int, dtype: torch.dtype) -> None:
    t, stretch, sign = (
        x.flatten().to(dtype).requires_grad_()
        for x in torch.meshgrid(
            torch.tensor([0.05, 0.5, 5.0]),
            torch.tensor([1 + 2.0**-20, 1.1, 1e3]),
            torch.tensor([-1.0, 1.0]),
            indexing="ij",
        )
    )
    logits = (sign.detach().unsqueeze(-1) * torch.linspace(-50, 50, K, dtype=dtype)).requires_grad_()
    y = torch.full((K,), 1e-38, dtype=dtype)
    y[0] = 1.0
    y.requires_grad_()
    log_prob = HardConcreteSimplex(t, logits, stretch).log_prob(y)
    assert log_prob.dtype == dtype and log_prob.isfinite().all()
    for gradient in torch.autograd.grad(log_prob.sum(), (t, logits, stretch, y)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("K", [2, 3, 10])
def test_float32(K: int) -> None:
    args = 0.1 + 2 * torch.rand(50), torch.randn(50, K), 1.05 + torch.rand(50), dist.Dirichlet(torch.ones(K)).sample()
    rows = [x.float() for x in args]
    single, double = (
        HardConcreteSimplex(*(x.to(dtype) for x in rows[:3])).log_prob(rows[3].to(dtype))
        for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("y", [[0.3, 0.7], [0.0, 1.0], [0.2, 0.5, 0.3]])
def test_gradients(y: list[float]) -> None:
    t, stretch = torch.tensor([0.3, 1.5], requires_grad=True), torch.tensor([1.2, 2.0], requires_grad=True)
    logits, value = torch.randn(2, len(y), requires_grad=True), torch.tensor(y)
    args = (t, logits, stretch)
    assert torch.autograd.gradcheck(lambda *args: HardConcreteSimplex(*args).log_prob(value), args)
    if value.all():  # in the value: along the face, as off it there is no density
        move = torch.tensor([1.0, -1.0, 0.0][: len(y)])
        at = torch.tensor(0.1, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: HardConcreteSimplex(*args).log_prob(value + x * move), at)


def test_a_smaller_face_of_three_vertices() -> None:
    d = HardConcreteSimplex(0.5, torch.zeros(3), 1.2)
    rows = torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.5, 0.0]])
    message = (
        r"^HardConcreteSimplex.log_prob: expected all coordinates to be positive, or K = 2, got a zero and K = 3. "
        r"The density .* Use GaussianSparsemax or MixedDirichlet\.$"
    )
    for flag in (True, False):
        d = HardConcreteSimplex(0.5, torch.zeros(3), 1.2, validate_args=flag)
        with pytest.raises(NotImplementedError, match=message):
            d.log_prob(rows)
    assert d.log_prob(rows[0]).isfinite() and d.log_prob(torch.tensor([0.5, 0.6, 0.0])) == -math.inf


# Draws.


def test_pathwise_gradient_of_a_continuous_function() -> None:
    """Of E exp(Y @ effects), 4 parameters; fails by chance once in 430 000 runs of other seeds."""
    start = torch.tensor([0.8, 0.4, -0.3, 1.4])
    y, w = points(2, 60)

    def make(t: Tensor) -> Any:
        return HardConcreteSimplex(t[..., 0], t[..., 1:3], t[..., 3])

    def f(y: Tensor) -> Tensor:
        return (y @ EFFECTS[:2]).exp()

    exact = exact_gradient(lambda t: (w * make(t).log_prob(y).exp() * f(y)).sum(), start)
    t = start.expand(100_000, 4).clone().requires_grad_()
    rows = torch.autograd.grad(f(make(t).rsample()).sum(), t)[0]
    assert standard_errors(rows - exact).max() < LIMIT


def test_draws_are_projected_concrete_ones() -> None:
    """The means of y and y^2 against torch's sampler; fails by chance once in 290 000 runs of other seeds."""
    logits = torch.tensor([0.4, -0.3, 0.2])
    ours = HardConcreteSimplex(0.7, logits, 1.3).sample((100_000,))
    theirs = sparsemax(1.3 * RelaxedOneHotCategorical(0.7, logits=logits).sample((100_000,)))
    for a, b in ((ours, theirs), (ours.square(), theirs.square())):
        assert standard_errors(a - b).max() < LIMIT


def test_kinds_of_draws() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    d = HardConcreteSimplex(0.5, logits, 1.2)
    assert not d.has_rsample and not d().requires_grad and not d.sample().requires_grad
    assert d.rsample((2,)).requires_grad and d.has_rsample_(True)((2,)).requires_grad and not d.sample().requires_grad
    assert d.to_event(1).has_rsample and d.expand((2, 3)).has_rsample and d.mask(False)().requires_grad


# As a site.

GATE = Family(
    lambda t: HardConcreteSimplex(t[..., 2].exp(), t[..., :2], 1.5 + t[..., 3].exp()),
    (0.5, -0.1, -0.3, -0.5),
    (0.0, 0.2, 0.1, -0.2),
    2,
)


@pytest.mark.parametrize("route", ROUTES)
def test_gradient_of_one_site(route: str) -> None:
    check_one_site(GATE, route, nodes=30)


@pytest.mark.parametrize("route", ROUTES)
def test_gradient_of_two_sites(route: str) -> None:
    check_two_sites(GATE, route, nodes=24)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_gradient_of_a_wrapped_pair(wrapping: str, route: str) -> None:
    check_wrapping(GATE, route, wrapping, nodes=24)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_gradient_of_one_site_by_draws(route: str) -> None:
    rows = torch.cat([estimates(ROUTES[route](), one_site(GATE, 10_000)) for _ in range(10)])
    assert standard_errors(rows - exact_gradient(lambda t: one_site_elbo(GATE, t, 40), GATE.q())).max() < LIMIT


@pytest.mark.slow
def test_pathwise_draws_with_a_drawn_kl_are_biased() -> None:
    rows = torch.cat([estimates(Trace_ELBO(), one_site(GATE, 10_000, pathwise=True)) for _ in range(10)])
    assert standard_errors(rows - exact_gradient(lambda t: one_site_elbo(GATE, t, 40), GATE.q())).max() > 20


# The rest.


def test_conformance() -> None:
    d = HardConcreteSimplex(0.5, torch.randn(3, 2, requires_grad=True), torch.tensor([[1.2], [1.5]]))
    check_distribution(d)
    check_distribution(d.has_rsample_(True))
    check_distribution(d.to_event(1))
    # So little stretch that no draw has a zero.
    check_distribution(HardConcreteSimplex(5.0, torch.zeros(2, 3, requires_grad=True), 1.0001))


def test_shapes() -> None:
    for t, logits, stretch, batch in (
        (0.5, torch.zeros(2), 1.2, ()),
        (torch.ones(4, 1), torch.zeros(2), torch.full((3,), 1.2), (4, 3)),
        (0.5, torch.zeros(3, 2), torch.full((4, 1), 1.2), (4, 3)),
    ):
        d = HardConcreteSimplex(t, logits, stretch)
        assert d.batch_shape == batch and d.event_shape == (2,) and d.sample((5,)).shape == (5, *batch, 2)
        assert d.log_prob(torch.tensor([0.5, 0.5])).shape == batch
        assert d.expand((6, *batch)).log_prob(torch.tensor([0.5, 0.5])).shape == (6, *batch)


def test_what_is_not_known() -> None:
    d = HardConcreteSimplex(0.5, torch.zeros(3), 1.2)
    for name, get in {"entropy": lambda: d.entropy(), "mean": lambda: d.mean, "variance": lambda: d.variance}.items():
        with pytest.raises(NotImplementedError, match=rf"^HardConcreteSimplex\.{name}: expected a closed form, got"):
            get()
    other = dist.Dirichlet(torch.ones(3))
    for p, q in ((d, d), (d, other), (other, d)):
        with pytest.raises(TypeError, match="expected a pair with a known divergence"):
            kl_divergence(p, q)
    with pytest.raises(NotImplementedError, match="expected a domain without atoms, got mixed_simplex"):
        biject_to(d.support)


def test_bad_input() -> None:
    two, nan, inf = torch.zeros(2), math.nan, math.inf
    for args, message in {
        (
            0.5,
            torch.zeros(1),
            1.2,
        ): "HardConcreteSimplex: expected at least two vertices in the last dim, got shape (1,)",
        (
            0.5,
            torch.tensor(0.0),
            1.2,
        ): "HardConcreteSimplex: expected at least two vertices in the last dim, got shape ()",
        (0.0, two, 1.2): "HardConcreteSimplex.temperature: expected a positive number, got 0.0. Use",
        (torch.tensor([1.0, -1.0]), two, 1.2): "HardConcreteSimplex.temperature: expected a positive number, got -1.0.",
        (nan, two, 1.2): "HardConcreteSimplex.temperature: expected a positive number, got nan. Use",
        (inf, two, 1.2): "HardConcreteSimplex.temperature: expected a positive number, got inf. Use",
        (0.5, torch.tensor([0.0, nan]), 1.2): "HardConcreteSimplex.logits: expected a finite number, got nan. Check",
        (0.5, torch.tensor([0.0, -inf]), 1.2): "HardConcreteSimplex.logits: expected a finite number, got -inf. Check",
        (0.5, two, 1.0): "HardConcreteSimplex.stretch: expected a number above 1, got 1.0. Use",
        (0.5, two, torch.tensor([1.2, 0.5])): "HardConcreteSimplex.stretch: expected a number above 1, got 0.5. Use",
        (0.5, two, nan): "HardConcreteSimplex.stretch: expected a number above 1, got nan. Use",
        (0.5, two, inf): "HardConcreteSimplex.stretch: expected a number above 1, got inf. Use",
    }.items():
        with pytest.raises(ValueError) as error:
            HardConcreteSimplex(*args)
        assert str(error.value).startswith(message)
    with pytest.raises(
        TypeError, match=r"^HardConcreteSimplex.logits: expected a floating-point tensor, got torch.int64"
    ):
        HardConcreteSimplex(0.5, torch.tensor([0, 1]), 1.2)
    d, loose = HardConcreteSimplex(0.5, two, 1.2), HardConcreteSimplex(0.5, two, 0.5, validate_args=False)
    with pyro.validation_enabled(False):
        HardConcreteSimplex(0.5, two, 0.5)
    for value in ([0.5, 0.6], [1.1, -0.1], [0.0, 0.0]):
        with pytest.raises(ValueError, match="sum to one"):
            d.log_prob(torch.tensor(value))
        assert loose.log_prob(torch.tensor(value)) == -math.inf
    with pytest.raises(
        ValueError, match=r"HardConcreteSimplex.log_prob: expected a floating-point value, got torch.in"
    ):
        d.log_prob(torch.tensor([0, 1]))
