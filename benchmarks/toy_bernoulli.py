"""
The toy of the literature on control variates: E[f(b)], f(b) = (b - .499)^2, b a single bit with P(b = 1) = p. How noisy
is its gradient by the logit of p, whose value is .002 p (1 - p), and how far from it do biased estimators end?

    python benchmarks/toy_bernoulli.py                 # 2 minutes

For each p, the natural logarithm of the variance of one draw's gradient (of two draws' in LeaveOneOut), and its mean
less the exact gradient, plus or minus two standard errors. b*: the constant (1 - p) f(1) + p f(0), with which nothing
but rounding is left; on a single bit no control variate can do better. MuProp takes off the line through f at the
mean, which is nowhere near f(0) and f(1), both about .25. Nor is REBAR's f at relaxed bits, which falls to 0 between
them: its best scale is 0. REBAR and RELAX (a network of 10 Tanh units) learn from --learn steps of 100 draws (their own
objective; Adam, from 3e-2 falling to 0), and are measured afterwards. ST(...): straight-through, at temperature 1.
float64.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

from pyro_sparse._relaxation import Jacobian
from pyro_sparse.estimators import (
    REBAR,
    RELAX,
    Baseline,
    Estimator,
    LeaveOneOut,
    MuProp,
    ScoreFunction,
    StraightThrough,
)
from pyro_sparse.estimators.base import Site

TARGET = 0.499
PROBS = (0.1, 0.3, 0.5)
BATCH, LEARNING_RATE = 100, 3e-2


def f(b: Tensor) -> Tensor:
    return (b - TARGET).square()


class Constant(Baseline):
    """What is subtracted from every cost."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        return cost.new_tensor(self.value), 0.0


def exact(p: float) -> float:
    return (1 - 2 * TARGET) * p * (1 - p)


def best_constant(p: float) -> float:
    return (1 - p) * (1 - TARGET) ** 2 + p * TARGET**2


ESTIMATORS: dict[str, Callable[[float], Estimator]] = {
    "score function": lambda p: ScoreFunction(),
    "LeaveOneOut(2)": lambda p: LeaveOneOut(2),
    "constant b*": lambda p: ScoreFunction(Constant(best_constant(p))),
    "MuProp": lambda p: MuProp(),
    "REBAR": lambda p: REBAR(),
    "RELAX": lambda p: RELAX(nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1))),
    **{f"ST({name})": functools.partial(lambda name, p: StraightThrough(name), name) for name in get_args(Jacobian)},
}


def gradients(estimator: Estimator, logit: float, draws: int) -> tuple[Tensor, Tensor | float]:
    """One for each draw, by the estimator's own protocol, as an ELBO would follow it; and the estimator's own loss."""
    logits = torch.full((draws,), logit, requires_grad=True)
    site = Site("b", Bernoulli(logits=logits, validate_args=False))  # relaxed bits, too, have a log_prob
    loss: Tensor | float = 0.0
    if estimator.reparameterizes:
        surrogate = f(estimator.reparameterized(site))
    else:
        if estimator.draws_slots:
            site.slots = estimator.draw(site)
            site.value = site.slots.values
            site.attached_cost = functools.partial(f, site.value)
        else:
            site.value = site.fn.sample((estimator.num_particles,) if estimator.num_particles > 1 else ())
        site.log_prob = site.fn.log_prob(site.value.detach())
        surrogate, loss = estimator(f(site.value).detach(), site)
    (gradient,) = torch.autograd.grad(surrogate.sum() / estimator.num_particles, logits, retain_graph=True)
    return gradient, loss


def learn(estimator: Estimator, logit: float, steps: int) -> None:
    parameters = [*estimator.parameters()]
    if not parameters:
        return
    optimiser = torch.optim.Adam(parameters)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        optimiser.zero_grad()
        _, loss = gradients(estimator, logit, BATCH)
        torch.as_tensor(loss).backward()
        optimiser.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1_000_000, help="for each variance")
    parser.add_argument("--learn", type=int, default=3000, help="steps for what learns")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    print(f"{'':<18}" + "".join(f"{f'p = {p}, gradient {exact(p):.2e}':^35}" for p in PROBS))
    print(f"{'':<18}" + f"{'log-var.     bias (+- 2 s.e.)':>35}" * len(PROBS))
    for name, make in ESTIMATORS.items():
        line = f"{name:<18}"
        for p in PROBS:
            torch.manual_seed(args.seed)
            logit = math.log(p / (1 - p))
            estimator = make(p)
            learn(estimator, logit, args.learn)
            gradient = gradients(estimator, logit, args.draws)[0].detach()
            variance = gradient.var()
            bias = gradient.mean() - exact(p)
            line += f"{variance.log():>12.2f} {bias:>9.1e} (+- {2 * (variance / args.draws).sqrt():.1e})"
        print(line, flush=True)


if __name__ == "__main__":
    main()
