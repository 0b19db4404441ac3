"""The digits VAEs of benchmarks/estimators.py, and one ELBO's gradients on them. It prints nothing by itself."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI
from torch import Tensor, nn

from pyro_sparse.infer.exact import EnumeratedELBO

PIXELS, CODES, HIDDEN, BATCH = 64, 10, 200, 32
LEARNING_RATE = 1e-2


class VAE(nn.Module):
    """Model and guide, in plain Pyro."""

    def __init__(self, kind: str, decoder: str) -> None:
        super().__init__()
        self.kind = kind
        width = PIXELS if decoder == "linear" else HIDDEN
        first = nn.Linear(CODES, width, bias=kind == "bits")
        if kind == "categorical":
            nn.init.normal_(first.weight)  # as an embedding has it
        rest = [] if decoder == "linear" else [nn.ReLU(), nn.Linear(HIDDEN, PIXELS)]
        self.decoder = nn.Sequential(first, *rest)
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CODES))

    def code(self, logits: Tensor) -> dist.TorchDistribution:
        if self.kind == "categorical":
            return dist.OneHotCategorical(logits=logits)
        return dist.Bernoulli(logits=logits).to_event(1)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", self.code(x.new_zeros(CODES)))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor, infer: dict[str, Any] | None = None) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("images", len(x)):
            pyro.sample("z", self.code(self.encoder(x)), infer=infer)


class Case:
    """One ELBO on a frozen VAE that other ELBOs share. Its own are a baseline's state and the parameter store."""

    def __init__(self, vae: VAE, elbo: ELBO, infer: dict[str, Any] | None = None) -> None:
        self.vae, self.elbo = vae, elbo
        self.guide = vae.guide if infer is None else functools.partial(vae.guide, infer=infer)
        self.store: Any = {"params": {}, "constraints": {}}
        self.svi = SVI(vae.model, self.guide, pyro.optim.Adam({"lr": 0.0}), loss=elbo)

    def run(self, x: Tensor) -> float:
        """Leaves the gradients of one minibatch; returns the processor time that they took."""
        self.vae.zero_grad()
        if isinstance(self.elbo, nn.Module):
            self.elbo.zero_grad()
        with pyro.get_param_store().scope(self.store):
            start = time.process_time()
            self.elbo.loss_and_grads(self.vae.model, self.guide, x)
            return time.process_time() - start

    def step(self, x: Tensor) -> float:
        """The processor time of a whole ``svi.step``, at a learning rate of zero."""
        with pyro.get_param_store().scope(self.store):
            start = time.process_time()
            self.svi.step(x)
            return time.process_time() - start

    def encoder_gradient(self, x: Tensor) -> Tensor:
        self.run(x)
        return torch.cat([p.grad.flatten() for p in self.vae.encoder.parameters()])

    def learn(self, batches: Iterator[Tensor], steps: int) -> None:
        """Running means move, what has parameters is trained, with a step size that falls to zero."""
        self.run(next(batches))
        parameters = [*self.elbo.parameters()] if isinstance(self.elbo, nn.Module) else []
        optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE) if parameters else None
        for step in range(steps):
            self.run(next(batches))
            if optimiser is not None:
                optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
                optimiser.step()

    def evaluations(self, x: Tensor) -> int:
        counts: list[int] = []
        hook = self.vae.decoder.register_forward_hook(lambda *call: counts.append(math.prod(call[-1].shape[:-2])))
        self.run(x)
        hook.remove()
        return sum(counts)


def exactly(vae: VAE) -> Case:
    """TraceEnum_ELBO, which here enumerates the 1024 patterns of a vector of bits, too."""
    return Case(vae, EnumeratedELBO(max_plate_nesting=1))


def minibatches(images: Tensor, seed: int) -> Iterator[Tensor]:
    """Minibatches without end."""
    shuffle = torch.Generator().manual_seed(seed)
    while True:
        yield from images[torch.randperm(len(images), generator=shuffle)].split(BATCH)


def trained(kind: str, decoder: str, elbo: ELBO, images: Tensor, steps: int, seed: int) -> VAE:
    """The weights start alike whatever the ELBO, whose own network may have drawn random numbers."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae = VAE(kind, decoder)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss=elbo)
    batches = minibatches(images, seed)
    for _ in range(steps):
        svi.step(next(batches))
    return vae


@torch.no_grad()
def exact_elbo(vae: VAE, images: Tensor) -> float:
    """Nats per image, by enumeration."""
    elbo = EnumeratedELBO(max_plate_nesting=1)
    return -sum(elbo.loss(vae.model, vae.guide, x) for x in images.split(BATCH)) / len(images)
