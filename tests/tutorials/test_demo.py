"""tutorials/demo.py at a size that takes seconds: its command line, its figures, and what its comparison rests on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro
import pytest
import torch

TUTORIALS = Path(__file__).parents[2] / "tutorials"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(TUTORIALS)
    import demo

    monkeypatch.setattr(demo, "TEST_DRAWS", 1)
    threads = torch.get_num_threads()
    yield demo
    torch.set_num_threads(threads)


def few(demo: ModuleType) -> Any:
    digits = demo.load_digits()
    return digits._replace(train_images=digits.train_images[:256], train_labels=digits.train_labels[:256])


def test_main_job(demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["--epochs", "1", "--num-codes", "6", "--out", str(tmp_path)])
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"1 epochs by dense, sparsemax, entmax15, tracegraph: about \d+ seconds", out[1])
    for name in demo.ESTIMATORS:
        progress, row = (line for line in out if line.lstrip().startswith(name))
        assert re.fullmatch(rf" *{name}: epoch 1 of 1, ELBO -\d+\.\d\d, support [\d.]+, about \d+ s left", progress)
        assert re.fullmatch(r" +\w+ +-\d+\.\d\d +-\d+\.\d\d +\d+\.\d% +\d\.\d +\d+\.\d{3} +\d+\.\d", row)
    assert out[-1] == f"Pictures: {tmp_path}"
    pictures = sorted(tmp_path.iterdir())
    assert [p.name for p in pictures] == ["elbo.png", "posterior.png", "prototypes.png", "support.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)


@pytest.mark.parametrize("name", ["dense", "sparsemax", "entmax15", "tracegraph"])
def test_same_seed_same_numbers(demo: ModuleType, name: str) -> None:
    def cells(seed: int) -> list[str]:
        run = demo.train(name, few(demo), 6, 2, seed)
        run.seconds = [0.0]
        return [repr(run.elbo), repr(run.test_elbo), *demo.table([run]).split()]

    assert cells(1) == cells(1) != cells(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--estimator", "reinforce"], "invalid choice: 'reinforce'"),
        (["--num-codes", "1"], "--num-codes: expected 2 to 1536 (each starts at a training image), got 1"),
        (["--num-codes", "1537"], "got 1537"),
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--seed", "-1"], "--seed: expected 0 to 2**32 - 1, got -1"),
        (["--out", __file__], "--out: expected a folder that can be made"),
    ],
)
def test_bad_input_is_refused(
    demo: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as refused:
        demo.main(arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_differ_only_by_estimator(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "LEARNING_RATE", 0.0)
    first, *others = [demo.train(name, few(demo), 5, 1, seed=3) for name in demo.ESTIMATORS]
    for run in others:
        for net in ("encoder", "decoder"):
            for a, b in zip(getattr(first.vae, net).parameters(), getattr(run.vae, net).parameters(), strict=True):
                assert torch.equal(a, b)
        # Each projection keeps the order of the scores.
        assert torch.equal(run.code_counts, first.code_counts)


def test_scores_start_at_the_likelihoods_of_the_prototypes(demo: ModuleType) -> None:
    images = few(demo).train_images
    vae = demo.ClusteringVAE(7, demo.ESTIMATORS["dense"])
    vae.start_at(images[:7])
    likelihood = demo.dist.Bernoulli(logits=vae.decoder.prototype.weight).to_event(1).log_prob(images[:, None])
    difference = vae.encoder.scores(images) - likelihood
    torch.testing.assert_close(difference, difference[:, :1].expand(-1, 7))


def test_purity_by_hand(demo: ModuleType) -> None:
    digits = few(demo)
    run = demo.Run("sparsemax", demo.ClusteringVAE(9, demo.ESTIMATORS["sparsemax"]))
    run.vae.start_at(digits.train_images[:9])
    demo.count_codes(run, digits)

    train_codes = run.vae.encoder.scores(digits.train_images).argmax(-1).tolist()
    test_codes = run.vae.encoder.scores(digits.test_images).argmax(-1).tolist()
    members: dict[int, list[int]] = {code: [] for code in range(9)}
    for code, label in zip(train_codes, digits.train_labels.tolist(), strict=True):
        members[code].append(label)
    commonest = {code: max(range(10), key=labels.count) for code, labels in members.items() if labels}
    right = [commonest.get(c) == label for c, label in zip(test_codes, digits.test_labels.tolist(), strict=True)]
    assert run.purity == pytest.approx(sum(right) / len(right))
    assert run.code_counts.sum(-1).tolist() == [len(labels) for labels in members.values()]


def test_decoder_rows_and_supports(demo: ModuleType) -> None:
    with pyro.validation_enabled(False):  # which compares the first step with runs on single outcomes
        runs = {name: demo.train(name, few(demo), 6, 1, seed=0) for name in demo.ESTIMATORS}
    assert runs["dense"].decoder_rows == [6.0]
    assert runs["tracegraph"].decoder_rows == [1.0]
    for name in ("sparsemax", "entmax15"):
        run = runs[name]
        assert 1 <= run.support_mean[0] <= run.decoder_rows[0] <= run.support_max[0] <= 6
    assert runs["sparsemax"].peak_bytes < runs["dense"].peak_bytes
