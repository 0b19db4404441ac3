"""
What a hidden Markov model with sparse transitions costs beside dense ones: log-likelihood and gradients.

Each state has four transitions, drawn at random; 32 sequences of 50 steps (10 at 1024 states) over 27 letters. Dense
forms, all with the same matrix, its zeros included:

    loop     the forward recursion in log space, a logsumexp over all S x S transitions at each step
    matmul   the same in probability space, each step divided by its largest weight: a matrix product, the fastest
             dense form, which loses states that are far below the best one
    Pyro     pyro.distributions.DiscreteHMM: parallel in time, O(S^3) work

    python benchmarks/hmm.py

One thread, float32; forms take turns, medians of 7 rounds (3 at 1024 states) and the median of ratios within a round.
Where a step of ``DiscreteHMM`` would take minutes it is left out. Memory is the peak of live tensors of one
log-likelihood and its gradient. Last, memory of ours as transitions and steps grow.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_sparse.diagnostics import peak_memory
from pyro_sparse.distributions import SparseCategorical, SparseHMM

CHAINS = 32


class Parameters:
    """Learned tensors of one model: a matrix with ``degree`` transitions from each state."""

    def __init__(self, states: int, degree: int) -> None:
        kept = torch.randn(states, states).argsort(-1) < degree
        # Scores that sparsemax maps to four nearly even probabilities.
        self.scores = (torch.where(kept, 0.0, -2.0) + 0.02 * torch.randn(states, states)).requires_grad_()
        self.initial = torch.zeros(states, requires_grad=True)
        self.letters = torch.randn(states, 27, requires_grad=True)

    def all(self) -> list[Tensor]:
        return [self.scores, self.initial, self.letters]

    def observed(self) -> SparseCategorical:
        return SparseCategorical(logits=self.letters)  # which keeps no copy of its logits for each observation


def sparse(p: Parameters, value: Tensor) -> Tensor:
    return SparseHMM(p.initial, SparseCategorical(p.scores), p.observed()).log_prob(value)


def by_pyro(p: Parameters, value: Tensor) -> Tensor:
    return dist.DiscreteHMM(p.initial, SparseCategorical(p.scores).logits, p.observed()).log_prob(value)


def loop(p: Parameters, value: Tensor) -> Tensor:
    rows = SparseCategorical(p.scores).logits.clamp_min(-1e30)  # gradients of -inf - -inf are NaN
    seen = p.observed().log_prob(value.unsqueeze(-1))
    message = p.initial.log_softmax(-1)
    for t in range(value.shape[-1]):
        message = (message.unsqueeze(-1) + rows).logsumexp(-2) + seen[:, t]
    return message.logsumexp(-1)


def matmul(p: Parameters, value: Tensor) -> Tensor:
    rows = SparseCategorical(p.scores).probs
    seen = p.observed().log_prob(value.unsqueeze(-1))
    message, total = p.initial.softmax(-1), torch.zeros(())
    for t in range(value.shape[-1]):
        top = seen[:, t].amax(-1, keepdim=True)
        message = (message @ rows) * (seen[:, t] - top).exp()
        scale = message.sum(-1, keepdim=True)
        message, total = message / scale, total + (scale.log() + top).squeeze(-1)
    return total


FORMS: dict[str, Callable[[Parameters, Tensor], Tensor]] = {
    "sparse": sparse,
    "loop": loop,
    "matmul": matmul,
    "Pyro": by_pyro,
}


def peak(form: Callable[[Parameters, Tensor], Tensor], p: Parameters, value: Tensor) -> float:
    with peak_memory() as memory:
        torch.autograd.grad(form(p, value).sum(), p.all())
    return memory.peak / 2**20


def table(states: int, steps: int, rounds: int) -> None:
    p, value = Parameters(states, 4), torch.randint(27, (CHAINS, steps))
    forms = {name: form for name, form in FORMS.items() if name != "Pyro" or states <= 64}
    edges = int((SparseCategorical(p.scores).probs > 0).sum())
    exact = sparse(p, value).sum().item()
    times: dict[str, list[float]] = {name: [] for name in forms}
    for r in range(rounds + 1):
        for name, form in forms.items():
            started = time.perf_counter()
            total = form(p, value).sum()
            torch.autograd.grad(total, p.all())
            if r:
                times[name].append(time.perf_counter() - started)
            assert abs(total.item() - exact) < 1e-4 * abs(exact), (name, total.item(), exact)
    print(f"\n{states} states, {edges} transitions, {CHAINS} sequences of {steps}")
    print(f"{'':8s} {'ms':>10s} {'MiB':>8s} {'over sparse (quartiles)':>26s}")
    for name, form in forms.items():
        ratios = [a / b for a, b in zip(times[name], times["sparse"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ms = 1e3 * statistics.median(times[name])
        print(f"{name:8s} {ms:10.1f} {peak(form, p, value):8.1f} {middle:12.1f} ({low:.1f}-{high:.1f})")


def memory() -> None:
    print("\nmemory of ours, MiB, 8 sequences")
    print(f"{'states':>8s} {'degree':>8s} {'T=50':>8s} {'T=100':>8s} {'T=200':>8s}")
    for states, degree in ((256, 4), (256, 16), (1024, 4), (1024, 16)):
        p = Parameters(states, degree)
        peaks = [peak(sparse, p, torch.randint(27, (8, steps))) for steps in (50, 100, 200)]
        print(f"{states:8d} {degree:8d} " + " ".join(f"{x:8.1f}" for x in peaks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--states", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pyro.enable_validation(False)
    print(f"torch {torch.__version__}, Pyro {pyro.__version__}, one thread, float32")
    for states in args.states:
        table(states, 50 if states < 1024 else 10, args.rounds if states < 1024 else 3)
    memory()


if __name__ == "__main__":
    main()
