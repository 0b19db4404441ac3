"""Convolutions with gates, gates of other families, and gates that several places share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pyro_sparse.nn import (
    HardConcreteGate,
    HardKumaraswamyGate,
    L0Conv1d,
    L0Conv2d,
    L0ConvTranspose1d,
    L0ConvTranspose2d,
    L0Linear,
    RectifiedNormalGate,
    prune,
)

LAYERS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "Conv1d": (L0Conv1d, nn.Conv1d, (3, 4, 9)),
    "Conv2d": (L0Conv2d, nn.Conv2d, (3, 4, 9, 8)),
    "ConvTranspose1d": (L0ConvTranspose1d, nn.ConvTranspose1d, (3, 4, 9)),
    "ConvTranspose2d": (L0ConvTranspose2d, nn.ConvTranspose2d, (3, 4, 9, 8)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
each_gate = pytest.mark.parametrize("kind", [HardConcreteGate, HardKumaraswamyGate, RectifiedNormalGate])


def closed(layer: Any) -> Any:
    layer.gate.logits.data.fill_(4.0)
    layer.gate.logits.data[::2] = -4.0
    return layer.eval()


@each_layer
@pytest.mark.parametrize("groups", [1, 2])
def test_gates_multiply_the_maps_of_an_ordinary_layer(name: str, groups: int) -> None:
    kind, plain, shape = LAYERS[name]
    old = plain(4, 6, 3, stride=2, padding=1, groups=groups).train()
    old.weight.requires_grad_(False)
    layer = closed(kind.from_conv(old, init_open=0.5))
    x = torch.randn(shape)
    z = layer.gate.point_estimate()
    assert torch.equal(layer(x), old(x) * z) and not layer.weight.requires_grad and layer.bias.requires_grad
    weight, bias = layer.folded()
    folded = plain(4, 6, 3, stride=2, padding=1, groups=groups)
    folded.load_state_dict({"weight": weight, "bias": bias})
    torch.testing.assert_close(folded(x), layer(x))


@each_layer
@pytest.mark.parametrize("groups", [1, 2])
def test_expected_norms_are_means(name: str, groups: int) -> None:
    """Of what folding leaves, over all gates that are open or not."""
    kind = LAYERS[name][0]
    layer = kind(4, 6, 3, groups=groups)
    layer.gate.logits.data = torch.linspace(-2.0, 2.0, 6).reshape(layer.gate.shape)
    prob = layer.gate.distribution.prob_nonzero.flatten()
    sizes, squares = [], []
    for i in range(6):
        probe = kind.from_conv(layer)
        probe.gate.logits.data.fill_(-4.0)
        probe.gate.logits.data[i] = 4.0
        weight = probe.eval().folded()[0]
        sizes.append(weight.count_nonzero())
        squares.append(weight.square().sum())
    torch.testing.assert_close(layer.expected_l0, (torch.stack(sizes) * prob).sum())
    torch.testing.assert_close(layer.expected_l2, (torch.stack(squares) * prob).sum())


@each_layer
def test_pruned_alone(name: str) -> None:
    kind, plain, shape = LAYERS[name]
    layer = closed(kind(4, 6, 3, stride=2, padding=1))
    x = torch.randn(shape)
    smaller, kept = layer.prune()
    assert type(smaller) is plain and kept.tolist() == [1, 3, 5] and smaller.out_channels == 3
    torch.testing.assert_close(smaller(x), layer(x)[:, kept])
    with pytest.raises(ValueError, match=rf"^L0{name}.prune: expected groups=1, got 2"):
        kind(4, 6, 3, groups=2).prune()
    with pytest.raises(TypeError, match=rf"^L0{name}.from_conv: expected an nn.{name}, got Linear"):
        kind.from_conv(nn.Linear(2, 2))


def test_output_size_of_a_transposed_convolution() -> None:
    layer = L0ConvTranspose1d(4, 6, 3, stride=2)
    assert layer(torch.randn(2, 4, 5), output_size=[12]).shape == (2, 6, 12)


def test_from_linear() -> None:
    old = nn.Linear(4, 3).eval()
    old.bias.requires_grad_(False)
    layer = L0Linear.from_linear(old, init_open=0.99)
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer(x), old(x * layer.gate.point_estimate()))
    assert not layer.training and layer.weight.requires_grad and not layer.bias.requires_grad
    assert layer.weight.data_ptr() != old.weight.data_ptr()
    assert L0Linear.from_linear(nn.Linear(4, 3, bias=False, dtype=torch.float32)).gate.logits.dtype == torch.float32


@each_gate
def test_gates_of_each_family(kind: Any) -> None:
    """Open with the probability asked for; gradients reach every parameter, in and before closing; 0 at last."""
    gate = kind((4,), init_open=0.7, per_example=True)
    torch.testing.assert_close(gate.expected_l0, torch.tensor(4 * 0.7))
    z = gate(torch.ones(4000, 4))
    assert abs(float((z != 0).double().mean()) - 0.7) < 0.02  # 5 standard errors
    parameters = list(gate.parameters())
    assert all((g != 0).all() for g in torch.autograd.grad(z.mean(), parameters))
    optimizer = torch.optim.Adam(parameters, 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        gate.expected_l0.backward()
        optimizer.step()
    assert (gate.eval()(torch.ones(4)) == 0).all() and gate.expected_l0 < 1.6
    assert kind.__name__ in repr(gate)


@each_gate
def test_layers_with_gates_of_each_family_are_pruned(kind: Any) -> None:
    network = nn.Sequential(L0Linear(4, 6, gate=kind), nn.ReLU(), L0Linear(6, 2, gate=kind, init_open=0.95)).eval()
    for p in network[2].gate.parameters():
        p.data[::2] = 3.0 if kind is HardKumaraswamyGate and p is network[2].gate.log_concentration0 else -3.0
    smaller, kept = prune(network)
    x = torch.randn(5, 4)
    torch.testing.assert_close(smaller(x[:, kept]), network(x))
    assert smaller[0].weight.shape[0] == 3


def test_a_gate_in_two_places() -> None:
    """The same parameters; the same draw where it is asked for."""
    gate = HardConcreteGate(50, init_open=0.5)
    first, second = L0Linear(50, 50, gate=gate), L0Linear(50, 2, gate=gate)
    assert len(list(nn.ModuleList([first, second]).parameters())) == 5
    x = torch.ones(50)
    assert not torch.equal(gate(x), gate(x))
    with gate.one_draw():
        assert torch.equal(gate(x), gate(x))
        inside = gate(x)
        with gate.one_draw():
            assert not torch.equal(gate(x), inside)
        assert torch.equal(gate(x), inside)
    assert not torch.equal(gate(x), inside)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L0Linear(3, 2, gate=HardConcreteGate(4)), r"L0Linear: expected a gate of shape \(3,\), got \(4,\)"),
        (
            lambda: L0Conv1d(3, 2, 1, gate=HardConcreteGate(2)),
            r"L0Conv1d: expected a gate of shape \(2, 1\)",
        ),
        (
            lambda: L0Linear(3, 2, gate=HardConcreteGate(3), init_open=0.5),
            r"no options with a given gate, got",
        ),
        (lambda: HardKumaraswamyGate(3, low=0.0), "HardKumaraswamyGate: expected low < 0"),
        (lambda: HardKumaraswamyGate(3, kind="l0"), "HardKumaraswamyGate: expected kind in .*, got 'l0'"),
        (lambda: RectifiedNormalGate(3, scale=0.0), "RectifiedNormalGate: expected scale > 0, got 0.0"),
        (lambda: RectifiedNormalGate(3, init_open=1.0), r"RectifiedNormalGate: expected init_open in \(0, 1\)"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
