r"""
Words as bit vectors: a VAE whose latent variable is a vector of bits, its training and its evaluation.

.. math::
    z_k \sim \mathrm{Bernoulli}(1/2), \qquad
    x_t \mid z, x_{<t} \sim \mathrm{Categorical}(f_\theta(z, x_{<t})), \qquad
    q(z \mid x) = \prod_k \mathrm{Bernoulli}(z_k; \lambda_k(x)),

where x is a word, symbol by symbol, f a character LSTM that starts in a state made of the bits, and :math:`\lambda` a
bidirectional LSTM. The architecture is that of the latent-factor exercise of the VI tutorial by Schulz, Aziz and
colleagues (vitutorial.github.io).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence

PAD, START, END, UNKNOWN = range(4)  # a word is its characters and END; PAD fills the batch


def encode(words: Sequence[str], alphabet: str) -> Tensor:
    """The words as rows of numbers, each ended by END and filled up with PAD: ``(N, T)``, T as the longest needs."""
    number = {character: i for i, character in enumerate(alphabet, start=UNKNOWN + 1)}
    rows = [torch.tensor([*(number.get(character, UNKNOWN) for character in word), END]) for word in words]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def decode(x: Tensor, alphabet: str) -> list[str]:
    """The inverse of :func:`encode`: each row up to its END."""
    symbols = ["", "", "", "?", *alphabet]
    ends = [row.index(END) if END in row else len(row) for row in x.tolist()]
    return ["".join(symbols[i] for i in row[:end]) for row, end in zip(x.tolist(), ends, strict=True)]


def trim(x: Tensor) -> Tensor:
    """A batch without the columns that are PAD throughout."""
    return x[:, : int((x != PAD).sum(-1).max())]


def symbol_counts(x: Tensor, num_symbols: int) -> Tensor:
    """How often each symbol is in each word, ``(B, num_symbols)``; PAD is not counted."""
    is_symbol = (x != PAD).unsqueeze(-1)
    return (functional.one_hot(x, num_symbols) * is_symbol).sum(-2).to(torch.get_default_dtype())


class Decoder(nn.Module):
    """Logits of the next symbol, given the bits and the symbols so far: a character LSTM that starts in the bits."""

    def __init__(self, num_symbols: int, num_bits: int, size: int, dropout: float, sees_past: bool) -> None:
        super().__init__()
        self.sees_past = sees_past
        self.embedding = nn.Embedding(num_symbols, size, padding_idx=PAD)
        self.first_state = nn.Linear(num_bits, size)
        self.lstm = nn.LSTM(size, size, batch_first=True)
        self.out = nn.Linear(size, num_symbols, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """
        Args:
            z: bits, ``(..., B, num_bits)``, with any leading dims (particles, slots).
            x: words, ``(B, T)``.

        Returns:
            Logits, ``(..., B, T, num_symbols)``.
        """
        previous = functional.pad(x[:, :-1], (1, 0), value=START) if self.sees_past else torch.full_like(x, UNKNOWN)
        inputs = self.dropout(self.embedding(previous))
        state = self.first_state(z)
        leading = state.shape[:-1]  # the LSTM wants one batch dim: flatten, run, unflatten
        flat = inputs.expand(*leading, *inputs.shape[1:]).flatten(0, len(leading) - 1)
        state = state.reshape(1, -1, state.shape[-1])
        states = self.lstm(flat, (state, state))[0].unflatten(0, leading)
        # All the bit vectors of a word get the same dropout, here and above: their costs then differ by the bits alone.
        return self.out(states * self.dropout(torch.ones_like(inputs)))

    @torch.no_grad()
    def generate(self, z: Tensor, length: int) -> Tensor:
        """The likeliest symbol at each step, given bits ``(N, num_bits)`` and the symbols chosen so far."""
        x = z.new_full((len(z), length), END, dtype=torch.long)
        for t in range(length):
            x[:, t] = self(z, x[:, : t + 1])[:, t].argmax(-1)
        return x


class Encoder(nn.Module):
    """Logits of the bits, given the embedded symbols of a word: a bidirectional LSTM and two dense layers."""

    def __init__(self, num_bits: int, size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(size, size, batch_first=True, bidirectional=True)
        self.logits = nn.Sequential(nn.Linear(2 * size, 2 * num_bits), nn.Tanh(), nn.Linear(2 * num_bits, num_bits))

    def forward(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        forwards, backwards = self.lstm(packed)[1][0]
        return self.logits(torch.cat([forwards, backwards], -1))


class WordVAE(nn.Module):
    """
    Model and guide, in plain Pyro; their argument is a batch of words ``(B, T)`` from :func:`encode`.

    Args:
        num_symbols: PAD, START, END, UNKNOWN and the characters.
        num_bits: of z.
        size: of the embeddings and of each LSTM's state.
        dropout: of the decoder's inputs and outputs.
        kl_weight: what the KL is multiplied by in training, above 0.
        sees_past: whether the decoder sees the symbols so far; without them, it has the bits alone to go by.
    """

    def __init__(
        self,
        num_symbols: int,
        num_bits: int = 16,
        size: int = 256,
        dropout: float = 0.6,
        kl_weight: float = 1.0,
        sees_past: bool = True,
    ) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        self.decoder = Decoder(num_symbols, num_bits, size, dropout, sees_past)
        self.encoder = Encoder(num_bits, size)
        self.register_buffer("prior_logits", torch.zeros(num_bits), persistent=False)

    def prior(self) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=self.prior_logits).to_event(1)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        # The embeddings are the model's: the guide reads them and does not train them.
        embedded = functional.embedding(x, self.decoder.embedding.weight.detach())
        return dist.Bernoulli(logits=self.encoder(embedded, (x != PAD).sum(-1))).to_event(1)

    def likelihood(self, z: Tensor, x: Tensor) -> dist.TorchDistribution:
        return dist.Categorical(logits=self.decoder(z, x)).mask(x != PAD).to_event(1)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("words", len(x)):
            with poutine.scale(scale=self.kl_weight):
                z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z, x), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("words", len(x)), poutine.scale(scale=self.kl_weight):
            pyro.sample("z", self.posterior(x))


def batches(x: Tensor, size: int, shuffle: torch.Generator | None = None) -> Iterator[Tensor]:
    """Minibatches of words, trimmed: in random order, or from the shortest words to the longest."""
    order = (x != PAD).sum(-1).argsort() if shuffle is None else torch.randperm(len(x), generator=shuffle)
    for indices in order.split(size):
        yield trim(x[indices])


def train(
    vae: WordVAE,
    elbo: ELBO,
    x: Tensor,
    epochs: int,
    seed: int = 0,
    learning_rate: float = 1e-3,
    after_epoch: Callable[[int, float], None] = lambda epoch, elbo: None,
) -> None:
    """
    Adam on minibatches of 64 words.

    Args:
        vae: trained in place; left in evaluation mode.
        elbo: any Pyro ELBO.
        x: the words, ``(N, T)``.
        epochs: passes over the words.
        seed: of the order of the words.
        learning_rate: of Adam.
        after_epoch: called with the number of the epoch and the mean ELBO per word during it.
    """
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": learning_rate}), loss=elbo)
    shuffle = torch.Generator().manual_seed(seed)
    for epoch in range(1, epochs + 1):
        vae.train()
        loss = sum(svi.step(batch) for batch in batches(x, 64, shuffle))
        vae.eval()
        after_epoch(epoch, -loss / len(x))


@torch.no_grad()
def elbo_and_kl(vae: WordVAE, x: Tensor) -> tuple[float, float]:
    """The ELBO and its KL term, nats per word: one draw of the bits for each word, the KL in closed form."""
    elbo = kl = 0.0
    for batch in batches(x, 1024):
        posterior = vae.posterior(batch)
        prior = vae.prior().expand(posterior.batch_shape)
        divergence = torch.distributions.kl_divergence(posterior, prior).sum()
        elbo += float(vae.likelihood(posterior.sample(), batch).log_prob(batch).sum() - divergence)
        kl += float(divergence)
    return elbo / len(x), kl / len(x)


@torch.no_grad()
def nll_and_perplexity(vae: WordVAE, x: Tensor, draws: int = 100) -> tuple[float, float]:
    r"""
    The negative log-likelihood per word, and the perplexity per symbol, END included.

    .. math:: \log p(x) \approx \log \frac1S \sum_{s=1}^S \frac{p(x, z_s)}{q(z_s \mid x)}, \qquad z_s \sim q(z \mid x)

    too low on average, and the less so the more draws.
    """
    total = 0.0
    for batch in batches(x, max(1, 4096 // draws)):
        posterior = vae.posterior(batch)
        z = posterior.sample((draws,))
        log_joint = vae.prior().log_prob(z) + vae.likelihood(z, batch).log_prob(batch)
        log_weights = log_joint - posterior.log_prob(z)
        total += float((log_weights.logsumexp(0) - torch.tensor(draws).log()).sum())
    return -total / len(x), float(torch.tensor(-total / int((x != PAD).sum())).exp())
