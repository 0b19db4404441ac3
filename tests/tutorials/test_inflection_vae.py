"""tutorials/inflection_vae.py at a size that takes milliseconds: padding, dims, the loss, and what is read off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence
from torch.nn import functional

from pyro_sparse.datasets import Inflection

TUTORIALS = Path(__file__).parents[2] / "tutorials"
LIST = [Inflection("ev", "evler", ("N", "PL")), Inflection("ev", "ev", ("N", "SG")), Inflection("at", "atın", ("N",))]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(TUTORIALS)
    import inflection_vae

    yield inflection_vae


def test_padding_changes_nothing(page: ModuleType) -> None:
    words = page.Words(LIST, "aeılnrtv")
    vae = page.InflectionVAE(12, num_features=3, lemma_size=2, size=5)
    lemma, form = words.lemma, words.form
    longer = functional.pad(lemma, (0, 2), value=page.PAD), functional.pad(form, (0, 3), value=page.PAD)
    for posterior, narrow, wide in (
        (vae.lemma_posterior, (lemma,), longer[:1]),
        (vae.feature_posterior, (lemma, form), longer),
    ):
        torch.testing.assert_close(posterior(*narrow).mean, posterior(*wide).mean)
    f = vae.feature_posterior(lemma, form).sample()
    log_probs = [vae.spell(vae.form_decoder(f, y.shape[1], x), y).log_prob(y) for x, y in ((lemma, form), longer)]
    torch.testing.assert_close(*log_probs)


def test_loss_is_exact_in_the_kl(page: ModuleType) -> None:
    words = page.Words(LIST, "aeılnrtv")
    vae = page.InflectionVAE(12, num_features=3, lemma_size=2, size=5, kl_weight=1.0)
    torch.nn.init.zeros_(vae.lemma_decoder.latents.weight)  # the likelihood no longer depends on the draw
    torch.nn.init.zeros_(vae.form_decoder.latents.weight)
    loss = TraceMeanField_ELBO().loss(vae.model, vae.guide, words.lemma, words.form)
    with torch.no_grad():
        q_w, q_f = vae.lemma_posterior(words.lemma), vae.feature_posterior(words.lemma, words.form)
        kl = kl_divergence(q_w, torch.distributions.Normal(0.0, 1.0)).sum()
        kl = kl + kl_divergence(q_f, vae.feature_prior().expand(q_f.batch_shape)).sum()
        nll = torch.zeros(())
        for decoder, z, given, y in (
            (vae.lemma_decoder, q_w.mean, None, words.lemma),
            (vae.form_decoder, q_f.mean, words.lemma, words.form),
        ):
            nll = nll - vae.spell(decoder(z, y.shape[1], given), y).log_prob(y).sum()
    assert loss == pytest.approx(float(nll + kl), rel=1e-10)


def test_information_of_a_switch(page: ModuleType) -> None:
    words = page.Words(LIST, "aeılnrtv")
    on = torch.tensor([[1.0, 0.5], [0.0, 0.5], [0.0, 0.5]])
    thirds = -(torch.tensor([1.0, 2.0]) / 3).log2() @ torch.tensor([1.0, 2.0]) / 3
    torch.testing.assert_close(page.information(on, words, ["PL"]), torch.stack([thirds, torch.zeros(())]))
