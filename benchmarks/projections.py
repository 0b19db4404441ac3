"""How fast are sparsemax and entmax15, forward and backward, beside those of the entmax package?

    python benchmarks/projections.py

Eager mode, float32, one thread. The functions are timed in turn, round after round; a ratio is the median over the
rounds of their time over ours, with its interquartile range, so that a busy machine slows both sides of it.
Scores are independent and normal. Standard deviation 1 stands for a trained encoder: supports are small.
Standard deviation 0.001 stands for one before training: no score is so low that it could be left out at once.
"k=100" are the package's functions that look for the support among the 100 largest scores, and double that number for
the rows where it does not suffice.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial

import entmax
import torch
from torch import Tensor

from pyro_sparse.projections import entmax15, sparsemax

PAIRS = {"sparsemax": (sparsemax, entmax.sparsemax), "entmax15": (entmax15, entmax.entmax15)}
# Per size the number of rounds, then the least ratio asked of (sparsemax, entmax15) to the full functions where
# scores have standard deviation 1, and to k=100.
SIZES = {
    (256, 64): (201, (1.0, 1.0), None),
    (256, 1024): (41, (3.0, 2.5), (1.0, 1 / 1.7)),
    (256, 4096): (15, (5.0, 3.5), (1.0, 1 / 1.7)),
    (32, 50_000): (15, (10.0, 6.0), (1.0, 1 / 1.7)),
}
HEADER = (
    "",
    "scores",
    "std",
    "support",
    "ours, ms",
    "full, ms",
    "ratio (quartiles)",
    "asked",
    "k=100, ms",
    "ratio",
    "asked",
)
LINE = "{:9} {:>12} {:>6} {:>8} {:>9} {:>9} {:>20} {:>6} {:>10} {:>20} {:>6}"


def seconds(f: Callable[[Tensor], Tensor], scores: Tensor, weights: Tensor) -> float:
    start = time.perf_counter()
    torch.autograd.grad(f(scores), scores, weights)
    return time.perf_counter() - start


def measure(functions: list[Callable[[Tensor], Tensor]], scores: Tensor, rounds: int) -> tuple[list[str], list[str]]:
    """Returns the median milliseconds of each function, and how they compare with the first."""
    weights = torch.randn_like(scores)
    for f in functions:
        seconds(f, scores, weights)  # the first call is slower
    times = torch.tensor([[seconds(f, scores, weights) for f in functions] for _ in range(rounds)])
    ratios = (times[:, 1:] / times[:, :1]).quantile(torch.tensor([0.5, 0.25, 0.75]), dim=0)
    return (
        [f"{1e3 * median:.2f}" for median in times.median(0).values.tolist()],
        ["{:.2f} ({:.2f}-{:.2f})".format(*three) for three in ratios.T.tolist()],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, python {platform.python_version()}, {platform.machine()}, 1 thread, float32")
    print(LINE.format(*HEADER))
    for std in (1.0, 1e-3):
        for size, (rounds, full, top) in SIZES.items():
            for i, (name, (ours, theirs)) in enumerate(PAIRS.items()):
                torch.manual_seed(arguments.seed)
                scores = (std * torch.randn(size)).requires_grad_()
                support = (ours(scores) > 0).sum(-1).double().mean().item()
                functions = [ours, theirs] if top is None else [ours, theirs, partial(theirs, k=100)]
                ms, ratios = measure(functions, scores, rounds)
                asked = [f"{a[i]:.2g}" if a is not None and std == 1.0 else "" for a in (full, top)]
                cells = [f"{support:.1f}", *ms[:2], ratios[0], asked[0]]
                cells += ["", "", ""] if top is None else [ms[2], ratios[1], asked[1]]
                print(LINE.format(name, "x".join(map(str, size)), f"{std:g}", *cells), flush=True)


if __name__ == "__main__":
    main()
