"""The gradient by enumeration, against sums written by hand; and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

import pyro_sparse.distributions as sdist
from pyro_sparse.infer.exact import EnumeratedELBO, NoiseLeftError, exact_gradient
from pyro_sparse.infer.runs.together import why_one_by_one

B, K = 4, 3


def start(*functions: Any) -> list[Tensor]:
    """Makes the parameters; returns them."""
    for function in functions:
        with pyro.poutine.block():
            function()
    return [p for _, p in pyro.get_param_store().named_parameters()]


def assert_close(got: list[Tensor], expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


class Mixed:
    """A categorical and, depending on it, a vector of two bits, in a plate."""

    def __init__(self) -> None:
        self.x = torch.randn(B)

    def model(self) -> None:
        w = pyro.param("w", torch.randn(K))  # the initial value draws at every run, and does not matter
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))
            b = pyro.sample("b", dist.Bernoulli(torch.full((B, 2), 0.3)).to_event(1))
            pyro.sample("x", dist.Normal(w[z] + w[0] * b[..., 0] * b[..., 1], 1.0), obs=self.x)

    def guide(self) -> None:
        z_logits, b_logits = pyro.param("z_logits", torch.randn(B, K)), pyro.param("b_logits", torch.randn(K, 2))
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Categorical(logits=z_logits))
            pyro.sample("b", dist.Bernoulli(logits=b_logits[z]).to_event(1))

    def loss(self) -> Tensor:
        store = pyro.get_param_store()
        elbo = torch.zeros(())
        for i, z, bits in itertools.product(range(B), range(K), itertools.product((0.0, 1.0), repeat=2)):
            b = torch.tensor(bits)
            log_q = (
                store["z_logits"][i].log_softmax(-1)[z] + dist.Bernoulli(logits=store["b_logits"][z]).log_prob(b).sum()
            )
            log_p = -torch.tensor(float(K)).log() + dist.Bernoulli(torch.tensor(0.3)).log_prob(b).sum()
            log_p = log_p + dist.Normal(store["w"][z] + store["w"][0] * b.prod(), 1.0).log_prob(self.x[i])
            elbo = elbo + log_q.exp() * (log_p - log_q)
        return -elbo


@pytest.mark.parametrize("strategy", ["parallel", "sequential"])
def test_equals_the_sum_by_hand(strategy: str) -> None:
    mixed = Mixed()
    parameters = start(mixed.guide, mixed.model)
    got = exact_gradient(mixed.model, mixed.guide, parameters=parameters, strategy=strategy)
    assert_close(got, torch.autograd.grad(mixed.loss(), parameters))


def test_equals_stock_enumeration_and_needs_no_marks() -> None:
    scores = torch.randn(B, K)

    def model(x: Tensor) -> None:
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Categorical(torch.ones(K)))
            pyro.sample("x", dist.Normal(pyro.param("w", torch.zeros(K))[z], 1.0), obs=x)

    def guide(x: Tensor, infer: Any = None) -> None:
        with pyro.plate("data", B):
            pyro.sample("z", sdist.SparseCategorical(pyro.param("scores", scores)), infer=infer or {})

    x = torch.randn(B)
    parameters = start(lambda: (guide(x), model(x)))
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, config_enumerate(guide), x)
    expected = torch.autograd.grad(loss, parameters)
    local = {"enumerate": "parallel", "num_samples": 4, "tmc": "diagonal"}  # asks for draws, which are not exact
    for infer in ({}, {"enumerate": "parallel"}, {"enumerate": "sequential"}, local):
        got = exact_gradient(model, lambda x, infer=infer: guide(x, infer), (), {"x": x}, parameters=parameters)
        assert_close(got, expected)


def test_vectors_of_outcomes_and_masks() -> None:
    logits, x, mask = torch.randn(B, 2, K), torch.randn(B), torch.tensor([True, False, True, True])

    def model() -> None:
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(B, 2, K)).to_event(1).mask(mask))
            pyro.sample("x", dist.Normal((z * torch.arange(K)).sum((-1, -2)), 1.0), obs=x)

    def guide() -> None:
        logits_ = pyro.param("logits", logits)
        with pyro.plate("data", B):
            pyro.sample("z", dist.OneHotCategorical(logits=logits_).to_event(1).mask(mask))

    [parameter] = start(guide)
    log_q, elbo = parameter.log_softmax(-1), torch.zeros(())
    for i, j in itertools.product(range(K), repeat=2):
        q = log_q[:, 0, i] + log_q[:, 1, j]
        log_p = dist.Normal(float(i + j), 1.0).log_prob(x) - 2 * torch.tensor(float(K)).log()
        elbo = elbo + (q.exp() * (log_p - q))[mask].sum()
    got, expected = exact_gradient(model, guide, parameters=[parameter])[0], -torch.autograd.grad(elbo, parameter)[0]
    torch.testing.assert_close(got[mask], expected[mask], rtol=0, atol=1e-12)


def test_recycled_dims_do_not_count_as_combinations() -> None:
    steps = 12  # 2**12 combinations, two at a time

    def chain(logits: Tensor) -> None:
        z = torch.tensor(0.0)
        for t in pyro.markov(range(steps)):
            z = pyro.sample(f"z{t}", dist.Bernoulli(logits=logits[t] + z))

    def model() -> None:
        chain(torch.zeros(steps))

    def guide() -> None:
        chain(pyro.param("logits", torch.randn(steps)))

    parameters = start(guide)
    exact_gradient(model, guide, parameters=parameters, max_outcomes=8)
    with pytest.raises(ValueError, match=r"max_outcomes=8 combinations of outcomes, got 16\."):
        exact_gradient(model, guide, parameters=parameters, max_outcomes=8, strategy="sequential")


def test_too_many_outcomes_are_refused_before_they_are_made() -> None:
    def guide() -> None:
        pyro.sample("b", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(60))).to_event(1))

    parameters = start(guide)
    with pytest.raises(
        ValueError, match=r"expected at most max_outcomes=4096 combinations of outcomes, got 115292150460"
    ):
        exact_gradient(guide, guide, parameters=parameters)


def test_leaves_state_as_it_was() -> None:
    mixed = Mixed()
    parameters = start(mixed.guide, mixed.model)
    parameters[0].grad = torch.ones_like(parameters[0])
    before = pyro.util.get_rng_state()["torch"]
    with torch.no_grad():
        exact_gradient(mixed.model, mixed.guide, parameters=parameters)
    assert torch.equal(pyro.util.get_rng_state()["torch"], before)
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    assert parameters[1].grad is None


def test_parameters_that_do_not_matter_get_zeros() -> None:
    mixed = Mixed()
    parameters = start(mixed.guide, mixed.model)
    other = torch.ones(2, requires_grad=True)
    *_, gradient = exact_gradient(mixed.model, mixed.guide, parameters=[*parameters, other])
    assert torch.equal(gradient, torch.zeros(2))


# Noise


def discrete() -> Any:
    return pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))


def continuous() -> None:
    z = discrete()
    pyro.sample("u", dist.Normal(pyro.param("m", torch.tensor(0.0)) + z, 1.0))


def rare() -> None:
    discrete()
    pyro.sample("n", dist.Poisson(pyro.param("rate", torch.tensor(1e-9))))  # the same value at any two runs


def subsampled() -> None:
    with pyro.plate("data", 5, subsample_size=2):
        discrete()


@pytest.mark.parametrize(("program", "where"), [(continuous, "'u'"), (rare, "'n'"), (subsampled, "'data'")])
def test_noise_is_refused_by_name(program: Any, where: str) -> None:
    parameters = start(program)
    with pytest.raises(NoiseLeftError, match=rf"got random numbers at \[{where}\]"):
        exact_gradient(program, program, parameters=parameters)


def test_noise_of_the_model_is_refused() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(nn.functional.dropout(1.0 + discrete(), 0.5), 1.0), obs=torch.tensor(1.0))

    parameters = start(discrete)
    with pytest.raises(NoiseLeftError, match="outside of the guide's sites, such as dropout"):
        exact_gradient(model, discrete, parameters=parameters)


def test_enumerated_elbo_averages_to_the_gradient_where_noise_is_left() -> None:
    """With plates subsampled by hand, the mean over all subsamples is the gradient of the whole."""
    x, logits = torch.randn(5), torch.randn(5)

    def model(subsample: Tensor | None) -> None:
        with pyro.plate("data", 5, subsample=subsample) as i:
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(subsample: Tensor | None) -> None:
        with pyro.plate("data", 5, subsample=subsample) as i:
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", logits)[i]))

    parameters = start(lambda: guide(None))
    whole = exact_gradient(model, guide, (None,), parameters=parameters)[0]
    elbo = EnumeratedELBO()
    parts = []
    for pair in itertools.combinations(range(5), 2):
        loss = elbo.differentiable_loss(model, guide, torch.tensor(pair))
        parts.append(torch.autograd.grad(loss, parameters)[0])
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=0, atol=1e-12)
    assert elbo.enumerated == {"z"}
    assert elbo.sampled == {"data"}


# Programs that parallel enumeration would get wrong


@pytest.mark.parametrize("validate", [True, False])
def test_a_site_that_depends_on_all_elements_of_a_plate_is_refused(validate: bool) -> None:
    def model() -> None:
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=torch.tensor(0.0))

    def guide() -> None:
        with pyro.plate("data", B):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(B))))

    parameters = start(guide)
    with pyro.validation_enabled(validate), pytest.raises(ValueError, match=r"(?s)no site outside of a plate.*'?x"):
        exact_gradient(model, guide, parameters=parameters)


def test_why_one_by_one() -> None:
    layer = nn.BatchNorm1d(1, affine=False)

    def guide() -> None:
        logits = pyro.param("logits", torch.zeros(B, 2))
        pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("data", B):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    def run(decode: Any) -> str:
        def model() -> None:
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            with pyro.plate("data", B):
                z = pyro.sample("z", dist.Bernoulli(torch.full((B, 2), 0.5)).to_event(1))
                pyro.sample("x", dist.Normal(decode(z, u), 1.0), obs=torch.zeros(B))

        return why_one_by_one(model, guide, (), {})

    assert run(lambda z, u: z.sum(-1) + u) == ""
    assert "RuntimeError" in run(lambda z, u: z.sum(-1) + (1.0 if u > 0 else 0.0))
    assert run(lambda z, u: z.sum(-1) / z.mean()) == "other log-probabilities at ['x']"  # no error, but wrong
    assert run(lambda z, u: layer(z.reshape(-1, 1)).reshape(z.shape).sum(-1)) == "other log-probabilities at ['x']"


ONE_HOT = {
    "softmax": lambda logits: sdist.OneHotCategoricalST(logits=logits),
    "gumbel-softmax": lambda logits: sdist.GumbelSoftmaxST(0.5, logits=logits),
    "torch's": lambda logits: dist.OneHotCategoricalStraightThrough(logits=logits),
}


def one_hot_gradient(make: Any, elbo: Any, mark: bool = False) -> Tensor:
    logits, weights = torch.arange(6.0).reshape(2, 3).sin().requires_grad_(), torch.tensor([1.0, -1.0, 0.4])

    def model() -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(z @ weights, 0.5), obs=torch.tensor([0.7, -2.0]))

    def guide() -> None:
        with pyro.plate("data", 2):
            pyro.sample("z", make(logits))

    loss = elbo.differentiable_loss(model, config_enumerate(guide) if mark else guide)
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


@pytest.mark.parametrize("name", ONE_HOT)
def test_straight_through_sites_are_enumerated_as_plain_ones(name: str) -> None:
    """Pyro weights an outcome by its score part, which a site with a derivative of its own lacks."""
    plain = one_hot_gradient(
        lambda logits: dist.OneHotCategorical(logits=logits), TraceEnum_ELBO(max_plate_nesting=1), True
    )
    assert_close([one_hot_gradient(ONE_HOT[name], EnumeratedELBO(max_plate_nesting=1))], [plain])
    stock = one_hot_gradient(ONE_HOT[name], TraceEnum_ELBO(max_plate_nesting=1), True)
    if name == "torch's":
        assert (stock - plain).abs().max() > 0.1  # the defect that our families avoid
    else:
        assert_close([stock], [plain])


def test_straight_through_bits_of_a_vector_are_enumerated() -> None:
    found = []
    for make in (dist.Bernoulli, sdist.BernoulliST):
        logits = torch.tensor([[0.3, -1.0, 2.0]], requires_grad=True)

        def model() -> None:
            b = pyro.sample("b", dist.Bernoulli(torch.full((1, 3), 0.4)).to_event(1))
            pyro.sample("x", dist.Normal(b.prod(-1) + b[..., 0], 1.0), obs=torch.tensor([0.7]))

        def guide(make: Any = make, logits: Tensor = logits) -> None:
            pyro.sample("b", make(logits=logits).to_event(1))

        in_plate = pyro.plate("data", 1)
        loss = EnumeratedELBO(max_plate_nesting=1).differentiable_loss(in_plate(model), in_plate(guide))
        found.append(torch.autograd.grad(loss, logits)[0])
    assert_close([found[1]], [found[0]])
    assert found[0].abs().max() > 0.1


def test_sequential_serves_a_program_that_branches() -> None:
    def model(branch: bool) -> None:
        z = pyro.sample("z", dist.Categorical(torch.ones(K)))
        loc = (1.0 if int(z) == 1 else 0.0) if branch else 1.0 * (z == 1)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(0.4))

    def guide(branch: bool) -> None:
        pyro.sample("z", dist.Categorical(logits=pyro.param("logits", torch.randn(K))))

    parameters = start(lambda: guide(True))
    expected = exact_gradient(model, guide, (False,), parameters=parameters)
    assert_close(exact_gradient(model, guide, (True,), parameters=parameters, strategy="sequential"), expected)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        exact_gradient(model, guide, (True,), parameters=parameters)


def test_unknown_strategy() -> None:
    with pytest.raises(
        ValueError, match=r"EnumeratedELBO: expected strategy in \('parallel', 'sequential'\), got 'both'"
    ):
        EnumeratedELBO("both")
