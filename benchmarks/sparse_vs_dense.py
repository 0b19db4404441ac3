"""
What does it cost to be exact? The same guide under stock ``TraceEnum_ELBO`` (all K outcomes), under ``SparseEnumELBO``
(its support), and in a hand-written torch loop that does only what this one model needs.

    python benchmarks/sparse_vs_dense.py              # every table but the dense run at K=4096: 5 minutes
    python benchmarks/sparse_vs_dense.py --largest    # that one too: a process of its own, a minute, up to 18 GB

float32, one thread, loss and all gradients, B=256 examples, sparsemax. Supports have 1 to 6 outcomes, equally often:
3.5 on average (with --gaussian the scores are Gaussian instead, scaled to the same average; the largest of the 256
supports is then 8 or 9, and padding goes up to that). Decoder: Linear(32, H)-ReLU-Linear(H, D) of a 16-dimensional
embedding of the code and, where it sees it, a 16-dimensional style per example; D is the number of pixels.
A ratio is the median over interleaved runs, with its quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

import pyro_sparse.distributions as sdist
from pyro_sparse.diagnostics import peak_memory
from pyro_sparse.infer import SparseEnumELBO
from pyro_sparse.projections import sparsemax

BATCH, EMBED = 256, 16
SCORES = "even"  # or "gaussian"
FREE_GB_FOR_LARGEST = 24


def even_scores(outcomes: int) -> Tensor:
    """Scores whose sparsemax keeps 1, 2, ... 6 (or K) outcomes, equally often, at random places."""
    sizes = torch.arange(BATCH) % min(6, outcomes) + 1
    order = torch.rand(BATCH, outcomes).argsort(-1)
    kept = torch.zeros(BATCH, outcomes, dtype=torch.bool).scatter(-1, order, torch.arange(outcomes) < sizes[:, None])
    return torch.where(kept, 0.1 * torch.rand(BATCH, outcomes), -2.0 + 0.1 * torch.randn(BATCH, outcomes))


def gaussian_scores(outcomes: int) -> Tensor:
    """Gaussian scores, scaled by bisection so that sparsemax keeps 3.5 (or .7 K) outcomes on average."""
    noise = torch.randn(BATCH, outcomes)
    low, high = 1e-2, 1e2
    for _ in range(40):
        scale = (low * high) ** 0.5
        size = (sparsemax(scale * noise) > 0).sum(-1).float().mean().item()
        low, high = (scale, high) if size > min(3.5, 0.7 * outcomes) else (low, scale)
    return scale * noise


@dataclass
class Problem:
    """One model, its guide, and the parameters that both ELBOs differentiate."""

    outcomes: int
    hidden: int
    pixels: int
    sees_style: bool

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.images = (torch.rand(BATCH, self.pixels) < 0.3).float()
        self.scores = {"even": even_scores, "gaussian": gaussian_scores}[SCORES](self.outcomes).requires_grad_()
        self.loc = torch.randn(BATCH, EMBED).requires_grad_()
        self.embed = nn.Embedding(self.outcomes, EMBED)
        width = 2 * EMBED if self.sees_style else EMBED
        self.net = nn.Sequential(nn.Linear(width, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.pixels))
        self.parameters = [self.scores, *self.embed.parameters(), *self.net.parameters()]
        if self.sees_style:
            self.parameters.append(self.loc)

    def decode(self, code: Tensor, style: Tensor | None) -> Tensor:
        h = self.embed(code)
        if style is not None:
            shape = torch.broadcast_shapes(h.shape, style.shape)
            h = torch.cat([h.expand(shape), style.expand(shape)], -1)
        return self.net(h)

    def model(self) -> None:
        with pyro.plate("data", BATCH):
            style = None
            if self.sees_style:
                style = pyro.sample("style", dist.Normal(torch.zeros(EMBED), 1.0).to_event(1))
            code = pyro.sample("code", dist.Categorical(logits=torch.zeros(self.outcomes)))
            pyro.sample("x", dist.Bernoulli(logits=self.decode(code, style)).to_event(1), obs=self.images)

    def guide(self) -> None:
        with pyro.plate("data", BATCH):
            if self.sees_style:
                pyro.sample("style", dist.Normal(self.loc, 0.1).to_event(1))
            pyro.sample("code", sdist.SparseCategorical(self.scores))

    def step(self, elbo: TraceEnum_ELBO, guide: Callable[[], None]) -> Callable[[], float]:
        """One evaluation of loss and gradients; the loss comes back to compare."""

        def run() -> float:
            for p in self.parameters:
                p.grad = None
            loss = elbo.differentiable_loss(self.model, guide)
            loss.backward()
            return loss.item()

        return run

    def dense(self) -> Callable[[], float]:
        return self.step(TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(self.guide))

    def sparse(self, mode: str) -> Callable[[], float]:
        return self.step(SparseEnumELBO(mode, max_plate_nesting=1), self.guide)

    def by_hand(self, packed: bool) -> Callable[[], float]:
        """The loop a user would write for this model: ``packed`` one row per non-zero pair, else padded slots."""

        def run() -> float:
            for p in self.parameters:
                p.grad = None
            loss = self._loss_by_hand(packed)
            loss.backward()
            return loss.item()

        return run

    def _loss_by_hand(self, packed: bool) -> Tensor:
        probs = sparsemax(self.scores)
        if packed:
            row, code = (probs > 0).nonzero(as_tuple=True)
            q = probs[row, code]
        else:
            q, code = probs.topk(int((probs > 0).sum(-1).max()), dim=-1)
            row = torch.arange(BATCH)[:, None]
        loss = torch.zeros(())
        style = None
        if self.sees_style:
            z = self.loc + 0.1 * torch.randn_like(self.loc)
            prior, post = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(self.loc, 0.1)
            loss = (post.log_prob(z) - prior.log_prob(z)).sum()
            style = z[row]
        logits = self.decode(code, style)
        x = self.images[row].expand_as(logits)
        fit = -nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
        log_q = torch.where(q > 0, q, 1.0).log()
        return loss - (q * (fit - torch.tensor(float(self.outcomes)).log() - log_q)).sum()


def interleaved(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn so that whatever else the machine does hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(top: list[float], bottom: list[float]) -> str:
    """Median of the interleaved ratios and their quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(top, bottom, strict=True)], n=4)
    return f"{middle:6.2f} ({low:.2f}-{high:.2f})"


def peak_mb(run: Callable[[], float]) -> float:
    with peak_memory() as memory:
        run()
    return memory.peak / 1e6


def describe(problem: Problem) -> str:
    sizes = (sparsemax(problem.scores) > 0).sum(-1)
    sees = "code, style" if problem.sees_style else "code"
    support = f"{sizes.float().mean():4.1f}/{int(sizes.max()):<2}"
    return f"{sees:<11}  {problem.hidden:>4}  {problem.pixels:>4}  {problem.outcomes:>5}  {support}"


HEAD = "decoder sees H     D        K  support"


HEAD_DENSE = f"{HEAD}   dense ms    ours ms   time ratio (quartiles)      dense MB   ours MB  memory ratio"


def table_dense(repeats: int) -> None:
    print(f"\nDense TraceEnum_ELBO over SparseEnumELBO('padded'), B={BATCH}")
    print(HEAD_DENSE)
    for sees_style, outcomes in [(True, 64), (True, 1024), (False, 16), (False, 64), (False, 1024)]:
        problem = Problem(outcomes, 512, 784, sees_style)
        runs = {"dense": problem.dense(), "ours": problem.sparse("padded")}
        times = interleaved(runs, max(5, repeats // 2) if outcomes < 1024 else 5)
        memory = {name: peak_mb(run) for name, run in runs.items()}
        print_dense_row(problem, times, memory)


def print_dense_row(problem: Problem, times: dict[str, list[float]], memory: dict[str, float]) -> None:
    ms = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    print(
        f"{describe(problem)}  {ms['dense']:9.1f}  {ms['ours']:9.1f}   {ratio(times['dense'], times['ours']):<24}"
        f"  {memory['dense']:9.1f}  {memory['ours']:8.2f}  {memory['dense'] / memory['ours']:8.1f}",
        flush=True,
    )


def table_auto(repeats: int) -> None:
    print("\nSparseEnumELBO('auto') over stock TraceEnum_ELBO with the same guide: 1.10 is the most allowed")
    print(f"{HEAD}  dense ms   auto ms   time ratio (quartiles)")
    for sees_style in (True, False):
        for outcomes in (2, 4, 8, 16, 64, 256):
            problem = Problem(outcomes, 512, 64, sees_style)
            runs = {"dense": problem.dense(), "auto": problem.sparse("auto")}
            times = interleaved(runs, repeats)
            ms = {name: 1e3 * statistics.median(t) for name, t in times.items()}
            print(
                f"{describe(problem)}  {ms['dense']:8.2f}  {ms['auto']:8.2f}   {ratio(times['auto'], times['dense'])}",
                flush=True,
            )


def table_by_hand(repeats: int) -> None:
    print("\nSparseEnumELBO('padded') over a torch loop written for this model (K=1024)")
    print(f"{HEAD}   ours ms   padded by hand   ratio (quartiles)    packed by hand   ratio (quartiles)")
    for sees_style in (True, False):
        for hidden in (512, 128):
            problem = Problem(1024, hidden, 64, sees_style)
            runs = {
                "ours": problem.sparse("padded"),
                "padded": problem.by_hand(packed=False),
                "packed": problem.by_hand(packed=True),
            }
            times = interleaved(runs, repeats)
            ms = {name: 1e3 * statistics.median(t) for name, t in times.items()}
            print(
                f"{describe(problem)}  {ms['ours']:8.2f}   "
                f"{ms['padded']:8.2f}   {ratio(times['ours'], times['padded'])}    "
                f"{ms['packed']:8.2f}   {ratio(times['ours'], times['packed'])}",
                flush=True,
            )


def free_gb() -> float:
    with open("/proc/meminfo") as lines:
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return kilobytes / 1e6


def largest() -> None:
    """K=4096: the dense run once, timed in this process."""
    problem = Problem(4096, 512, 784, True)
    ours = problem.sparse("padded")
    times = {"ours": interleaved({"ours": ours}, 5)["ours"]}
    dense, memory = problem.dense(), {"ours": peak_mb(ours)}
    start = time.perf_counter()
    with peak_memory() as peak:
        dense()
    times["dense"] = [time.perf_counter() - start] * 5
    memory["dense"] = peak.peak / 1e6
    print_dense_row(problem, times, memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repeats", type=int, default=51, help="interleaved runs (first table: half as many, 5 at K=1024)"
    )
    parser.add_argument("--gaussian", action="store_true", help="Gaussian scores: supports of very different sizes")
    parser.add_argument("--tables", nargs="*", default=["dense", "auto", "by_hand"], help="which tables to print")
    parser.add_argument("--largest", action="store_true", help="also dense at K=4096, in a process of its own")
    parser.add_argument("--largest-alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    global SCORES
    SCORES = "gaussian" if args.gaussian else "even"
    torch.set_num_threads(1)
    if args.largest_alone:
        largest()
        return
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, 1 thread, float32, {args.repeats} interleaved runs")
    for name in args.tables:
        {"dense": table_dense, "auto": table_auto, "by_hand": table_by_hand}[name](args.repeats)
    if args.largest:
        print(f"\nK=4096 (the dense run once, so its ratio has no spread of its own)\n{HEAD_DENSE}", flush=True)
        if free_gb() < FREE_GB_FOR_LARGEST:
            print(f"not run: {free_gb():.0f} GB free, it takes {FREE_GB_FOR_LARGEST}")
        else:
            options = ["--gaussian"] if args.gaussian else []
            subprocess.run([sys.executable, __file__, "--largest-alone", *options], check=True)


if __name__ == "__main__":
    main()
