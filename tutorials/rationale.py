r"""
Which words matter: a classifier that reads only the words that it picks, its training and its evaluation.

.. math::
    z_t \mid x \sim \mathrm{HardKumaraswamy}(a_t(x), b_t(x)), \qquad
    y \mid x, z \sim \mathrm{Categorical}(f_\theta(z \odot x)),

where :math:`x_1, \dots, x_T` are the words of a sentence, :math:`z_t \in [0, 1]` says how much of a word is read, and y
is the sentence's class. The model is that of Bastings, Aziz and Titov, *Interpretable neural predictions with
differentiable binary variables*, ACL 2019, with smaller networks.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn import functional

import pyro_sparse.distributions as sdist
from pyro_sparse.datasets import Sentence
from pyro_sparse.nn import ConstraintLagrangian

PAD, UNKNOWN = range(2)
NEUTRAL = 2


class Texts(NamedTuple):
    """Sentences: words ``(N, T)``, filled up with PAD; classes ``(N,)``; the sentiment of each word ``(N, T)``."""

    x: Tensor
    y: Tensor
    word_labels: Tensor


def vocabulary(sentences: Sequence[Sentence], min_count: int = 5) -> dict[str, int]:
    """Numbers the words, in lower case, that occur so often."""
    counts = Counter(word.lower() for sentence in sentences for word in sentence.words)
    frequent = sorted(word for word, count in counts.items() if count >= min_count)
    return {word: i for i, word in enumerate(frequent, start=UNKNOWN + 1)}


def encode(sentences: Sequence[Sentence], numbers: dict[str, int]) -> Texts:
    """The sentences as tensors, T as the longest needs."""

    def pad(rows: list[list[int]], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    return Texts(
        pad([[numbers.get(word.lower(), UNKNOWN) for word in sentence.words] for sentence in sentences], PAD),
        torch.tensor([sentence.label for sentence in sentences]),
        pad([sentence.word_labels for sentence in sentences], NEUTRAL),
    )


class Rationale(nn.Module):
    """
    Model and guide, in plain Pyro; their arguments are words ``(B, T)`` and classes ``(B,)``.

    Args:
        num_words: PAD, UNKNOWN and the vocabulary.
        share: of the words, to be read.
        transitions: at most so many changes between read and unread, per pair of neighbours; None for any number.
        size: of the embeddings.
        dropout: of the embeddings that are read.
    """

    def __init__(
        self, num_words: int, share: float, transitions: float | None = None, size: int = 64, dropout: float = 0.7
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_words, size, padding_idx=PAD)
        with torch.no_grad():
            self.embedding.weight.mul_(0.1)
        self.scores = nn.Linear(size, 2)
        self.context = nn.Conv1d(2, 2, 5, padding=2)
        nn.init.dirac_(self.context.weight)  # at first a word's neighbours have no say
        with torch.no_grad():
            self.context.bias.copy_(torch.tensor([2.0, -2.0]))  # and every gate is open
        self.classes = nn.Linear(size, 5)
        self.dropout = nn.Dropout(dropout)
        self.share = ConstraintLagrangian(share, damping=10.0)
        self.transitions = None if transitions is None else ConstraintLagrangian(transitions, "at_most", damping=10.0)

    def gates(self, x: Tensor) -> sdist.HardKumaraswamy:
        """The extractor: a distribution of batch shape ``(B, T)``, by the words and two neighbours on either side."""
        scores = self.context(self.scores(self.embedding(x)).mT).mT
        a, b = (functional.softplus(scores) + 0.01).unbind(-1)
        return sdist.HardKumaraswamy(a, b).has_rsample_(True)

    def classify(self, x: Tensor, z: Tensor) -> Tensor:
        """The predictor: logits ``(B, 5)`` by the mean of what is read; the 1 stands for reading nothing."""
        z = (z * (x != PAD)).unsqueeze(-1)
        read = (self.dropout(self.embedding(x)) * z).sum(-2) / (1 + z.sum(-2))
        return self.classes(read)

    def constraints(self, gates: sdist.HardKumaraswamy, x: Tensor) -> Tensor:
        """What it costs that the share of words, or the number of changes, is not what it should be."""
        is_word = x != PAD
        p = gates.prob_nonzero * is_word
        price = self.share(p.sum() / is_word.sum())
        if self.transitions is not None:
            left, right, is_pair = p[:, :-1], p[:, 1:], is_word[:, 1:]
            changes = (left * (1 - right) + (1 - left) * right) * is_pair
            price = price + self.transitions(changes.sum() / is_pair.sum())
        return price

    def model(self, x: Tensor, y: Tensor) -> None:
        pyro.module("rationale", self)
        gates = self.gates(x)
        with pyro.plate("sentences", len(x)):
            z = pyro.sample("z", gates.mask(x != PAD).to_event(1))
            pyro.sample("y", dist.Categorical(logits=self.classify(x, z)), obs=y)
        pyro.factor("constraints", -len(x) * self.constraints(gates, x))

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("sentences", len(x)):
            pyro.sample("z", self.gates(x).mask(x != PAD).to_event(1))

    def read(self, x: Tensor) -> Tensor:
        """At test time, without chance: of 0, 1 and between them the likeliest, ``(B, T)``."""
        return self.gates(x).point_estimate("mode") * (x != PAD)


class FullText(Rationale):
    """A yardstick: the same classifier, which reads everything."""

    def __init__(self, num_words: int) -> None:
        super().__init__(num_words, share=1.0)

    def model(self, x: Tensor, y: Tensor) -> None:
        pyro.module("rationale", self)
        with pyro.plate("sentences", len(x)):
            pyro.sample("y", dist.Categorical(logits=self.classify(x, self.read(x))), obs=y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        pass

    def read(self, x: Tensor) -> Tensor:
        return (x != PAD).to(self.classes.weight.dtype)


class RandomWords(FullText):
    """Another: it reads each word with the same probability, whatever the word."""

    def __init__(self, num_words: int, share: float) -> None:
        super().__init__(num_words)
        self.share.target = share

    def read(self, x: Tensor) -> Tensor:
        return super().read(x) * (torch.rand(x.shape) < self.share.target)


def batches(texts: Texts, size: int, shuffle: torch.Generator | None = None) -> Iterator[Texts]:
    """Minibatches of sentences of like length, without needless PAD; in random order, or from short to long."""
    lengths = (texts.x != PAD).sum(-1)
    if shuffle is None:
        chunks = list(lengths.argsort(stable=True).split(size))
    else:
        parts = torch.randperm(len(lengths), generator=shuffle).split(20 * size)
        chunks = [chunk for part in parts for chunk in part[lengths[part].argsort()].split(size)]
        chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=shuffle).tolist()]
    for chunk in chunks:
        longest = int(lengths[chunk].max())
        yield Texts(texts.x[chunk, :longest], texts.y[chunk], texts.word_labels[chunk, :longest])


def train(
    rationale: Rationale,
    texts: Texts,
    epochs: int,
    narrowing: int = 3,
    seed: int = 0,
    learning_rate: float = 4e-3,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """
    Adam on minibatches of 64 sentences.

    Args:
        rationale: trained in place; left in evaluation mode.
        texts: to train on.
        epochs: passes over them.
        narrowing: in so many epochs the share goes down from all words to its target.
        seed: of the order of the sentences.
        learning_rate: of Adam.
        after_epoch: called with the number of the epoch.
    """
    optimizer = pyro.optim.Adam({"lr": learning_rate, "weight_decay": 1e-4})
    svi = SVI(rationale.model, rationale.guide, optimizer, loss=Trace_ELBO())
    shuffle = torch.Generator().manual_seed(seed)
    share, step = rationale.share.target, 0
    for epoch in range(1, epochs + 1):
        rationale.train()
        for batch in batches(texts, 64, shuffle):
            done = 64 * step / (narrowing * len(texts.y))
            rationale.share.target = max(share, 1 - (1 - share) * done)
            svi.step(batch.x, batch.y)
            step += 1
        rationale.eval()
        after_epoch(epoch)


class Scores(NamedTuple):
    """Shares, in percent: of sentences classified right; of words read; of pairs of neighbours one of which is read;
    of words read that have a sentiment (nan if none is read); of words with a sentiment that are read."""

    accuracy: float
    words: float
    changes: float
    precision: float
    recall: float


@torch.no_grad()
def evaluate(rationale: Rationale, texts: Texts) -> Scores:
    """With the gates of test time."""
    right = words = pairs = is_read = changed = matters = both = 0.0
    for x, y, word_labels in batches(texts, 512):
        z = rationale.read(x)
        right += float((rationale.classify(x, z).argmax(-1) == y).sum())
        words += float((x != PAD).sum())
        pairs += float((x[:, 1:] != PAD).sum())
        changed += float((((z[:, 1:] > 0) != (z[:, :-1] > 0)) & (x[:, 1:] != PAD)).sum())
        is_read += float((z > 0).sum())
        matters += float((word_labels != NEUTRAL).sum())
        both += float(((z > 0) & (word_labels != NEUTRAL)).sum())
    precision = both / is_read if is_read else float("nan")
    shares = right / len(texts.y), is_read / words, changed / pairs, precision, both / matters
    return Scores(*(100 * share for share in shares))


def highlight(words: Sequence[str], z: Sequence[float]) -> str:
    """A line of HTML; the more of a word is read, the stronger its shade."""
    shaded = (
        f'<span style="background: rgba(255, 160, 0, {share:.2f})">{html.escape(word)}</span>'
        for word, share in zip(words, z, strict=True)
    )
    return f"<p>{' '.join(shaded)}</p>"
