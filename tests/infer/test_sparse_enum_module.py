"""SparseEnumELBO where Pyro's own loss fails: without gradients, with a compiled network, with a graph from outside."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_sparse.distributions import SparseCategorical
from pyro_sparse.infer import SparseEnumELBO

K, X = 5, torch.linspace(-1.0, 1.0, 18, dtype=torch.float64).reshape(6, 3)


class Model(pyro.nn.PyroModule):  # type: ignore[misc]
    def __init__(self, compiled: bool = False, noise: bool = False) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(K, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        self.run = torch.compile(self.decoder, backend="aot_eager") if compiled else self.decoder
        self.noise = noise

    def forward(self, scores: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0)) if self.noise else 1.0
        with pyro.plate("d", len(scores)):
            z = pyro.sample("z", SparseCategorical(probs=torch.full((K,), 1 / K)))
            mean = self.run(nn.functional.one_hot(z, K).double())
            pyro.sample("x", dist.Normal(mean, scale).to_event(1), obs=X[: len(scores)])


class Guide(pyro.nn.PyroModule):  # type: ignore[misc]
    def __init__(self, noise: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, K).double()
        self.noise = noise

    def forward(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        if self.noise:
            pyro.sample("scale", dist.LogNormal(pyro.param("loc", torch.zeros(())), 0.1))
        with pyro.plate("d", len(x)):
            pyro.sample("z", SparseCategorical(3 * self.encoder(x)))


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
def test_validation_without_gradients(no_grad: Any) -> None:
    model, guide = Model(), Guide()
    module = SparseEnumELBO(max_plate_nesting=1)(model, guide)
    expected = module(X)
    with no_grad():
        loss = module(X)
    assert not loss.requires_grad and loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected.detach())
    with torch.no_grad(), pytest.raises(ValueError, match="cannot be differentiated"):  # control: stock
        TraceEnum_ELBO(max_plate_nesting=1)(model, config_enumerate(guide))(X)


def test_an_elbo_without_parameters_cannot_be_trained() -> None:
    def program() -> None:
        pyro.sample("z", SparseCategorical(torch.zeros(3)))

    elbo = SparseEnumELBO(max_plate_nesting=0)
    with pytest.raises(ValueError, match=r"expected an ELBO that depends on parameters, got -?0, which does not"):
        elbo.differentiable_loss(program, program)
    with torch.no_grad():
        assert elbo.differentiable_loss(program, program) == 0.0


def losses(elbo: Any, compiled: bool, noise: bool = False) -> list[float]:
    torch.compiler.reset()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(Model(compiled, noise), Guide(noise), Adam({"lr": 0.01}), elbo)  # type: ignore[arg-type]
    return [svi.step(X[: 3 + i]) for i in (0, 1, -1, 3)]  # supports, and so shapes, change


@pytest.mark.slow  # torch takes seconds to compile anything
@pytest.mark.parametrize("mode", ["padded", "auto"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_decoder_under_svi(mode: str) -> None:
    elbo = SparseEnumELBO(mode, max_plate_nesting=1)
    assert losses(elbo, True) == pytest.approx(losses(elbo, False))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_decoder_with_particles() -> None:
    elbo = SparseEnumELBO(max_plate_nesting=1, num_particles=2)
    assert losses(elbo, True, noise=True) == pytest.approx(losses(elbo, False, noise=True))


class Stock(SparseEnumELBO):
    loss_and_grads = TraceEnum_ELBO.loss_and_grads


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_the_loss_of_stock_keeps_graphs_that_a_compiled_network_gives_away() -> None:
    """Negative control. It is once shapes vary that torch compiles so."""
    with pytest.raises(RuntimeError, match="donated buffers"):
        losses(Stock(max_plate_nesting=1), True)


@pytest.mark.parametrize("particles", [1, 3])
def test_gradients_reach_what_was_computed_outside(particles: int) -> None:
    """Also where particles share it; they are those of stock enumeration."""
    found = []
    for make in (SparseEnumELBO, TraceEnum_ELBO):
        pyro.clear_param_store()
        outside = torch.tensor(0.7, requires_grad=True)
        elbo = make(max_plate_nesting=1, num_particles=particles)
        pyro.set_rng_seed(0)
        torch.manual_seed(0)
        model, guide = Model(), Guide()
        elbo.loss_and_grads(model, config_enumerate(guide), outside.exp() * X)
        found += [outside.grad]
    torch.testing.assert_close(*found)
