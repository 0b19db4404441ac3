"""Closed forms stand for both log-probabilities only where that is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor

from pyro_sparse.distributions import GumbelSoftmaxST, HardConcrete, RectifiedNormal
from pyro_sparse.estimators import Exact, MovingAverage, StraightThrough
from pyro_sparse.infer import BaselineELBO, EstimatorELBO
from pyro_sparse.infer.terms.divergences import NoClosedFormError, divergence

MASK = torch.tensor([True, False])
LOGITS = torch.tensor([0.3, -1.2])


def evaluate(estimator: Any, q: Any, p: Any, around: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the guide's logits of one site in a plate, and a datum."""
    logits = LOGITS.clone().requires_grad_()

    def model() -> None:
        plate = pyro.plate("N", 2)
        with plate, around() if around else poutine.scale(scale=1.0):
            z = pyro.sample("z", p())
        with plate:
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 3.0]))

    def guide() -> None:
        with pyro.plate("N", 2):
            pyro.sample("z", q(logits))

    elbo = EstimatorELBO(estimator, max_plate_nesting=1, **options)
    loss = elbo.differentiable_loss(model, guide)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize(
    "around",
    [
        lambda: poutine.scale(scale=0.1),
        lambda: poutine.scale(scale=torch.tensor(0.1)),
        lambda: poutine.mask(mask=MASK),
        lambda: poutine.mask(mask=False),
    ],
    ids=["scale", "scale as a tensor", "mask", "no prior"],
)
def test_scale_or_mask_in_the_model_only(around: Any) -> None:
    """Both terms are drawn, and Exact is exact either way."""
    q, p = (lambda logits: dist.Bernoulli(logits=logits)), (lambda: dist.Bernoulli(0.2))
    torch.testing.assert_close(evaluate(Exact(), q, p, around, analytic_kl=True), evaluate(Exact(), q, p, around))


@pytest.mark.parametrize("wrap", [lambda d: d.mask(MASK), lambda d: d.mask(True), lambda d: d.mask(False)])
@pytest.mark.parametrize("both", [False, True])
def test_masks_of_distributions(wrap: Callable[[Any], Any], both: bool) -> None:
    def q(logits: Tensor) -> Any:
        return wrap(dist.Bernoulli(logits=logits))

    def p() -> Any:
        d = dist.Bernoulli(torch.tensor([0.2, 0.4]))
        return wrap(d) if both else d

    torch.testing.assert_close(evaluate(Exact(), q, p, analytic_kl=True), evaluate(Exact(), q, p))


def test_a_straight_through_site_needs_the_same_scale() -> None:
    """Its log-probabilities cannot be drawn."""

    def bits(logits: Tensor) -> Any:
        return dist.Bernoulli(logits=logits)

    with pytest.raises(ValueError, match=r"site 'z'.*same scale and mask.*another scale in the model"):
        evaluate(StraightThrough(), bits, lambda: dist.Bernoulli(0.2), lambda: poutine.scale(scale=0.1))
    evaluate(StraightThrough(), bits, lambda: dist.Bernoulli(0.2))


def test_a_point_mass_keeps_its_log_density() -> None:
    """An AutoNormal of a constrained latent: its Delta holds the Jacobian."""
    x = torch.tensor([1.0, 3.0])

    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("N", 2):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    init = init_to_value(values={"scale": torch.tensor(4.0)})
    auto = AutoNormal(poutine.block(model, expose=["scale"]), init_loc_fn=init)

    def guide() -> None:
        auto()
        with pyro.plate("N", 2):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.zeros(2))))

    losses = []
    for analytic_kl in (False, True):
        pyro.set_rng_seed(0)
        losses.append(EstimatorELBO({"z": Exact()}, analytic_kl=analytic_kl).loss(model, guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_bits_of_different_batch_shapes_under_a_mask() -> None:
    q, p = dist.Bernoulli(logits=torch.randn(3, 2)).mask(MASK), dist.Bernoulli(0.5).expand([2]).mask(MASK)
    expected = torch.distributions.kl_divergence(q.base_dist, p.base_dist.expand([3, 2])) * MASK
    torch.testing.assert_close(divergence(q, p), expected)


@pytest.mark.parametrize("mask", [True, MASK[:1]])
def test_saturated_bits_under_a_mask(mask: Any) -> None:
    """Where torch's own is infinite."""
    q, p = dist.Bernoulli(logits=torch.zeros(1)), dist.Bernoulli(logits=torch.full((1,), 100.0))
    expected = torch.tensor([50.0 - torch.tensor(2.0).log()])
    for a, b in ((q, p), (q.mask(mask), p.mask(mask)), (q.mask(mask).to_event(1), p.mask(mask).to_event(1))):
        torch.testing.assert_close(divergence(a, b).reshape(1), expected)


def moved(loc: Tensor) -> Any:
    return dist.TransformedDistribution(dist.Normal(0.3, 1.0), [torch.distributions.AffineTransform(loc, 1.0)])


@pytest.mark.parametrize(
    "q, p",
    [
        (moved(torch.zeros(())), moved(torch.zeros(()))),
        (dist.Gumbel(torch.zeros((), requires_grad=True), 1.0), dist.Gumbel(0.0, 2.0)),
        (dist.LogNormal(0.0, 1.0), dist.LogNormal(1.0, 1.0)),
    ],
)
def test_transformed_ones_that_have_it(q: Any, p: Any) -> None:
    assert torch.equal(divergence(q, p), torch.distributions.kl_divergence(q, p))


@pytest.mark.parametrize(
    "q, p",
    [
        (dist.Bernoulli(0.5).expand([2]).mask(MASK), dist.Bernoulli(0.5).expand([2]).mask(~MASK)),
        (dist.Bernoulli(0.5).expand([2]).mask(MASK).to_event(1), dist.Bernoulli(0.5).expand([2]).to_event(1)),
        (dist.Delta(torch.tensor(0.5), log_density=2.0), dist.Normal(0.0, 1.0)),
        (dist.FoldedDistribution(dist.Normal(0.3, 0.8)), dist.FoldedDistribution(dist.Normal(1.0, 1.0))),
        (dist.FoldedDistribution(dist.Normal(0.3, 0.8)), dist.HalfNormal(1.0)),
        (moved(torch.zeros((), requires_grad=True)), moved(torch.zeros(()))),
        (dist.ContinuousBernoulli(0.3), dist.Uniform(0.0, 1.0)),
    ],
    ids=[
        "other masks",
        "mask under to_event",
        "point mass",
        "folded",
        "folded to half-normal",
        "learnt map",
        "interval",
    ],
)
def test_no_closed_form(q: Any, p: Any) -> None:
    with pytest.raises(NoClosedFormError):
        divergence(q, p)


def test_torchs_own_would_take_the_smaller_mask() -> None:
    """The control: the registered divergence of two masks is zero where either is False."""
    q, p = dist.Bernoulli(0.5).expand([2]).mask(MASK), dist.Bernoulli(0.1).expand([2])
    assert torch.distributions.kl_divergence(q, p.mask(torch.tensor([False, True]))).abs().sum() == 0


def test_a_mixed_variable_drawn_pathwise_must_have_its_divergence() -> None:
    """Its log-probabilities jump: drawn pathwise they would be biased."""

    def run(around: Any) -> float:
        def model() -> None:
            with around:
                z = pyro.sample("z", RectifiedNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

        def guide() -> None:
            loc = pyro.param("loc", torch.tensor(0.2))
            pyro.sample("z", RectifiedNormal(loc, 1.0).has_rsample_(True))

        return BaselineELBO(analytic_kl=True).loss_and_grads(model, guide)

    run(poutine.scale(scale=1.0))
    with pytest.raises(ValueError, match=r"site 'z'.*another scale"):
        run(poutine.scale(scale=0.5))


def test_a_sampled_mixed_variable_may_be_drawn() -> None:
    def model() -> None:
        with poutine.scale(scale=0.5):
            pyro.sample("z", HardConcrete(0.5, 0.0))

    def guide() -> None:
        pyro.sample("z", HardConcrete(0.5, pyro.param("l", torch.tensor(0.2))))

    assert torch.isfinite(torch.tensor(BaselineELBO(MovingAverage(), analytic_kl=True).loss(model, guide)))


def test_a_latent_that_only_its_divergence_uses() -> None:
    """It is no model that rounds the value: nothing else has it."""
    logits = torch.tensor([0.3, -0.4, 0.1], requires_grad=True)

    def model() -> None:
        pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))

    def guide() -> None:
        pyro.sample("z", dist.OneHotCategorical(logits=logits))

    loss = EstimatorELBO(StraightThrough()).differentiable_loss(model, guide)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(torch.ones(3))
    )
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))
    family = GumbelSoftmaxST(torch.tensor(0.5), logits=logits)
    EstimatorELBO({}, analytic_kl=True).differentiable_loss(model, lambda: pyro.sample("z", family)).backward()
