"""Pyro's examples whose discrete sites are in the model alone, to be summed out, rebuilt small on generated data."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.distributions import constraints

PARALLEL = {"enumerate": "parallel"}

# Three binary variables in a row, of which the middle one is never seen.


@config_enumerate
def table_model(seen: dict[str, Tensor], size: int) -> None:
    p_a = pyro.sample("p_a", dist.Beta(1.0, 1.0))
    p_b = pyro.sample("p_b", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
    p_c = pyro.sample("p_c", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
    with pyro.plate("rows", size):
        a = pyro.sample("a", dist.Bernoulli(p_a.expand(size)), obs=seen["a"])
        b = pyro.sample("b", dist.Bernoulli(Vindex(p_b)[a.long()]), infer=PARALLEL)
        pyro.sample("c", dist.Bernoulli(Vindex(p_c)[b.long()]), obs=seen["c"])


def table_guide(seen: dict[str, Tensor], size: int) -> None:
    for name, shape in (("p_a", (2,)), ("p_b", (2, 2)), ("p_c", (2, 2))):
        counts = pyro.param(
            f"counts_{name}", lambda shape=shape: 1 + torch.rand(shape), constraint=constraints.positive
        )
        pyro.sample(name, dist.Beta(counts[..., 0], counts[..., 1]).to_event(len(shape) - 1))


# Hidden Markov models of chords.

LENGTHS = torch.tensor([3, 1, 2])
STATES, TONES = 4, 3


def chords() -> Tensor:
    return torch.rand(len(LENGTHS), int(LENGTHS.max()), TONES).round()


def tables(prior: bool, states: int = STATES, emission: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    with poutine.mask(mask=prior):
        x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(states) + 0.1).to_event(1))
        y = pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand([*emission, TONES]).to_event(len(emission) + 1))
    return x, y


def hmm_0(sequences: Tensor, lengths: Tensor, prior: bool = True) -> None:
    """One sequence after the other."""
    probs_x, probs_y = tables(prior, emission=(STATES,))
    tones = pyro.plate("tones", TONES, dim=-1)
    for i in pyro.plate("sequences", len(sequences)):
        x = 0
        for t in pyro.markov(range(lengths[i])):
            x = pyro.sample(f"x_{i}_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
            with tones:
                pyro.sample(f"y_{i}_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequences[i, t])


def hmm_1(sequences: Tensor, lengths: Tensor, prior: bool = True, batch_size: int | None = None) -> None:
    """Sequences in parallel, padded and masked, perhaps in minibatches."""
    probs_x, probs_y = tables(prior, emission=(STATES,))
    tones = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(sequences), batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        x = 0
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                with tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequences[batch, t])


def hmm_2(sequences: Tensor, lengths: Tensor, prior: bool = True) -> None:
    """Tones that depend on the tones before."""
    probs_x, probs_y = tables(prior, emission=(STATES, 2))
    tones_plate = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(sequences), dim=-2) as batch:
        x: Any = 0
        y: Any = 0
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                with tones_plate as tones:
                    y = pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x, y, tones]), obs=sequences[batch, t]).long()


def factorial(sequences: Tensor, lengths: Tensor, coupled: bool, prior: bool = True) -> None:
    """Two chains, the second one perhaps driven by the first."""
    half = int(STATES**0.5)
    transition = dist.Dirichlet(0.9 * torch.eye(half) + 0.1)
    with poutine.mask(mask=prior):
        probs_w = pyro.sample("probs_w", transition.to_event(1))
        probs_x = pyro.sample(
            "probs_x", transition.expand_by([half]).to_event(2) if coupled else transition.to_event(1)
        )
        probs_y = pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand([half, half, TONES]).to_event(3))
    tones_plate = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(sequences), dim=-2) as batch:
        w = x = torch.tensor(0)
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]), infer=PARALLEL)
                row = Vindex(probs_x)[w, x] if coupled else probs_x[x]
                x = pyro.sample(f"x_{t}", dist.Categorical(row), infer=PARALLEL)
                with tones_plate as tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[w, x, tones]), obs=sequences[batch, t])


class Tones(nn.Module):
    """Tones given the state and the tones before, which a convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.before = nn.Linear(STATES, 5), nn.Linear(2 * TONES, 5)
        self.convolution, self.out = nn.Conv1d(1, 2, 3, padding=1), nn.Linear(5, TONES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        one_hot = y.new_zeros(*x.shape[:-1], STATES).scatter_(-1, x, 1)
        read = self.convolution(y.reshape(-1, 1, TONES)).relu().reshape(*y.shape[:-1], -1)
        logits: Tensor = self.out((self.state(one_hot) + self.before(read)).relu())
        return logits


def hmm_5(sequences: Tensor, lengths: Tensor, net: Tones, prior: bool = True) -> None:
    """A neural emission."""
    pyro.module("tones", net)
    with poutine.mask(mask=prior):
        probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(STATES) + 0.1).to_event(1))
    with pyro.plate("sequences", len(sequences), dim=-2) as batch:
        x: Any = 0
        y = torch.zeros(TONES)
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                with pyro.plate(f"tones_{t}", TONES, dim=-1):
                    y = pyro.sample(f"y_{t}", dist.Bernoulli(logits=net(x, y)), obs=sequences[batch, t])


def hmm_6(sequences: Tensor, lengths: Tensor, raftery: bool = False) -> None:
    """Of second order, by parameters alone: the guide has nothing to do."""
    if raftery:
        first = pyro.param("first", torch.rand(STATES, STATES), constraint=constraints.simplex)
        second = pyro.param("second", torch.rand(STATES, STATES), constraint=constraints.simplex)
        share = pyro.param("share", torch.tensor(0.4), constraint=constraints.unit_interval)
        probs_x = share * first + (1 - share) * second.unsqueeze(-2)
    else:
        probs_x = pyro.param("probs_x", torch.rand(STATES, STATES, STATES), constraint=constraints.simplex)
    probs_y = pyro.param("probs_y", torch.rand(STATES, TONES), constraint=constraints.unit_interval)
    tones = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(sequences), dim=-2) as batch:
        now, before = torch.tensor(0), torch.tensor(0)
        for t in pyro.markov(range(int(lengths.max())), history=2):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                row = Vindex(probs_x)[before, now]
                before, now = now, pyro.sample(f"x_{t}", dist.Categorical(row), infer=PARALLEL)
                with tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[now.squeeze(-1)]), obs=sequences[batch, t])


# Latent Dirichlet allocation.

TOPICS, WORDS, DOCUMENTS, LENGTH = 2, 5, 4, 6


def lda_model(data: Tensor, batch_size: int | None = None) -> None:
    with pyro.plate("topics", TOPICS):
        weights = pyro.sample("topic_weights", dist.Gamma(1.0 / TOPICS, 1.0))
        words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(WORDS) / WORDS))
    with pyro.plate("documents", DOCUMENTS) as ind:
        topics = pyro.sample("doc_topics", dist.Dirichlet(weights))
        with pyro.plate("words", LENGTH):
            topic = pyro.sample("word_topics", dist.Categorical(topics), infer=PARALLEL)
            pyro.sample("doc_words", dist.Categorical(words[topic]), obs=data[:, ind])


def lda_guide(predictor: nn.Module, data: Tensor, batch_size: int | None = None) -> None:
    weights = pyro.param("weights_of_q", torch.ones(TOPICS), constraint=constraints.positive)
    words = pyro.param("words_of_q", torch.ones(TOPICS, WORDS), constraint=constraints.greater_than(0.5))
    with pyro.plate("topics", TOPICS):
        pyro.sample("topic_weights", dist.Gamma(weights, 1.0))
        pyro.sample("topic_words", dist.Dirichlet(words))
    pyro.module("predictor", predictor)
    with pyro.plate("documents", DOCUMENTS, batch_size) as ind:
        histogram = F.one_hot(data[:, ind], WORDS).sum(0).to(words.dtype)
        pyro.sample("doc_topics", dist.Delta(predictor(histogram).softmax(-1), event_dim=1))


# Capture and recapture of marked animals, who live or not, in five variants.

ANIMALS, YEARS = 5, 3


class CaptureRecapture:
    """
    The survival of a year: one parameter (1); one for each year (2), perhaps drawn around a mean (3); one for each sex
    (4); a sum of both in logits (5). Before its first capture, an animal is masked.
    """

    def __init__(self, variant: int) -> None:
        self.variant = variant

    def shared(self, sex: Tensor) -> Any:
        unit = dist.Uniform(0.0, 1.0)
        if self.variant == 1:
            return pyro.sample("phi", unit)
        if self.variant == 3:
            return pyro.sample("phi_mean", unit).logit(), pyro.sample("phi_sigma", dist.Uniform(0.0, 10.0))
        if self.variant == 4:
            return sex * pyro.sample("phi_male", unit) + (1 - sex) * pyro.sample("phi_female", unit)
        return sex * pyro.sample("phi_beta", dist.Normal(0.0, 10.0)) if self.variant == 5 else None

    def survival(self, t: int, shared: Any) -> Any:
        if self.variant in (1, 4):
            return shared
        if self.variant == 2:
            return pyro.sample(f"phi_{t}", dist.Uniform(0.0, 1.0)) if t else 1.0
        if self.variant == 3:
            return pyro.sample(f"phi_logit_{t}", dist.Normal(*shared)).sigmoid() if t else 0.5
        return (shared + (pyro.sample(f"phi_gamma_{t}", dist.Normal(0.0, 10.0)) if t else 0.0)).sigmoid()

    def __call__(self, captures: Tensor, sex: Tensor) -> None:
        shared = self.shared(sex)
        rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
        animals = pyro.plate("animals", ANIMALS, dim=-1)
        alive, known = torch.ones(ANIMALS), torch.zeros(ANIMALS).bool()
        for t in pyro.markov(range(YEARS)):
            phi = self.survival(t, shared)  # outside of the plate
            with animals, poutine.mask(mask=known):
                p = known.to(alive.dtype) * phi * alive + (1 - known.to(alive.dtype))
                alive = pyro.sample(f"z_{t}", dist.Bernoulli(p), infer=PARALLEL)
                pyro.sample(f"y_{t}", dist.Bernoulli(rho * alive), obs=captures[:, t])
            known = known | captures[:, t].bool()


# The mixed HMM: tracks of animals in groups, with a random effect of each group and each animal, discrete or not.

MOODS, EFFECTS, GROUPS, TRACKS, STEPS, MISSING = 2, 3, 2, 3, 2, 1e-6


def positive(name: str) -> Tensor:
    return pyro.param(name, lambda: torch.rand(MOODS) + 0.5, constraint=constraints.positive)


def random_effect(level: str, kind: str, groups: tuple[int, ...]) -> Any:
    """On the logits of the transitions."""
    if kind == "discrete":
        probs = pyro.param(f"probs_{level}", lambda: torch.rand(*groups, EFFECTS), constraint=constraints.simplex)
        theta = pyro.param(f"theta_{level}", lambda: torch.randn(*groups, EFFECTS, MOODS**2))
        return Vindex(theta)[..., pyro.sample(f"e_{level}", dist.Categorical(probs)), :]
    if kind == "continuous":
        return pyro.sample(f"eps_{level}", dist.Normal(torch.zeros(*groups, MOODS**2), 1.0).to_event(1))
    return 0.0


def zero_inflated(name: str, fn: dist.TorchDistribution, seen: Tensor, y: Tensor) -> None:
    missing = seen == MISSING
    logits = Vindex(pyro.param(f"zi_{name[0]}", lambda: torch.randn(MOODS, 2)))[..., y, :]
    pyro.sample(f"zi_{name}", dist.Categorical(logits=logits), obs=missing.long())
    pyro.sample(name, dist.MaskedMixture(missing, fn, dist.Delta(torch.tensor(MISSING))), obs=seen)


@config_enumerate
def tracks_model(
    kinds: tuple[str, str], steps: Tensor, angles: Tensor, turns: Tensor, masks: tuple[Tensor, Tensor]
) -> None:
    gamma = torch.zeros(MOODS**2)
    with pyro.plate("group", GROUPS, dim=-1):
        gamma = gamma + random_effect("group", kinds[0], ())
        with pyro.plate("individual", TRACKS, dim=-2), poutine.mask(mask=masks[0]):
            gamma = gamma + random_effect("individual", kinds[1], (GROUPS,))
            y = torch.tensor(0)
            for t in pyro.markov(range(STEPS)):
                with poutine.mask(mask=masks[1][..., t]):
                    table = gamma.reshape(*gamma.shape[:-1], MOODS, MOODS)
                    y = pyro.sample(f"y_{t}", dist.Categorical(logits=Vindex(table)[..., y, :]))
                    of_mood = {name: Vindex(positive(name))[..., y] for name in ("a", "b", "k", "loc", "c", "d")}
                    zero_inflated(f"s_{t}", dist.Gamma(of_mood["a"], of_mood["b"]), steps[..., t], y)
                    pyro.sample(f"angle_{t}", dist.VonMises(of_mood["loc"], of_mood["k"]), obs=angles[..., t])
                    zero_inflated(f"o_{t}", dist.Beta(of_mood["c"], of_mood["d"]), turns[..., t], y)


def tracks_guide(kinds: tuple[str, str], *data: Any) -> None:
    def normal(level: str, *groups: int) -> None:
        loc = pyro.param(f"loc_{level}", lambda: torch.zeros(*groups, MOODS**2))
        scale = pyro.param(f"scale_{level}", lambda: torch.ones(*groups, MOODS**2), constraint=constraints.positive)
        pyro.sample(f"eps_{level}", dist.Normal(loc, scale).to_event(1))

    with pyro.plate("group", GROUPS, dim=-1):
        if kinds[0] == "continuous":
            normal("group")
        with pyro.plate("individual", TRACKS, dim=-2), poutine.mask(mask=data[-1][0]):
            if kinds[1] == "continuous":
                normal("individual", GROUPS)
