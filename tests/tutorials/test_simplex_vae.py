"""tutorials/simplex_vae.py at a size that takes milliseconds: shapes, the NLL against sums and quadrature, training."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

TUTORIALS = Path(__file__).parents[2] / "tutorials"
KINDS = ["Gaussian", "Dirichlet", "Categorical", "GumbelSoftmaxST", "MixedDirichlet"]


@pytest.fixture
def vaes(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(TUTORIALS)
    import simplex_vae

    yield simplex_vae


@pytest.fixture
def images() -> Tensor:
    """Two kinds, and some noise."""
    return torch.bernoulli(torch.tensor([[0.9] * 4 + [0.1] * 4, [0.1] * 4 + [0.9] * 4]).repeat(32, 1))


def tiny(vaes: ModuleType, kind: str, images: Tensor, size: int = 3) -> torch.nn.Module:
    vae = getattr(vaes, kind)(images, hidden=5, size=size)
    with torch.no_grad():  # a decoder that makes something of z
        vae.decoder[0].weight.mul_(6)
    return vae


def log_likelihood(vae: torch.nn.Module, z: Tensor, x: Tensor) -> Tensor:
    return dist.Bernoulli(logits=vae.decoder(z)).to_event(1).log_prob(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draws", [1, 4])
def test_training_raises_the_elbo(vaes: ModuleType, images: Tensor, kind: str, draws: int) -> None:
    vae = getattr(vaes, kind)(images, hidden=5, size=3)
    before = [parameter.clone() for parameter in vae.parameters()]
    elbos = vaes.train(vae, vae.elbo(draws), images, 5, learning_rate=0.03)
    assert len(elbos) == 5 and elbos[0] < elbos[-1] < 0
    assert not any(torch.equal(*pair) for pair in zip(before, vae.parameters(), strict=True))
    assert {name.split("$$$")[0] for name in pyro.get_param_store()} == {"decoder", "encoder"}


@pytest.mark.parametrize("kind", KINDS)
def test_elbo_is_that_of_pyro(vaes: ModuleType, images: Tensor, kind: str) -> None:
    vae, x = tiny(vaes, kind, images), images[:5]
    _, elbo = vaes.nll_and_elbo(vae, x, draws=4000)
    pyros = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    assert elbo == pytest.approx(-pyros.loss(vae.model, vae.guide, x) / len(x), abs=0.05)
    assert elbo == pytest.approx(-vae.elbo(4000).loss(vae.model, vae.guide, x) / len(x), abs=0.05)


@pytest.mark.parametrize("kind", ["Categorical", "GumbelSoftmaxST"])
def test_nll_and_elbo_of_vertices_are_exact(vaes: ModuleType, images: Tensor, kind: str) -> None:
    vae, x = tiny(vaes, kind, images), images[:5]
    joint = torch.stack([log_likelihood(vae, z, x) for z in torch.eye(3)]) - torch.tensor(3.0).log()
    log_q = vae.encoder(x).log_softmax(-1).T
    nll, elbo = vaes.nll_and_elbo(vae, x)
    assert nll == pytest.approx(-float(joint.logsumexp(0).mean().detach()), rel=1e-12)
    assert elbo == pytest.approx(float((log_q.exp() * (joint - log_q)).sum(0).mean().detach()), rel=1e-12)


def test_nll_of_mixed_dirichlet_is_that_of_quadrature(vaes: ModuleType, images: Tensor) -> None:
    """Of two vertices and the edge between them, each with a third of the prior."""
    vae, x = tiny(vaes, "MixedDirichlet", images, size=2), images[:5]
    t, weights = (torch.from_numpy(a) / 2 for a in np.polynomial.legendre.leggauss(40))
    t = torch.cat([torch.tensor([0.0, 1.0]), t + 0.5])
    weights = torch.cat([torch.ones(2), weights]) / 3
    joint = log_likelihood(vae, torch.stack([t, 1 - t], -1).unsqueeze(1), x) + weights.log().unsqueeze(-1)
    nll, _ = vaes.nll_and_elbo(vae, x, draws=50_000)
    assert nll == pytest.approx(-float(joint.logsumexp(0).mean().detach()), abs=5e-3)


def test_mixed_prior_has_the_largest_entropy(vaes: ModuleType, images: Tensor) -> None:
    assert float(vaes.MixedDirichlet(images).prior().entropy()) == pytest.approx(5.0902, abs=1e-4)


def test_decoder_starts_at_the_mean_image(vaes: ModuleType, images: Tensor) -> None:
    """With a prior count of one ink and one paper, so that pixels that are always paper are not impossible."""
    images[:, 0] = 0.0
    probs = vaes.Gaussian(images, size=3).decoder[-1].bias.sigmoid()
    torch.testing.assert_close(probs, (images.sum(0) + 1) / 66)


def test_mixed_draws_are_on_faces(vaes: ModuleType, images: Tensor) -> None:
    vae = tiny(vaes, "MixedDirichlet", images)
    z = vae.posterior(images).sample((50,))
    torch.testing.assert_close(z.sum(-1), torch.ones(50, len(images)))
    sizes = (z > 0).sum(-1)
    assert sizes.min() == 1 and sizes.max() == 3
    torch.testing.assert_close(sizes.double().mean(), vae.posterior(images).expected_l0.mean(), rtol=0.05, atol=0.0)


def test_reads_idx(vaes: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(struct.pack(">4i", 0x803, 2, 1, 3) + bytes([0, 127, 128, 255, 1, 200])))
    assert vaes.read_idx(path).tolist() == [[0, 0, 1], [1, 0, 1]]
    path.write_bytes(gzip.compress(struct.pack(">2i", 0x801, 8) + bytes(8)))
    with pytest.raises(ValueError, match="expected an IDX file of images"):
        vaes.read_idx(path)
