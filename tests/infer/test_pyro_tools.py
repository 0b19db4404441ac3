"""The sparse families in Pyro's own tools: sites, handlers, ELBOs, prediction, MAP and sampled assignments, HMC."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    config_enumerate,
    infer_discrete,
)
from pyro.infer.autoguide import AutoDelta
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sparse.distributions import SparseCategorical, SparseOneHotCategorical
from pyro_sparse.infer import SparseEnumELBO
from pyro_sparse.projections import sparsemax

K, B = 6, 5
PRIOR = torch.tensor([0.0, 0.3, 0.0, 0.2, 0.5, 0.0], dtype=torch.float64)
MEANS = torch.linspace(-3, 3, K, dtype=torch.float64)
DATA = torch.tensor([-3.0, -1.5, 0.1, 1.0, 2.9], dtype=torch.float64)

each_family = pytest.mark.parametrize("family", [SparseCategorical, SparseOneHotCategorical])


def mixture(family: Any = SparseCategorical, data: Tensor | None = DATA) -> Tensor:
    """A mixture of normals whose prior rules out half of the components."""
    with pyro.plate("data", B):
        z = pyro.sample("z", family(probs=PRIOR), infer={"enumerate": "parallel"})
        index = z if family is SparseCategorical else z.argmax(-1)
        pyro.sample("x", dist.Normal(MEANS[index], 1.0), obs=data)
    return z


def posterior() -> Tensor:
    """Of each component for each datum, shape (B, K)."""
    return (PRIOR.log() + dist.Normal(MEANS, 1.0).log_prob(DATA[:, None])).softmax(-1)


# Sites.


@each_family
def test_an_observed_site_counts_its_log_prob(family: Any) -> None:
    d = family(probs=PRIOR)
    for k, expected in ((4, 3 * math.log(0.5)), (0, -math.inf)):

        def model(value: Tensor) -> None:
            with pyro.plate("data", 3):
                pyro.sample("z", d, obs=value)

        value = d.enumerate_support()[k].expand(3, *d.event_shape)
        log_prob = poutine.trace(model).get_trace(value).log_prob_sum()
        torch.testing.assert_close(log_prob, torch.tensor(expected))


@each_family
def test_plates_expand_a_site(family: Any) -> None:
    def model() -> Tensor:
        with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 3, dim=-1):
            return pyro.sample("z", family(probs=PRIOR))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert site["value"].shape == (4, 3, *site["fn"].event_shape)
    assert site["log_prob"].shape == (4, 3)
    assert isinstance(site["fn"], family)
    assert "z dist 4 3 |" in " ".join(trace.format_shapes().split())


@each_family
def test_masked_and_scaled_sites(family: Any) -> None:
    mask = torch.tensor([True, False, True])

    def model() -> None:
        with pyro.plate("data", 3), poutine.scale(scale=2.0), poutine.mask(mask=mask):
            pyro.sample("z", family(probs=PRIOR))

    trace = poutine.trace(model).get_trace()
    site = trace.nodes["z"]
    expected = 2 * torch.where(mask, site["fn"].log_prob(site["value"]), 0.0).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_condition_block_and_replay() -> None:
    fixed = poutine.condition(mixture, data={"z": torch.full((B,), 4)})
    assert (fixed() == 4).all()
    assert set(poutine.trace(poutine.block(mixture, hide=["z"])).get_trace().stochastic_nodes) == {"data"}
    trace = poutine.trace(mixture).get_trace()
    assert torch.equal(poutine.replay(mixture, trace=trace)(), trace.nodes["z"]["value"])


# ELBOs of Pyro.


@each_family
@pytest.mark.parametrize("make_elbo", [TraceEnum_ELBO, SparseEnumELBO])
def test_a_sparse_prior_is_summed_out(family: Any, make_elbo: Any) -> None:
    """A site of the model only: the evidence, beside a guide that hides it."""
    guide = AutoDelta(poutine.block(mixture, hide=["z", "x"]))
    loss = make_elbo(max_plate_nesting=1).loss(mixture, guide, family)
    evidence = (PRIOR * dist.Normal(MEANS, 1.0).log_prob(DATA[:, None]).exp()).sum(-1).log().sum()
    assert loss == pytest.approx(-evidence.item(), abs=1e-10)


@each_family
@pytest.mark.parametrize("make_elbo", [TraceEnum_ELBO, SparseEnumELBO])
def test_without_data_the_elbo_is_minus_the_kl(family: Any, make_elbo: Any) -> None:
    scores = (0.5 * torch.randn(B, K)).masked_fill(PRIOR == 0, -math.inf).requires_grad_()

    @config_enumerate
    def guide() -> None:
        with pyro.plate("data", B):
            pyro.sample("z", family(scores))

    def model() -> None:
        with pyro.plate("data", B):
            pyro.sample("z", family(probs=PRIOR))

    kl = kl_divergence(family(scores), family(probs=PRIOR)).sum()
    loss = make_elbo(max_plate_nesting=1).differentiable_loss(model, guide)
    torch.testing.assert_close(loss, kl, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, scores)[0], torch.autograd.grad(kl, scores)[0]]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@each_family
@pytest.mark.parametrize("make_elbo", [Trace_ELBO, TraceGraph_ELBO])
def test_elbos_that_sample_score_its_draws(family: Any, make_elbo: Any) -> None:
    def guide(family: Any) -> None:
        scores = pyro.param("scores", torch.zeros(B, K))
        with pyro.plate("data", B):
            pyro.sample("z", family(scores.masked_fill(PRIOR == 0, -math.inf)))

    SVI(mixture, guide, pyro.optim.SGD({"lr": 0.1}), make_elbo()).step(family)
    moved = pyro.param("scores").detach() != 0
    assert moved.any(-1).all() and not moved[:, PRIOR == 0].any()


@each_family
def test_a_step_projects_once(family: Any) -> None:
    calls = []

    def projection(scores: Tensor) -> Tensor:
        calls.append(scores.shape)
        return sparsemax(scores)

    def guide(family: Any) -> None:
        with pyro.plate("data", B):
            pyro.sample("z", family(torch.zeros(K).masked_fill(PRIOR == 0, -math.inf), projection))

    elbo = SparseEnumELBO(max_plate_nesting=1)
    elbo.loss_and_grads(mixture, guide, family)  # which is compared with other runs
    calls.clear()
    elbo.loss_and_grads(mixture, guide, family)
    assert calls == [(K,)]


# Prediction and discrete assignments.


@each_family
def test_predictive_draws_from_model_and_guide(family: Any) -> None:
    def guide(family: Any, data: Any = None) -> None:
        with pyro.plate("data", B):
            pyro.sample("z", family(probs=torch.eye(K)[:B]))

    prior = Predictive(mixture, num_samples=200)(family, None)
    values = prior["z"] if family is SparseCategorical else prior["z"].argmax(-1)
    assert values.shape == (200, B) and prior["x"].shape == (200, B)
    assert set(values.flatten().tolist()) == {1, 3, 4}
    for parallel in (False, True):
        later = Predictive(mixture, guide=guide, num_samples=7, parallel=parallel)(family, None)
        values = later["z"] if family is SparseCategorical else later["z"].argmax(-1)
        assert torch.equal(values.reshape(7, B), torch.arange(B).expand(7, B))


# (Pyro's infer_discrete does not take one-hot values, of its own families neither; see test_discrete.py for ours.)


def test_infer_discrete_finds_the_best_outcome() -> None:
    z = infer_discrete(mixture, first_available_dim=-2, temperature=0)()
    assert torch.equal(z, posterior().argmax(-1))


def test_infer_discrete_samples_over_all_outcomes() -> None:
    """2000 copies of the data. A correct sampler leaves the bound, six standard errors, with probability < 1e-6."""
    copies = 2000

    def many() -> Tensor:
        with pyro.plate("copies", copies, dim=-2):
            return mixture()

    z = infer_discrete(many, first_available_dim=-3)()
    frequencies = torch.stack([(z == k).double().mean(0) for k in range(K)], -1)
    p = posterior()
    assert (frequencies[:, PRIOR == 0] == 0).all()
    assert ((frequencies - p).abs() <= 6 * (p * (1 - p) / copies).sqrt()).all()


def test_marginals_are_over_all_outcomes() -> None:
    guide = AutoDelta(poutine.block(mixture, hide=["z", "x"]))
    marginal = SparseEnumELBO(max_plate_nesting=1).compute_marginals(mixture, guide)["z"]
    assert marginal.logits.shape == (B, K)
    torch.testing.assert_close(marginal.logits.exp(), posterior(), rtol=1e-8, atol=1e-8)


# HMC sums discrete sites of the model out.


@each_family
def test_the_potential_of_hmc(family: Any) -> None:
    def model(prior: Any) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", B):
            z = pyro.sample("z", prior, infer={"enumerate": "parallel"})
            index = z.argmax(-1) if prior.event_dim else z
            pyro.sample("x", dist.Normal(MEANS[index] + shift, 1.0), obs=DATA)

    gradients = []
    for prior in (family(probs=PRIOR), dist.Categorical(logits=PRIOR.log())):
        _, potential, _, _ = initialize_model(model, (prior,), max_plate_nesting=1)
        shift = torch.tensor(0.3, requires_grad=True)
        energy = potential({"shift": shift})
        gradients.append((energy.detach(), *torch.autograd.grad(energy, shift)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)
