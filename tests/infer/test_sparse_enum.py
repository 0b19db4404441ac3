"""SparseEnumELBO beyond the grid of models: what it reports, what it refuses, and how it trains."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

import pyro_sparse.distributions as sdist
from pyro_sparse.infer import SparseEnumELBO
from pyro_sparse.projections import entmax15, sparsemax
from pyro_sparse.testing import check_elbo
from pyro_sparse.testing.models import Options, make_case

B, K, D = 5, 6, 3
MODES = ("padded", "union", "auto")


class Mixture:
    """A mixture with an amortised guide: x ~ Normal(means[z], 1)."""

    def __init__(self, prior: Tensor | None = None, scale: float = 2.0) -> None:
        self.x = torch.randn(B, D)
        self.means = torch.randn(K, D, requires_grad=True)
        self.encoder = nn.Linear(D, K)
        with torch.no_grad():
            self.encoder.weight.mul_(scale)
        self.prior = torch.full((K,), 1.0 / K) if prior is None else prior
        self.parameters = [self.means, *self.encoder.parameters()]

    def model(self) -> None:
        with pyro.plate("data", B):
            z = pyro.sample("z", sdist.SparseCategorical(probs=self.prior))
            pyro.sample("x", dist.Normal(self.means[z], 1.0).to_event(1), obs=self.x)

    def guide(self, infer: dict[str, Any] | None = None) -> None:
        with pyro.plate("data", B):
            pyro.sample("z", sdist.SparseCategorical(self.encoder(self.x)), infer=infer or {})

    def gradients(self, elbo: TraceEnum_ELBO, guide: Callable[[], None] | None = None) -> tuple[float, list[Tensor]]:
        loss = elbo.differentiable_loss(self.model, guide or self.guide)
        return loss.item(), list(torch.autograd.grad(loss, self.parameters, allow_unused=True))


def assert_same(got: tuple[float, list[Tensor]], expected: tuple[float, list[Tensor]]) -> None:
    assert got[0] == pytest.approx(expected[0], abs=1e-10)
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# What it reports


def test_options_of_other_elbos_are_not_ignored_in_silence() -> None:
    def model() -> None:
        pyro.sample("z", dist.Categorical(logits=torch.zeros(3)))

    def guide() -> None:
        scores = torch.tensor([1.0, 0.8, -2.0])
        pyro.sample("z", sdist.SparseCategorical(scores), infer={"baseline": {"use_decaying_avg_baseline": True}})

    elbo = SparseEnumELBO()
    with pytest.warns(UserWarning, match=r"site 'z': infer\['baseline'\] is not read here, but by EstimatorELBO"):
        elbo.loss(model, guide)
    elbo.loss(model, guide)  # once


def test_last_stats_counts_supports_and_rows() -> None:
    mixture = Mixture()
    elbo = SparseEnumELBO(max_plate_nesting=1)
    assert elbo.last_stats is None
    elbo.loss(mixture.model, mixture.guide)
    sizes = sdist.SparseCategorical(mixture.encoder(mixture.x)).support_size
    stats = elbo.last_stats
    assert stats is not None
    assert 1 < sizes.max() < K
    assert (stats.mean, stats.max) == (sizes.double().mean().item(), sizes.max().item())
    assert stats.sites == {"z": (stats.mean, stats.max)}
    assert (stats.model_rows, stats.dense_rows) == (B * stats.max, B * K)


def test_last_stats_add_up_over_particles() -> None:
    mixture = Mixture()
    rows = []
    for kwargs in ({}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}):
        elbo = SparseEnumELBO(max_plate_nesting=1, **kwargs)
        elbo.loss(mixture.model, mixture.guide)
        assert elbo.last_stats is not None
        rows.append((elbo.last_stats.model_rows, elbo.last_stats.dense_rows))
    assert rows[1] == rows[2] == (3 * rows[0][0], 3 * rows[0][1])


def test_last_stats_of_a_support_of_one_outcome() -> None:
    mixture = Mixture(scale=1e4)
    elbo = SparseEnumELBO(max_plate_nesting=1)
    elbo.loss(mixture.model, mixture.guide)
    assert elbo.last_stats is not None
    assert (elbo.last_stats.max, elbo.last_stats.model_rows, elbo.last_stats.dense_rows) == (1, B, B * K)


def test_all_three_losses_agree() -> None:
    mixture = Mixture()
    elbo = SparseEnumELBO()
    loss, grads = mixture.gradients(elbo)
    assert elbo.loss(mixture.model, mixture.guide) == pytest.approx(loss, abs=1e-12)

    def guide() -> None:
        pyro.param("unused", torch.zeros(()))  # loss_and_grads differentiates where the trace has a parameter
        mixture.guide()

    assert elbo.loss_and_grads(mixture.model, guide) == pytest.approx(loss, abs=1e-12)
    for parameter, grad in zip(mixture.parameters, grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-12)


# Which sites it enumerates, and how


@pytest.mark.parametrize("infer", [{}, {"enumerate": "parallel"}, {"enumerate": "sequential"}])
def test_enumerates_with_or_without_pyros_mark(infer: dict[str, Any]) -> None:
    mixture = Mixture()
    expected = mixture.gradients(TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(mixture.guide))
    given = dict(infer)
    elbo = SparseEnumELBO(max_plate_nesting=1)
    assert_same(mixture.gradients(elbo, functools.partial(mixture.guide, infer)), expected)
    assert infer == given  # the user's dict is left as it was
    assert elbo.last_stats is not None
    assert elbo.last_stats.max < K


@pytest.mark.parametrize("mode", MODES)
def test_dense_on_request(mode: str) -> None:
    mixture = Mixture()
    elbo = SparseEnumELBO(mode, max_plate_nesting=1, max_support=1)
    guide = functools.partial(mixture.guide, {"enumerate_support": "dense"})
    assert_same(
        mixture.gradients(elbo, guide),
        mixture.gradients(TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(mixture.guide)),
    )
    assert elbo.last_stats is not None
    assert elbo.last_stats.model_rows == elbo.last_stats.dense_rows == B * K


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_markov_values_do_not_carry_the_dims_of_their_parents(mode: str, masked: bool) -> None:
    steps = 6
    scores = (2 * torch.randn(steps, K, K)).requires_grad_()
    emission = torch.randn(K, requires_grad=True)
    shapes = []

    def model() -> None:
        z = torch.tensor(0)
        for t in pyro.markov(range(steps)):
            z = pyro.sample(f"z{t}", dist.Categorical(logits=torch.zeros(K)))
            pyro.sample(f"x{t}", dist.Normal(emission[z], 1.0), obs=torch.tensor(0.3 * t))

    def guide() -> None:
        z = torch.tensor(0)
        for t in pyro.markov(range(steps)):
            d = sdist.SparseCategorical(scores[t, z])
            z = pyro.sample(f"z{t}", d.mask(torch.tensor(True)) if masked else d)
            shapes.append(z.shape)

    def gradients(elbo: TraceEnum_ELBO, guide: Callable[[], None]) -> tuple[float, list[Tensor]]:
        loss = elbo.differentiable_loss(model, guide)
        return loss.item(), list(torch.autograd.grad(loss, [scores, emission]))

    expected = gradients(TraceEnum_ELBO(max_plate_nesting=0), config_enumerate(guide))
    shapes.clear()
    assert_same(gradients(SparseEnumELBO(mode, max_plate_nesting=0), guide), expected)
    assert all(shape.numel() <= K for shape in shapes)


@pytest.mark.parametrize("mode", MODES)
def test_local_monte_carlo_at_a_sparse_site_is_left_to_pyro(mode: str) -> None:
    mixture = Mixture()
    elbo = SparseEnumELBO(mode, max_plate_nesting=1, strict_enumeration_warning=False)
    guide = functools.partial(mixture.guide, {"enumerate": "parallel", "num_samples": 4})
    losses = []
    for some_elbo in (elbo, TraceEnum_ELBO(max_plate_nesting=1)):
        pyro.set_rng_seed(3)
        losses.append(some_elbo.loss(mixture.model, guide))
    assert losses[0] == losses[1]


# Sites that only the model has


def test_sparse_prior_enumerated_in_the_model() -> None:
    x, prior = torch.randn(B), torch.tensor([0.5, 0.0, 0.3, 0.2])
    means = torch.randn(4, requires_grad=True)

    def model(make: Callable[[Tensor], dist.TorchDistribution]) -> None:
        with pyro.plate("data", B):
            z = pyro.sample("z", make(prior), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(means[z], 1.0), obs=x)

    def guide(make: Any) -> None:
        pass

    elbo = SparseEnumELBO(max_plate_nesting=1)
    loss = elbo.differentiable_loss(model, guide, lambda p: sdist.SparseCategorical(probs=p))
    log_prob = torch.stack([dist.Normal(means[k], 1.0).log_prob(x) + prior[k].log() for k in (0, 2, 3)])
    expected = -log_prob.logsumexp(0).sum()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    (got,), (wanted,) = torch.autograd.grad(loss, [means]), torch.autograd.grad(expected, [means])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    assert elbo.last_stats is not None
    assert elbo.last_stats.sites == {"z": (3.0, 3)}

    marginal = elbo.compute_marginals(model, guide, lambda p: sdist.SparseCategorical(probs=p))["z"]
    dense = TraceEnum_ELBO(max_plate_nesting=1).compute_marginals(
        model, guide, lambda p: dist.Categorical(logits=p.log())
    )["z"]
    assert marginal.probs.shape == (B, 4)
    torch.testing.assert_close(marginal.probs, dense.probs, rtol=0, atol=1e-12)

    trace = poutine.trace(elbo.sample_posterior).get_trace(model, guide, lambda p: sdist.SparseCategorical(probs=p))
    assert trace.nodes["z"]["value"].shape == (B,)
    assert not (trace.nodes["z"]["value"] == 1).any()


# What it refuses


def test_refuses_unknown_options() -> None:
    with pytest.raises(ValueError, match=r"expected mode in .*, got 'sparse'"):
        SparseEnumELBO("sparse")
    with pytest.raises(ValueError, match=r"expected max_support >= 1 or None, got 0"):
        SparseEnumELBO(max_support=0)
    with pytest.raises(ValueError, match=r"expected no jit_options"):
        SparseEnumELBO(jit_options={"check_trace": False})
    mixture = Mixture()
    with pytest.raises(ValueError, match=r"site 'z': expected infer\['enumerate_support'\] 'sparse' or 'dense'"):
        mixture.gradients(SparseEnumELBO(), functools.partial(mixture.guide, {"enumerate_support": "all"}))


@pytest.mark.parametrize("mode", MODES)
def test_refuses_a_support_above_max_support(mode: str) -> None:
    mixture = Mixture(scale=0.1)
    with pytest.raises(ValueError, match=r"site 'z': expected supports of at most max_support=2 outcomes, got \d"):
        mixture.gradients(SparseEnumELBO(mode, max_support=2))
    assert Mixture(scale=1e4).gradients(SparseEnumELBO(mode, max_support=1))


def test_refuses_to_event_over_a_batch_dim() -> None:
    def guide() -> None:
        pyro.sample("z", sdist.SparseCategorical(torch.randn(B, K)).to_event(1))

    with pytest.raises(ValueError, match=r"site 'z': expected one outcome per plate element.*Use a pyro.plate"):
        SparseEnumELBO().loss(guide, guide)


@pytest.mark.parametrize("mode", MODES)
def test_refuses_a_prior_that_is_zero_where_the_guide_has_mass(mode: str) -> None:
    prior = torch.tensor([0.0] + [0.2] * (K - 1))
    mixture = Mixture(prior)
    with torch.no_grad():
        mixture.encoder.bias[0] = 3.0
    with pytest.raises(ValueError, match=r"site 'z': expected a prior that is positive wherever the guide is"):
        SparseEnumELBO(mode).loss_and_grads(mixture.model, mixture.guide)
    assert all(parameter.grad is None for parameter in mixture.parameters)


@pytest.mark.parametrize("mode", MODES)
def test_a_prior_that_is_zero_only_at_padding_is_fine(mode: str) -> None:
    mixture = Mixture(torch.tensor([0.0] + [0.2] * (K - 1)))
    with torch.no_grad():
        mixture.encoder.bias[0] = -100.0
    assert_same(
        mixture.gradients(SparseEnumELBO(mode, max_plate_nesting=1)),
        mixture.gradients(TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(mixture.guide)),
    )


def test_looking_for_a_zero_prior_leaves_the_gradients_alone() -> None:
    """The padding has prior zero, so the look takes place, next to masked data that depend on a summed-out site."""
    case = make_case(Options(prior="sparse", marginal="dense", mask="data"))
    check_elbo(SparseEnumELBO, cases=[case])


def test_a_zero_prior_below_an_outcome_that_the_guide_excludes_is_fine() -> None:
    """z2's prior is zero only given z1=1, which the guide never picks."""
    q1 = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    p2 = torch.tensor([[0.5, 0.5], [0.0, 1.0]])

    def model(q1: Tensor) -> None:
        z1 = pyro.sample("z1", dist.Categorical(torch.ones(2)))
        pyro.sample("z2", sdist.SparseCategorical(probs=p2[z1]))

    def guide(q1: Tensor) -> None:
        pyro.sample("z1", sdist.SparseCategorical(probs=q1))
        pyro.sample("z2", sdist.SparseCategorical(probs=torch.tensor([0.5, 0.5])))

    dense = functools.partial(functools.partial, guide)
    elbo = SparseEnumELBO("union", max_plate_nesting=0)
    infer_dense = config_enumerate(dense(q1[0]))
    assert elbo.loss(functools.partial(model, q1[0]), infer_dense) == pytest.approx(
        TraceEnum_ELBO(max_plate_nesting=0).loss(functools.partial(model, q1[0]), infer_dense)
    )
    with pytest.raises(ValueError, match=r"site 'z2': expected a prior that is positive"):
        elbo.loss(functools.partial(model, q1[1]), dense(q1[1]))


def test_warns_once_where_no_site_is_sparse() -> None:
    def program() -> None:
        pyro.sample("z", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
        pyro.sample("u", dist.Normal(0.0, 1.0))

    elbo = SparseEnumELBO(max_plate_nesting=0)
    with pytest.warns(UserWarning, match=r"expected a guide site with a sparse support, got sites \['z', 'u'\]"):
        loss = elbo.loss(program, program)
    assert loss == pytest.approx(0.0)
    elbo.loss(program, program)  # warnings are errors here
    SparseEnumELBO(max_plate_nesting=0, strict_enumeration_warning=False).loss(program, program)


def test_a_labelled_batch_has_nothing_to_enumerate_and_no_warning() -> None:
    """Unless a later batch has latent sites without a sparse support."""
    labels = torch.tensor([0, 2])

    def model(y: Tensor | None) -> None:
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Categorical(torch.ones(3)), obs=y)

    def guide(y: Tensor | None) -> None:
        if y is None:
            with pyro.plate("data", 2):
                pyro.sample("y", dist.Categorical(torch.ones(3)))

    elbo = SparseEnumELBO(max_plate_nesting=1)
    assert elbo.loss(model, guide, labels) == pytest.approx(2 * torch.tensor(3.0).log().item())
    with pytest.warns(UserWarning, match="expected a guide site with a sparse support"):
        elbo.loss(model, guide, None)


def test_refuses_to_be_traced() -> None:
    mixture = Mixture()

    def loss(x: Tensor) -> Tensor:
        return x + SparseEnumELBO(max_plate_nesting=1).differentiable_loss(mixture.model, mixture.guide)

    with pytest.raises(RuntimeError, match=r"expected an eager run, got one under torch.jit.trace"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.trace` is deprecated")  # that is not under test
            torch.jit.trace(loss, (torch.zeros(()),))


# How it trains


def make_svi(elbo: TraceEnum_ELBO, dense: bool, projection: Any) -> Callable[[], float]:
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    x = torch.randn(B, D)
    encoder, decoder = nn.Linear(D, K), nn.Embedding(K, D)

    def model() -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", B):
            noise = pyro.sample("noise", dist.Normal(torch.zeros(D), 0.1).to_event(1))
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))
            pyro.sample("x", dist.Normal(decoder(z) + noise, 1.0).to_event(1), obs=x)

    def guide() -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", B):
            pyro.sample("noise", dist.Normal(torch.zeros(D), 0.1).to_event(1))
            pyro.sample("z", sdist.SparseCategorical(2 * encoder(x), projection))

    return SVI(model, config_enumerate(guide) if dense else guide, pyro.optim.Adam({"lr": 0.1}), elbo).step


@pytest.mark.parametrize("mode", [pytest.param(m, marks=[] if m == "auto" else pytest.mark.slow) for m in MODES])
@pytest.mark.parametrize("projection", [sparsemax, entmax15])
def test_trains_to_the_same_parameters_as_dense_enumeration(mode: str, projection: Any) -> None:
    results = []
    for elbo, dense in [
        (TraceEnum_ELBO(max_plate_nesting=1), True),
        (SparseEnumELBO(mode, max_plate_nesting=1), False),
    ]:
        step = make_svi(elbo, dense, projection)
        losses = [step() for _ in range(50)]
        results.append((losses, {k: v.detach().clone() for k, v in pyro.get_param_store().items()}))
    (dense_losses, expected), (losses, got) = results
    assert losses[-1] < losses[0] - 1
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(dense_losses), rtol=0, atol=1e-8)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_same_seed_same_bits(mode: str) -> None:
    runs = []
    for _ in range(2):
        step = make_svi(SparseEnumELBO(mode, max_plate_nesting=1), False, entmax15)
        runs.append(([step() for _ in range(10)], [v.detach().clone() for v in pyro.get_param_store().values()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_trains_as_a_torch_module() -> None:
    class Model(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.means = nn.Parameter(torch.randn(K, D))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))
                pyro.sample("x", dist.Normal(self.means[z], 1.0).to_event(1), obs=x)

    class Guide(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(D, K)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", sdist.SparseCategorical(self.encoder(x)))

    x = torch.randn(20, D)
    module = SparseEnumELBO(max_plate_nesting=1)(Model(), Guide())
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = module(x)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 5


def test_particles_one_by_one_may_write_to_what_they_read() -> None:
    """A codebook that follows a moving average, say."""
    codes = torch.tensor([1.0, 2.0, 0.5])

    def model() -> None:
        with torch.no_grad():
            codes.mul_(0.9)
        z = pyro.sample("z", sdist.SparseCategorical(torch.zeros(3)))
        pyro.sample("x", dist.Normal((pyro.param("w", torch.tensor(0.7)) * codes)[z], 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("z", sdist.SparseCategorical(torch.tensor([0.5, 0.3, -1.0])))

    def gradients(elbo: Any) -> tuple[Tensor, Tensor]:
        elbo.loss(model, config_enumerate(guide))  # the first run is compared with others, which change the codes, too
        codes.copy_(torch.tensor([1.0, 2.0, 0.5]))
        pyro.clear_param_store()
        loss = elbo.loss_and_grads(model, config_enumerate(guide))
        return torch.tensor(loss), pyro.param("w").grad  # type: ignore[return-value]

    options = {"max_plate_nesting": 0, "num_particles": 2}
    torch.testing.assert_close(gradients(SparseEnumELBO(**options)), gradients(TraceEnum_ELBO(**options)))


@pytest.mark.slow
def test_particles_one_by_one_in_a_new_process() -> None:
    """torch imports what compiled networks need when it first compiles."""
    program = """
import pyro, torch, pyro_sparse.distributions as sdist
from pyro_sparse.infer import SparseEnumELBO
site = lambda: pyro.sample("z", sdist.SparseCategorical(pyro.param("w", torch.zeros(3))))
SparseEnumELBO(max_plate_nesting=0, num_particles=2).loss_and_grads(site, site)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
