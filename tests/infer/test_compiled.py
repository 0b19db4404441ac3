"""Networks under torch.compile inside the ELBOs: the same numbers, compiled a bounded number of times."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_sparse.diagnostics import peak_memory
from pyro_sparse.distributions import SparseCategorical
from pyro_sparse.estimators import REBAR, Exact, LeaveOneOut, MuProp
from pyro_sparse.infer import EstimatorELBO, SparseEnumELBO

pytestmark = [
    pytest.mark.slow,  # torch takes seconds to compile anything
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),  # torch looks at it of what it compiles with
]

K, X, STEPS = 100, 5, 20
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")


class Program(pyro.nn.PyroModule):  # type: ignore[misc]
    def __init__(self, one_hot: bool, **options: Any) -> None:
        super().__init__()
        self.one_hot = one_hot
        self.encoder = nn.Sequential(nn.Linear(X, 16), nn.Tanh(), nn.Linear(16, K))
        self.decoder = nn.Sequential(nn.Linear(K, 16), nn.ReLU(), nn.Linear(16, X))
        with torch.no_grad():
            self.encoder[2].weight.mul_(4.0)
        self.encode, self.decode = (
            torch.compile(network, **options) if options else network for network in (self.encoder, self.decoder)
        )

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        family = dist.OneHotCategorical if self.one_hot else dist.Categorical
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", family(logits=torch.zeros(K)))
            z = z if self.one_hot else nn.functional.one_hot(z, K).to(x)
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        scores = self.encode(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=scores) if self.one_hot else SparseCategorical(scores))


def graphs() -> int:
    from torch._dynamo.utils import counters  # torch has no public count

    return int(counters["stats"]["unique_graphs"])


def train(elbo: Any, one_hot: bool, steps: int = STEPS, **options: Any) -> tuple[Tensor, list[int]]:
    """Losses and gradients of steps whose batches have other sizes and supports; graphs compiled so far at each."""
    torch.compiler.reset()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    program, seen, compiled, before = Program(one_hot, **options), [], [], graphs()
    optimiser = torch.optim.SGD(program.parameters(), 1e-3)
    for step in range(steps):
        torch.manual_seed(step)
        x = (1 + step % 3) * torch.randn(20 + step % 2, X)
        optimiser.zero_grad()
        seen.append(torch.tensor([elbo.loss_and_grads(program.model, program.guide, x)]))
        seen += [p.grad.flatten() for p in program.parameters() if p.grad is not None]
        optimiser.step()
        compiled.append(graphs() - before)
    return torch.cat(seen), compiled


ELBOS: dict[str, tuple[Callable[[], Any], bool]] = {
    **{mode: (lambda mode=mode: SparseEnumELBO(mode, max_plate_nesting=1), False) for mode in ("padded", "union")},
    **{mode: (lambda mode=mode: SparseEnumELBO(mode, max_plate_nesting=1), False) for mode in ("packed", "auto")},
    "chunks of 1": (lambda: SparseEnumELBO("packed", chunk_rows=1, max_plate_nesting=1), False),
    "chunks of 7": (lambda: SparseEnumELBO("packed", chunk_rows=7, max_plate_nesting=1), False),
    "Exact": (lambda: EstimatorELBO(Exact(), max_plate_nesting=1), False),
    "LeaveOneOut": (lambda: EstimatorELBO(LeaveOneOut(4), max_plate_nesting=1), False),
    "frozen REBAR": (lambda: EstimatorELBO(REBAR().requires_grad_(False), max_plate_nesting=1), True),
    "MuProp": (lambda: EstimatorELBO(MuProp(), max_plate_nesting=1), True),
}


CASES = [(name, None, False) for name in ELBOS] + [("padded", True, False), ("padded", None, True)]


@pytest.mark.parametrize(("name", "dynamic", "validated"), CASES)
def test_the_same_numbers_from_few_graphs(name: str, dynamic: bool | None, validated: bool) -> None:
    """A graph for each number of dims, and one for sizes that vary; comparisons under validation have others still."""
    make, one_hot = ELBOS[name]
    steps = 6 if "chunks" in name else STEPS
    with pyro.validation_enabled(validated):
        expected, _ = train(make(), one_hot, steps)
        got, compiled = train(make(), one_hot, steps, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert 2 <= compiled[0] <= compiled[-1] <= 8
    assert compiled[min(6, steps - 1)] == compiled[-1]


@needs_compiler
@pytest.mark.parametrize("name", ["padded", "packed"])
def test_machine_code(name: str) -> None:
    make, one_hot = ELBOS[name]
    with pyro.validation_enabled(False):
        expected, _ = train(make(), one_hot, 6)
        got, _ = train(make(), one_hot, 6, backend="inductor", dynamic=True)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("watch", ["peak_memory", "costs"])
def test_what_watches_operations_leaves_networks_to_be_compiled(watch: str) -> None:
    """Torch gives up a network that it first meets under a mode, unless it is told to run eagerly."""
    torch.compiler.reset()
    program, x = Program(False, backend="eager"), torch.randn(20, X)
    with pyro.validation_enabled(False):
        if watch == "peak_memory":
            with peak_memory():
                program.decode(torch.zeros(2, K))
        else:
            EstimatorELBO(LeaveOneOut(2), costs="graph").loss(program.model, program.guide, x)
    before = graphs()
    program.decode(torch.zeros(20, K))
    assert graphs() == before + 1


def test_a_network_that_cannot_be_differentiated_twice() -> None:
    with pytest.raises(RuntimeError, match=r"^REBAR: expected a model that can be differentiated twice"):
        train(EstimatorELBO(REBAR(), max_plate_nesting=1), True, 1, backend="aot_eager")
    train(EstimatorELBO(REBAR(), max_plate_nesting=1), True, 1, backend="eager")
