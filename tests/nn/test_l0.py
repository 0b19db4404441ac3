"""L0Linear and L0Conv2d: torch's layers with gates, what they cost, and the ordinary layer that they become."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_sparse.nn import L0Conv2d, L0Linear

CASES = [
    (L0Linear, nn.Linear, (6, 4), {}, (5, 6)),
    (L0Linear, nn.Linear, (6, 4, False), {}, (2, 5, 6)),
    (L0Conv2d, nn.Conv2d, (2, 4, 3), {}, (5, 2, 8, 8)),
    (L0Conv2d, nn.Conv2d, (2, 4, (3, 1), 2, (1, 0)), {"bias": False}, (5, 2, 8, 8)),
    (L0Conv2d, nn.Conv2d, (2, 4, 3), {"padding": "same", "padding_mode": "circular", "dilation": 2}, (2, 8, 8)),
    (L0Conv2d, nn.Conv2d, (2, 4, 3, 1, 1, 1, 2), {}, (5, 2, 8, 8)),
]
each_layer = pytest.mark.parametrize("ours, theirs, args, kwargs, shape", CASES)


def mixed_gates(layer: Any) -> Any:
    """Some gates closed, some half open, some open."""
    layer.gate.logits.data = torch.linspace(-4, 4, layer.gate.logits.numel()).reshape(layer.gate.logits.shape)
    return layer


@each_layer
def test_torchs_layer_with_gates(ours: Any, theirs: Any, args: Any, kwargs: Any, shape: Any) -> None:
    """Same arguments; with every gate open, the same function; else gates on inputs, or on feature maps."""
    layer, plain = ours(*args, **kwargs), theirs(*args, **kwargs)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(shape)
    layer.gate.logits.data.fill_(4.6)
    torch.testing.assert_close(layer.eval()(x), plain(x))
    z = mixed_gates(layer).gate.point_estimate()
    assert z.min() == 0 and z.max() == 1 and z.unique().numel() > 2
    torch.testing.assert_close(layer(x), plain(x * z) if ours is L0Linear else plain(x) * z)
    layer.train()
    torch.manual_seed(0)
    got = layer(x)
    torch.manual_seed(0)
    torch.testing.assert_close(got, plain(layer.gate(x)) if ours is L0Linear else layer.gate(plain(x)))


@each_layer
def test_penalties_count_weights(ours: Any, theirs: Any, args: Any, kwargs: Any, shape: Any) -> None:
    """Expected numbers and squares of the weights that are left, by 2000 draws (4 s.e.: 1 failure in 16 000)."""
    layer = mixed_gates(ours(*args, **kwargs))
    size = layer.gate.logits.shape
    is_open = layer.gate.distribution.sample((2000,)) != 0
    weights = is_open.reshape(2000, *size, 1) if ours is L0Conv2d else is_open.reshape(2000, 1, *size)
    for got, each in (
        (layer.expected_l0, torch.ones_like(layer.weight)),
        (layer.expected_l2, layer.weight.detach().square()),
    ):
        drawn = (weights * each).flatten(1).sum(1)
        assert got.shape == () and got.requires_grad
        assert abs(got.detach() - drawn.mean()) < 4 * drawn.std() / 2000**0.5


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pruned(ours: Any, theirs: Any, args: Any, kwargs: Any, shape: Any, dtype: torch.dtype) -> None:
    layer = mixed_gates(ours(*args, **kwargs)).to(dtype).eval()
    if getattr(layer, "groups", 1) != 1:
        with pytest.raises(ValueError, match=r"L0Conv2d.prune: expected groups=1, got 2\. "):
            layer.prune()
        return
    state = torch.get_rng_state()
    smaller, kept = layer.prune()
    assert torch.equal(torch.get_rng_state(), state)
    assert type(smaller) is theirs and not smaller.training and smaller.weight.dtype == dtype
    assert kept.tolist() == layer.gate.point_estimate().flatten().nonzero()[:, 0].tolist()
    assert 0 < len(kept) < layer.gate.logits.numel()
    x = torch.randn(shape, dtype=dtype)
    if ours is L0Linear:
        assert smaller.weight.shape == (4, len(kept)) == (smaller.out_features, smaller.in_features)
        torch.testing.assert_close(smaller(x[..., kept]), layer(x))
    else:
        assert smaller.out_channels == len(kept)
        full = torch.zeros_like(layer(x)).index_copy(-3, kept, smaller(x))
        torch.testing.assert_close(full, layer(x))
    for parameter in smaller.parameters():
        assert parameter.requires_grad and parameter.is_leaf
        parameter.data.zero_()
    assert layer.weight.count_nonzero() > 0  # nothing is shared


def test_everything_closed() -> None:
    linear, conv = L0Linear(3, 2).eval(), L0Conv2d(3, 2, 1).eval()
    for layer in (linear, conv):
        layer.gate.logits.data.fill_(-4.0)
    smaller, kept = linear.prune()
    assert kept.numel() == 0
    torch.testing.assert_close(smaller(torch.randn(5, 0)), linear(torch.randn(5, 3)))
    with pytest.raises(ValueError, match=r"L0Conv2d.prune: expected an open feature map, got none\. "):
        conv.prune()


@each_layer
def test_ordinary_modules(ours: Any, theirs: Any, args: Any, kwargs: Any, shape: Any) -> None:
    layer = mixed_gates(ours(*args, **kwargs))
    assert isinstance(layer, theirs) and "gate" in repr(layer)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = ours(*args, **kwargs)
    loaded.load_state_dict(torch.load(buffer))
    x = torch.randn(shape)
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(0)
        expected = layer(x)
        torch.manual_seed(0)
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    assert layer.float()(x.float()).dtype == torch.float32
    assert ours(*args, **kwargs, dtype=torch.float32).gate.logits.dtype == torch.float32


def test_gate_options_reach_the_gate() -> None:
    for layer in (L0Linear(6, 4, init_open=0.3, kind="mean"), L0Conv2d(2, 6, 3, init_open=0.3, kind="mean")):
        assert layer.gate.kind == "mean"
        torch.testing.assert_close(layer.gate.expected_l0, torch.tensor(1.8))
    with pytest.raises(ValueError, match="HardConcreteGate: expected init_open"):
        L0Linear(6, 4, init_open=2.0)
    with pytest.raises(TypeError, match="droprate"):
        L0Linear(6, 4, droprate=0.5)


def test_in_a_pyro_model() -> None:
    """Regression on the first of 20 inputs: the layer is an ordinary part of a program, the penalty a factor."""
    x = torch.randn(200, 20)
    y = 3 * x[:, 0] + 0.1 * torch.randn(200)
    layer = L0Linear(20, 1, init_open=0.8)

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("layer", layer)
        pyro.factor("penalty", -10.0 * layer.expected_l0)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(layer(x)[:, 0], 1.0), obs=y)

    svi = SVI(model, lambda x, y: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(300):
        svi.step(x, y)
    smaller, kept = layer.prune()
    assert kept.tolist() == [0] and abs(float(smaller.weight.detach()) - 3) < 0.2


def test_a_gate_by_name_is_refused() -> None:
    with pytest.raises(TypeError, match=r"L0Linear.gate: expected a class of gates, or a gate, got 'HardConcrete'"):
        L0Linear(3, 2, gate="HardConcrete")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 3, 3), nn.LazyLinear(3), L0Linear(3, 2)], ids=lambda x: type(x).__name__
)
def test_from_linear_takes_ordinary_layers(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"L0Linear.from_linear: expected an nn.Linear without gates"):
        L0Linear.from_linear(layer)  # type: ignore[arg-type]
