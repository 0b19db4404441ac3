"""Training on two processes, and in Lightning, against one process on the joined batch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

import pyro_sparse.distributions as sdist
from pyro_sparse.infer import Checkpoint
from tests.infer.digests import BITS, ONE_HOT, SPARSE
from tests.infer.on_two_processes import EXACT, Guide, Model, data, gradient, make, on_two

pytestmark = pytest.mark.slow  # a process takes five seconds to import torch

SCRIPT = Path(__file__).parents[2] / "tutorials" / "train_distributed.py"
CUTS = (4, 7, 1, 6)  # of eight rows; the first process's supports are the small ones


def exact_gradients(rank: int, folder: Path) -> Any:
    found = {}
    for name in EXACT:
        loss = make(name)
        parallel = DistributedDataParallel(loss)
        for cut in CUTS:
            x = data(8)
            parallel.zero_grad()
            (2 * parallel(x[:cut] if rank == 0 else x[cut:])).backward()
            found[f"{name} {cut}"] = gradient(parallel), loss.elbo.last_stats.max
    return found


def test_gradients_of_the_joined_batch(tmp_path: Path) -> None:
    """Supports of different size on each process, a batch of one example, ``auto`` free to choose for itself."""
    both = on_two(exact_gradients, tmp_path)
    for name in EXACT:
        loss = make(name)
        loss(data(8)).backward()
        expected = gradient(loss)
        for cut in CUTS:
            (first, small), (second, large) = (found[f"{name} {cut}"] for found in both)
            torch.testing.assert_close(first, expected, rtol=0, atol=1e-10)
            assert torch.equal(first, second)
            assert small < large


class Global(PyroModule):
    """A guide, and a model, with a site outside of the plate, which says how many rows there are in all."""

    def __init__(self, is_model: bool) -> None:
        super().__init__()
        self.is_model = is_model
        self.net = "prior" if is_model else "posterior"  # names are global in Pyro
        self.add_module(self.net, torch.nn.Linear(3, 4))
        if not is_model:
            self.weight = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> None:
        prior = dist.Normal(x.new_zeros(()), 1.0) if self.is_model else dist.Delta(self.weight)
        w = pyro.sample("w", prior)
        with pyro.plate("data", 40, subsample_size=len(x)), poutine.scale(scale=0.5):
            logits = getattr(self, self.net)(x)
            family = dist.Categorical(logits=logits) if self.is_model else sdist.SparseCategorical(logits)
            z = pyro.sample("z", family)
            if self.is_model:
                pyro.sample("x", dist.Normal(w * z, 1.0), obs=x[:, 0])


def global_site(name: str) -> torch.nn.Module:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    return EXACT[name]()(Global(True), Global(False))  # type: ignore[no-any-return]


def global_gradients(rank: int, folder: Path) -> Any:
    found = {}
    for name in EXACT:
        parallel = DistributedDataParallel(global_site(name))
        x = data(8)
        with parallel.no_sync():
            parallel(x[rank::2] / 2).backward()
        parallel(x[rank::2]).backward()
        found[name] = gradient(parallel)
    return found


def test_a_site_outside_of_the_plate(tmp_path: Path) -> None:
    """The plate says how many rows there are, and the average over processes is right; gradients are accumulated."""
    first, second = on_two(global_gradients, tmp_path)
    for name in EXACT:
        loss = global_site(name)
        loss(data(8) / 2).backward()
        loss(data(8)).backward()
        expected = torch.cat([p.grad.flatten() for n, p in loss.named_parameters() if p.grad is not None])
        torch.testing.assert_close(first[name], expected, rtol=0, atol=1e-10)
        assert torch.equal(first[name], second[name])


DRAWS = 1500


def drawn_gradients(rank: int, folder: Path) -> Any:
    x = data(8)
    parallel = DistributedDataParallel(make("leave-one-out"))
    torch.manual_seed(100 + rank)
    found = []
    for _ in range(DRAWS):
        parallel.zero_grad()
        (2 * parallel(x[:3] if rank == 0 else x[3:])).backward()
        found.append(gradient(parallel).clone())
    return torch.stack(found)


def test_leave_one_out_in_expectation(tmp_path: Path) -> None:
    """Failure rate: 42 z-tests at 4.5 standard errors, 3e-4."""
    first, second = on_two(drawn_gradients, tmp_path)
    assert torch.equal(first, second)
    exact = EXACT["exact"]()(Model(), Guide(sparse=False))
    exact.load_state_dict(make("leave-one-out").state_dict())
    exact(data(8)).backward()
    error = first.mean(0) - gradient(exact)
    assert (error.abs() < 4.5 * first.std(0) / DRAWS**0.5 + 1e-12).all()
    assert (first.std(0) > 0).sum() > 20


def learned_state(rank: int, folder: Path) -> Any:
    found = {}
    for name in ("average", "learned", "leave-one-out"):
        loss = make(name)
        parallel = DistributedDataParallel(loss)
        optimiser = torch.optim.Adam(parallel.parameters(), lr=0.05)
        torch.manual_seed(rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(5):
                optimiser.zero_grad()
                parallel(data(8)[rank::2]).backward()
                optimiser.step()
        parallel(data(8)[:2])  # its means come from process 0 as a step begins
        said = [str(w.message) for w in caught if "running means" in str(w.message)]
        found[name] = [p.detach() for p in loss.parameters()], said
        means = [b.clone() for b in loss.buffers()]
        parallel.eval()
        with torch.no_grad():
            parallel(data(8)[:2])
        found[name] += ([b.clone() for b in loss.buffers()], means)
    return found


def test_what_baselines_learn(tmp_path: Path) -> None:
    """Parameters are the same on both processes; running means are those of process 0, as a warning says once."""
    first, second = on_two(learned_state, tmp_path)
    for name in ("average", "learned"):
        (here, said, sent, means), (there, other, received, _) = first[name], second[name]
        assert sent
        assert all(map(torch.equal, here, there))
        assert len(said) == 1 and "those of process 0" in said[0] and other == []
        assert all(map(torch.equal, sent, received)) and all(map(torch.equal, sent, means))
    assert first["leave-one-out"][1] == [], "it has no means"


def ragged(rank: int, folder: Path) -> Any:
    """Five batches on the first process, two on the second, the last of which is smaller, in torch's own context."""
    parallel = DistributedDataParallel(make("padded"))
    optimiser = torch.optim.SGD(parallel.parameters(), lr=0.01)
    batches = [data(8)[:4]] * 5 if rank == 0 else [data(8)[4:], data(8)[6:7]]
    with parallel.join():
        for x in batches:
            optimiser.zero_grad()
            parallel(x).backward()
            optimiser.step()
    return [p.detach() for p in parallel.parameters()]


def test_a_process_that_has_no_more_data_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    first, second = on_two(ragged, tmp_path)
    assert all(map(torch.equal, first, second))


def branching(rank: int, folder: Path) -> None:
    parallel = DistributedDataParallel(make("padded", branch=True))
    x = data(8).abs() if rank == 0 else -data(8).abs()
    parallel(x).backward()


def branching_allowed(rank: int, folder: Path) -> Any:
    parallel = DistributedDataParallel(make("padded", branch=True), find_unused_parameters=True)
    x = data(8).abs() if rank == 0 else -data(8).abs()
    parallel(x).backward()
    return gradient(parallel)


def test_a_parameter_that_one_process_leaves_out_is_named(tmp_path: Path) -> None:
    expected = r"(?s)ValueError: SparseEnumELBO: expected a loss of all parameters on every process, got one without "
    expected += r"\['guide\.other\.weight', 'guide\.other\.bias'\] on process 1.*find_unused_parameters=True"
    (tmp_path / "refused").mkdir()
    with pytest.raises(ProcessRaisedException, match=expected):
        on_two(branching, tmp_path / "refused")
    first, second = on_two(branching_allowed, tmp_path)
    assert torch.equal(first, second)


def checkpoints(rank: int, folder: Path) -> Any:
    """Random numbers of each process's own, and what goes wrong on one process."""
    order = torch.Generator().manual_seed(10 + rank)
    own = Checkpoint(folder / "own.pt", order=order)
    own.save(1)
    expected = torch.rand(2, generator=order), torch.rand(2)
    assert own.load() == 1
    found = torch.rand(2, generator=order), torch.rand(2)

    if rank == 0:
        (folder / "only0.pt").write_bytes(b"")
    torch.distributed.barrier()
    refused = []
    name = f"only{rank}.pt"  # as where each process has a disk of its own
    with pytest.raises(ValueError) as error:
        Checkpoint(folder / name).exists()
    refused.append(str(error.value))
    with pytest.raises(ValueError) as error:
        own.save(rank)
    refused.append(str(error.value))
    pyro.param("w", torch.zeros(2) + rank)
    with pytest.raises(ValueError) as error:
        own.save(2)
    refused.append(str(error.value))
    pyro.clear_param_store()
    return expected, found, refused, own.load()


def test_a_checkpoint_of_two_processes(tmp_path: Path) -> None:
    both = on_two(checkpoints, tmp_path)
    for expected, found, refused, step in both:
        assert all(map(torch.equal, expected, found))
        assert step == 1, "what was refused has changed the file"
        assert "expected all processes to see the file, got [True, False]" in refused[0]
        assert "expected one step on all processes" in refused[1]
        assert "expected the same parameters on all processes" in refused[2] and "['w']" in refused[2]
    assert not any(map(torch.equal, both[0][1], both[1][1]))


def processes(*arguments: Any) -> list[subprocess.Popen[bytes]]:
    """What torchrun starts, whose processes outlive it when it is killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [subprocess.Popen(command, env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]


def test_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    options = ["--epochs", "1", "--num-codes", "16", "--hidden", "32"]
    two = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=120).stdout
    one = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=True).stdout
    line = r"epoch 1 of 1: ELBO (-\d+\.\d{4}), \d+ images per second"
    elbos = [float(re.fullmatch(line, out.strip()).group(1)) for out in (one, two)]  # type: ignore[union-attr]
    assert elbos[0] == pytest.approx(elbos[1], abs=0.02), "the same batches, the same starting point"


def test_killed_and_resumed(tmp_path: Path) -> None:
    """Bit for bit what an uninterrupted run is: parameters, means, optimiser and random states of both processes."""
    options = ["--epochs", 6, "--elbo", "average", "--num-codes", 16, "--hidden", 32, "--checkpoint"]
    assert [p.wait(120) for p in processes(*options, tmp_path / "whole.pt")] == [0, 0]
    killed = processes(*options, tmp_path / "killed.pt")
    while not (tmp_path / "killed.pt").exists():
        assert killed[0].poll() is None
        time.sleep(0.01)
    for process in killed:
        process.kill()
        process.wait()
    assert torch.load(tmp_path / "killed.pt", weights_only=True)["step"] < 6, "it was over before the kill"
    assert [p.wait(120) for p in processes(*options, tmp_path / "killed.pt")] == [0, 0]
    whole, resumed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "killed"))
    assert_same(resumed, whole)
    assert len(whole["random"]) == 2


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def test_the_same_numbers_in_every_process() -> None:
    """Bit for bit, though Python orders its sets by another seed in each; sums would take over that order."""
    outputs = []
    for seed in ("1", "2", "3"):
        command = [sys.executable, "-W", "ignore", "-m", "tests.infer.digests"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            command, env=environment, cwd=SCRIPT.parents[1], capture_output=True, text=True, check=True
        )
        outputs.append(run.stdout.splitlines())
    assert len(outputs[0]) == len(ONE_HOT) + len(BITS) + len(SPARSE)
    assert outputs[0] == outputs[1] == outputs[2]
