"""Gates that are trained in bfloat16, mixed and pure: digits, as in float32 to one percent."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pyro_sparse.datasets import load_digits
from pyro_sparse.nn import ConstraintLagrangian, L0Linear


def trained(kind: str, epochs: int = 40) -> tuple[float, float]:
    """The accuracy on the test images, and the expected share of open gates, whose target is .6."""
    torch.manual_seed(0)
    digits = load_digits(binarize=False)
    dtype = torch.bfloat16 if kind == "pure" else torch.float32
    network = nn.Sequential(L0Linear(64, 100), nn.ReLU(), L0Linear(100, 50), nn.ReLU(), L0Linear(50, 10)).to(dtype)
    lagrangian = ConstraintLagrangian(0.6, rate=0.02).to(dtype)
    x, x_test = (part.reshape(len(part), 64).to(dtype) for part in (digits.train_images, digits.test_images))
    gates = [layer.gate for layer in network if isinstance(layer, L0Linear)]
    optimizer = torch.optim.Adam(network.parameters(), lr=0.004)

    def share() -> torch.Tensor:
        return torch.stack([gate.expected_l0 for gate in gates]).sum() / 214

    mixed = torch.autocast("cpu", torch.bfloat16) if kind == "mixed" else contextlib.nullcontext()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            with mixed:
                loss = cross_entropy(network(x[batch]).float(), digits.train_labels[batch]) + lagrangian(share())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        accuracy = (network(x_test).argmax(-1) == digits.test_labels).double().mean()
        return float(accuracy), float(share())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixed", "pure"])
def test_digits(kind: str) -> None:
    accuracy, share = trained("float32")
    other_accuracy, other_share = trained(kind)
    assert accuracy > 0.95
    assert abs(accuracy - other_accuracy) <= 0.01
    assert abs(share - other_share) <= 0.01
