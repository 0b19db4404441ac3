"""
Quadrature over all faces of the simplex, and programs with a projected latent whose gradients it gives exactly: what
the tests of ``GaussianSparsemax`` and ``HardConcreteSimplex`` share.

All programs have ``n`` copies of one small program and a parameter ``theta`` with one row per copy, so that one step
gives n independent estimates of the same gradient, one in each row of ``theta.grad``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor

from pyro_sparse.estimators import ScoreFunction
from pyro_sparse.infer import EstimatorELBO
from tests.known_gradients import Program, estimates, exact_gradient

ROUTES: dict[str, Callable[[], ELBO]] = {
    "Trace_ELBO": Trace_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "EstimatorELBO": lambda: EstimatorELBO(ScoreFunction()),
}
NOISE = 0.5
DATA = torch.tensor([0.9, -0.6], dtype=torch.float64)
EFFECTS = torch.tensor([1.0, -0.7, 0.4], dtype=torch.float64)


def inside(n: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Points of the open simplex of n vertices and their weights in the first n - 1 coordinates: Gauss and Duffy."""
    x, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    x, w = (x + 1) / 2, w / 2
    u = torch.cartesian_prod(*[x] * (n - 1)).reshape(-1, n - 1)
    weights = torch.cartesian_prod(*[w] * (n - 1)).reshape(-1, n - 1).prod(-1)
    left = torch.ones(len(u), dtype=torch.float64)
    columns = []
    for i in range(n - 1):
        columns.append(left * u[:, i])
        weights = weights * left
        left = left * (1 - u[:, i])
    return torch.stack([*columns, left], -1), weights


def all_faces(K: int) -> list[list[int]]:
    return [list(c) for n in range(1, K + 1) for c in itertools.combinations(range(K), n)]


def on_faces(K: int, nodes: int) -> list[tuple[Tensor, Tensor]]:
    """For each face, points of it and their weights in its base measure."""
    result = []
    for face in all_faces(K):
        if len(face) == 1:
            y, w = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        else:
            y, w = inside(len(face), nodes)
        points = torch.zeros(len(w), K, dtype=torch.float64)
        points[:, face] = y
        result.append((points, w))
    return result


def points(K: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Of all faces together."""
    y, w = zip(*on_faces(K, nodes), strict=True)
    return torch.cat(y), torch.cat(w)


@dataclass(frozen=True)
class Family:
    """What makes a distribution of real parameters in the last dim, those of the guide, those of the prior, and K."""

    make: Callable[[Tensor], Any]
    guide: tuple[float, ...]
    prior: tuple[float, ...]
    K: int

    def q(self) -> Tensor:
        return torch.tensor(self.guide, dtype=torch.float64)

    def p(self) -> Tensor:
        return torch.tensor(self.prior, dtype=torch.float64)


def likelihood(family: Family, y: Tensor) -> Any:
    return dist.Normal(y @ EFFECTS[: family.K], NOISE)


def theta(start: Tensor, *shape: int) -> Tensor:
    return pyro.param("theta", lambda: start.expand(*shape, *start.shape).clone())


def placed(d: Any, y: Tensor | None) -> Any:
    """The distribution, which draws y where one is given."""
    if y is not None:
        d._draw = lambda shape: y.expand(shape)
    return d


# One latent.


def one_site(family: Family, n: int, y: Tensor | None = None, pathwise: bool = False) -> Program:
    def model() -> None:
        with pyro.plate("copies", n):
            z = pyro.sample("z", family.make(family.p()))
            pyro.sample("x", likelihood(family, z), obs=DATA[0].expand(n))

    def guide() -> None:
        d = placed(family.make(theta(family.q(), n)), y)
        with pyro.plate("copies", n):
            pyro.sample("z", d.has_rsample_(pathwise))

    return model, guide


def one_site_elbo(family: Family, t: Tensor, nodes: int, x: Tensor = DATA[0], kl: bool = True) -> Tensor:
    y, w = points(family.K, nodes)
    log_q, log_p = family.make(t).log_prob(y), family.make(family.p()).log_prob(y)
    return (w * log_q.exp() * (likelihood(family, y).log_prob(x) + (log_p - log_q if kl else 0.0))).sum()


# Two latents, the second with parameters that depend on the first.


def shifted(t: Tensor, y: Tensor) -> Tensor:
    """Parameters, the first of which depends on y."""
    first = t[..., 0] + 0.8 * y[..., 0]
    return torch.cat([first.unsqueeze(-1), t[..., 1:].expand(*first.shape, -1)], -1)


def two_sites(family: Family, n: int, y: tuple[Tensor, Tensor]) -> Program:
    def model() -> None:
        with pyro.plate("copies", n):
            a = pyro.sample("a", family.make(family.p()))
            b = pyro.sample("b", family.make(shifted(family.p(), -a)))
            pyro.sample("x", likelihood(family, a + 1.5 * b), obs=DATA[0].expand(n))

    def guide() -> None:
        t = theta(torch.stack([family.q(), family.q()]), n)
        with pyro.plate("copies", n):
            a = pyro.sample("a", placed(family.make(t[:, 0]), y[0]))
            pyro.sample("b", placed(family.make(shifted(t[:, 1], a)), y[1]))

    return model, guide


def two_sites_terms(family: Family, t: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """log q and the log-ratio whose mean is the ELBO."""
    log_q = family.make(t[0]).log_prob(a) + family.make(shifted(t[1], a)).log_prob(b)
    log_p = family.make(family.p()).log_prob(a) + family.make(shifted(family.p(), -a)).log_prob(b)
    return log_q, likelihood(family, a + 1.5 * b).log_prob(DATA[0]) + log_p - log_q


# A pair of independent latents, in a plate or as one event, wrapped.


@dataclass(frozen=True)
class Wrapping:
    """How a batch of ``(n, 2)`` is wrapped, which of the two is masked then, and by what plates scale both."""

    wrap: Callable[[Any], Any]
    keep: tuple[bool, bool] = (True, True)
    event: bool = False
    scale: int = 1


KEEP = torch.tensor([True, False])
WRAPPINGS = {
    "expand": Wrapping(lambda d: d.expand(d.batch_shape)),
    "subsampled plate": Wrapping(lambda d: d, scale=3),
    "mask": Wrapping(lambda d: d.mask(KEEP), (True, False)),
    "to_event": Wrapping(lambda d: d.to_event(1), event=True),
    "mask, to_event": Wrapping(lambda d: d.mask(KEEP).to_event(1), (True, False), event=True),
    "to_event, mask": Wrapping(lambda d: d.to_event(1).mask(torch.tensor(False)), (False, False), event=True),
}


def pair(family: Family, n: int, w: Wrapping, y: Tensor) -> Program:
    size, index = 2 * w.scale, torch.tensor([0, 1])

    def model() -> None:
        prior = w.wrap(family.make(family.p().expand(n, 2, -1)))
        if w.event:
            with pyro.plate("copies", n):
                z = pyro.sample("z", prior)
                pyro.sample("x", likelihood(family, z).to_event(1), obs=DATA.expand(n, 2))
        else:
            with pyro.plate("copies", n, dim=-2), pyro.plate("pair", size, subsample=index, dim=-1):
                z = pyro.sample("z", prior)
                pyro.sample("x", likelihood(family, z), obs=DATA.expand(n, 2))

    def guide() -> None:
        d = w.wrap(placed(family.make(theta(torch.stack([family.q(), family.q()]), n)), y))
        if w.event:
            with pyro.plate("copies", n):
                pyro.sample("z", d)
        else:
            with pyro.plate("copies", n, dim=-2), pyro.plate("pair", size, subsample=index, dim=-1):
                pyro.sample("z", d)

    return model, guide


# Gradients.


def check_one_site(family: Family, route: str, nodes: int) -> None:
    """A draw at each node, so that the mean over draws has no noise."""
    y, w = points(family.K, nodes)
    weights = w * family.make(family.q()).log_prob(y).exp()
    rows = estimates(ROUTES[route](), one_site(family, len(y), y))
    exact = exact_gradient(lambda t: one_site_elbo(family, t, nodes), family.q())
    torch.testing.assert_close(weights @ rows, exact, rtol=0, atol=1e-7)


def check_two_sites(family: Family, route: str, nodes: int) -> None:
    y, w = points(family.K, nodes)
    a, b = y.repeat_interleave(len(y), 0), y.repeat(len(y), 1)
    start = torch.stack([family.q(), family.q()])
    joint = torch.outer(w, w).flatten()
    weights = joint * two_sites_terms(family, start, a, b)[0].exp()

    def elbo(t: Tensor) -> Tensor:
        log_q, ratio = two_sites_terms(family, t, a, b)
        return (joint * log_q.exp() * ratio).sum()

    rows = estimates(ROUTES[route](), two_sites(family, len(a), (a, b)))
    torch.testing.assert_close(torch.tensordot(weights, rows, 1), exact_gradient(elbo, start), rtol=0, atol=1e-6)


def check_wrapping(family: Family, route: str, wrapping: str, nodes: int) -> None:
    y, w = points(family.K, nodes)
    both = torch.stack([y.repeat_interleave(len(y), 0), y.repeat(len(y), 1)], -2)
    weights = torch.outer(*[w * family.make(family.q()).log_prob(y).exp()] * 2).flatten()
    how = WRAPPINGS[wrapping]
    rows = estimates(ROUTES[route](), pair(family, len(both), how, both))
    exact = torch.stack(
        [
            exact_gradient(lambda t, x=x, kl=kl: how.scale * one_site_elbo(family, t, nodes, x, kl), family.q())
            for x, kl in zip(DATA, how.keep, strict=True)
        ]
    )
    torch.testing.assert_close(torch.tensordot(weights, rows, 1), exact, rtol=0, atol=1e-6)
