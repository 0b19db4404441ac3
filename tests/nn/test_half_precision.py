"""Gates that are trained under bfloat16 autocast: digits, as in float32 to one percent."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pyro_sparse.datasets import load_digits
from pyro_sparse.nn import ConstraintLagrangian, L0Linear


def trained(mixed: bool, epochs: int = 40) -> tuple[float, float]:
    """The accuracy on all images, which is less noisy than on a few, and the expected share of open gates."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    digits = load_digits(binarize=False)
    network = nn.Sequential(L0Linear(64, 100), nn.ReLU(), L0Linear(100, 50), nn.ReLU(), L0Linear(50, 10)).float()
    lagrangian = ConstraintLagrangian(0.6, rate=0.02).float()
    x, x_test = (part.reshape(len(part), 64).float() for part in (digits.train_images, digits.test_images))
    gates = [layer.gate for layer in network if isinstance(layer, L0Linear)]
    optimizer = torch.optim.Adam(network.parameters(), lr=0.004)

    def share() -> torch.Tensor:
        return torch.stack([gate.expected_l0 for gate in gates]).sum() / 214

    precision = torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            with precision:
                loss = cross_entropy(network(x[batch]).float(), digits.train_labels[batch]) + lagrangian(share())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        labels = torch.cat([digits.train_labels, digits.test_labels])
        accuracy = (network(torch.cat([x, x_test])).argmax(-1) == labels).double().mean()
        return float(accuracy), float(share())


@pytest.mark.slow
def test_digits() -> None:
    """One seed, the same noise in both: fixed but for the rounding of the machine."""
    (accuracy, share), (other_accuracy, other_share) = trained(mixed=False), trained(mixed=True)
    assert accuracy > 0.95
    assert abs(accuracy - other_accuracy) <= 0.01
    assert abs(share - other_share) <= 0.01
