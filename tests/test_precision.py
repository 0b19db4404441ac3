"""Half precision: noise, estimators and running means."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_sparse._precision import Accumulating
from pyro_sparse._relaxation import draw_with_stand_in, exact_logits, gumbel_like
from pyro_sparse.estimators import (
    ARMS,
    REBAR,
    RELAX,
    DisARM,
    LocalExpectation,
    MovingAverage,
    RaoBlackwell,
    Scaled,
    Sum,
    TrainableConstant,
    UnorderedSet,
)
from pyro_sparse.infer import EstimatorELBO
from pyro_sparse.nn import ConstraintLagrangian, HardConcreteGate

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_noise_and_stand_ins_are_in_float32(dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 3, dtype=dtype)
    assert gumbel_like(logits).dtype == torch.float32
    for jacobian in ("identity", "softmax", "reinmax", "gumbel-softmax", "gumbel-rao"):
        for x in draw_with_stand_in(logits, jacobian, 0.5, 3):  # type: ignore[arg-type]
            assert x.dtype == torch.float32


def test_probabilities_below_the_rounding_of_bfloat16() -> None:
    p = torch.tensor([0.998, 0.002, 0.0], dtype=torch.bfloat16)
    expected = p.float() / p.float().sum()
    torch.testing.assert_close(exact_logits(dist.OneHotCategorical(p)).softmax(-1), expected, rtol=1e-2, atol=1e-9)
    bits = exact_logits(dist.Bernoulli(p)).softmax(-1)[:, 0]
    torch.testing.assert_close(bits, p.float(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_underflows_in_half_precision_is_no_zero(dtype: torch.dtype) -> None:
    logits = torch.tensor([0.0, -20.0, -100.0], dtype=dtype)
    d = dist.Categorical(logits=logits)
    assert d.probs[2] == 0 or dtype == torch.bfloat16  # now torch keeps them
    torch.testing.assert_close(exact_logits(d).to(dtype), logits)


def test_a_mask_in_bfloat16_is_a_zero() -> None:
    logits = torch.tensor([0.0, torch.finfo(torch.bfloat16).min], dtype=torch.bfloat16)
    assert exact_logits(dist.Categorical(logits=logits))[1] == -torch.inf


@pytest.mark.parametrize("dtype", HALVES)
def test_running_sums_stay_in_float32(dtype: torch.dtype) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.baseline = Sum(Scaled(MovingAverage()), MovingAverage(num_data=5))
            self.lagrangian = ConstraintLagrangian(0.3)
            self.norm = nn.BatchNorm1d(2)

    outer = Outer()
    before = {name: buffer.clone() for name, buffer in outer.named_buffers()}
    outer.to(dtype)
    for name, buffer in outer.named_buffers():
        if buffer.is_floating_point():
            assert buffer.dtype == (dtype if name.startswith("norm") else before[name].dtype)
        torch.testing.assert_close(buffer, before[name], check_dtype=False)
    outer.lagrangian.float().to(dtype)
    assert outer.lagrangian.multiplier.dtype == torch.float32


def test_parameters_follow() -> None:
    assert TrainableConstant().to(torch.bfloat16).constant.dtype == torch.bfloat16


def test_a_buffer_in_half_precision_stands_still() -> None:
    """The negative control: why they do not follow."""

    class Follows(ConstraintLagrangian):
        _apply = nn.Module._apply

    value = torch.tensor(1.3)
    right, wrong = ConstraintLagrangian(0.3).to(torch.bfloat16), Follows(0.3).to(torch.bfloat16)
    assert isinstance(right, Accumulating)
    for _ in range(500):
        right(value), wrong(value)
    torch.testing.assert_close(right.multiplier.item(), 5.0, rtol=1e-4, atol=0.0)
    assert wrong.multiplier.item() < 4.1


def test_a_moving_average_of_costs_in_bfloat16() -> None:
    from pyro_sparse.estimators.base import Site

    baseline, site = MovingAverage(beta=0.999).to(torch.bfloat16), Site("z", dist.Bernoulli(torch.tensor(0.5)))
    costs = 100 + torch.randn(2000)
    for cost in costs.to(torch.bfloat16):
        baseline.update(cost, site)
    weights = 0.999 ** torch.arange(1999.0, -1.0, -1.0)
    expected = (weights * costs.to(torch.bfloat16)).sum() / weights.sum()
    torch.testing.assert_close(baseline.mean.double(), expected, rtol=1e-4, atol=0.0)


ESTIMATORS: dict[str, Any] = {
    "ARMS(3)": lambda: ARMS(3),
    "DisARM": DisARM,
    "REBAR": REBAR,
    "RELAX": lambda: RELAX(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).float()),
    "RaoBlackwell": lambda: RaoBlackwell(1),
    "UnorderedSet": lambda: UnorderedSet(2),
    "LocalExpectation": LocalExpectation,
}


@pytest.mark.parametrize("name", [x if x == "ARMS(3)" else pytest.param(x, marks=pytest.mark.slow) for x in ESTIMATORS])
def test_estimators_of_bits_in_bfloat16(name: str) -> None:
    """The mean gradient over 4000 bits of 20 steps: the exact one, to 5 standard errors or the rounding of bfloat16."""
    logit = torch.tensor(-3.0)
    p = logit.sigmoid()
    weight = torch.tensor([0.3, 1.5])

    def cost(z: Tensor) -> Tensor:
        return (weight[0].to(z) + z * weight[1].to(z)) ** 2

    def model() -> None:
        with pyro.plate("data", 4000):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=torch.bfloat16)))
            pyro.factor("f", cost(z))

    theta = logit.to(torch.bfloat16).clone().requires_grad_()

    def guide() -> None:
        with pyro.plate("data", 4000):
            pyro.sample("z", dist.Bernoulli(logits=theta))

    # d/dlogit of E f - KL to Bernoulli(1/2), negated
    f1, f0 = (cost(torch.tensor(x)) for x in (1.0, 0.0))
    exact = -(p * (1 - p) * (f1 - f0 - logit))
    estimator = ESTIMATORS[name]()
    elbo = EstimatorELBO(estimator.to(torch.bfloat16) if name == "RELAX" else estimator)
    gradients = []
    for _ in range(20):
        loss = elbo.differentiable_loss(model, guide) / 4000
        gradients.append(torch.autograd.grad(loss, theta)[0].double())
    g = torch.stack(gradients)
    assert g.isfinite().all()
    assert (g.mean() - exact).abs() < 5 * g.std() / 20**0.5 + 0.02 * exact.abs()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_gate_in_half_precision(dtype: torch.dtype) -> None:
    gate, wide = HardConcreteGate(500), HardConcreteGate(500)
    gate.to(dtype)
    assert gate(torch.ones(3, 500, dtype=dtype)).dtype == dtype
    torch.testing.assert_close(gate.expected_l0, wide.expected_l0.float(), rtol=2e-3, atol=0.0)
    gate.expected_l0.backward()
    assert gate.logits.grad is not None and gate.logits.grad.isfinite().all()
