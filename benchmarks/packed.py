"""
What packed rows cost beside padded slots, dense enumeration and a loop written by hand.

Skewed: of 256 images one is not sure of its code, with a support of a quarter of all K codes; the others have a few.
Uniform: supports of 1 to 6 codes, for two widths of the decoder. Large: 4096 images, 65 536 codes, mean support 4.

    python benchmarks/packed.py [--skewed] [--uniform] [--large]

One thread, float32, a step of loss and gradients; forms take turns, the medians of 11 rounds and the median of ratios
within a round. Memory is the peak of live tensors of one step, without parameters and data.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

import pyro_sparse.distributions as sdist
from pyro_sparse.diagnostics import peak_memory
from pyro_sparse.infer import SparseEnumELBO

PIXELS, CODE = 64, 32


class Vae(nn.Module):
    """A decoder of a code and a style; the guide's scores are parameters, so that supports are what they are set to."""

    def __init__(self, probs: Tensor, width: int) -> None:
        super().__init__()
        self.num_codes = probs.shape[1]
        self.probs = nn.Parameter(probs)
        self.embed = nn.Embedding(self.num_codes, CODE)
        self.net = nn.Sequential(nn.Linear(CODE + 8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.out = nn.Linear(width, PIXELS)

    def model(self, images: Tensor, style: Tensor) -> None:
        logits = torch.zeros(self.num_codes, device=images.device)
        with pyro.plate("data", len(images)):
            z = pyro.sample("z", dist.Categorical(logits=logits))
            embed = self.embed(z)
            shape = torch.broadcast_shapes(embed.shape[:-1], style.shape[:-1])
            h = torch.cat([embed.expand(*shape, CODE), style.expand(*shape, 8)], -1)
            pyro.sample("x", dist.Bernoulli(logits=self.out(self.net(h))).to_event(1), obs=images)

    def guide(self, images: Tensor, style: Tensor) -> None:
        with pyro.plate("data", len(images)):
            pyro.sample("z", sdist.SparseCategorical(probs=self.probs))

    def by_hand(self, images: Tensor, style: Tensor) -> Tensor:
        """Packed rows without Pyro: the loss."""
        example, code = (self.probs > 0).nonzero(as_tuple=True)
        q, log_prior = self.probs[example, code], -torch.tensor(float(self.num_codes)).log()
        h = torch.cat([self.embed(code), style[example]], -1)
        logits = self.out(self.net(h))
        x = -nn.functional.binary_cross_entropy_with_logits(logits, images[example], reduction="none").sum(-1)
        return -(q * (x + log_prior - q.log())).sum()


def supports(sizes: Tensor, num_codes: int) -> Tensor:
    """Random rows of probabilities with so many that are not zero."""
    scores = torch.rand(len(sizes), num_codes)
    kept = scores.argsort(-1).argsort(-1) < sizes[:, None]
    probs = torch.where(kept, torch.rand(len(sizes), num_codes) + 0.1, 0.0)
    return probs / probs.sum(-1, keepdim=True)


def forms(vae: Vae, data: tuple[Tensor, Tensor], names: list[str], chunk: int) -> dict[str, Callable[[], Any]]:
    """A step of each form."""

    def step_of(elbo: Any, guide: Any) -> Callable[[], Any]:
        return lambda: elbo.loss_and_grads(vae.model, guide, *data)

    made: dict[str, Callable[[], Any]] = {"by hand": lambda: vae.by_hand(*data).backward()}
    made["dense"] = step_of(TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(vae.guide))
    for mode in ("padded", "union", "packed", "auto"):
        made[mode] = step_of(SparseEnumELBO(mode, max_plate_nesting=1), vae.guide)
    chunked = SparseEnumELBO("packed", chunk_rows=chunk, max_plate_nesting=1)
    made[f"chunks of {chunk}"] = step_of(chunked, vae.guide)
    return {name: made[name] for name in names if name in made}


def measure(title: str, vae: Vae, names: list[str], chunk: int = 64, rounds: int = 11, base: str = "padded") -> None:
    """Prints a row for each form."""
    size = len(vae.probs)
    data = (torch.rand(size, PIXELS) < 0.3).float(), torch.randn(size, 8)
    steps = forms(vae, data, names, chunk)
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = {}
    for name, step in steps.items():
        for _ in range(2):
            vae.zero_grad()
            step()
        vae.zero_grad()
        with peak_memory() as memory:
            step()
        peaks[name] = memory.peak / 2**20
    for _ in range(rounds):
        for name, step in steps.items():
            vae.zero_grad()
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    rows = int((vae.probs > 0).sum())
    print(f"\n{title}: {rows} rows of probability, {size} x {vae.num_codes} in all")
    print(f"{'':16s} {'ms':>9s} {'MiB':>9s} {'of ' + base:>12s}")
    for name in steps:
        ratio = statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
        print(f"{name:16s} {1e3 * statistics.median(times[name]):9.2f} {peaks[name]:9.1f} {ratio:12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in ("skewed", "uniform", "large"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    everything = not (args.skewed or args.uniform or args.large)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pyro.enable_validation(False)
    print(f"torch {torch.__version__}, Pyro {pyro.__version__}, one thread, float32")
    if args.skewed or everything:
        sizes = torch.randint(1, 7, (256,))
        sizes[0] = 256
        names = ["padded", "union", "dense", "packed", "auto", "chunks of 64", "by hand"]
        for width in (128, 512):
            measure(f"skewed, H={width}", Vae(supports(sizes, 1024), width), names, rounds=5 if width == 512 else 11)
    if args.uniform or everything:
        names = ["padded", "union", "dense", "packed", "auto", "by hand"]
        for codes in (16, 64, 1024):
            for width in (128, 512):
                vae = Vae(supports(torch.randint(1, 7, (256,)), codes), width)
                measure(f"uniform, K={codes}, H={width}", vae, names, base="by hand")
    if args.large or everything:
        vae = Vae(supports(torch.randint(1, 8, (4096,)), 65536), 128)
        measure("large", vae, ["packed", "chunks of 512", "by hand"], chunk=512, rounds=3, base="packed")


if __name__ == "__main__":
    main()
