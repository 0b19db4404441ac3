"""The same loss in PyTorch Lightning, on one process and on two, against a loop in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_sparse.estimators import NeuralBaseline
from pyro_sparse.infer import BaselineELBO
from tests.infer.on_two_processes import Guide, Model, data, make

lightning = pytest.importorskip("lightning", reason="pip install pyro_sparse[lightning]")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]


class Training(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def training_step(self, batch: list[Tensor], index: int) -> Any:
        return self.loss(*batch) / len(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def trainer(devices: int) -> Any:
    return lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=devices,
        strategy="ddp_spawn" if devices > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )


def fit(name: str, devices: int) -> list[Tensor]:
    """The parameters after three steps on all rows, whose order Lightning chooses."""
    training = Training(make(name))
    torch.manual_seed(2)
    trainer(devices).fit(training, DataLoader(TensorDataset(data(8)), batch_size=8 // devices))
    return [p.detach() for p in training.parameters()]


class Watched(Training):
    """Looks at its validation data first, and then in which mode everything is."""

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        assert not self.loss.training
        self.loss(*batch)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        assert all(module.training for module in self.loss.modules())
        self.looked = True


@pytest.mark.filterwarnings("ignore:Found . module.* in eval mode")
def test_what_the_check_of_the_validation_data_makes_is_trained() -> None:
    """Lightning puts back the modes of modules that it knew: the copy for the second site comes later."""
    baseline = NeuralBaseline(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)))
    loss = BaselineELBO(baseline)(Model(), Guide(sparse=False))
    training = Watched(loss)
    rows = DataLoader(TensorDataset(data(8)), batch_size=8)
    trainer(1).fit(training, rows, rows)
    assert training.looked


def by_hand(name: str) -> list[Tensor]:
    loss = make(name)
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(3):
        optimiser.zero_grad()
        (loss(data(8)) / 8).backward()
        optimiser.step()
    return [p.detach() for p in loss.parameters()]


@pytest.mark.parametrize("name", ["padded", "packed", "chunks", "exact"])
def test_one_process(name: str) -> None:
    for found, expected in zip(fit(name, 1), by_hand(name), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["leave-one-out", "learned"])
def test_one_process_with_draws(name: str) -> None:
    before = [p.detach().clone() for p in make(name).parameters()]
    assert all(not torch.equal(old, new) for old, new in zip(before, fit(name, 1), strict=True))


def test_two_processes() -> None:
    for found, expected in zip(fit("padded", 2), by_hand("padded"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
