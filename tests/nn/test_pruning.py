"""prune: a smaller ordinary network with the same outputs, whatever is closed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from pyro_sparse.nn import HardConcreteGate, L0Conv1d, L0Conv2d, L0Linear, prune


def mlp() -> nn.Sequential:
    return nn.Sequential(L0Linear(12, 9), nn.ReLU(), L0Linear(9, 7), nn.Tanh(), nn.Dropout(), L0Linear(7, 3))


def mlp_with_plain_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 9), nn.GELU(), L0Linear(9, 7, bias=False), nn.Identity(), nn.Linear(7, 3))


def lenet() -> nn.Sequential:
    return nn.Sequential(
        *(L0Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(L0Conv2d(6, 5, 3, bias=False), nn.ELU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), L0Linear(5 * 1 * 1, 6), nn.ReLU(), L0Linear(6, 3), nn.LogSoftmax(-1)),
    )


def wide_flatten() -> nn.Sequential:
    """Several inputs of the linear layer for each feature map, some of which close on their own."""
    return nn.Sequential(L0Conv2d(2, 4, 3), nn.LeakyReLU(), nn.Flatten(), L0Linear(4 * 36, 3))


def convolutions_only() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), L0Conv2d(4, 6, 3), nn.SiLU(), nn.Conv2d(6, 5, 1, stride=2), L0Conv2d(5, 3, 1)
    )


def convolutions_of_sequences() -> nn.Sequential:
    return nn.Sequential(
        *(L0Conv1d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.BatchNorm1d(6), L0Conv1d(6, 5, 3), nn.Sigmoid()),
        *(nn.Conv1d(5, 4, 2), nn.Flatten(), L0Linear(4 * 1, 3)),
    )


def nested() -> nn.Sequential:
    """With an activation that is there twice, and a subclass without a forward of its own."""
    act = nn.Tanh()

    class Block(nn.Sequential):
        pass

    first = nn.Sequential(OrderedDict(layer=L0Linear(12, 9), act=act))
    return nn.Sequential(first, Block(nn.Sequential(L0Linear(9, 7)), act), L0Linear(7, 5), act, nn.Linear(5, 3))


NETWORKS = {
    mlp: (4, 12),
    mlp_with_plain_layers: (4, 12),
    lenet: (4, 2, 8, 8),
    wide_flatten: (4, 2, 8, 8),
    convolutions_only: (4, 2, 8, 8),
    convolutions_of_sequences: (4, 2, 8),
    nested: (4, 12),
}


def gates(network: nn.Module) -> list[HardConcreteGate]:
    return [module for module in network.modules() if isinstance(module, HardConcreteGate)]


@pytest.mark.parametrize("make, shape", NETWORKS.items())
@pytest.mark.parametrize("seed", range(4))
def test_same_outputs_fewer_weights(make: Any, shape: tuple[int, ...], seed: int) -> None:
    """Gates closed at random, at least one open and one closed in each layer; others half open."""
    torch.manual_seed(seed)
    network = make().eval()
    for gate in gates(network):
        gate.logits.data.uniform_(-4.0, 4.0)
        gate.logits.data.flatten()[:2] = torch.tensor([1.0, -4.0])
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    smaller, kept = prune(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values(), strict=True))
    assert not {L0Linear, L0Conv1d, L0Conv2d} & {type(module) for module in smaller.modules()}
    assert [*smaller.state_dict()] == [name for name in before if ".gate." not in name]
    assert not gates(smaller) and not smaller.training
    x = torch.randn(shape)
    torch.testing.assert_close(smaller(x[:, kept]), network(x))
    count = [sum(p.numel() for p in net.parameters() if p.dim() > 1) for net in (smaller, network)]
    assert count[0] < count[1]


@pytest.mark.parametrize("make, shape", NETWORKS.items())
def test_nothing_closed_nothing_cut(make: Any, shape: tuple[int, ...]) -> None:
    network = make().eval()
    for gate in gates(network):
        gate.logits.data.fill_(2.0)
    smaller, kept = prune(network)
    assert kept.tolist() == list(range(shape[1]))
    plain = [m for m in smaller if isinstance(m, (nn.Linear, nn.Conv2d))]
    gated = [m for m in network if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert [m.weight.shape for m in plain] == [m.weight.shape for m in gated]
    torch.testing.assert_close(smaller(torch.ones(shape)), network(torch.ones(shape)))


def test_sizes_by_hand() -> None:
    network = mlp().eval()
    for gate, closed in zip(gates(network), ([0, 1, 2], [3], [0, 6]), strict=True):
        gate.logits.data.fill_(4.0)
        gate.logits.data[closed] = -4.0
    smaller, kept = prune(network)
    assert kept.tolist() == list(range(3, 12))
    assert [tuple(m.weight.shape) for m in smaller if isinstance(m, nn.Linear)] == [(8, 9), (5, 8), (3, 5)]


def test_a_map_goes_where_all_its_features_are_closed() -> None:
    network = wide_flatten().eval()
    for gate in gates(network):
        gate.logits.data.fill_(4.0)
    gates(network)[1].logits.data[36:72] = -4.0  # all of map 1
    gates(network)[1].logits.data[72:100] = -4.0  # some of map 2
    smaller, _ = prune(network)
    assert [tuple(smaller[i].weight.shape[:2]) for i in (0, 3)] == [(3, 2), (3, 108)]
    x = torch.randn(4, 2, 8, 8)
    torch.testing.assert_close(smaller(x), network(x))


def test_a_network_of_closed_gates_is_a_constant() -> None:
    network = mlp().eval()
    for gate in gates(network):
        gate.logits.data.fill_(-4.0)
    smaller, kept = prune(network)
    assert kept.numel() == 0
    torch.testing.assert_close(smaller(torch.randn(4, 0)), network(torch.randn(4, 12)))


def test_gates_that_never_close_are_kept() -> None:
    network = nn.Sequential(L0Linear(5, 3, kind="mean", init_open=0.05)).eval()
    smaller, kept = prune(network)
    assert kept.tolist() == list(range(5))
    torch.testing.assert_close(smaller(torch.ones(2, 5)), network(torch.ones(2, 5)))


def test_modes_are_kept_module_by_module() -> None:
    network = mlp().train()
    network[4].eval()
    smaller, _ = prune(network)
    assert [module.training for module in smaller] == [module.training for module in network]
    assert smaller.training


@pytest.mark.parametrize(
    "network, error, message",
    [
        (L0Linear(3, 2), TypeError, r"an nn.Sequential, got L0Linear\. "),
        (nn.Sequential(nn.ReLU()), ValueError, r"a network with layers, L0Linear.*, got \['ReLU'\]\. "),
        (
            nn.Sequential(L0Linear(3, 2), nn.Softmax(-1), L0Linear(2, 2)),
            TypeError,
            r"got Softmax\(dim=-1\) as module 1\. ",
        ),
        (nn.Sequential(L0Linear(3, 2), nn.LayerNorm(2), L0Linear(2, 2)), TypeError, "got LayerNorm.* as module 1"),
        (
            nn.Sequential(nn.Sequential(L0Linear(3, 2), nn.Softmax(-1)), L0Linear(2, 2)),
            TypeError,
            r"got Softmax\(dim=-1\) as module 0\.1\. Take",
        ),
        (
            nn.Sequential(nn.Linear(3, 2), HardConcreteGate(2), nn.Linear(2, 2)),
            TypeError,
            r"gates in layers, got HardConcreteGate by itself as module 1\. .*L0Linear\(\.\.\., gate=gate\)",
        ),
        (
            nn.Sequential(L0Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 4), L0Linear(4, 2)),
            TypeError,
            r"\(L0Linear, L0Conv1d, L0Conv2d .*\), got TransformerEncoderLayer.* as module 1\. Take",
        ),
        (nn.Sequential(L0Conv1d(3, 4, 3), L0Conv2d(4, 2, 1)), TypeError, "got none before module 1"),
        (nn.Sequential(nn.LazyLinear(3)), ValueError, r"got LazyLinear.* as module 0\. Run the network once"),
        (nn.Sequential(nn.Flatten(), L0Linear(3, 2)), TypeError, "got Flatten.* as module 0"),
        (nn.Sequential(L0Conv2d(3, 4, 3), L0Linear(8, 2)), TypeError, "got none before module 1"),
        (nn.Sequential(L0Conv2d(3, 4, 3), nn.Flatten(2), L0Linear(8, 2)), TypeError, "got Flatten.* as module 1"),
        (nn.Sequential(L0Linear(3, 4), nn.MaxPool2d(1), L0Linear(4, 2)), TypeError, "got MaxPool2d.* as module 1"),
        (nn.Sequential(L0Linear(3, 4), nn.Conv2d(4, 2, 1)), TypeError, "got none before module 1"),
        (nn.Sequential(L0Conv2d(4, 4, 3, groups=2)), ValueError, "without groups, got L0Conv2d.* as module 0"),
        (nn.Sequential(L0Linear(3, 4), L0Linear(8, 2)), ValueError, "modules 0 and 1, got 4 outputs and 8 inputs"),
        (nn.Sequential(L0Conv2d(3, 4, 3), nn.Flatten(), L0Linear(7, 2)), ValueError, "got 4 outputs and 7 inputs"),
        (
            nn.Sequential(L0Conv2d(3, 4, 3, init_open=0.1), nn.Conv2d(4, 2, 1)),
            ValueError,
            "an open feature map between modules 0 and 1, got none of 4",
        ),
    ],
)
def test_what_cannot_be_pruned(network: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"(?s)^prune: expected .*{message}"):
        prune(network)  # type: ignore[arg-type]


ELEMENTWISE = (
    nn.ReLU6(),
    nn.Hardtanh(),
    nn.Mish(),
    nn.SELU(),
    nn.Softsign(),
    nn.PReLU(6),
    nn.PReLU(),
    nn.Softplus(),
    nn.Sigmoid(),
)


def half_closed(network: nn.Sequential) -> nn.Sequential:
    for gate in gates(network):
        gate.logits.data.fill_(4.0)
        gate.logits.data[::2] = -4.0
    return network.eval()


def with_statistics(network: nn.Sequential) -> nn.Sequential:
    """Normalisations and slopes that are not those of the start."""
    for module in network:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for x in (module.running_mean, module.weight.data, module.bias.data):
                x.copy_(torch.randn(len(x)))  # type: ignore[union-attr]
            module.running_var.copy_(torch.rand(module.num_features) + 0.5)  # type: ignore[union-attr]
        if isinstance(module, nn.PReLU):
            module.weight.data = torch.rand(module.num_parameters)
    return network


@pytest.mark.parametrize("activation", ELEMENTWISE, ids=str)
def test_any_activation(activation: nn.Module) -> None:
    """Whatever treats units by themselves; what is constant behind a closed gate goes into the next bias."""
    linear = nn.Sequential(L0Linear(4, 6), copy.deepcopy(activation).double(), L0Linear(6, 3))
    maps = nn.Sequential(
        *(L0Conv2d(2, 6, 3), copy.deepcopy(activation).double(), nn.Conv2d(6, 4, 3, bias=False), nn.ReLU()),
        *(
            L0Conv2d(4, 6, 1),
            copy.deepcopy(activation).double(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        ),
    )
    for network, shape in ((linear, (5, 4)), (maps, (5, 2, 8, 8))):
        half_closed(with_statistics(network))
        x = torch.randn(shape)
        smaller, kept = prune(network)
        torch.testing.assert_close(smaller(x[:, kept]), network(x))
        layers = [m for m in smaller if isinstance(m, (nn.Linear, nn.Conv2d))]
        assert all(m.weight.shape[1] == 3 for m in layers[1::2])


def test_through_normalisation_by_batches() -> None:
    """Its constants go into the next bias; maps that the next convolution pads with zeros stay."""
    network = nn.Sequential(
        *(L0Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), L0Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)),
        *(nn.Flatten(), nn.Linear(144, 6), nn.BatchNorm1d(6), nn.ReLU(), L0Linear(6, 3)),
    )
    half_closed(with_statistics(network))
    network[1].bias.data[:3] = network[1].running_mean[:3] = 0.0
    smaller, kept = prune(network)
    x = torch.randn(5, 2, 8, 8)
    torch.testing.assert_close(smaller(x[:, kept]), network(x))
    assert smaller[4].num_features == 2 and smaller[6].weight.shape == (3, 72) and smaller[7].num_features == 3
    zero = torch.zeros(6)  # maps that a constant, not zero, keeps are there in the padded convolution alone
    constant = (zero - network[1].running_mean) / (network[1].running_var + 1e-5).sqrt() * network[1].weight
    stay = (constant + network[1].bias).relu()[::2] > 0
    assert len(smaller[0].weight) == 3 + int(stay.sum())


def test_names_and_frozen_parameters_stay() -> None:
    network = nn.Sequential(
        OrderedDict(first=L0Linear(4, 6), bend=nn.ReLU(), second=L0Linear(6, 5, bias=False), last=nn.Linear(5, 2))
    )
    network.first.weight.requires_grad_(False)
    network.last.bias.requires_grad_(False)
    smaller, _ = prune(half_closed(network))
    assert [name for name, _ in smaller.named_children()] == ["first", "bend", "second", "last"]
    frozen = {name for name, p in smaller.named_parameters() if not p.requires_grad}
    assert frozen == {"first.weight", "last.bias"}


def test_trying_modules_leaves_the_generator_and_the_network() -> None:
    network = nn.Sequential(L0Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), L0Linear(6, 2)).train()
    before, state = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    prune(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
