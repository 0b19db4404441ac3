"""The straight-through estimator at one site: the families' own draws and Jacobians, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal, OneHotCategorical

from pyro_sparse import estimators
from pyro_sparse._relaxation import JACOBIANS
from pyro_sparse.distributions import BernoulliST, OneHotCategoricalST, SparseCategorical, SparseOneHotCategorical
from pyro_sparse.estimators import Site, StraightThrough
from pyro_sparse.estimators import __all__ as NAMES

each_jacobian = pytest.mark.parametrize("jacobian", JACOBIANS)


def draw(e: Any, fn: Distribution, seed: int = 3) -> Tensor:
    pyro.set_rng_seed(seed)
    return e.reparameterized(Site("z", fn))


@each_jacobian
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_it_draws_as_the_families_do(jacobian: Any, temperature: float) -> None:
    """Value and gradient are the same numbers for the same seed."""
    e = StraightThrough(jacobian, temperature, num_draws=3)
    options = {"jacobian": jacobian, "temperature": temperature, "num_draws": 3}
    for plain, family in ((OneHotCategorical, OneHotCategoricalST), (Bernoulli, BernoulliST)):
        for kind in ("logits", "probs"):
            given = torch.rand(4, 3)
            given = given / given.sum(-1, keepdim=True) if kind == "probs" else given
            given.requires_grad_()
            z = draw(e, plain(**{kind: given}))
            pyro.set_rng_seed(3)
            expected = family(**{kind: given}, **options).rsample()
            assert torch.equal(z, expected)
            found, theirs = (torch.autograd.grad((v * torch.arange(3.0)).sum(), given)[0] for v in (z, expected))
            assert torch.equal(found, theirs) and (found != 0).any()


@each_jacobian
def test_bits_of_a_vector(jacobian: Any) -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    together = draw(StraightThrough(jacobian), Independent(Bernoulli(logits=logits), 1))
    alone = draw(StraightThrough(jacobian), Bernoulli(logits=logits))
    assert torch.equal(together, alone) and together.shape == (4, 3)
    gradients = [torch.autograd.grad((z * torch.arange(3.0)).sum(), logits)[0] for z in (together, alone)]
    assert torch.equal(*gradients)


def test_rows_of_one_hot_vectors() -> None:
    logits = torch.randn(4, 2, 3, requires_grad=True)
    z = draw(StraightThrough(), Independent(OneHotCategorical(logits=logits), 1))
    assert z.shape == (4, 2, 3) and (z.sum(-1) == 1).all()
    (gradient,) = torch.autograd.grad((z * torch.arange(3.0)).sum(), logits)
    p = logits.softmax(-1)
    torch.testing.assert_close(gradient, p * (torch.arange(3.0) - (p @ torch.arange(3.0))[..., None]))


@each_jacobian
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_peaked_logits_have_finite_gradients(jacobian: Any, dtype: torch.dtype) -> None:
    for temperature in (0.01, 10.0):
        logits = torch.tensor([40.0, -40.0, 0.0], dtype=dtype).expand(300, 3).clone().requires_grad_()
        for plain in (OneHotCategorical, Bernoulli):
            z = draw(StraightThrough(jacobian, temperature), plain(logits=logits))
            (gradient,) = torch.autograd.grad((z * torch.randn_like(z)).sum(), logits)
            assert z.dtype == dtype and gradient.isfinite().all()


def test_a_temperature_that_is_a_parameter_gets_a_gradient() -> None:
    for jacobian in ("gumbel-softmax", "gumbel-rao"):
        temperature = nn.Parameter(torch.tensor(0.7))
        e = StraightThrough(jacobian, temperature)
        assert [*e.parameters()] == [temperature]
        (draw(e, OneHotCategorical(logits=torch.randn(20, 3))) * torch.arange(3.0)).sum().backward()
        assert temperature.grad.isfinite() and temperature.grad != 0


def test_each_element_may_have_its_temperature() -> None:
    """As in the families: a row of them meets the batch, not the outcomes."""
    temperature = torch.tensor([0.1, 1.0, 5.0])
    logits = torch.randn(2, 3, 3, requires_grad=True)
    for jacobian in ("reinmax", "gumbel-softmax", "gumbel-rao"):
        z = draw(StraightThrough(jacobian, temperature), OneHotCategorical(logits=logits))
        pyro.set_rng_seed(3)
        expected = OneHotCategoricalST(logits=logits, jacobian=jacobian, temperature=temperature).rsample()
        found, theirs = (torch.autograd.grad((v * torch.arange(3.0)).sum(), logits)[0] for v in (z, expected))
        assert torch.equal(found, theirs)


def test_a_schedule_may_set_the_temperature() -> None:
    e = StraightThrough("gumbel-softmax", 5.0)
    logits = torch.randn(20, 3, requires_grad=True)
    fn = OneHotCategorical(logits=logits)

    def gradient(estimator: StraightThrough) -> Tensor:
        return torch.autograd.grad((draw(estimator, fn) * torch.arange(3.0)).sum(), logits, retain_graph=True)[0]

    before = gradient(e)
    e.temperature = 0.1
    assert torch.equal(gradient(e), gradient(StraightThrough("gumbel-softmax", 0.1)))
    assert not torch.equal(gradient(e), before)
    e.temperature = 0.0
    with pytest.raises(ValueError, match=r"^StraightThrough: expected a positive temperature, got 0\.0\."):
        draw(e, fn)


def test_it_alone_says_that_it_is_biased() -> None:
    """What a report may recommend depends on it."""
    flags = {
        name: getattr(estimators, name).unbiased
        for name in NAMES
        if isinstance(getattr(estimators, name), type) and hasattr(getattr(estimators, name), "unbiased")
    }
    assert len(flags) > 8
    assert [name for name, unbiased in flags.items() if not unbiased] == ["StraightThrough"]


# Bad input.


@pytest.mark.parametrize("jacobian", ["softmx", "Softmax", None, ""])
def test_unknown_jacobians(jacobian: Any) -> None:
    with pytest.raises(ValueError, match=rf"^StraightThrough: expected a jacobian in .*'identity', .*got {jacobian!r}"):
        StraightThrough(jacobian)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, math.nan, torch.tensor(-0.5)], ids=str)
def test_temperatures_that_are_not_positive(temperature: Any) -> None:
    with pytest.raises(ValueError, match=r"^StraightThrough: expected a positive temp.*, got .*\. Use, say, 0\.5"):
        StraightThrough("gumbel-softmax", temperature)


@pytest.mark.parametrize("num_draws", [0, -1, 1.5])
def test_numbers_of_draws(num_draws: Any) -> None:
    with pytest.raises(ValueError, match=rf"^StraightThrough: expected num_draws of at least 1, got {num_draws}\."):
        StraightThrough("gumbel-rao", num_draws=num_draws)


@pytest.mark.parametrize(
    "fn",
    [
        Categorical(torch.ones(3)),
        Independent(Categorical(torch.ones(2, 3)), 1),
        SparseCategorical(torch.ones(3)),
        SparseOneHotCategorical(torch.ones(3)),
        Normal(0.0, 1.0),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_other_distributions(fn: Distribution) -> None:
    with pytest.raises(ValueError, match=r"^StraightThrough, site 'z': expected Bernoulli, OneHotCategorical.*RELAX"):
        draw(StraightThrough(), fn)
