r"""
Latent features that switch on and off: a VAE of inflected words, its training, and what its features say.

.. math::
    w \sim \mathcal N(0, I), \qquad f_k \sim \mathrm{HardKumaraswamy}(a_0, b_0), \qquad
    \text{lemma} \mid w, \qquad \text{form} \mid \text{lemma}, f,

both strings symbol by symbol, and the guide :math:`q(w \mid \text{lemma}) \prod_k q(f_k \mid \text{lemma},
\text{form})`. A continuous part for the lemma and sparse features for its inflection: the idea is that of Ataman, Aziz
and Birch, *A latent morphology model for open-vocabulary neural machine translation*, ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn import functional
from word_vae import END, PAD, encode, trim

import pyro_sparse.distributions as sdist
from pyro_sparse.datasets import Inflection


class Words:
    """Lemmas and forms as rows of numbers, ``(N, T)`` each, with the words that they are."""

    def __init__(self, words: Sequence[Inflection], alphabet: str) -> None:
        self.words = list(words)
        self.lemma = encode([word.lemma for word in words], alphabet)
        self.form = encode([word.form for word in words], alphabet)


class Tower(nn.Module):
    """Residual convolutions over ``(B, T, size)`` that look at ``reach`` symbols on the left and on the right."""

    def __init__(self, size: int, depth: int, reach: tuple[int, int]) -> None:
        super().__init__()
        self.reach = reach
        self.layers = nn.ModuleList(nn.Conv1d(size, size, sum(reach) + 1) for _ in range(depth))

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            h = h if mask is None else h * mask
            h = h + layer(functional.pad(h.relu().mT, self.reach)).mT
        return h


class Encoder(nn.Module):
    """Two parameters for each of ``num_latents`` variables, from strings that are read side by side."""

    def __init__(self, num_symbols: int, num_strings: int, num_latents: int, size: int) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(num_symbols, size, padding_idx=PAD) for _ in range(num_strings))
        self.tower = Tower(size, 3, (2, 2))
        self.out = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, 2 * num_latents))

    def forward(self, *strings: Tensor) -> tuple[Tensor, Tensor]:
        mask = (strings[0] != PAD).unsqueeze(-1)
        h = sum(embed(fit(x, mask.shape[1])) for embed, x in zip(self.embed, strings, strict=True))
        h = self.tower(h, mask).masked_fill(~mask, -torch.inf).amax(1)
        first, second = self.out(h).chunk(2, -1)
        return first, second


class Decoder(nn.Module):
    """
    Logits of each symbol, given latent variables and a string that the new one resembles, if there is one.

    It does not see the symbols before: what the latent variables could say it cannot learn by itself, see the page on
    words as bit vectors.
    """

    def __init__(self, num_symbols: int, num_latents: int, size: int, max_length: int = 64) -> None:
        super().__init__()
        self.position = nn.Embedding(max_length, size)
        self.embed = nn.Embedding(num_symbols, size, padding_idx=PAD)
        self.look = nn.Conv1d(size, size, 7, padding=3)  # at the given string, three symbols ahead
        self.latents = nn.Linear(num_latents, size)
        self.tower = Tower(size, 4, (4, 0))
        self.out = nn.Linear(size, num_symbols)

    def forward(self, z: Tensor, length: int, given: Tensor | None = None) -> Tensor:
        h = self.latents(z).unsqueeze(1)
        if given is None:
            h = h + self.position.weight[:length]
        else:
            h = h + self.look(self.embed(fit(given, length + 3)).mT).mT[:, :length]
        return self.out(self.tower(h))


def fit(x: Tensor, length: int) -> Tensor:
    """The first columns of x, filled up with PAD."""
    return functional.pad(x, (0, max(0, length - x.shape[1])), value=PAD)[:, :length]


class InflectionVAE(nn.Module):
    """
    Model and guide, in plain Pyro; their arguments are lemmas and forms, ``(B, T)`` each.

    Args:
        num_symbols: PAD, START, END, UNKNOWN and the characters.
        num_features: how many can switch on.
        lemma_size: the dimension of w.
        size: of the embeddings and layers.
        kl_weight: what both KL terms are multiplied by in training, above 0.
    """

    def __init__(
        self,
        num_symbols: int,
        num_features: int = 16,
        lemma_size: int = 16,
        size: int = 64,
        kl_weight: float = 0.25,
    ) -> None:
        super().__init__()
        self.num_features, self.lemma_size, self.kl_weight = num_features, lemma_size, kl_weight
        self.lemma_encoder = Encoder(num_symbols, 1, lemma_size, size)
        self.feature_encoder = Encoder(num_symbols, 2, num_features, size)
        self.lemma_decoder = Decoder(num_symbols, lemma_size, size)
        self.form_decoder = Decoder(num_symbols, num_features, size)

    def feature_prior(self) -> sdist.HardKumaraswamy:
        # Off nine times in ten. With a stretch as wide as this one there is mass on exactly 1 as well.
        return sdist.HardKumaraswamy(0.1, 1.1, low=-0.5, high=1.5, nodes=24).expand([self.num_features])

    def lemma_posterior(self, lemma: Tensor) -> dist.Normal:
        loc, scale = self.lemma_encoder(lemma)
        return dist.Normal(loc, functional.softplus(scale) + 1e-3)

    def feature_posterior(self, lemma: Tensor, form: Tensor) -> sdist.HardKumaraswamy:
        a, b = (functional.softplus(x) + 0.05 for x in self.feature_encoder(form, lemma))
        return sdist.HardKumaraswamy(a, b, low=-0.5, high=1.5, nodes=24).has_rsample_(True)

    def spell(self, logits: Tensor, x: Tensor) -> dist.TorchDistribution:
        return dist.Categorical(logits=logits).mask(x != PAD).to_event(1)

    def model(self, lemma: Tensor, form: Tensor) -> None:
        pyro.module("lemma_decoder", self.lemma_decoder)
        pyro.module("form_decoder", self.form_decoder)
        with pyro.plate("words", len(form)):
            with poutine.scale(scale=self.kl_weight):
                w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([self.lemma_size]).to_event(1))
                f = pyro.sample("f", self.feature_prior().to_event(1))
            pyro.sample("lemma", self.spell(self.lemma_decoder(w, lemma.shape[1]), lemma), obs=lemma)
            pyro.sample("form", self.spell(self.form_decoder(f, form.shape[1], lemma), form), obs=form)

    def guide(self, lemma: Tensor, form: Tensor) -> None:
        pyro.module("lemma_encoder", self.lemma_encoder)
        pyro.module("feature_encoder", self.feature_encoder)
        with pyro.plate("words", len(form)), poutine.scale(scale=self.kl_weight):
            pyro.sample("w", self.lemma_posterior(lemma).to_event(1))
            pyro.sample("f", self.feature_posterior(lemma, form).to_event(1))

    @torch.no_grad()
    def inflect(self, f: Tensor, lemma: Tensor, length: int = 40) -> Tensor:
        """The likeliest form of each lemma, given features ``(B, num_features)``."""
        x = self.form_decoder(f, length, lemma).argmax(-1)
        return x.masked_fill((x == END).cumsum(1) - (x == END).long() > 0, PAD)


def train(
    vae: InflectionVAE,
    words: Words,
    epochs: int,
    seed: int = 0,
    warm_up: int = 10,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Adam on minibatches of 128 words; the weight of the KL rises in the first ``warm_up`` epochs."""
    # The KL of the features is exact, so a gradient through the whole draw is right, and has the least variance.
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 3e-3}), loss=TraceMeanField_ELBO())
    kl_weight, shuffle = vae.kl_weight, torch.Generator().manual_seed(seed)
    for epoch in range(1, epochs + 1):
        vae.kl_weight = kl_weight * min(1.0, epoch / warm_up)
        for rows in torch.randperm(len(words.form), generator=shuffle).split(128):
            svi.step(trim(words.lemma[rows]), trim(words.form[rows]))
        after_epoch(epoch)
    vae.kl_weight = kl_weight


@torch.no_grad()
def evaluate(vae: InflectionVAE, words: Words) -> dict[str, float]:
    """Nats per word, by one draw and the exact KL; the share of features that are on; the share of forms rebuilt."""
    lemma, form = words.lemma, words.form
    q_w, q_f = vae.lemma_posterior(lemma), vae.feature_posterior(lemma, form)
    f = q_f.point_estimate("median")
    kl_w = torch.distributions.kl_divergence(q_w, dist.Normal(0.0, 1.0))
    kl_f = torch.distributions.kl_divergence(q_f, vae.feature_prior().expand(q_f.batch_shape))
    return {
        "log p(lemma|w)": float(
            vae.spell(vae.lemma_decoder(q_w.sample(), lemma.shape[1]), lemma).log_prob(lemma).mean()
        ),
        "KL(w)": float(kl_w.sum(-1).mean()),
        "log p(form|lemma,f)": float(
            vae.spell(vae.form_decoder(q_f.sample(), form.shape[1], lemma), form).log_prob(form).mean()
        ),
        "KL(f)": float(kl_f.sum(-1).mean()),
        "features on": float(q_f.prob_nonzero.mean()),
        "forms rebuilt": float((vae.inflect(f, lemma, form.shape[1]) == form).all(-1).to(f.dtype).mean()),
    }


@torch.no_grad()
def prob_on(vae: InflectionVAE, words: Words) -> Tensor:
    """The probability that each feature is on in each word, ``(N, num_features)``."""
    return vae.feature_posterior(words.lemma, words.form).prob_nonzero


def has_tag(words: Words, tag: str) -> Tensor:
    """Which words have a tag, ``(N,)``."""
    return torch.tensor([tag in word.tags for word in words.words])


def information(on: Tensor, words: Words, tags: Sequence[str]) -> Tensor:
    r"""
    The mutual information, in bits, of each feature's switch and which of the tags a word has, ``(num_features,)``.

    .. math:: I_k = H\Bigl(\frac1N \sum_n p_{nk}\Bigr)
        - \sum_c \frac{N_c}{N} H\Bigl(\frac1{N_c} \sum_{n: c_n = c} p_{nk}\Bigr), \qquad p_{nk} = \Pr(f_{nk} \ne 0),

    with H the entropy of a bit. Words with none of the tags are a class of their own.
    """
    classes = [has_tag(words, tag) for tag in tags]
    classes.append(~torch.stack(classes).any(0))
    entropy = torch.distributions.Bernoulli(on.mean(0)).entropy()
    for members in classes:
        if members.any():
            share = members.to(on.dtype).mean()
            entropy = entropy - share * torch.distributions.Bernoulli(on[members].mean(0)).entropy()
    return entropy / torch.tensor(2.0).log()
