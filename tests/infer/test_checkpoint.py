"""A training in a file goes on with the same bits, and no kill leaves half a file."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_sparse.distributions as sdist
from pyro_sparse.estimators import RELAX, LeaveOneOut, MovingAverage, NeuralBaseline, Sum
from pyro_sparse.infer import BaselineELBO, Checkpoint, EstimatorELBO, SparseEnumELBO

DATA = torch.tensor([[0.3, -1.0], [1.0, 0.2], [-0.4, 0.1], [0.8, 0.8]], dtype=torch.float64)
ELBOS: dict[str, Any] = {
    "padded": lambda: SparseEnumELBO(max_plate_nesting=1),
    "packed": lambda: SparseEnumELBO("packed", max_plate_nesting=1),
    "auto": lambda: SparseEnumELBO("auto", max_plate_nesting=1),
    "average": lambda: BaselineELBO(MovingAverage()),
    "learned": lambda: BaselineELBO({"z": Sum(MovingAverage(), NeuralBaseline(nn.Linear(2, 1)))}),
    "learned *": lambda: BaselineELBO(Sum(MovingAverage(), NeuralBaseline(nn.Linear(2, 1)))),
    "leave-one-out": lambda: EstimatorELBO(LeaveOneOut(3)),
    "relax": lambda: EstimatorELBO(RELAX(nn.Linear(4, 1))),
}


class Run:
    """A training under SVI with dropout, a normalisation and a scheduler: everything that has a state."""

    def __init__(self, name: str, path: Path) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        self.encoder = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 4), nn.Dropout(0.3))
        self.sparse = name in ("padded", "packed", "auto")
        self.one_hot = name == "relax"
        self.elbo = ELBOS[name]()
        self.optimizer = pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.9}
        )
        self.svi = SVI(self.model, self.guide, self.optimizer, loss=self.elbo)
        self.order = torch.Generator().manual_seed(5)
        self.checkpoint = Checkpoint(path, svi=self.svi, encoder=self.encoder, order=self.order)

    def model(self, x: Tensor) -> None:
        scale = pyro.param("scale", lambda: torch.rand(4).double() + 1.0, constraint=dist.constraints.positive)
        prior = dist.OneHotCategorical if self.one_hot else dist.Categorical
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(logits=x.new_zeros(4)))
            loc = z @ scale if self.one_hot else scale[z.long()]
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[:, 0])

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        scores = self.encoder(x)
        family = sdist.SparseCategorical if self.sparse else dist.Categorical
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=scores) if self.one_hot else family(logits=scores))

    def steps(self, number: int) -> list[float]:
        losses = []
        for _ in range(number):
            losses.append(self.svi.step(DATA[torch.randperm(4, generator=self.order)]))
            self.optimizer.step()
        return losses

    def state(self) -> dict[str, Tensor]:
        elbo = self.elbo.state_dict() if isinstance(self.elbo, nn.Module) else {}
        store = pyro.get_param_store().named_parameters()
        return {k: v.detach().clone() for k, v in [*store, *elbo.items(), *self.encoder.state_dict().items()]}


@pytest.mark.parametrize("name", ELBOS)
def test_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    run = Run(name, tmp_path / "run.pt")
    run.steps(4)
    run.checkpoint.save(4)
    expected, state = run.steps(4), run.state()

    resumed = Run(name, tmp_path / "run.pt")
    pyro.set_rng_seed(11)
    resumed.svi.evaluate_loss(DATA)
    assert resumed.checkpoint.load() == 4
    assert resumed.steps(4) == expected
    after = resumed.state()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)


def drawn() -> tuple[float, ...]:
    return random.random(), np.random.rand(), float(torch.rand(()))


def saved(tmp_path: Path, name: str = "padded", steps: int = 1) -> Run:
    run = Run(name, tmp_path / "run.pt")
    run.steps(steps)
    run.checkpoint.save(steps)
    return run


def started(tmp_path: Path, name: str = "padded") -> Run:
    run = Run(name, tmp_path / "run.pt")
    run.svi.evaluate_loss(DATA)
    return run


def test_random_states_of_all_three(tmp_path: Path) -> None:
    saved(tmp_path)
    expected = drawn()
    started(tmp_path).checkpoint.load()
    assert drawn() == expected
    resumed = started(tmp_path)
    pyro.set_rng_seed(8)
    fresh = drawn()
    pyro.set_rng_seed(8)
    resumed.checkpoint.load(random_state=False)
    assert drawn() == fresh != expected


def test_a_state_that_waits_for_its_parameter_is_saved_again(tmp_path: Path) -> None:
    """Pyro's optimiser holds what it loaded until it meets the parameter."""
    run = saved(tmp_path, steps=3)
    expected = run.steps(2)
    between = started(tmp_path)
    between.checkpoint.load()
    between.checkpoint.save(3)
    resumed = started(tmp_path)
    resumed.checkpoint.load()
    assert resumed.steps(2) == expected


class Guide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=self.net(x)))


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=x.new_zeros(4)))
        pyro.sample("x", dist.Normal(z.to(x.dtype), 1.0), obs=x[:, 0])


class TorchRun:
    def __init__(self, path: Path) -> None:
        pyro.clear_param_store()
        self.loss = ELBOS["learned"]()(model, Guide())
        self.optimiser = torch.optim.Adam(self.loss.parameters(), lr=0.05)
        self.checkpoint = Checkpoint(path, loss=self.loss, optimiser=self.optimiser)

    def steps(self) -> list[float]:
        losses = []
        for _ in range(3):
            self.optimiser.zero_grad()
            value = self.loss(DATA)
            value.backward()
            self.optimiser.step()
            losses.append(value.item())
        return losses


def test_a_torch_optimiser_and_the_module_of_a_loss(tmp_path: Path) -> None:
    """Loaded before the first run: there the module has all its parameters."""
    run = TorchRun(tmp_path / "run.pt")
    run.steps()
    run.checkpoint.save(3)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["params"] == {}, "what a part holds is in the file once"
    expected = run.steps()
    resumed = TorchRun(tmp_path / "run.pt")
    assert resumed.checkpoint.load() == 3
    assert resumed.steps() == expected


KILLS = """
import itertools, os, signal, sys, time
import pyro, torch
from pyro_sparse.infer import Checkpoint

torch.set_num_threads(1)
path = sys.argv[1]
weight = pyro.param("weight", torch.zeros(500_000))
checkpoint = Checkpoint(path)
checkpoint.save(0)
for attempt in range(20):
    child = os.fork()
    if child == 0:
        for step in itertools.count():
            with torch.no_grad():
                weight.fill_(step)
            checkpoint.save(step)
    time.sleep(0.03 + 0.0037 * attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = torch.load(path, weights_only=True)
    assert (state["params"]["weight"][0] == state["step"]).all()
    print(state["step"], os.path.exists(path + ".part"))
"""


@pytest.mark.slow  # a process of its own
def test_a_kill_leaves_a_whole_file(tmp_path: Path) -> None:
    """A process that does nothing but save is killed at twenty moments, some of them while it writes."""
    command = [sys.executable, "-c", KILLS, str(tmp_path / "run.pt")]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 20
    assert any(line.endswith("True") for line in lines), "no kill came while a file was written"
    assert any(not line.startswith("0 ") for line in lines), "no kill came after one was"


# What is refused


def test_an_elbo_that_is_no_part(tmp_path: Path) -> None:
    run = Run("learned", tmp_path / "run.pt")
    run.steps(1)
    with pytest.raises(ValueError, match=r"expected the ELBO among the parts.*net\.weight.*elbo=elbo"):
        Checkpoint(tmp_path / "run.pt", optimizer=run.optimizer).save(1)
    Checkpoint(tmp_path / "run.pt", optimizer=run.optimizer, elbo=run.elbo).save(1)


def test_a_part_without_a_state(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"part 'elbo'.*SparseEnumELBO"):
        Checkpoint(tmp_path / "run.pt", elbo=SparseEnumELBO())


class Own:
    """A state that nothing but pickle would read."""

    def __init__(self) -> None:
        self.value: Any = object()

    def get_state(self) -> Any:
        return self.value

    def set_state(self, state: Any) -> None:
        self.value = state


def test_a_state_of_other_objects_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    own = Own()
    own.value = 7
    checkpoint = Checkpoint(tmp_path / "run.pt", own=own)
    checkpoint.save(3)
    own.value = Own()
    with pytest.raises(ValueError, match=r"parts \['own'\]: expected states of tensors.*Own"):
        checkpoint.save(4)
    assert [f.name for f in tmp_path.iterdir()] == ["run.pt"]
    assert checkpoint.load() == 3
    assert own.value == 7


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "run.pt"
    run = started(tmp_path)
    before = run.state()
    with pytest.raises(
        ValueError, match=r"expected parts as saved, \{'svi\.optim': 'Adam'.*got \{'svi\.optim': 'Adam'\}"
    ):
        Checkpoint(path, svi=run.svi).load()
    sgd = SVI(run.model, run.guide, pyro.optim.SGD({"lr": 0.1}), run.elbo)
    with pytest.raises(ValueError, match=r"'svi\.optim': 'Adam'.*got \{'svi\.optim': 'SGD'"):
        Checkpoint(path, svi=sgd, encoder=run.encoder, order=run.order).load()
    with pyro.get_param_store().scope():
        with pytest.raises(ValueError, match=r"param store without \['scale'\].*svi\.evaluate_loss"):
            run.checkpoint.load()
        pyro.param("scale", torch.full((4,), 0.5), constraint=dist.constraints.unit_interval)
        with pytest.raises(
            ValueError, match=r"torch\.float64 \(4,\), GreaterThan.*got .*torch\.float64 \(4,\), Interval"
        ):
            run.checkpoint.load()
    pyro.param("more", torch.zeros(2))
    with pytest.raises(ValueError, match=r"expected the parameters that were saved, \{'more': 'none'\}"):
        run.checkpoint.load()
    del pyro.get_param_store()["more"]
    assert all(torch.equal(v, before[k]) for k, v in run.state().items())
    run.checkpoint.load()


def test_a_part_that_refuses_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    Checkpoint(tmp_path / "run.pt", net=net, adam=torch.optim.Adam(net.parameters())).save(1)
    other = nn.Linear(2, 2)
    before = other.weight.detach().clone()
    with pytest.raises(ValueError, match="parameter group"):
        Checkpoint(tmp_path / "run.pt", net=other, adam=torch.optim.Adam([other.weight])).load()
    assert torch.equal(other.weight, before)


@pytest.mark.parametrize("content", [b"", b"half of a file", b"PK\x03\x04"])
def test_half_a_file_and_none(tmp_path: Path, content: bytes) -> None:
    checkpoint = Checkpoint(tmp_path / "run.pt")
    with pytest.raises(FileNotFoundError, match=r"expected a file, got none\. Ask exists\(\)"):
        checkpoint.load()
    (tmp_path / "run.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a whole file of Checkpoint\.save, got another"):
        checkpoint.load()
    torch.save({"weights": torch.zeros(2)}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"expected a whole file of Checkpoint\.save, got another"):
        checkpoint.load()


def test_where_a_file_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / "none" / "run.pt"):
        with pytest.raises(ValueError, match="expected a file in a folder that exists"):
            Checkpoint(path)
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint("run.pt")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    checkpoint.save(1)
    assert checkpoint.exists()
    (tmp_path / "latest.pt").symlink_to(tmp_path / "run.pt")
    Checkpoint(tmp_path / "latest.pt").save(2)
    assert (tmp_path / "latest.pt").is_symlink()
    assert checkpoint.load() == 2


@pytest.mark.parametrize("step", ["3", 3.5, None, -1, True])
def test_a_step_is_a_number(tmp_path: Path, step: Any) -> None:
    with pytest.raises(TypeError, match="expected the number of the next step"):
        Checkpoint(tmp_path / "run.pt").save(step)
    Checkpoint(tmp_path / "run.pt").save(np.int64(4))  # type: ignore[arg-type]
    assert Checkpoint(tmp_path / "run.pt").load() == 4


def test_back_to_an_earlier_step(tmp_path: Path) -> None:
    """In the same program, whose optimiser has been at work since."""
    run = saved(tmp_path, "learned", steps=2)
    expected = run.steps(3)
    assert run.checkpoint.load() == 2
    assert run.steps(3) == expected


def test_parameters_that_come_late(tmp_path: Path) -> None:
    """Made in a step of their own: the program is run until they are there."""

    def late(run: Run) -> list[float]:
        pyro.param("late", lambda: torch.rand(2))
        return run.steps(2)

    run = saved(tmp_path)
    late(run)
    run.checkpoint.save(3)
    expected = run.steps(2)
    resumed = started(tmp_path)
    with pytest.raises(ValueError, match=r"without \['late'\].*or svi\.step"):
        resumed.checkpoint.load()
    late(resumed)
    assert resumed.checkpoint.load() == 3
    assert resumed.steps(2) == expected
