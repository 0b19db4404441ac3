"""HardConcreteGate: what it draws, what it costs, that it can be called back, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch

from pyro_sparse.nn import HardConcreteGate, L0Linear


@pytest.mark.parametrize("temperature, low, high", [(2 / 3, -0.1, 1.1), (0.2, -0.5, 1.1), (2.0, -0.01, 3.0)])
@pytest.mark.parametrize("init_open", [0.01, 0.3, 0.5, 0.95])
def test_a_gate_begins_as_open_as_it_was_told(temperature: float, low: float, high: float, init_open: float) -> None:
    gate = HardConcreteGate((2, 3), init_open=init_open, temperature=temperature, low=low, high=high, max_logit=None)
    torch.testing.assert_close(gate.distribution.prob_nonzero, torch.full((2, 3), init_open))
    torch.testing.assert_close(gate.expected_l0, torch.tensor(6 * init_open))


@pytest.mark.parametrize(
    "shape, input_shape",
    [
        (3, (3,)),
        (3, (5, 3)),
        (3, (2, 5, 3)),
        ((2, 3), (5, 2, 3)),
        ((4, 1, 1), (5, 4, 6, 7)),
        ((4, 1, 1), (4, 6, 7)),
        ((), (5,)),
    ],
)
def test_shapes_and_who_shares_a_draw(shape: Any, input_shape: tuple[int, ...]) -> None:
    x = torch.ones(input_shape)
    own, shared = HardConcreteGate(shape, per_example=True), HardConcreteGate(shape)
    size = own.logits.shape
    for gate, leading in ((own, input_shape[: len(input_shape) - len(size)]), (shared, ())):
        z = gate(x)
        assert z.shape == x.shape and 0 <= z.min() and z.max() <= 1
        drawn = (1,) * (x.dim() - len(leading) - len(size)) + (*leading, *size)
        first = z[tuple(slice(None) if n > 1 else slice(0, 1) for n in drawn)]  # what was drawn; the rest are copies
        torch.testing.assert_close(z, first.expand(z.shape), rtol=0, atol=0)
        assert first.unique().numel() > 1 or first.numel() < 10
    assert (own(torch.ones(50, *input_shape)).flatten(1).std(0) > 0).all()


@pytest.mark.parametrize("kind", ["l0", "mean", "median", "mode"])
def test_eval_is_the_point_estimate(kind: Any) -> None:
    gate = HardConcreteGate(5, kind=kind).eval()
    gate.logits.data = torch.linspace(-4, 4, 5)
    x = torch.randn(7, 5)
    state = torch.get_rng_state()
    torch.testing.assert_close(gate(x), x * gate.distribution.point_estimate(kind=kind))
    assert torch.equal(torch.get_rng_state(), state)
    if kind == "l0":
        by_hand = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-a)) - 0.1)) for a in (-4, -2, 0, 2, 4)]
        torch.testing.assert_close(gate.point_estimate(), torch.tensor(by_hand))
        assert gate.point_estimate()[0] == 0 and gate.point_estimate()[-1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("logit", [-3.0, 0.0, 2.0])
def test_gradients_through_draws_are_those_of_the_expectation(logit: float) -> None:
    """E z^2: 400 averages of 1000 draws, within 4 standard errors (fails once in 16 000 runs per logit)."""
    gate = HardConcreteGate(400, per_example=True)
    gate.logits.data.fill_(logit)
    gate(torch.ones(1000, 400)).square().mean(0).sum().backward()
    got = gate.logits.grad
    assert got is not None
    d = gate.distribution
    (exact,) = torch.autograd.grad((d.variance + d.mean.square()).sum(), gate.logits)
    assert abs(got.mean() - exact[0]) < 4 * got.std() / 20
    counts = (gate(torch.ones(1000, 400)) != 0).double().mean(0)
    assert abs(counts.mean() - d.prob_nonzero[0]) < 4 * counts.std() / 20


def descend(gate: HardConcreteGate, price: float, steps: int) -> None:
    """Minimises the price of what is open."""
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        (price * gate.expected_l0).backward()
        optimizer.step()


@pytest.mark.parametrize("start, price", [(40.0, 1.0), (-40.0, -1.0)])
def test_a_gate_that_ran_away_can_be_called_back(start: float, price: float) -> None:
    """Unless there is no bound: then the gradient is nothing where it is."""
    for bound, comes_back in ((math.log(100), True), (None, False)):
        gate = HardConcreteGate(1, max_logit=bound)
        gate.logits.data.fill_(start)
        descend(gate, price, 260)
        assert (gate.logits.abs() < 10).all() == comes_back


def test_the_bound_is_projected_gradient_descent() -> None:
    gate = HardConcreteGate(5, max_logit=3.0)
    gate.logits.data = torch.tensor([-9.0, -3.0, 0.0, 3.0, 9.0])
    torch.testing.assert_close(gate.distribution.logits, torch.tensor([-3.0, -3.0, 0.0, 3.0, 3.0]))
    inside = HardConcreteGate(5, max_logit=None)
    inside.logits.data = gate.distribution.logits.detach()
    for sign, passes in ((1.0, [0.0, 1.0, 1.0, 1.0, 1.0]), (-1.0, [1.0, 1.0, 1.0, 1.0, 0.0])):
        (got,) = torch.autograd.grad(sign * gate.expected_l0, gate.logits)
        (there,) = torch.autograd.grad(sign * inside.expected_l0, inside.logits)
        torch.testing.assert_close(got, there * torch.tensor(passes))
    # However long it is pushed, it goes beyond the bound no farther than momentum takes it.
    descend(gate, 1.0, 100)
    assert gate.logits.detach()[1:].min() > -8.0 and gate.logits[0] == -9.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_ordinary_module(dtype: torch.dtype) -> None:
    gate = HardConcreteGate((3, 1), kind="mean", dtype=dtype)
    gate.logits.data.normal_()
    x = torch.ones(4, 3, 2, dtype=dtype)
    buffer = io.BytesIO()
    torch.save(gate.state_dict(), buffer)
    buffer.seek(0)
    loaded = HardConcreteGate((3, 1), kind="mean", dtype=dtype)
    loaded.load_state_dict(torch.load(buffer))
    copies = [copy.deepcopy(gate), pickle.loads(pickle.dumps(gate)), loaded]
    for other in copies:
        torch.manual_seed(1)
        expected = gate(x)
        torch.manual_seed(1)
        got = other(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert gate.to(torch.float32)(x.float()).dtype == torch.float32
    assert [name for name, _ in gate.named_parameters()] == ["logits"]
    assert "(3, 1)" in repr(gate) and "kind='mean'" in repr(gate)


@pytest.mark.parametrize("per_example", [False, True])
def test_finite_at_the_extremes_in_float32(per_example: bool) -> None:
    gate = HardConcreteGate(4, max_logit=None, per_example=per_example, dtype=torch.float32)
    gate.logits.data = torch.tensor([-80.0, -30.0, 30.0, 80.0])
    loss = gate(torch.ones(100, 4, dtype=torch.float32)).sum() + gate.expected_l0
    (grad,) = torch.autograd.grad(loss, gate.logits)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiles() -> None:
    """The warnings are torch's, about its own compiler, for any autograd.Function, and where it leaves the graph."""
    torch.manual_seed(0)
    gate, x = HardConcreteGate(3).eval(), torch.randn(4, 3)
    torch.testing.assert_close(torch.compile(gate, backend="eager")(x), gate(x))


@pytest.mark.parametrize(
    "options, expected, got",
    [
        ({"shape": 0}, "sizes of at least 1", r"\(0,\)"),
        ({"shape": (3, -1)}, "sizes of at least 1", r"\(3, -1\)"),
        ({"init_open": 0.0}, r"init_open in \(0, 1\)", "0.0"),
        ({"init_open": 1.0}, r"init_open in \(0, 1\)", "1.0"),
        ({"init_open": math.nan}, r"init_open in \(0, 1\)", "nan"),
        ({"temperature": 0.0}, "temperature > 0", "0.0"),
        ({"temperature": math.nan}, "temperature > 0", "nan"),
        ({"low": 0.0}, "low < 0 and high > 1", "0.0 and 1.1"),
        ({"high": 1.0}, "low < 0 and high > 1", "-0.1 and 1.0"),
        ({"max_logit": 1.0, "init_open": 0.5}, r"max_logit of at least 1\.599", "1.0"),
        ({"max_logit": math.nan}, "max_logit of at least", "nan"),
        ({"init_open": 0.9999}, "max_logit of at least", r"4\.605"),
        ({"kind": "best"}, "kind in", "'best'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], expected: str, got: str) -> None:
    with pytest.raises(ValueError, match=rf"^HardConcreteGate: expected .*{expected}.*got .*{got}.*\. [A-Z].*\.$"):
        HardConcreteGate(**{"shape": 3, **options})


@pytest.mark.parametrize("shape, input_shape", [(3, (5, 4)), ((2, 3), (3,)), ((4, 1, 1), (5, 3, 2, 2)), (3, ())])
def test_an_input_of_another_shape(shape: Any, input_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^HardConcreteGate: expected an input of shape \(\*, .*got .*\. Give .*\.$"):
        HardConcreteGate(shape)(torch.zeros(input_shape))


def test_under_torch_func() -> None:
    """Gradients of each example, of fixed gates and of gates with a draw for each, as one by one."""
    network = L0Linear(4, 2, max_logit=2.0, init_open=0.5)
    network.gate.logits.data = torch.tensor([0.2, -0.5, 3.0, -3.0])  # two beyond the bound
    parameters, x = dict(network.named_parameters()), torch.randn(5, 4)

    def loss(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = torch.func.functional_call(network, p, (x,)).square().sum()
        return total

    network.eval()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, row in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, row), list(parameters.values()))
        for name, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(each[name][i], value)
    network.train()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")(parameters, x[:1].expand(30, -1))
    assert len(each["weight"].unique(dim=0)) > 1
