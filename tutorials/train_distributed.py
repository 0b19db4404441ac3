r"""
A clustering VAE on one process or several, which can be killed and goes on with the same bits::

    python tutorials/train_distributed.py
    torchrun --nproc_per_node=2 tutorials/train_distributed.py --checkpoint run.pt

Model, guide and loss are the same in both. Each process takes its share of every batch; DistributedDataParallel
averages the gradients. With GPUs each process takes one, by the same command.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_sparse.datasets import load_digits
from pyro_sparse.distributions import SparseCategorical
from pyro_sparse.estimators import LeaveOneOut, MovingAverage
from pyro_sparse.infer import BaselineELBO, Checkpoint, EstimatorELBO, SparseEnumELBO

PIXELS = 64
ELBOS = {
    "sparse": partial(SparseEnumELBO, max_plate_nesting=1),
    "packed": partial(SparseEnumELBO, "packed", max_plate_nesting=1),
    "leave-one-out": lambda: EstimatorELBO(LeaveOneOut(4)),
    "average": lambda: BaselineELBO(MovingAverage()),
}


class Model(PyroModule):
    """Each image has one of K codes."""

    def __init__(self, num_codes: int, hidden: int) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.decoder = nn.Sequential(
            nn.Embedding(num_codes, 32), nn.Linear(32, hidden), nn.ReLU(), nn.Linear(hidden, PIXELS)
        )

    def forward(self, x: Tensor) -> None:
        with pyro.plate("images", len(x)):
            code = pyro.sample("code", dist.Categorical(logits=x.new_zeros(self.num_codes)))
            pyro.sample("pixels", dist.Bernoulli(logits=self.decoder(code)).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self, num_codes: int, hidden: int, sparse: bool) -> None:
        super().__init__()
        self.sparse = sparse
        self.encoder = nn.Sequential(nn.Linear(PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, num_codes))

    def forward(self, x: Tensor) -> None:
        scores = self.encoder(x)
        with pyro.plate("images", len(x)):
            pyro.sample("code", SparseCategorical(scores) if self.sparse else dist.Categorical(logits=scores))


@contextmanager
def processes() -> Iterator[tuple[int, int, torch.device]]:
    """The number of this process, how many there are, and its device; torchrun says so by environment variables."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield 0, 1, device
        return
    distributed.init_process_group("nccl" if gpu else "gloo")
    try:
        yield distributed.get_rank(), distributed.get_world_size(), device
    finally:
        distributed.destroy_process_group()


def shares(images: Tensor, epoch: int, batch: int, seed: int, rank: int, world: int) -> list[Tensor]:
    """
    This process's part of each batch, all of one size. The order follows from the epoch's number alone: there is
    nothing to save.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed + epoch)).to(images.device)
    return [images[chosen[rank::world]] for chosen in order.split(batch) if len(chosen) == batch]


def mean_over_processes(value: Tensor) -> Tensor:
    if not distributed.is_initialized():
        return value
    distributed.all_reduce(value)
    return value / distributed.get_world_size()


def train(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
    if args.batch_size % world:
        raise SystemExit(f"--batch-size: expected a multiple of {world} processes, got {args.batch_size}.")
    images = load_digits().train_images.to(device)
    pyro.set_rng_seed(args.seed)
    sparse = args.elbo in ("sparse", "packed")
    model, guide = Model(args.num_codes, args.hidden), Guide(args.num_codes, args.hidden, sparse)
    loss = ELBOS[args.elbo]()(model, guide).to(device)
    parallel = DistributedDataParallel(loss) if world > 1 else loss
    optimizer = torch.optim.Adam(parallel.parameters(), lr=args.learning_rate)
    pyro.set_rng_seed(args.seed + rank)  # each process has its own draws

    checkpoint = Checkpoint(args.checkpoint, loss=loss, optimizer=optimizer) if args.checkpoint else None
    start = checkpoint.load() if checkpoint is not None and checkpoint.exists() else 0
    for epoch in range(start, args.epochs):
        began, total = time.perf_counter(), torch.zeros((), device=device)
        batches = shares(images, epoch, args.batch_size, args.seed, rank, world)
        for x in batches:
            optimizer.zero_grad()
            mean = parallel(x) / len(x)  # so that the average over equal shares is that over the batch
            mean.backward()
            optimizer.step()
            total += mean.detach()
        if checkpoint is not None:
            checkpoint.save(epoch + 1)
        elbo = -mean_over_processes(total).item() / len(batches)
        if rank == 0:
            speed = len(batches) * args.batch_size / (time.perf_counter() - began)
            print(f"epoch {epoch + 1} of {args.epochs}: ELBO {elbo:.4f}, {speed:.0f} images per second", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elbo", choices=ELBOS, default="sparse")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128, help="images of all processes together (128)")
    parser.add_argument("--num-codes", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="saved at each epoch; goes on from it if it is there")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with processes() as (rank, world, device):
        train(args, rank, world, device)


if __name__ == "__main__":
    main()
