"""
What a second process brings: images per second of one process, and of two that exchange gradients.

A guide with 1024 codes and a style for each image and code; a decoder of code and style, Linear-ReLU(H)-Linear(784).
Each process has one thread and a batch of 256 images of its own; the model is in DistributedDataParallel, over gloo. A
step is loss, gradients and Adam.

    python benchmarks/distributed.py

The two processes live throughout. A round is ten steps of the first alone, while the second waits, and ten of both;
medians of 9 rounds, and the median of ratios within a round, float32. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_sparse.distributions import SparseCategorical
from pyro_sparse.estimators import LeaveOneOut
from pyro_sparse.infer import EstimatorELBO, SparseEnumELBO

PIXELS, CODES, STYLE, BATCH, STEPS = 784, 1024, 8, 256, 10
ELBOS = {
    "SparseEnumELBO()": partial(SparseEnumELBO, max_plate_nesting=1),
    'SparseEnumELBO("packed")': partial(SparseEnumELBO, "packed", max_plate_nesting=1),
    "EstimatorELBO(LeaveOneOut(4))": lambda: EstimatorELBO(LeaveOneOut(4)),
}


class Model(PyroModule):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.code, self.style = nn.Embedding(CODES, hidden), nn.Linear(STYLE, hidden)
        self.pixels = nn.Linear(hidden, PIXELS)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("images", len(x)):
            code = pyro.sample("code", dist.Categorical(logits=x.new_zeros(CODES)))
            style = pyro.sample("style", dist.Normal(x.new_zeros(STYLE), 1.0).to_event(1))
            logits = self.pixels(torch.relu(self.code(code) + self.style(style)))
            pyro.sample("pixels", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(PIXELS, 64), nn.ReLU())
        self.scores, self.loc, self.code = nn.Linear(64, CODES), nn.Linear(64, STYLE), nn.Embedding(CODES, STYLE)
        self.sparse = sparse

    def forward(self, x: Tensor) -> None:
        features = self.features(x)
        scores = self.scores(features)
        with pyro.plate("images", len(x)):
            family = SparseCategorical(scores) if self.sparse else dist.Categorical(logits=scores)
            code = pyro.sample("code", family)
            pyro.sample("style", dist.Normal(self.loc(features) + self.code(code), 0.1).to_event(1))


class Training:
    """Ten steps at a time, in ``DistributedDataParallel`` or not."""

    def __init__(self, name: str, hidden: int, rank: int, together: bool) -> None:
        torch.manual_seed(0)
        pyro.clear_param_store()
        self.loss: Any = ELBOS[name]()(Model(hidden), Guide(name.startswith("Sparse")))
        self.module = DistributedDataParallel(self.loss) if together else self.loss
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-4)
        torch.manual_seed(rank)
        self.x = (torch.rand(8, PIXELS) < 0.5).float()[torch.randint(8, (BATCH,))]

    def seconds(self) -> float:
        started = time.perf_counter()
        for _ in range(STEPS):
            self.optimizer.zero_grad()
            (self.module(self.x) / BATCH).backward()
            self.optimizer.step()
        return time.perf_counter() - started


def row(name: str, hidden: int, rank: int, rounds: int) -> None:
    alone, both = Training(name, hidden, rank, False), Training(name, hidden, rank, True)
    one: list[float] = []
    two: list[float] = []
    for r in range(rounds + 1):
        distributed.barrier()
        seconds = alone.seconds() if rank == 0 else 0.0
        distributed.barrier()
        together = both.seconds()
        distributed.barrier()
        if r:
            one.append(BATCH * STEPS / seconds if rank == 0 else 1.0)
            two.append(2 * BATCH * STEPS / together)
    if rank == 0:
        low, middle, high = statistics.quantiles([b / a for a, b in zip(one, two, strict=True)], n=4)
        speeds = f"{statistics.median(one):10.0f} {statistics.median(two):10.0f}"
        print(f"{name:32s} {hidden:5d} {speeds} {middle:8.2f} ({low:.2f}-{high:.2f})", flush=True)


def process(rank: int, meeting: str, hidden: list[int], rounds: int) -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    pyro.enable_validation(False)
    pyro.settings.set(module_local_params=True)  # else the two trainings would share parameters, by their names
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    if rank == 0:
        print(f"torch {torch.__version__}, Pyro {pyro.__version__}, one thread in each process, float32")
        print(f"{'':32s} {'H':>5s} {'one, /s':>10s} {'two, /s':>10s} {'two over one (quartiles)':>26s}", flush=True)
    for size in hidden:
        for name in ELBOS:
            row(name, size, rank, rounds)
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 64])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(process, (f"{folder}/meeting", args.hidden, args.rounds), nprocs=2)


if __name__ == "__main__":
    main()
