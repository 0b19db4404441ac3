"""``pyro.plate("data")`` without a size: that of the site's batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_sparse.estimators import (
    VIMCO,
    DisARM,
    Estimator,
    Exact,
    LeaveOneOut,
    MovingAverage,
    NeuralBaseline,
    RaoBlackwell,
    SampleBaseline,
    ScoreFunction,
)
from pyro_sparse.infer import EstimatorELBO, SparseEnumELBO

N = 4


def program(size: int | None, nested: bool) -> tuple[Any, Any, Tensor]:
    x = torch.linspace(-1.0, 1.0, N)[:, None].expand(N, 2).contiguous()

    def sites(bits: Any, observe: bool) -> None:
        with pyro.plate("data", size, dim=-2 if nested else -1):
            z = pyro.sample("z", bits)
            if observe and nested:
                with pyro.plate("inner", dim=-1):
                    pyro.sample("x", dist.Normal(z * torch.tensor([1.0, 0.5]), 1.0), obs=x)
            elif observe:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def model(x: Tensor) -> None:
        sites(dist.Bernoulli(torch.full((N, 1) if nested else (N,), 0.4)), True)

    def guide(x: Tensor) -> None:
        logits = pyro.param("logits", torch.linspace(-1.0, 2.0, N))
        sites(dist.Bernoulli(logits=logits[:, None] if nested else logits), False)

    return model, guide, x


def step(elbo: ELBO, size: int | None, nested: bool) -> tuple[float, Tensor]:
    pyro.clear_param_store()
    model, guide, x = program(size, nested)
    losses = []
    for seed in range(2):  # the second by what the first has left in baselines
        pyro.set_rng_seed(seed)
        losses.append(elbo.loss_and_grads(model, guide, x))
    return losses[-1], pyro.param("logits").grad


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(2, 1)


ELBOS: dict[str, Callable[[], ELBO]] = {
    "plain": lambda: EstimatorELBO(ScoreFunction()),
    "table": lambda: EstimatorELBO(ScoreFunction(MovingAverage(num_data=N))),
    "network": lambda: EstimatorELBO(ScoreFunction(NeuralBaseline(network()))),
    "sample": lambda: EstimatorELBO(ScoreFunction(SampleBaseline())),
    "leave-one-out": lambda: EstimatorELBO(LeaveOneOut(2)),
    "one by one": lambda: EstimatorELBO(LeaveOneOut(2, vectorized=False)),
    "VIMCO": lambda: EstimatorELBO(VIMCO(2)),
    "DisARM": lambda: EstimatorELBO(DisARM()),
    "Rao-Blackwell": lambda: EstimatorELBO(RaoBlackwell()),
    "exact": lambda: EstimatorELBO(Exact()),
    "sparse": lambda: SparseEnumELBO(strict_enumeration_warning=False),
}


@pytest.mark.parametrize("nested", [False, True], ids=["plate", "plates"])
@pytest.mark.parametrize("name", ELBOS)
def test_the_same_numbers_as_with_the_size(name: str, nested: bool) -> None:
    expected, expected_grad = step(ELBOS[name](), N, nested)
    got, grad = step(ELBOS[name](), None, nested)
    assert got == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_one_draw_for_the_whole_plate() -> None:
    """A site that has no batch of its own: the network sees one row."""
    seen: list[torch.Size] = []

    class Look(ScoreFunction):
        def forward(self, cost: Tensor, site: Any) -> tuple[Tensor, Tensor | float]:
            seen.append(site.batch_shape)
            return super().forward(cost, site)

    def model() -> None:
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(N))

    def guide() -> None:
        with pyro.plate("data"):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", torch.tensor(0.3))))

    estimator: Estimator = Look()
    EstimatorELBO(estimator).loss_and_grads(model, guide)
    assert seen == [(1,)]
