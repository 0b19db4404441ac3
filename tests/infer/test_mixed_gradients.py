r"""
Gradients of programs with mixed latents against quadrature: exactly where one draw can be placed, else by z-tests.

A z-test compares the mean of 2 * 10^4 draws and more with the exact gradient and asks for less than 4 standard errors
in every parameter. The slow tests make 1,576 such comparisons: with everything right and seeds that are not fixed, one
run in 10 would have a failure. Negative controls ask the naive estimates, with as many draws, to fail by 8.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_sparse.distributions import SparseCategorical
from pyro_sparse.infer import SparseEnumELBO
from tests.infer.mixed_programs import (
    DATA,
    FAMILIES,
    NOISE,
    RECTIFIED,
    ROUTES,
    Draw,
    Family,
    Route,
    one_site,
    one_site_elbo,
    place,
    sampler,
    shifted,
    subsampled,
    subsampled_elbo,
    theta,
    two_sites,
    two_sites_elbo,
)
from tests.known_gradients import Program, estimates, exact_gradient, standard_errors

DRAWS = 20_000
CHUNK = 10_000  # of draws at a time: faster than all at once
UNTRACKED = ("ZeroOneInflated, Beta", "TraceGraph_ELBO")  # torch's Beta has no gradient there, given another draw
GRID = [(f, r) for f, r in itertools.product(FAMILIES, ROUTES) if ROUTES[r].serves(FAMILIES[f])]


# Exactly: a draw is placed at each quadrature point, so the mean over draws has no noise.


def placing(values: dict[str, Tensor], pathwise: bool) -> Draw:
    """A sampler whose "random" draws are given; their gradients are the distribution's own."""
    plain = sampler(pathwise)

    def draw(name: str, d: Any) -> Tensor:
        place(d, values[name])
        return plain(name, d)

    return draw


def placeable(family: str, route: str) -> bool:
    """One draw for each estimate; the default form of an inflated variable draws its slab by other means."""
    r = ROUTES[route]
    return r.particles == 1 and (r.pathwise or r.splits or family in RECTIFIED)


PLACEABLE = [pair for pair in GRID if placeable(*pair)]
DRAWN = [pair for pair in GRID if not placeable(*pair)]


@pytest.mark.parametrize(("family", "route"), PLACEABLE)
def test_one_site_exactly(family: str, route: str) -> None:
    f, r = FAMILIES[family], ROUTES[route]
    z, w = f.points(100)
    weights = w * f.make(f.q()).log_prob(z).exp()
    rows = estimates(r.elbo(), one_site(f, len(z), placing({"z": z}, r.pathwise)))
    exact = exact_gradient(lambda t: one_site_elbo(f, t), f.q())
    torch.testing.assert_close(weights @ rows, exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("family", "route"),
    [pytest.param(*pair, marks=[] if pair[0] == "HardConcrete" else pytest.mark.slow) for pair in PLACEABLE],
)
def test_two_sites_exactly(family: str, route: str) -> None:
    f, r = FAMILIES[family], ROUTES[route]
    nodes, w = f.points(24 if len(f.inside) == 2 else 32)
    z1, z2 = nodes.repeat_interleave(len(nodes)), nodes.repeat(len(nodes))
    log_q = f.make(f.q()).log_prob(z1) + f.make(shifted(f.q(), z1)).log_prob(z2)
    weights = torch.outer(w, w).flatten() * log_q.exp()
    rows = estimates(r.elbo(), two_sites(f, len(z1), placing({"z1": z1, "z2": z2}, r.pathwise)))
    exact = exact_gradient(lambda t: two_sites_elbo(f, t), f.both())
    torch.testing.assert_close(torch.tensordot(weights, rows, 1), exact, rtol=0, atol=1e-6)


# By z-tests.


def assert_unbiased(errors: Tensor) -> None:
    assert standard_errors(errors).max() < 4


def drawn(route: Route, program: Callable[[int], Program], draws: int = DRAWS) -> Tensor:
    """Estimates from so many draws, after a step that teaches the ELBO what it keeps, such as a running mean."""
    elbo = route.elbo()
    estimates(elbo, program(64))
    chunk = min(draws, CHUNK)
    return torch.cat([estimates(elbo, program(chunk // route.particles)) for _ in range(draws // chunk)])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "route"), DRAWN)
def test_one_site(family: str, route: str) -> None:
    f, r = FAMILIES[family], ROUTES[route]
    rows = drawn(r, lambda n: one_site(f, n, sampler(r.pathwise)))
    assert_unbiased(rows - exact_gradient(lambda t: one_site_elbo(f, t), f.q()))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "route"), [pair for pair in DRAWN if pair != UNTRACKED])
def test_two_dependent_sites(family: str, route: str) -> None:
    f, r = FAMILIES[family], ROUTES[route]
    rows = drawn(r, lambda n: two_sites(f, n, sampler(r.pathwise)))
    assert_unbiased(rows - exact_gradient(lambda t: two_sites_elbo(f, t), f.both()))


# Half a minute each, for divergences by quadrature; the other families have these routes.
LONG = [(f, r) for f, r in GRID if ("mixture" in f or "Gumbel" in f) and ("analytic KL" in r or "MeanField" in r)]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "route"), [pair for pair in GRID if pair != UNTRACKED and pair not in LONG])
def test_subsampled_plate(family: str, route: str) -> None:
    """Each pair of the four data is the subsample once; the mean over them is the gradient on all data."""
    f, r = FAMILIES[family], ROUTES[route]
    pairs = [torch.tensor(pair) for pair in itertools.combinations(range(len(DATA)), 2)]
    rows = [drawn(r, lambda n, pair=pair: subsampled(f, n, sampler(r.pathwise), pair), DRAWS // 4) for pair in pairs]
    errors = torch.stack(rows).mean(0) - exact_gradient(lambda t: subsampled_elbo(f, t), f.both())
    assert_unbiased(errors)


# Negative controls: the same tests find the well-known mistakes.


@pytest.mark.parametrize("family", [name for name, f in FAMILIES.items() if f.pathwise])
def test_naive_pathwise_entropy_is_biased(family: str) -> None:
    f = FAMILIES[family]
    t = f.q().expand(DRAWS, -1).clone().requires_grad_()
    d = f.make(t)
    rows = torch.autograd.grad(-d.log_prob(d.rsample()).sum(), t)[0]
    exact = exact_gradient(lambda t: f.make(t).entropy(), f.q())
    assert standard_errors(rows - exact).max() > 8


@pytest.mark.slow
def test_pathwise_draws_with_a_drawn_kl_are_biased() -> None:
    f = FAMILIES["HardConcrete"]
    rows = drawn(Route(Trace_ELBO), lambda n: one_site(f, n, sampler(True)))
    assert standard_errors(rows - exact_gradient(lambda t: one_site_elbo(f, t), f.q())).max() > 8


# Wrappers, in a plate, two independent latents each.

PAIR = torch.tensor([True, False])


@dataclass(frozen=True)
class Wrapping:
    """How to wrap a batch of ``(n, 2)``, what is masked then, and whether the pair is an event."""

    wrap: Callable[[Any, int], Any]
    mask: Callable[[int], Tensor] = lambda n: torch.ones(n, 2, dtype=torch.bool)
    event: bool = False


def half(n: int) -> Tensor:
    return torch.arange(n) % 2 == 0


WRAPPINGS = {
    "expand": Wrapping(lambda d, n: d.expand((n, 2))),
    "mask(tensor)": Wrapping(lambda d, n: d.mask(PAIR), lambda n: PAIR.expand(n, 2)),
    "mask(True)": Wrapping(lambda d, n: d.mask(True)),
    "mask(False)": Wrapping(lambda d, n: d.mask(False), lambda n: torch.zeros(n, 2, dtype=torch.bool)),
    "to_event(1)": Wrapping(lambda d, n: d.to_event(1), event=True),
    "mask(m).to_event(1)": Wrapping(lambda d, n: d.mask(PAIR).to_event(1), lambda n: PAIR.expand(n, 2), event=True),
    "to_event(1).mask(m)": Wrapping(
        lambda d, n: d.to_event(1).mask(torch.zeros(n)), lambda n: torch.zeros(n, 2, dtype=torch.bool), event=True
    ),
    "to_event(1).expand": Wrapping(lambda d, n: d.to_event(1).expand((n,)), event=True),
}
Flags = tuple[bool | None, bool | None]  # has_rsample_ before and after; None: not called
FLAGS: dict[bool, list[Flags]] = {
    False: [(None, None), (True, False)],
    True: [(True, None), (None, True)],
}


def flagged(d: Any, value: bool | None) -> Any:
    return d if value is None else d.has_rsample_(value)


@contextmanager
def plates(n: int, event: bool) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(pyro.plate("copies", n, dim=-1 if event else -2))
        if not event:
            stack.enter_context(pyro.plate("pair", 2, dim=-1))
        yield


def wrapped_sites(f: Family, n: int, w: Wrapping, flags: Flags, values: Tensor | None = None) -> Program:
    before, after = flags

    def model() -> None:
        with plates(n, w.event):
            z = pyro.sample("z", w.wrap(f.make(f.p().expand(n, 2, -1)), n))
            x = dist.Normal(z, NOISE)
            pyro.sample("x", x.to_event(1) if w.event else x, obs=DATA[:2].expand(n, 2))

    def guide() -> None:
        t = theta(f.q(), n, 2)
        with plates(n, w.event):
            d = f.make(t)
            if values is not None:
                place(d, values)
            pyro.sample("z", flagged(w.wrap(flagged(d, before), n), after))

    return model, guide


def exact_pair(f: Family, mask: Tensor) -> Tensor:
    """The gradient of each of the pair, its prior and its density counting where the mask is True."""
    rows = [[exact_gradient(lambda t: one_site_elbo(f, t, x, kl), f.q()) for x in DATA[:2]] for kl in (True, False)]  # noqa: B023
    whole, likelihood = (torch.stack(row) for row in rows)
    return torch.where(mask.unsqueeze(-1), whole, likelihood)


WRAPPED = ["Trace_ELBO", "TraceGraph_ELBO", "EstimatorELBO, leave-one-out"]
WRAPPED += ["TraceMeanField_ELBO, pathwise", "BaselineELBO, analytic KL, pathwise"]


@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "route", ["Trace_ELBO", "TraceGraph_ELBO", "EstimatorELBO, split", "TraceMeanField_ELBO, pathwise"]
)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers_exactly(wrapping: str, route: str, which: int) -> None:
    f, w, r = FAMILIES["HardConcrete"], WRAPPINGS[wrapping], ROUTES[route]
    nodes, weights = f.points(20)
    z = torch.cartesian_prod(nodes, nodes)
    joint = torch.outer(weights, weights).flatten() * f.make(f.q()).log_prob(z).sum(-1).exp()
    rows = estimates(r.elbo(), wrapped_sites(f, len(z), w, FLAGS[r.pathwise][which], z))
    exact = exact_pair(f, w.mask(1)[0])
    torch.testing.assert_close(torch.tensordot(joint, rows, 1), exact, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("route", WRAPPED)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers(wrapping: str, route: str, which: int) -> None:
    f, w, r = FAMILIES["SpikeAndSlab, Normal"], WRAPPINGS[wrapping], ROUTES[route]
    rows = drawn(r, lambda n: wrapped_sites(f, n, w, FLAGS[r.pathwise][which]))
    assert_unbiased(rows - exact_pair(f, w.mask(len(rows))))


@pytest.mark.slow
def test_a_stock_mask_is_biased() -> None:
    class Stock(MaskedDistribution):
        """As Pyro's own, which answers with ours for a distribution of ours."""

    f = FAMILIES["HardConcrete"]
    stock = Wrapping(lambda d, n: Stock(d, torch.ones(n, 2, dtype=torch.bool)))
    rows = drawn(ROUTES["Trace_ELBO"], lambda n: wrapped_sites(f, n, stock, (None, None)))
    assert standard_errors(rows - exact_pair(f, stock.mask(len(rows)))).max() > 8


# Handlers.


def handled(program: Program, handler: Callable[[], Any]) -> Program:
    model, guide = program
    return handler()(model), handler()(guide)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_scale(route: str) -> None:
    f, r = FAMILIES["HardConcrete"], ROUTES[route]
    rows = drawn(r, lambda n: handled(one_site(f, n, sampler(r.pathwise)), lambda: poutine.scale(scale=3.0)))
    assert_unbiased(rows - 3 * exact_gradient(lambda t: one_site_elbo(f, t), f.q()))


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_mask(route: str) -> None:
    """Where the prior and the guide are masked but not the data, the gradient is that of the likelihood."""
    f, r = FAMILIES["HardConcrete"], ROUTES[route]

    def program(n: int) -> Program:
        keep = half(n)

        def model() -> None:
            with pyro.plate("copies", n):
                with poutine.mask(mask=keep):
                    z = pyro.sample("z", f.make(f.p()))
                pyro.sample("x", dist.Normal(z, NOISE), obs=DATA[0].expand(n))

        def guide() -> None:
            t = theta(f.q(), n)
            with pyro.plate("copies", n), poutine.mask(mask=keep):
                sampler(r.pathwise)("z", f.make(t))

        return model, guide

    rows = drawn(r, program)
    exact = [exact_gradient(lambda t: one_site_elbo(f, t, kl=kl), f.q()) for kl in (False, True)]  # noqa: B023
    assert_unbiased(rows - torch.stack(exact)[half(len(rows)).long()])


@pytest.mark.slow
@pytest.mark.parametrize(
    "route", ["Trace_ELBO", "TraceGraph_ELBO", "EstimatorELBO, split", "TraceMeanField_ELBO, pathwise"]
)
def test_vectorised_particles(route: str) -> None:
    f, r = FAMILIES["HardConcrete"], ROUTES[route]
    several = Route(lambda: r.elbo(num_particles=4, vectorize_particles=True), r.pathwise, particles=4)
    rows = drawn(several, lambda n: one_site(f, n, sampler(r.pathwise)))
    assert_unbiased(rows - exact_gradient(lambda t: one_site_elbo(f, t), f.q()))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["padded", "union"])
def test_beside_a_sparsely_enumerated_site(mode: str) -> None:
    """A mixed latent given an enumerated one: there is a draw for each outcome."""
    f, start = FAMILIES["HardConcrete"], torch.tensor([-1.0, -0.4, 0.4, 0.1, -3.0])

    def program(n: int) -> Program:
        def model() -> None:
            with pyro.plate("copies", n):
                c = pyro.sample("c", dist.Categorical(logits=torch.zeros(3)))
                z = pyro.sample("z", f.make(f.p()))
                pyro.sample("x", dist.Normal(z + c / 2, NOISE), obs=DATA[0].expand(n))

        def guide() -> None:
            t = theta(start, n)
            with pyro.plate("copies", n):
                c = pyro.sample("c", SparseCategorical(t[:, 2:]))
                pyro.sample("z", f.make(shifted(t[:, :2], c - 1.0)))

        return model, guide

    def exact(t: Tensor) -> Tensor:
        given = [one_site_elbo(f, shifted(t[:2], torch.tensor(c - 1.0)), DATA[0] - c / 2) for c in range(3)]
        q = SparseCategorical(t[2:])
        return (q.probs * torch.stack(given)).sum() + q.entropy()

    rows = drawn(Route(lambda: SparseEnumELBO(mode=mode)), program)
    assert_unbiased(rows[:, :4] - exact_gradient(exact, start)[:4])
    assert (rows[:, 4] == 0).all()  # off the support


# Observed.


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("family", FAMILIES)
def test_observed(family: str, route: str) -> None:
    """With nothing latent all have the gradient of log p, at the atoms and inside."""
    f, r = FAMILIES[family], ROUTES[route]
    data = torch.tensor([*f.atoms, 0.03, 0.3, 0.97])

    def model() -> None:
        t = theta(f.q(), len(data))
        with pyro.plate("copies", len(data)):
            pyro.sample("z", f.make(t), obs=data)

    rows = estimates(r.elbo(), (model, lambda: None))
    step = 1e-5 * torch.eye(len(f.guide))
    up, down = (f.make(f.q() + sign * step).log_prob(data.unsqueeze(-1)) for sign in (1, -1))
    torch.testing.assert_close(rows, (up - down) / 2e-5, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_have_mean_zero(family: str) -> None:
    """Of the density and of the stratum: else the gradient on data would have its zero elsewhere than at the truth."""
    f = FAMILIES[family]
    t = f.q().requires_grad_()
    z, w = f.points(200)
    parts = f.make(t).score_parts(z)
    weights = w * parts.log_prob.detach().exp()
    for log_prob in (parts.log_prob, parts.score_function):
        (gradient,) = torch.autograd.grad((weights * log_prob).sum(), t, retain_graph=True)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-7)
