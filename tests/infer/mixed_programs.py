r"""
Programs with mixed latents whose gradients are known by quadrature: what ``test_mixed_gradients.py`` runs.

All have ``n`` copies of one small program in a plate of their own and a parameter ``theta`` with one row per copy, so
that one step gives n independent estimates of the same gradient, one in each row of ``theta.grad``.
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
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_sparse.distributions import (
    HardConcrete,
    HardKumaraswamy,
    Rectified,
    RectifiedNormal,
    SpikeAndExponential,
    SpikeAndSlab,
    StretchedRectified,
    ZeroOneInflated,
)
from pyro_sparse.distributions.univariate.spike_and_exponential import TruncatedExponential
from pyro_sparse.estimators import LeaveOneOut, MovingAverage, ScoreFunction, SplitPathwise
from pyro_sparse.infer import BaselineELBO, EstimatorELBO, SparseEnumELBO
from tests.known_gradients import Program

Draw = Callable[[str, Any], Tensor]

NOISE = 0.5
DATA = torch.tensor([0.8, -0.5, 0.3, 2.0], dtype=torch.float64)


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        make: a distribution from parameters in the last dim, all of them real.
        guide, prior: the parameters.
        atoms, inside: where it lives, for quadrature: the ends of one or two panels.
        default, pathwise: whether that form of it is part of the grid.
    """

    make: Callable[[Tensor], Any]
    guide: tuple[float, ...]
    prior: tuple[float, ...]
    atoms: tuple[float, ...] = (0.0, 1.0)
    inside: tuple[float, ...] = (0.0, 1.0)
    default: bool = True
    pathwise: bool = True

    def q(self) -> Tensor:
        return torch.tensor(self.guide)

    def p(self) -> Tensor:
        return torch.tensor(self.prior)

    def both(self) -> Tensor:
        """Guide parameters of two latents."""
        return torch.stack([self.q(), self.q()])

    def points(self, nodes: int) -> tuple[Tensor, Tensor]:
        """The atoms and Gauss-Legendre nodes in each panel, with their weights in an integral over the base measure."""
        x, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
        panels = list(itertools.pairwise(self.inside))
        z = torch.cat([torch.tensor(self.atoms), *(low + (high - low) * (x + 1) / 2 for low, high in panels)])
        return z, torch.cat([torch.ones(len(self.atoms)), *(weights * (high - low) / 2 for low, high in panels)])


def _mixture(t: Tensor) -> dist.MixtureSameFamily:
    weights = dist.Categorical(logits=torch.stack([torch.zeros_like(t[..., 1]), t[..., 1]], -1))
    return dist.MixtureSameFamily(weights, dist.Normal(torch.stack([t[..., 0], 1 - t[..., 0]], -1), 0.4))


# With so few nodes on a panel the gradients of these mild KLs are exact to 1e-8, and take less time.
FAMILIES = {
    "HardConcrete": Family(lambda t: HardConcrete(t[..., 1].exp(), t[..., 0], nodes=8), (-1.0, -0.4), (0.5, -0.7)),
    "HardKumaraswamy": Family(
        lambda t: HardKumaraswamy(t[..., 0].exp(), t[..., 1].exp(), nodes=8), (-0.5, 0.2), (0.1, -0.1)
    ),
    "RectifiedNormal": Family(lambda t: RectifiedNormal(t[..., 0], t[..., 1].exp()), (0.2, -0.5), (0.5, -0.3)),
    "StretchedRectified, mixture": Family(
        lambda t: StretchedRectified(_mixture(t), -0.1, 1.1, nodes=7), (0.2, -0.5), (0.1, 0.3)
    ),
    "Rectified, Gumbel": Family(
        lambda t: Rectified(dist.Gumbel(t[..., 0], t[..., 1].exp()), nodes=7), (0.2, -0.7), (0.5, -0.5)
    ),
    "SpikeAndSlab, Normal": Family(
        lambda t: SpikeAndSlab(dist.Normal(t[..., 1], t[..., 2].exp()), logits=t[..., 0]),
        (-0.3, 0.4, -0.5),
        (0.2, 0.0, 0.2),
        (0.0,),
        (-9.0, 0.0, 9.0),  # quantiles have a kink at the spike
    ),
    "SpikeAndSlab, a slab without a gradient": Family(
        lambda t: SpikeAndSlab(dist.Normal(t[..., 1], t[..., 2].exp()).has_rsample_(False), logits=t[..., 0]),
        (-0.3, 0.4, -0.5),
        (0.2, 0.0, 0.2),
        (0.0,),
        (-9.0, 0.0, 9.0),  # quantiles have a kink at the spike
        pathwise=False,
    ),
    "SpikeAndExponential": Family(
        lambda t: SpikeAndExponential(t[..., 1], logits=t[..., 0]), (-0.3, 1.5), (0.2, -1.0), (0.0,)
    ),
    "ZeroOneInflated, Beta": Family(
        lambda t: ZeroOneInflated(dist.Beta(t[..., 3].exp(), t[..., 4].exp()), t[..., :3]),
        (0.1, -0.3, 0.4, 0.6, 0.9),
        (0.0, 0.0, 0.0, 0.7, 0.7),
        pathwise=False,  # torch has no cdf of a Beta
    ),
    "ZeroOneInflated, exponential": Family(
        lambda t: ZeroOneInflated(TruncatedExponential(t[..., 3]), t[..., :3]),
        (0.1, -0.3, 0.4, 0.6),
        (0.0, 0.0, 0.0, -0.7),
    ),
}
RECTIFIED = [name for name in FAMILIES if "Inflated" not in name and "Spike" not in name]


@dataclass(frozen=True)
class Route:
    """
    Attributes:
        elbo: an ELBO.
        pathwise: the form of the distributions it is used with.
        particles: how many one estimate takes.
        splits: whether it draws pathwise itself.
    """

    elbo: Callable[..., ELBO]
    pathwise: bool = False
    particles: int = 1
    splits: bool = False

    def serves(self, family: Family) -> bool:
        return family.pathwise or not (self.pathwise or self.splits)


ROUTES = {
    "Trace_ELBO": Route(Trace_ELBO),
    "TraceGraph_ELBO": Route(TraceGraph_ELBO),
    "SparseEnumELBO": Route(lambda: SparseEnumELBO(strict_enumeration_warning=False)),
    "BaselineELBO, moving average": Route(lambda: BaselineELBO(MovingAverage())),
    "BaselineELBO, analytic KL": Route(lambda: BaselineELBO(analytic_kl=True)),
    "EstimatorELBO, leave-one-out": Route(lambda: EstimatorELBO(LeaveOneOut(4)), particles=4),
    "EstimatorELBO, one by one": Route(lambda: EstimatorELBO(LeaveOneOut(4, vectorized=False)), particles=4),
    "EstimatorELBO, graph": Route(lambda: EstimatorELBO(ScoreFunction(), costs="graph")),
    "EstimatorELBO, split": Route(lambda **kwargs: EstimatorELBO(SplitPathwise(), **kwargs), splits=True),
    "EstimatorELBO, split, graph": Route(lambda: EstimatorELBO(SplitPathwise(), costs="graph"), splits=True),
    "TraceMeanField_ELBO, pathwise": Route(TraceMeanField_ELBO, pathwise=True),
    "BaselineELBO, analytic KL, pathwise": Route(lambda: BaselineELBO(analytic_kl=True), pathwise=True),
}


def log_lik(mean: Tensor, x: Tensor) -> Tensor:
    return dist.Normal(mean, NOISE).log_prob(x)


def shifted(t: Tensor, z: Tensor) -> Tensor:
    """Parameters, the first of which depends on z."""
    shape = torch.broadcast_shapes(t.shape[:-1], z.shape)
    return torch.cat([t[..., :1] + 0.8 * torch.tanh(z).unsqueeze(-1), t[..., 1:].expand(*shape, -1)], -1)


def theta(start: Tensor, *shape: int) -> Tensor:
    return pyro.param("theta", lambda: start.expand(*shape, *start.shape).clone())


def sampler(pathwise: bool) -> Draw:
    return lambda name, d: pyro.sample(name, d.has_rsample_(True) if pathwise else d)


def place(d: Any, z: Tensor) -> None:
    """Has a distribution draw z."""
    if isinstance(d, HardConcrete):  # differentiates its quantile function
        u = torch.where(z == 0, d.prob_zero / 2, torch.where(z == 1, 1 - d.prob_one / 2, d.cdf(z))).detach()
        d._uniform = lambda shape: u.expand(shape)
    else:
        d._draw = lambda shape: z.expand(shape)


# One latent.


def one_site(family: Family, n: int, draw: Draw) -> Program:
    def model() -> None:
        with pyro.plate("copies", n):
            z = pyro.sample("z", family.make(family.p()))
            pyro.sample("x", dist.Normal(z, NOISE), obs=DATA[0].expand(n))

    def guide() -> None:
        t = theta(family.q(), n)
        with pyro.plate("copies", n):
            draw("z", family.make(t))

    return model, guide


def one_site_elbo(family: Family, t: Tensor, x: Tensor = DATA[0], kl: bool = True) -> Tensor:
    z, w = family.points(400)
    log_q, log_p = family.make(t).log_prob(z), family.make(family.p()).log_prob(z)
    return (w * log_q.exp() * (log_lik(z, x) + (log_p - log_q if kl else 0.0))).sum()


# Two latents, one with parameters that depend on the other.


def two_sites(family: Family, n: int, draw: Draw) -> Program:
    def model() -> None:
        with pyro.plate("copies", n):
            z1 = pyro.sample("z1", family.make(family.p()))
            z2 = pyro.sample("z2", family.make(shifted(family.p(), -z1)))
            pyro.sample("x", dist.Normal(z1 + 1.5 * z2, NOISE), obs=DATA[0].expand(n))

    def guide() -> None:
        t = theta(family.both(), n)
        with pyro.plate("copies", n):
            z1 = draw("z1", family.make(t[:, 0]))
            draw("z2", family.make(shifted(t[:, 1], z1)))

    return model, guide


def two_sites_elbo(family: Family, t: Tensor) -> Tensor:
    z, w = family.points(100)
    log_q1, log_r1, log_q2, log_r2 = _chain(family, t, z)
    joint = w.unsqueeze(-1) * w * (log_q1 + log_q2).exp()
    return (joint * (log_r1 + log_r2 + log_lik(z.unsqueeze(-1) + 1.5 * z, DATA[0]))).sum()


def _chain(family: Family, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log q and log p - log q of the first latent, in rows, and of the second, in columns."""
    z1 = z.unsqueeze(-1)
    log_q1, log_p1 = family.make(t[0]).log_prob(z1), family.make(family.p()).log_prob(z1)
    log_q2 = family.make(shifted(t[1], z1)).log_prob(z)
    log_p2 = family.make(shifted(family.p(), -z1)).log_prob(z)
    return log_q1, log_p1 - log_q1, log_q2, log_p2 - log_q2


# One latent outside of a subsampled plate, one for each of its elements.


def subsampled(family: Family, n: int, draw: Draw, subsample: Tensor) -> Program:
    def data() -> Any:
        return pyro.plate("data", len(DATA), subsample=subsample, dim=-1)

    def model() -> None:
        with pyro.plate("copies", n, dim=-2):
            z1 = pyro.sample("z1", family.make(family.p()))
            with data() as index:
                z2 = pyro.sample("z2", family.make(shifted(family.p(), -z1)))
                pyro.sample("x", dist.Normal(z1 + 1.5 * z2, NOISE), obs=DATA[index].expand(n, -1))

    def guide() -> None:
        t = theta(family.both(), n, 1)
        with pyro.plate("copies", n, dim=-2):
            z1 = draw("z1", family.make(t[..., 0, :]))
            with data():
                draw("z2", family.make(shifted(t[..., 1, :], z1)))

    return model, guide


def subsampled_elbo(family: Family, t: Tensor) -> Tensor:
    """Of all the data."""
    z, w = family.points(100)
    log_q1, log_r1, log_q2, log_r2 = _chain(family, t, z)
    local = w * log_q2.exp()
    terms = [(local * (log_r2 + log_lik(z.unsqueeze(-1) + 1.5 * z, x))).sum(-1) for x in DATA]
    return (w * log_q1[:, 0].exp() * (log_r1[:, 0] + sum(terms[1:], terms[0]))).sum()
