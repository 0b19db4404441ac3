"""What do exact entropies and KL divergences of mixed variables cost, and what do they spare?

    python benchmarks/mixed.py

Eager mode, float32, one thread, a batch of 4096. First the time of quadrature beside that of a single draw of the same
quantity, in turn, round after round: the median ratio over the rounds, with its quartiles, so that a busy machine slows
both sides of it.

Then the gradient of an ELBO with one HardConcrete latent, by what publications do (one pathwise draw of
log q - log p) and by this package: its bias with its standard error, its variance (the sum over the two parameters),
and the product of variance and time: what a gradient of given precision costs. The published gradient is biased because
log q jumps between its atoms and its density, and the pathwise derivative does not see the jump.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sparse.distributions import HardConcrete, HardKumaraswamy
from pyro_sparse.estimators import LeaveOneOut, MovingAverage
from pyro_sparse.infer import BaselineELBO, EstimatorELBO

BATCH = 4096
DATUM, NOISE = 0.8, 0.5


def median_ratio(ours: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[float, float, str]:
    """Median milliseconds of both, and the median ratio with its quartiles."""
    times = torch.empty(rounds + 3, 2)
    for row in times:  # the first few calls are slower
        for i, f in enumerate((ours, other)):
            start = time.perf_counter()
            f()
            row[i] = time.perf_counter() - start
    times = times[3:]
    ratios = (times[:, 0] / times[:, 1]).quantile(torch.tensor([0.5, 0.25, 0.75])).tolist()
    ms = (1e3 * times.median(0).values).tolist()
    return ms[0], ms[1], "{:.2f} ({:.2f}-{:.2f})".format(*ratios)


def backward(f: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(f().sum(), leaves)


def time_quadrature(rounds: int) -> None:
    a, b = (torch.randn(BATCH).requires_grad_() for _ in range(2))

    def concrete(nodes: int | None) -> HardConcrete:
        return HardConcrete(0.7, a, nodes=nodes)

    def kumaraswamy(nodes: int | None) -> tuple[HardKumaraswamy, HardKumaraswamy]:
        one = torch.ones(())
        return HardKumaraswamy(a.exp(), b.exp(), nodes=nodes), HardKumaraswamy(one, one, nodes=nodes)

    def drawn_entropy() -> Tensor:
        d = concrete(None)
        return -d.log_prob(d.rsample())

    def drawn_kl() -> Tensor:
        q, prior = kumaraswamy(None)
        z = q.rsample()
        return q.log_prob(z) - prior.log_prob(z)

    # Nodes are counted on each of three panels.
    cases: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], tuple[Tensor, ...], str]] = {
        "HardConcrete entropy, 3 x 11 nodes": (lambda: concrete(11).entropy(), drawn_entropy, (a,), "3"),
        "the same, 3 x 31 (the default)": (lambda: concrete(None).entropy(), drawn_entropy, (a,), ""),
        "HardKumaraswamy KL, 3 x 21 nodes": (lambda: kl_divergence(*kumaraswamy(21)), drawn_kl, (a, b), "10"),
        "the same, 3 x 31 (the default) ": (lambda: kl_divergence(*kumaraswamy(None)), drawn_kl, (a, b), ""),
    }
    print(f"{'':>34} {'pass':>14} {'quadrature, ms':>15} {'one draw, ms':>13} {'ratio (quartiles)':>20} {'asked':>6}")
    for name, (exact, draw, leaves, asked) in cases.items():
        for kind, wrap in (("forward", lambda f, *_: f), ("with gradient", backward)):
            ours, other, ratio = median_ratio(wrap(exact, *leaves), wrap(draw, *leaves), rounds)
            print(f"{name:>34} {kind:>14} {ours:15.2f} {other:13.2f} {ratio:>20} {asked:>6}", flush=True)


def posterior(t: Tensor, nodes: int | None = None) -> HardConcrete:
    return HardConcrete(t[..., 1].exp(), t[..., 0], nodes=nodes)


def prior() -> HardConcrete:
    return HardConcrete(0.5, torch.tensor(0.5))


def program(start: Tensor, pathwise: bool, nodes: int | None) -> tuple[Callable[[], None], Callable[[], None]]:
    """Model and guide of independent copies, each with a row of parameters, so that a step gives 4096 gradients."""

    def model() -> None:
        with pyro.plate("copies", BATCH):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, NOISE), obs=torch.full((BATCH,), DATUM))

    def guide() -> None:
        t = pyro.param("t", lambda: start.expand(BATCH, 2).clone())
        with pyro.plate("copies", BATCH):
            d = posterior(t, nodes)
            pyro.sample("z", d.has_rsample_(True) if pathwise else d)

    return model, guide


def exact_gradient(start: Tensor) -> Tensor:
    """By a quadrature of its own: atoms, and 200 Gauss-Legendre nodes between them."""
    t = start.double().requires_grad_()
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(200))
    z = torch.cat([torch.tensor([0.0, 1.0]), (nodes + 1) / 2])
    weights = torch.cat([torch.ones(2), weights / 2])
    log_q, log_p = posterior(t).log_prob(z), prior().log_prob(z)
    elbo = (weights * log_q.exp() * (log_p - log_q + dist.Normal(z, NOISE).log_prob(torch.tensor(DATUM)))).sum()
    return torch.autograd.grad(elbo, t)[0].to(start)


# An ELBO, whether draws are purely pathwise, and the nodes on each panel of an analytic KL (None for the default).
ROUTES: dict[str, tuple[Callable[[], ELBO], bool, int | None]] = {
    "published: Trace_ELBO, pathwise": (Trace_ELBO, True, None),
    "Trace_ELBO": (Trace_ELBO, False, None),
    "BaselineELBO(MovingAverage())": (lambda: BaselineELBO(MovingAverage()), False, None),
    "the same, analytic_kl=True": (lambda: BaselineELBO(MovingAverage(), analytic_kl=True), False, None),
    "EstimatorELBO(LeaveOneOut(4))": (lambda: EstimatorELBO(LeaveOneOut(4), max_plate_nesting=1), False, None),
    "TraceMeanField_ELBO, pathwise": (TraceMeanField_ELBO, True, None),
    "the same, 11 nodes on a panel": (TraceMeanField_ELBO, True, 11),
}


def compare_gradients(rounds: int) -> None:
    start = torch.tensor([-1.0, -0.4])
    exact = exact_gradient(start)
    pyro.clear_param_store()
    pyro.param("t", lambda: start.expand(BATCH, 2).clone())
    elbos = {name: (make(), *program(start, *how)) for name, (make, *how) in ROUTES.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in ROUTES}
    times = torch.empty(rounds, len(ROUTES))
    for i in range(-3, rounds):
        for j, (name, (elbo, model, guide)) in enumerate(elbos.items()):
            leaf = pyro.param("t")
            leaf.grad = None
            begin = time.perf_counter()
            elbo.loss_and_grads(model, guide)
            if i >= 0:
                times[i, j] = time.perf_counter() - begin
                rows[name].append(-leaf.grad)
    print(f"\nexact gradient in (logits, log temperature): {exact[0]:.4f}, {exact[1]:.4f}; {rounds * BATCH} estimates")
    columns = ("variance", "ms", "variance x time", "of published")
    print(f"{'':>32} {'bias (standard error)':>34} {columns[0]:>9} {columns[1]:>6} {columns[2]:>16} {columns[3]:>13}")
    published = None
    for (name, steps), ms in zip(rows.items(), (1e3 * times.median(0).values).tolist(), strict=True):
        g = torch.cat(steps).double()
        bias, se, variance = g.mean(0) - exact, g.std(0) / len(g) ** 0.5, g.var(0).sum().item()
        published = variance * ms if published is None else published
        shown = ", ".join(f"{b:+.4f} ({s:.4f})" for b, s in zip(bias.tolist(), se.tolist(), strict=True))
        cost = variance * ms
        print(f"{name:>32} {shown:>34} {variance:9.3f} {ms:6.2f} {cost:16.2f} {cost / published:13.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=101)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(arguments.seed)
    print(f"torch {torch.__version__}, python {platform.python_version()}, {platform.machine()}, 1 thread, float32")
    time_quadrature(arguments.rounds)
    compare_gradients(arguments.rounds)


if __name__ == "__main__":
    main()
