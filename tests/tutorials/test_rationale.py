"""tutorials/rationale.py at a size that takes milliseconds: padding, constraints, the ELBO, and what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_sparse.datasets import Sentence

TUTORIALS = Path(__file__).parents[2] / "tutorials"
SENTENCES = [
    Sentence(["A", "warm", "film"], 3, [2, 3, 2]),
    Sentence(["Dull", "and", "very", "messy", "film"], 0, [1, 2, 1, 1, 2]),
]


@pytest.fixture
def rationale(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(TUTORIALS)
    import rationale

    yield rationale


def tiny(rationale: ModuleType, **kwargs: float) -> tuple[torch.nn.Module, object]:
    numbers = rationale.vocabulary(SENTENCES, min_count=1)
    module = rationale.Rationale(2 + len(numbers), share=0.4, size=3, **kwargs)
    with torch.no_grad():  # gates of every kind, that differ
        module.embedding.weight.mul_(20)
        module.context.bias.zero_()
    return module.eval(), rationale.encode(SENTENCES, numbers)


def test_encodes_with_padding(rationale: ModuleType) -> None:
    numbers = rationale.vocabulary(SENTENCES, min_count=2)
    assert numbers == {"film": 2}
    texts = rationale.encode(SENTENCES, numbers)
    assert texts.x.tolist() == [[1, 1, 2, 0, 0], [1, 1, 1, 1, 2]] and texts.y.tolist() == [3, 0]
    assert texts.word_labels.tolist() == [[2, 3, 2, 2, 2], [1, 2, 1, 1, 2]]


def test_batches_have_every_sentence_once(rationale: ModuleType) -> None:
    texts = rationale.encode(SENTENCES * 20, rationale.vocabulary(SENTENCES, 1))
    shuffle = torch.Generator().manual_seed(0)
    for parts in (list(rationale.batches(texts, 7)), list(rationale.batches(texts, 7, shuffle))):
        rows = [row[row != rationale.PAD].tolist() for part in parts for row in part.x]
        assert sorted(rows) == sorted(row[row != rationale.PAD].tolist() for row in texts.x)
        assert max(len(part.y) for part in parts) == 7 and all((part.x != rationale.PAD).any(0).all() for part in parts)


def test_padding_is_never_read(rationale: ModuleType) -> None:
    module, texts = tiny(rationale)
    x = texts.x[:1, :3]
    torch.testing.assert_close(module.read(texts.x)[:1, :3], module.read(x))
    assert (module.read(texts.x)[0, 3:] == 0).all()
    z = torch.rand(2, 5)
    torch.testing.assert_close(module.classify(texts.x, z)[:1], module.classify(x, z[:1, :3]))


def test_constraints_are_of_the_expected_share_and_changes(rationale: ModuleType) -> None:
    module, texts = tiny(rationale, transitions=0.2)
    gates = module.gates(texts.x)
    rows = [gates.prob_nonzero[i, :length].tolist() for i, length in enumerate((3, 5))]
    share = sum(map(sum, rows)) / 8
    changes = sum(p * (1 - q) + q * (1 - p) for row in rows for p, q in pairwise(row)) / 6
    assert changes > 0.2
    expected = 10 / 2 * (share - 0.4) ** 2 + 10 / 2 * (changes - 0.2) ** 2
    torch.testing.assert_close(module.constraints(gates, texts.x), torch.tensor(expected))


def test_under_its_own_prior_every_draw_has_kl_zero(rationale: ModuleType) -> None:
    """So the pathwise gradient of Trace_ELBO is that of TraceMeanField_ELBO, which knows the KL."""
    module, texts = tiny(rationale)
    gradients = []
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        pyro.set_rng_seed(0)
        module.zero_grad()
        loss = elbo.differentiable_loss(module.model, module.guide, texts.x, texts.y)
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad.clone() for parameter in module.parameters())])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_loss_is_that_of_the_paper(rationale: ModuleType) -> None:
    """Minus the log-likelihood under a draw of the gates, plus the price of the constraint for each sentence."""
    module, texts = tiny(rationale)
    pyro.set_rng_seed(1)
    loss = Trace_ELBO().loss(module.model, module.guide, texts.x, texts.y)
    pyro.set_rng_seed(1)
    z = module.gates(texts.x).sample()
    log_likelihood = module.classify(texts.x, z).log_softmax(-1)[range(2), texts.y].sum()
    price = module.constraints(module.gates(texts.x), texts.x)
    assert loss == pytest.approx(float((2 * price - log_likelihood).detach()), rel=1e-12)


def test_evaluate_counts_words(rationale: ModuleType) -> None:
    module, texts = tiny(rationale)
    z = torch.tensor([[0.0, 0.5, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0, 0.0]])
    module.read = lambda x: z[:, : x.shape[1]]
    module.classify = lambda x, z: torch.nn.functional.one_hot(torch.full((len(x),), 3), 5)
    scores = rationale.evaluate(module, texts)
    assert scores == pytest.approx((50, 100 * 4 / 8, 100 * 4 / 6, 75, 75))
    z.zero_()
    assert rationale.evaluate(module, texts) == pytest.approx((50, 0, 0, float("nan"), 0), nan_ok=True)


def test_training_narrows_the_share(rationale: ModuleType) -> None:
    numbers = rationale.vocabulary(SENTENCES, min_count=1)
    module = rationale.Rationale(2 + len(numbers), share=0.4)
    texts, targets = rationale.encode(SENTENCES * 64, numbers), []
    rationale.train(module, texts, 3, narrowing=2, after_epoch=lambda _: targets.append(module.share.target))
    assert targets == pytest.approx([1 - 0.6 / 4, 1 - 0.6 * 3 / 4, 0.4])
    assert not module.training
    full = rationale.FullText(2 + len(numbers))
    rationale.train(full, texts, 1)
    assert (full.read(texts.x) == (texts.x != rationale.PAD)).all()


def test_highlight_escapes(rationale: ModuleType) -> None:
    line = rationale.highlight(["<b>", "&"], [1.0, 0.25])
    assert "&lt;b&gt;" in line and "0.25" in line and "<b>" not in line
