"""What a mask takes out of the ELBO teaches a baseline nothing: padded words have no cost."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_sparse.estimators import MovingAverage, NeuralBaseline, Scaled, TrainableConstant
from pyro_sparse.infer import BaselineELBO


def elbo_after_a_step(baseline: Any, words: int, length: int) -> BaselineELBO:
    """Sentences of some words, padded to a length. Every word draws the same bit, so that all costs are equal."""
    mask = (torch.arange(length) < words).expand(4, length)

    def program(side: str, sizes: torch.Tensor) -> None:
        logits = pyro.param("logits", torch.tensor(50.0)) if side == "guide" else torch.zeros(())
        with pyro.plate("s", 4, dim=-2), pyro.plate("t", length, dim=-1), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Bernoulli(logits=logits))
            if side == "model":
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(5.0).expand(4, length))

    sizes = torch.zeros(4, length, 1)
    elbo = BaselineELBO(baseline, max_plate_nesting=2)
    elbo.loss_and_grads(lambda x: program("model", x), lambda x: program("guide", x), sizes)
    return elbo


def learned(elbo: BaselineELBO) -> dict[str, Any]:
    gradients = {name: p.grad for name, p in elbo.named_parameters()}
    return {
        **{k: v.clone() for k, v in elbo.state_dict().items()},
        **{f"{k}'s gradient": v for k, v in gradients.items()},
    }


def network() -> NeuralBaseline:
    pyro.set_rng_seed(1)
    return NeuralBaseline(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Flatten(-2)))


@pytest.mark.parametrize("make", [MovingAverage, TrainableConstant, network, lambda: Scaled(network())])
def test_padding_is_not_seen(make: Any) -> None:
    """The control: without a mask the padded words would count."""
    short, padded = (learned(elbo_after_a_step(make(), 3, length)) for length in (3, 9))
    assert short.keys() == padded.keys()
    for name in short:
        torch.testing.assert_close(padded[name], short[name], msg=name)
    unmasked = learned(elbo_after_a_step(make(), 9, 9))
    torch.testing.assert_close(unmasked, short)  # all costs are equal


def test_all_rows_masked_moves_nothing() -> None:
    elbo = elbo_after_a_step(MovingAverage(), 0, 3)
    assert all(v.isfinite().all() for v in learned(elbo).values())
