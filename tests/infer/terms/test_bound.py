"""The n-particle bound of programs with terms outside of the data plate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_sparse.estimators import VIMCO
from pyro_sparse.infer import EstimatorELBO
from pyro_sparse.infer.terms import bound as bound_module

X = torch.tensor([0.3, -1.0], dtype=torch.float64)
Outside = Callable[[Tensor], Any]


def program(before: Outside, after: Callable[[Tensor], Any] = lambda z: None) -> tuple[Any, Any]:
    def model() -> None:
        w = pyro.param("w", torch.tensor(0.5))
        before(w)
        with pyro.plate("N", 2):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(z * w, 1.0), obs=X)
        after(z)

    def guide() -> None:
        with pyro.plate("N", 2):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(2))))

    return model, guide


def step(model: Any, guide: Any, loss: str = "loss_and_grads") -> tuple[float, Tensor, Tensor]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    value = getattr(EstimatorELBO(VIMCO(3), max_plate_nesting=1), loss)(model, guide)
    if isinstance(value, Tensor):
        value.backward()
    return float(torch.as_tensor(value).detach()), *(pyro.param(name).grad for name in ("w", "logits"))


def scaled(w: Tensor) -> None:
    with poutine.scale(scale=2.0):
        pyro.factor("penalty", -w.square() / 2)


OUTSIDE: dict[str, tuple[Outside, float, float]] = {  # what they add to the loss, and to its derivative by w = 0.5
    "deterministic": (lambda w: pyro.deterministic("d", 2 * w), 0.0, 0.0),
    "factor": (lambda w: pyro.factor("penalty", -w.square()), 0.25, 1.0),
    "scaled": (scaled, 0.25, 1.0),
    "observed": (
        lambda w: pyro.sample("prior", dist.Normal(0.0, 1.0), obs=w),
        0.125 + 0.5 * math.log(2 * math.pi),
        0.5,
    ),
}


@pytest.mark.parametrize("loss", ["loss_and_grads", "differentiable_loss"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_what_depends_on_no_draw_is_a_summand(name: str, loss: str) -> None:
    """The same seed, hence the same draws, with it and without."""
    outside, more, slope = OUTSIDE[name]
    plain, w, logits = step(*program(lambda w: None), loss)
    value, w_beside, logits_beside = step(*program(outside), loss)
    assert value == pytest.approx(plain + more, abs=1e-12)
    torch.testing.assert_close(w_beside, w + slope, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits_beside, logits, rtol=0, atol=1e-12)


def test_a_point_mass_is_no_draw() -> None:
    """A parameter at its maximum a posteriori, as a site of its own."""
    _, guide = program(lambda w: None)

    def pointwise() -> None:
        pyro.sample("v", dist.Delta(pyro.param("w", torch.tensor(0.5))))
        guide()

    model = program(lambda w: pyro.sample("v", dist.Normal(0.0, 1.0)))[0]
    plain, w, _ = step(*program(lambda w: None))
    value, w_beside, _ = step(model, pointwise)
    assert value == pytest.approx(plain + 0.125 + 0.5 * math.log(2 * math.pi), abs=1e-12)
    torch.testing.assert_close(w_beside, w + 0.5, rtol=0, atol=1e-12)


def test_what_depends_on_a_draw_is_refused_by_name() -> None:
    model, guide = program(lambda w: None, lambda z: pyro.factor("count", z.sum(-1, keepdim=True)))
    with pytest.raises(ValueError, match=r"site 'z': expected for VIMCO one data plate .*\['count'\] outside"):
        step(model, guide)


def test_joint_weights_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: with no term taken for a summand the program is refused."""
    monkeypatch.setattr(bound_module, "without_draws", lambda *args: frozenset())
    with pytest.raises(ValueError, match="one data plate"):
        step(*program(OUTSIDE["factor"][0]))
