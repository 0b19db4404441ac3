"""
What each form of enumeration costs on a GPU, and the projections beside those of entmax and adasplash.

Steps: 1024 images, supports of 1 to 6 codes of 1024 and of 16 384, a decoder of width 128: loss and gradients, padded,
union, packed and dense. Projections: sparsemax and entmax15, forward and backward, 256 rows of 1024 and of 65 536
normal scores, beside the entmax package's, and beside the Triton functions of the adasplash package if it is installed
(pip install adasplash); above 1, ours is faster. Waits are how often a step makes the host wait for the device: as CUDA
tells (its sync debug mode), on the CPU as pyro_sparse.testing.count_host_waits does.

    python benchmarks/gpu.py [--device cuda] [--quick] [--rounds 21]

float32, eager; forms take turns, round after round: medians, and the medians and quartiles of the ratios within a round
(to padded; to ours). Memory is the most that torch had allocated in a step; on the CPU the peak of live tensors.
Without a GPU, --device cpu --quick runs all of it at sizes that mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import entmax
import pyro
import torch
from packed import PIXELS, Vae, supports  # the benchmark beside this one
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_sparse.diagnostics import peak_memory
from pyro_sparse.infer import SparseEnumELBO
from pyro_sparse.projections import entmax15, sparsemax
from pyro_sparse.testing import count_host_waits

Run = Callable[[], Any]
STEP = "{:16} {:>9} {:>10} {:>7}  {}"
PROJECTION = "{:10} {:>12} {:>10} {:>9}  {}"


def milliseconds(run: Run, device: torch.device) -> float:
    """The time of one run, to the end of what it leaves to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def mebibytes(run: Run, device: torch.device) -> float:
    """The peak of one run's memory, beside what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before) / 2**20
    with peak_memory() as memory:
        run()
    return memory.peak / 2**20


def waits(run: Run, device: torch.device) -> int:
    """How often one run makes the host wait."""
    if device.type != "cuda":
        with count_host_waits() as counted:
            run()
        return counted.total
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def in_turns(runs: dict[str, Run], device: torch.device, rounds: int) -> torch.Tensor:
    """Milliseconds, ``(rounds, runs)``."""
    return torch.tensor([[milliseconds(run, device) for run in runs.values()] for _ in range(rounds)])


def ratio(times: torch.Tensor, base: torch.Tensor) -> str:
    middle, low, high = (times / base).quantile(torch.tensor([0.5, 0.25, 0.75])).tolist()
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def fits(name: str, run: Run) -> bool:
    """Runs it twice, to make what is made at the first run; False if there is no memory for it, or no kernel."""
    try:
        run(), run()
    except torch.OutOfMemoryError:
        print(f"{name:16} out of memory", flush=True)
        torch.cuda.empty_cache()
        return False
    return True


def steps(codes: int, images: int, device: torch.device, rounds: int) -> None:
    torch.manual_seed(0)
    vae = Vae(supports(torch.randint(1, 7, (images,)), codes), 128).to(device)
    data = (torch.rand(images, PIXELS) < 0.3).float().to(device), torch.randn(images, 8, device=device)

    def step(elbo: Any, guide: Any) -> None:
        vae.zero_grad()
        elbo.loss_and_grads(vae.model, guide, *data)

    elbos: dict[str, Any] = {mode: SparseEnumELBO(mode, max_plate_nesting=1) for mode in ("padded", "union", "packed")}
    runs: dict[str, Run] = {mode: partial(step, elbo, vae.guide) for mode, elbo in elbos.items()}
    runs["dense"] = partial(step, TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(vae.guide))
    rows = int((vae.probs > 0).sum())
    print(f"\n{images} images, {codes} codes, {rows} rows of probability")
    print(STEP.format("", "ms", "MiB", "waits", "of padded (quartiles)"))
    runs = {name: run for name, run in runs.items() if fits(name, run)}
    times = in_turns(runs, device, rounds)
    for i, (name, run) in enumerate(runs.items()):
        cells = f"{times[:, i].median():.2f}", f"{mebibytes(run, device):.0f}", waits(run, device)
        print(STEP.format(name, *cells, ratio(times[:, i], times[:, 0])), flush=True)


def peers(device: torch.device) -> dict[str, dict[str, Callable[..., Any]]]:
    """By projection and package."""
    found: dict[str, dict[str, Callable[..., Any]]] = {
        "sparsemax": {"ours": sparsemax, "entmax": entmax.sparsemax},
        "entmax15": {"ours": entmax15, "entmax": entmax.entmax15},
    }
    try:
        triton_entmax = importlib.import_module("adasplash").triton_entmax
    except ImportError as error:
        print(f"\nadasplash is left out: {error}. pip install adasplash, on a machine with a GPU.")
        return found
    if device.type != "cuda":
        print("\nadasplash is left out: its functions run on CUDA devices only.")
        return found
    found["sparsemax"]["adasplash"] = lambda scores, dim: triton_entmax(scores, alpha=2.0)
    found["entmax15"]["adasplash"] = lambda scores, dim: triton_entmax(scores, alpha=1.5)
    return found


def projections(sizes: list[tuple[int, int]], device: torch.device, rounds: int) -> None:
    named = peers(device)
    print("\n" + PROJECTION.format("", "scores", "", "ms", "of ours (quartiles)"))
    for size in sizes:
        for name, functions in named.items():
            torch.manual_seed(0)
            scores = torch.randn(size, device=device, requires_grad=True)
            weights = torch.randn(size, device=device)

            def run(f: Callable[..., Any], scores: Any = scores, weights: Any = weights) -> Any:
                return torch.autograd.grad(f(scores, dim=-1), scores, weights)

            runs: dict[str, Run] = {package: partial(run, f) for package, f in functions.items()}
            runs = {package: each for package, each in runs.items() if fits(package, each)}
            times = in_turns(runs, device, rounds)
            expected = functions["ours"](scores, dim=-1)
            for i, package in enumerate(runs):
                error = (functions[package](scores, dim=-1) - expected).abs().max()
                note = "" if package == "ours" else f"{ratio(times[:, i], times[:, 0])}, off by {error:.0e}"
                cells = name, "x".join(map(str, size)), package, f"{times[:, i].median():.3f}", note
                print(PROJECTION.format(*cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    device, quick = torch.device(arguments.device), arguments.quick
    rounds = min(arguments.rounds, 5) if quick else arguments.rounds
    pyro.enable_validation(False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()}), no GPU"
    print(f"{name}; torch {torch.__version__}, Pyro {pyro.__version__}, float32, {rounds} rounds")
    for codes in (64, 128) if quick else (1024, 16_384):
        steps(codes, 64 if quick else 1024, device, rounds)
    projections([(16, 128), (16, 1024)] if quick else [(256, 1024), (256, 65_536)], device, rounds)


if __name__ == "__main__":
    main()
