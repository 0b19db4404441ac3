"""ConstraintLagrangian: the constrained optimum and its price, the term by its formula, state, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_sparse.nn import ConstraintLagrangian, HardConcreteGate

CENTER = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def solve(lagrangian: ConstraintLagrangian, value: Callable[[Tensor], Tensor] = torch.sum, steps: int = 700) -> Tensor:
    """Minimises half the squared distance to CENTER."""
    theta = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([theta], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (theta - CENTER).square().sum() + lagrangian(value(theta))).backward()
        optimizer.step()
    return theta.detach()


@pytest.mark.parametrize("damping", [0.0, 1.0])
@pytest.mark.parametrize(
    "kind, target, price",
    [
        # Projected onto the plane where the coordinates sum to t, CENTER moves by (6 - t) / 3 in each.
        ("equal", 3.0, 1.0),
        ("equal", 9.0, -1.0),
        ("at_most", 3.0, 1.0),
        ("at_least", 9.0, -1.0),
        ("at_most", 9.0, 0.0),
        ("at_least", 3.0, 0.0),
    ],
)
def test_the_optimum_and_its_price(kind: Any, target: float, price: float, damping: float) -> None:
    lagrangian = ConstraintLagrangian(target, kind, rate=0.02, damping=damping)
    torch.testing.assert_close(solve(lagrangian), CENTER - price, atol=1e-4, rtol=0)
    torch.testing.assert_close(lagrangian.multiplier, torch.tensor(price), atol=1e-4, rtol=0)


def test_a_noisy_value_is_on_target_on_average() -> None:
    lagrangian = ConstraintLagrangian(3.0, rate=0.01, damping=1.0)
    theta = solve(lagrangian, lambda theta: theta.sum() + torch.randn(()), steps=1500)
    assert abs(float(theta.sum()) - 3) < 1.0 and abs(float(lagrangian.multiplier) - 1) < 0.3


@pytest.mark.parametrize("kind", ["equal", "at_most", "at_least"])
@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("multiplier", [0.0, 0.7, -0.7])
def test_the_term_and_its_gradient(kind: Any, damping: float, multiplier: float) -> None:
    """The augmented Lagrangian, whose gradient is the push; a one-sided push has one sign only."""
    allowed = {"equal": (-math.inf, math.inf), "at_most": (0.0, math.inf), "at_least": (-math.inf, 0.0)}[kind]
    lagrangian = ConstraintLagrangian(2.0, kind, rate=0.1, damping=damping)
    lagrangian.multiplier.fill_(min(max(multiplier, allowed[0]), allowed[1]))
    for v in (1.0, 1.9, 2.0, 2.2, 4.0):
        value, before = torch.tensor(v, requires_grad=True), float(lagrangian.multiplier)
        term = lagrangian(value)
        (grad,) = torch.autograd.grad(term, value)
        push = min(max(before + damping * (v - 2), allowed[0]), allowed[1])
        assert float(grad) == pytest.approx(push, abs=1e-12)
        if push != 0 or damping == 0:
            assert float(term.detach()) == pytest.approx(before * (v - 2) + damping / 2 * (v - 2) ** 2, abs=1e-12)
        else:
            assert float(term.detach()) == pytest.approx(-(before**2) / (2 * damping), abs=1e-12)
        after = min(max(before + 0.1 * (v - 2), allowed[0]), allowed[1])
        assert float(lagrangian.multiplier) == pytest.approx(after, abs=1e-12)


def test_eval_leaves_the_multiplier() -> None:
    lagrangian = ConstraintLagrangian(0.0)
    lagrangian(torch.tensor(5.0))
    before = lagrangian.multiplier.clone()
    lagrangian.eval()(torch.tensor(5.0))
    assert before > 0 and torch.equal(lagrangian.multiplier, before)


@pytest.mark.parametrize(
    "kind, slope, share",
    [("equal", -1.0, 0.3), ("equal", 1.0, 0.3), ("at_most", -1.0, 0.3), ("at_least", 1.0, 0.3), ("at_most", 1.0, 0.05)],
)
def test_gates_meet_a_share(kind: Any, slope: float, share: float) -> None:
    """Of a loss that changes by ``slope`` with the share of open gates, the price is -slope where there is one."""
    gate, lagrangian = HardConcreteGate(50), ConstraintLagrangian(0.3, kind, rate=0.1, damping=10.0)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        is_open = gate.expected_l0 / 50
        (slope * is_open + lagrangian(is_open)).backward()
        optimizer.step()
    assert abs(float(gate.expected_l0.detach()) / 50 - share) < 0.02
    assert abs(float(lagrangian.multiplier) - (-slope if share == 0.3 else 0.0)) < 0.1


def test_a_run_resumes_exactly() -> None:
    def step(gate: HardConcreteGate, lagrangian: ConstraintLagrangian, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss = (gate(torch.ones(8, 5)).sum(-1) - 3).square().mean()
        (loss + lagrangian(gate.expected_l0 / 5)).backward()
        optimizer.step()

    def start() -> tuple[HardConcreteGate, ConstraintLagrangian, torch.optim.Optimizer]:
        gate = HardConcreteGate(5)
        return gate, ConstraintLagrangian(0.3), torch.optim.Adam(gate.parameters(), lr=0.1)

    whole, part = start(), start()
    torch.manual_seed(0)
    for _ in range(20):
        step(*whole)
    torch.manual_seed(0)
    for _ in range(10):
        step(*part)
    buffer = io.BytesIO()
    torch.save([thing.state_dict() for thing in part], buffer)
    buffer.seek(0)
    resumed = start()
    for thing, state in zip(resumed, torch.load(buffer), strict=True):
        thing.load_state_dict(state)
    for _ in range(10):
        step(*resumed)
    assert torch.equal(resumed[0].logits, whole[0].logits)
    assert torch.equal(resumed[1].multiplier, whole[1].multiplier) and whole[1].multiplier != 0


def test_an_ordinary_module() -> None:
    lagrangian = ConstraintLagrangian(0.3, "at_most")
    lagrangian(torch.tensor(5.0))
    assert list(lagrangian.parameters()) == [] and list(lagrangian.state_dict()) == ["multiplier"]
    for other in (copy.deepcopy(lagrangian), pickle.loads(pickle.dumps(lagrangian))):
        assert torch.equal(other.multiplier, lagrangian.multiplier)
    assert lagrangian.float()(torch.tensor(1.0, dtype=torch.float32)).dtype == torch.float32
    assert "0.3, 'at_most'" in repr(lagrangian)


@pytest.mark.parametrize(
    "options, expected, got",
    [
        ({"target": math.nan}, "a finite target", "nan"),
        ({"kind": "below"}, "kind in", "'below'"),
        ({"rate": 0.0}, "rate > 0", "0.0"),
        ({"rate": math.inf}, "rate > 0", "inf"),
        ({"damping": -1.0}, "damping >= 0", "-1.0"),
        ({"damping": math.nan}, "damping >= 0", "nan"),
    ],
)
def test_bad_arguments(options: dict[str, Any], expected: str, got: str) -> None:
    with pytest.raises(ValueError, match=rf"^ConstraintLagrangian: expected .*{expected}.*got .*{got}.*\. [A-Z].*\.$"):
        ConstraintLagrangian(**{"target": 0.3, **options})


@pytest.mark.parametrize("value, got", [(torch.zeros(3), r"shape \(3,\)"), (torch.tensor(math.nan), "nan")])
def test_what_is_no_finite_scalar_moves_nothing(value: Tensor, got: str) -> None:
    lagrangian = ConstraintLagrangian(0.3)
    with pytest.raises(ValueError, match=rf"^ConstraintLagrangian: expected a finite scalar, got {got}\. [A-Z].*\.$"):
        lagrangian(value)
    assert lagrangian.multiplier == 0
