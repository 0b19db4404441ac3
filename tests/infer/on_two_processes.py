"""Model, guide and launch for tests of training on two processes. Each function with a rank runs in both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, distributed, multiprocessing, nn

import pyro_sparse.distributions as sdist
from pyro_sparse.estimators import Exact, LeaveOneOut, MovingAverage, NeuralBaseline, Sum
from pyro_sparse.infer import BaselineELBO, EstimatorELBO, SparseEnumELBO

K = 6
EXACT: dict[str, Callable[[], Any]] = {
    "padded": partial(SparseEnumELBO, max_plate_nesting=1),
    "union": partial(SparseEnumELBO, "union", max_plate_nesting=1),
    "auto": partial(SparseEnumELBO, "auto", max_plate_nesting=1),
    "packed": partial(SparseEnumELBO, "packed", max_plate_nesting=1),
    "chunks": partial(SparseEnumELBO, "packed", chunk_rows=2, max_plate_nesting=1),
    "exact": lambda: EstimatorELBO(Exact(), max_plate_nesting=1),
    "exact packed": lambda: EstimatorELBO(Exact("packed"), max_plate_nesting=1),
}
DRAWN: dict[str, Callable[[], Any]] = {
    "leave-one-out": lambda: EstimatorELBO(LeaveOneOut(4)),
    "average": lambda: BaselineELBO(MovingAverage()),
    "learned": lambda: BaselineELBO({"z": Sum(MovingAverage(), NeuralBaseline(nn.Linear(3, 1)))}),
}


class Model(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(K, 3)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=x.new_zeros(K)))
            loc = self.decoder(nn.functional.one_hot(z, K).to(x.dtype))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self, sparse: bool, branch: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, K)
        self.other = nn.Linear(3, K) if branch else None
        self.sparse = sparse

    def forward(self, x: Tensor) -> None:
        scores = 2 * self.encoder(x)
        if self.other is not None and x.sum() > 0:
            scores = scores + self.other(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", sdist.SparseCategorical(scores) if self.sparse else dist.Categorical(logits=scores))


def make(name: str, branch: bool = False) -> Any:
    """The module of a loss, the same on every process and at each call."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    return (EXACT | DRAWN)[name]()(Model(), Guide(name in EXACT, branch))


def data(number: int) -> Tensor:
    """The first rows have supports of one outcome, the last of nearly all."""
    x = torch.randn(number, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x * torch.linspace(8.0, 0.05, number, dtype=torch.float64)[:, None]


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def on_two(work: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """What ``work(rank, folder)`` returns on each of two processes, which exchange gradients by gloo."""
    multiprocessing.spawn(_start, (work, folder), nprocs=2)  # type: ignore[attr-defined]
    return [torch.load(folder / f"result{rank}") for rank in range(2)]


def _start(rank: int, work: Callable[[int, Path], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    try:
        torch.save(work(rank, folder), folder / f"result{rank}")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
