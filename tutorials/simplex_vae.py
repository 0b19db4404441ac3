r"""
Digits on the simplex: VAEs that differ in their latent variable alone, their training and their evaluation.

.. math::
    z \sim p(z), \qquad x_i \mid z \sim \mathrm{Bernoulli}(\sigma(g_\theta(z)_i)), \qquad q(z \mid x) = q(z; h_\phi(x)),

where x is a binary image, g and h are networks with one hidden layer, and z has ten coordinates: real numbers, a point
inside the simplex, a vertex of it, or a point that may lie on any of its faces. The last is from A. Farinhas et al.,
*Sparse communication via mixed distributions*, ICLR 2022.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyro_sparse
import pyro_sparse.distributions as sdist
from pyro_sparse.estimators import Exact, LeaveOneOut, MovingAverage, ScoreFunction
from pyro_sparse.infer import EstimatorELBO


class VAE(nn.Module):
    """
    What the VAEs share: the networks, model and guide, in plain Pyro.

    Args:
        images: to train on, ``(N, num_pixels)``, of zeros and ones. The decoder starts at their mean, so that the first
            steps do not go into learning it, by way of whichever coordinate is ahead.
        hidden: units of the hidden layers.
        size: coordinates of z.
    """

    num_parameters = 1  # of the guide, for each coordinate of z
    zeros: Tensor

    def __init__(self, images: Tensor, hidden: int = 128, size: int = 10) -> None:
        super().__init__()
        num_pixels, outputs = images.shape[1], self.num_parameters * size
        self.encoder = nn.Sequential(nn.Linear(num_pixels, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        self.decoder = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, num_pixels))
        with torch.no_grad():
            self.decoder[-1].bias.copy_(((images.sum(0) + 1) / (len(images) + 2)).logit())
        self.register_buffer("zeros", torch.zeros(size), persistent=False)

    def prior(self) -> dist.TorchDistribution:
        raise NotImplementedError

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        return self.code(*self.encoder(x).chunk(self.num_parameters, -1))

    def code(self, *parameters: Tensor) -> dist.TorchDistribution:
        raise NotImplementedError

    def elbo(self, draws: int = 8) -> ELBO:
        """The KL in closed form, draws of z for the rest: here pathwise."""
        return TraceMeanField_ELBO(num_particles=draws, vectorize_particles=draws > 1, max_plate_nesting=1)

    def draw(self, d: Any) -> Tensor:
        return pyro.sample("z", d)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            z = self.draw(self.prior())
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("images", len(x)):
            self.draw(self.posterior(x))


class Gaussian(VAE):
    num_parameters = 2

    def prior(self) -> dist.TorchDistribution:
        return dist.Normal(self.zeros, 1.0).to_event(1)

    def code(self, *parameters: Tensor) -> dist.TorchDistribution:
        loc, log_scale = parameters
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class Dirichlet(VAE):
    """Inside the simplex: no coordinate is ever zero."""

    def prior(self) -> dist.TorchDistribution:
        return dist.Dirichlet(self.zeros + 1)

    def code(self, *parameters: Tensor) -> dist.TorchDistribution:
        return dist.Dirichlet(0.01 + softplus(parameters[0]))


class Categorical(VAE):
    """At a vertex; all ten are summed."""

    def prior(self) -> dist.TorchDistribution:
        return dist.OneHotCategorical(logits=self.zeros)

    def code(self, *parameters: Tensor) -> dist.TorchDistribution:
        return dist.OneHotCategorical(logits=parameters[0])

    def elbo(self, draws: int = 8) -> ELBO:
        return EstimatorELBO({"z": Exact()}, analytic_kl=True, max_plate_nesting=1)


class GumbelSoftmaxST(Categorical):
    """At a vertex, with the derivative of a relaxed draw, which is biased."""

    elbo = VAE.elbo

    def code(self, *parameters: Tensor) -> dist.TorchDistribution:
        return sdist.GumbelSoftmaxST(1.0, logits=parameters[0])


class MixedDirichlet(VAE):
    """On any face: its vertices are drawn first, which an estimator of discrete variables serves, then the point."""

    num_parameters = 2

    def prior(self) -> dist.TorchDistribution:
        """That of maximum entropy: uniform on each face, and the faces accordingly."""
        faces = sdist.MaxEntropyFaces(len(self.zeros), self.zeros[0])
        return sdist.MixedSimplex(faces, sdist.FaceDirichlet(self.zeros + 1))

    def code(self, *parameters: Tensor) -> dist.TorchDistribution:
        scores, concentration = parameters
        return sdist.MixedDirichlet(scores, 0.01 + softplus(concentration))  # of a vertex never drawn it could be any

    def elbo(self, draws: int = 8) -> ELBO:
        estimator = LeaveOneOut(draws) if draws > 1 else ScoreFunction(MovingAverage())
        return EstimatorELBO({"z_face": estimator}, analytic_kl=True, max_plate_nesting=1)

    def draw(self, d: Any) -> Tensor:
        return pyro_sparse.sample_mixed("z", d.faces, d.within)[1]


def train(vae: VAE, elbo: ELBO, images: Tensor, epochs: int, seed: int = 0, learning_rate: float = 3e-3) -> list[float]:
    """
    Adam on minibatches of 64 images. Returns the mean ELBO per image during each epoch.

    Args:
        vae: trained in place.
        elbo: ``vae.elbo()`` or another.
        images: ``(N, num_pixels)``, of zeros and ones.
        epochs: passes over them.
        seed: of the order of the images.
        learning_rate: of Adam.
    """
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": learning_rate}), loss=elbo)
    shuffle, elbos = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=shuffle)
        elbos.append(-sum(svi.step(images[part]) for part in order.split(64)) / len(images))
    return elbos


@torch.no_grad()
def nll_and_elbo(vae: VAE, images: Tensor, draws: int = 1000) -> tuple[float, float]:
    r"""
    The negative log-likelihood and the ELBO, nats per image.

    .. math:: \log p(x) \approx \log \frac1S \sum_{s=1}^S \frac{p(x, z_s)}{q(z_s \mid x)}, \qquad z_s \sim q(z \mid x)

    the first too high on average, and the less so the more draws. Both are exact where z is a vertex: a sum over all.
    """
    nll = elbo = 0.0
    prior = vae.prior()
    for x in images.split(max(1, 16_000 // draws)):
        q = vae.posterior(x)
        exact = q.has_enumerate_support
        z = q.enumerate_support() if exact else q.sample((draws,))
        log_q = q.log_prob(z)
        log_likelihood = dist.Bernoulli(logits=vae.decoder(z)).log_prob(x).sum(-1)
        log_weights = prior.log_prob(z) + log_likelihood - log_q
        shares = log_q if exact else torch.full_like(log_q, 1 / draws).log()
        nll -= float((shares + log_weights).logsumexp(0).sum())
        elbo += float((shares.exp() * log_weights).sum())
    return nll / len(images), elbo / len(images)


def read_idx(path: str | Path) -> Tensor:
    """Images of an IDX file, gzip, as those of MNIST: ``(N, rows * columns)``, one where there is half of the ink."""
    data = gzip.decompress(Path(path).read_bytes())
    magic, number, rows, columns = struct.unpack(">4i", data[:16])
    if magic != 0x803 or len(data) != 16 + number * rows * columns:
        raise ValueError(f"read_idx: expected an IDX file of images, got {path}. Use e.g. t10k-images-idx3-ubyte.gz.")
    pixels = torch.frombuffer(bytearray(data[16:]), dtype=torch.uint8).reshape(number, rows * columns)
    return (pixels >= 128).to(torch.get_default_dtype())
