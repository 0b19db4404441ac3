"""tutorials/word_vae.py at a size that takes milliseconds: encoding, dims, masks, and the NLL against enumeration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_sparse.infer import BaselineELBO

TUTORIALS = Path(__file__).parents[2] / "tutorials"
LIST = ["ir", "dar", "ido", "íbamos"]
ALPHABET = "abdiorsmí"


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(TUTORIALS)
    import word_vae

    yield word_vae


def tiny(words: ModuleType, num_bits: int = 3) -> torch.nn.Module:
    return words.WordVAE(4 + len(ALPHABET), num_bits, size=5).eval()


def test_encode_and_decode_are_inverse(words: ModuleType) -> None:
    x = words.encode(LIST, ALPHABET)
    assert x.shape == (4, 7) and ((x == words.END).sum(-1) == 1).all()
    assert words.decode(x, ALPHABET) == LIST
    assert words.decode(words.encode(["yr"], ALPHABET), ALPHABET) == ["?r"]
    assert words.trim(x[:3]).shape == (3, 4)


def test_counts_leave_out_the_padding(words: ModuleType) -> None:
    counts = words.symbol_counts(words.encode(["dad", "a"], ALPHABET), 4 + len(ALPHABET))
    assert counts.sum(-1).tolist() == [4, 2] and counts[0, 4 + ALPHABET.index("d")] == 2
    assert counts[:, words.END].tolist() == [1, 1] and (counts[:, words.PAD] == 0).all()


def test_decoder_takes_any_leading_dims(words: ModuleType) -> None:
    vae, x = tiny(words), words.encode(LIST, ALPHABET)
    z = vae.prior().sample((2, 3, len(x)))
    together = vae.likelihood(z, x).log_prob(x)
    assert together.shape == (2, 3, len(x))
    for i, j in product(range(2), range(3)):
        torch.testing.assert_close(together[i, j], vae.likelihood(z[i, j], x).log_prob(x))


def test_bit_vectors_of_a_word_share_their_dropout(words: ModuleType) -> None:
    vae, x = tiny(words).train(), words.encode(LIST, ALPHABET)
    z = vae.prior().sample((len(x),)).expand(5, -1, -1)
    log_prob = vae.likelihood(z, x).log_prob(x)
    torch.testing.assert_close(log_prob, log_prob[:1].expand_as(log_prob))
    assert not torch.allclose(log_prob[0], vae.likelihood(z[0], x).log_prob(x))


def test_padding_changes_nothing(words: ModuleType) -> None:
    vae, x = tiny(words), words.encode(LIST, ALPHABET)
    z = vae.prior().sample((len(x),))
    for i, word in enumerate(LIST):
        alone = words.encode([word], ALPHABET)
        torch.testing.assert_close(
            vae.likelihood(z[i : i + 1], alone).log_prob(alone)[0], vae.likelihood(z, x).log_prob(x)[i]
        )
        torch.testing.assert_close(vae.posterior(alone).base_dist.logits[0], vae.posterior(x).base_dist.logits[i])


def test_a_symbol_is_predicted_from_those_before_it(words: ModuleType) -> None:
    vae, x = tiny(words), words.encode(["íbamos"], ALPHABET)
    z = vae.prior().sample((1,))
    changed = x.clone()
    changed[0, 3] = 4 + ALPHABET.index("í")
    different = (vae.decoder(z, x) != vae.decoder(z, changed)).any(-1)[0]
    assert different.tolist() == [False] * 4 + [True] * 3


def test_a_blind_decoder_does_not_see_the_word(words: ModuleType) -> None:
    vae = words.WordVAE(4 + len(ALPHABET), 3, size=5, sees_past=False).eval()
    x = words.encode(["dar", "ido"], ALPHABET)
    logits = vae.decoder(torch.ones(2, 3), x)
    torch.testing.assert_close(logits[0], logits[1])
    assert not torch.allclose(logits, vae.decoder(torch.zeros(2, 3), x))


def test_kl_weight_multiplies_the_kl_alone(words: ModuleType) -> None:
    x, losses = words.encode(LIST, ALPHABET), {}
    for weight in (1e-9, 1.0, 3.0):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        vae = words.WordVAE(4 + len(ALPHABET), 3, size=5, kl_weight=weight).eval()
        losses[weight] = BaselineELBO(analytic_kl=True).loss(vae.model, vae.guide, x)
    kl = words.elbo_and_kl(vae, x)[1] * len(x)
    assert losses[1.0] - losses[1e-9] == pytest.approx(kl) and losses[3.0] - losses[1e-9] == pytest.approx(3 * kl)


def test_nll_is_that_of_the_enumerated_bits(words: ModuleType) -> None:
    vae, x = tiny(words), words.encode(LIST, ALPHABET)
    z = torch.tensor(list(product([0.0, 1.0], repeat=3))).unsqueeze(1).expand(-1, len(x), -1)
    log_joint = vae.prior().log_prob(z) + vae.likelihood(z, x).log_prob(x)
    exact = -float(log_joint.logsumexp(0).mean().detach())
    nll, perplexity = words.nll_and_perplexity(vae, x, draws=20_000)
    assert nll == pytest.approx(exact, abs=2e-3)
    assert perplexity == pytest.approx(math.exp(exact * 4 / (3 + 4 + 4 + 7)), rel=1e-3)


def test_elbo_is_that_of_pyro(words: ModuleType) -> None:
    vae, x = tiny(words), words.encode(LIST, ALPHABET)
    ours = torch.tensor([words.elbo_and_kl(vae, x) for _ in range(200)]).mean(0)
    elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    assert float(ours[0]) == pytest.approx(-elbo.loss(vae.model, vae.guide, x) / len(x), abs=5e-3)


def test_training_raises_the_elbo(words: ModuleType) -> None:
    vae, x = words.WordVAE(4 + len(ALPHABET), 3, size=5, dropout=0.1), words.encode(LIST * 32, ALPHABET)
    seen: list[float] = []
    words.train(vae, Trace_ELBO(), x, epochs=4, after_epoch=lambda epoch, elbo: seen.append(elbo))
    assert len(seen) == 4 and seen[0] < seen[-1] < 0 and not vae.training
    assert {name.split("$$$")[0] for name in pyro.get_param_store()} == {"decoder", "encoder"}
