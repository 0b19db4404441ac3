r"""
The straight-through families: a discrete variable forward, a documented Jacobian backward.

Where the Jacobian depends on the draw alone, the mean of a gradient is a sum over outcomes, compared to rounding. Else,
z-tests of 10^5 draws and more ask for less than 4.5 standard errors; there are about 40 of them: with everything right
and seeds that are not fixed, one run in 3,500 would have a failure.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import stats
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_sparse._numerics import gauss_legendre
from pyro_sparse._relaxation import JACOBIANS
from pyro_sparse.distributions import BernoulliST, GumbelSoftmaxST, OneHotCategoricalST
from pyro_sparse.infer import BaselineELBO
from pyro_sparse.testing import check_distribution

GUMBEL = ("gumbel-softmax", "gumbel-rao")
SEVERAL = 4.5  # standard errors
each_jacobian = pytest.mark.parametrize("jacobian", JACOBIANS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def makers() -> dict[str, Callable[..., Any]]:
    """Of every family and Jacobian, from logits and a temperature."""
    made: dict[str, Callable[..., Any]] = {"GumbelSoftmaxST": lambda logits, t=1.0: GumbelSoftmaxST(t, logits=logits)}
    for j in JACOBIANS:
        for family in (OneHotCategoricalST, BernoulliST):
            made[f"{family.__name__}, {j}"] = lambda logits, t=1.0, family=family, j=j: family(
                logits=logits, jacobian=j, temperature=t
            )
    return made


MAKERS = makers()
each_family = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def stock(d: Any) -> Any:
    family = dist.Bernoulli if isinstance(d, BernoulliST) else dist.OneHotCategorical
    return family(logits=d.logits)


# The conventions of Pyro.


@each_family
def test_keeps_the_conventions_of_pyro(make: Any) -> None:
    check_distribution(make(torch.randn(3, 1, 4, requires_grad=True)))


def test_zeros_and_temperatures_keep_them_too() -> None:
    zeros = torch.tensor([[0.0, 0.3, 0.7], [1.0, 0.0, 0.0]])
    check_distribution(OneHotCategoricalST(zeros))
    check_distribution(GumbelSoftmaxST(0.1, zeros))
    check_distribution(BernoulliST(torch.tensor([0.0, 1.0, 0.4])))
    check_distribution(
        OneHotCategoricalST(logits=torch.randn(2, 5, 3), temperature=torch.rand(5) + 0.1, jacobian="gumbel-rao")
    )
    check_distribution(BernoulliST(logits=torch.randn(2, 5), temperature=torch.rand(2, 1) + 0.1, jacobian="reinmax"))


@each_family
def test_the_distribution_is_the_stock_one(make: Any) -> None:
    d, other = make(torch.randn(3, 4), 0.3), make(torch.randn(3, 4))
    theirs = stock(d)
    outcomes = theirs.enumerate_support()
    assert d.has_rsample and d.has_enumerate_support
    assert torch.equal(d.enumerate_support(), outcomes)
    torch.testing.assert_close(d.log_prob(outcomes), theirs.log_prob(outcomes))
    torch.testing.assert_close(d.entropy(), theirs.entropy())
    for p, q in itertools.product((d, theirs), (other, stock(other))):
        torch.testing.assert_close(kl_divergence(p, q), kl_divergence(theirs, stock(other)))
    assert torch.equal(d.mode, theirs.mode)
    torch.testing.assert_close(d.mean, theirs.mean)


# What they draw.


@each_family
@pytest.mark.parametrize("temperature", [0.01, 10.0])
@pytest.mark.parametrize("method", ["sample", "rsample"])
def test_draws_are_exactly_discrete_at_every_temperature(make: Any, temperature: float, method: str) -> None:
    """Chi-square tests at p > 1e-6."""
    logits = torch.tensor([0.8, -1.1, 0.0], requires_grad=True)
    d = make(logits, temperature)
    z = getattr(d, method)((20_000,))
    assert z.shape == (20_000, 3) and z.requires_grad == (method == "rsample")
    assert ((z == 0) | (z == 1)).all()
    n, mean = len(z), z.detach().mean(0)
    if isinstance(d, BernoulliST):
        p = logits.detach().sigmoid()
        assert (stats.norm.sf(((mean - p).abs() / (p * (1 - p) / n).sqrt()).numpy()) > 1e-6).all()
    else:
        assert (z.sum(-1) == 1).all()
        expected = n * logits.detach().softmax(-1)
        assert stats.chisquare((n * mean).numpy(), expected.numpy()).pvalue > 1e-6


@each_family
def test_elements_are_drawn_independently(make: Any) -> None:
    z = make(torch.zeros(2, 2)).sample((20_000,))
    first, second = z.reshape(len(z), 2, 2)[:, 0, 0], z.reshape(len(z), 2, 2)[:, 1, 0]
    assert (first * second).mean() == pytest.approx(0.25, abs=0.02)


@each_family
@pytest.mark.parametrize("sample_shape", [(), (5,), (2, 5)], ids=str)
def test_shapes(make: Any, sample_shape: tuple[int, ...]) -> None:
    d = make(torch.randn(3, 1, 4)).expand((3, 2) if make(torch.randn(4)).event_shape else (3, 2, 4))
    for z in (d.sample(sample_shape), d.rsample(sample_shape), d(sample_shape)):
        assert z.shape == (*sample_shape, 3, 2, 4)
        assert d.log_prob(z).shape == (*sample_shape, *d.batch_shape)


@each_family
def test_draws_through_wrappers_have_gradients(make: Any) -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    for wrapped in (
        make(logits).mask(False),
        make(logits).to_event(1),
        make(logits).expand((2, *make(logits).batch_shape)),
    ):
        assert wrapped.has_rsample
        z = wrapped.rsample()
        assert ((z == 0) | (z == 1)).all()
        (gradient,) = torch.autograd.grad((z * torch.randn_like(z)).sum(), logits)
        assert gradient.isfinite().all() and (gradient != 0).any()


# Finite at both ends.


@each_family
@each_dtype
@pytest.mark.parametrize("temperature", [0.01, 10.0])
def test_everything_is_finite_at_the_ends(make: Any, dtype: torch.dtype, temperature: float) -> None:
    logits = torch.tensor([[40.0, -40.0, 0.0], [-40.0, 40.0, 40.0]], dtype=dtype, requires_grad=True)
    t = torch.tensor(temperature, dtype=dtype, requires_grad=True)
    d, prior = make(logits, t), make(torch.randn(2, 3, dtype=dtype))
    z = d.rsample((200,))
    outcomes = d.enumerate_support()
    results = [z * torch.randn_like(z), d.log_prob(z), d.log_prob(outcomes), d.entropy()]
    results += [kl_divergence(d, q) for q in (prior, stock(prior), make(-logits), stock(make(-logits)))]
    for result in results:
        assert result.dtype == dtype and result.isfinite().all()
        inputs = [logits, t] if result is results[0] else [logits]
        for gradient in torch.autograd.grad(result.sum(), inputs, retain_graph=True, allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


# Log-probabilities between the outcomes.


@pytest.mark.parametrize("family", [OneHotCategoricalST, BernoulliST])
def test_log_prob_is_linear_in_the_value(family: Any) -> None:
    d = family(logits=torch.randn(3), validate_args=False)
    outcomes = d.enumerate_support()
    weights = torch.rand(len(outcomes), 1)
    weights = weights / weights.sum()
    between = (weights * outcomes.reshape(len(outcomes), -1)).sum(0)
    expected = (weights * d.log_prob(outcomes).reshape(len(outcomes), -1)).sum(0)
    torch.testing.assert_close(d.log_prob(between).reshape(-1), expected)


def test_log_prob_has_a_gradient_by_the_value() -> None:
    """That of the stock distribution has none, for it looks for the largest entry."""
    logits = torch.randn(4)
    z = torch.eye(4)[1].requires_grad_()
    (gradient,) = torch.autograd.grad(OneHotCategoricalST(logits=logits).log_prob(z), z)
    torch.testing.assert_close(gradient, logits.log_softmax(-1))
    assert not dist.OneHotCategorical(logits=logits).log_prob(z).requires_grad


# Gradients of expectations: of each outcome, so in expectation.


def outcome_gradients(d: Any, logits: Tensor, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The outcomes of one variable, and the gradient of f at each; it must be a function of the outcome alone."""
    many = d.expand((500,))
    z = many.rsample()
    gradients = torch.autograd.grad(f(z).sum(), z)[0]
    found, jacobians = [], []
    for outcome in d.enumerate_support():
        same = (z == outcome).reshape(500, -1).all(-1)
        assert same.any()
        rows = []
        for k in range(outcome.numel()):
            unit = torch.zeros(500, outcome.numel())
            unit[same.nonzero()[0, 0], k] = 1.0
            rows.append(torch.autograd.grad(z, logits, unit.reshape(z.shape), retain_graph=True)[0].reshape(-1))
        jacobian = torch.stack(rows)
        found.append(gradients.reshape(500, -1)[same][0] @ jacobian)
        jacobians.append(jacobian)
    return torch.stack(found), torch.stack(jacobians)


def mean_gradient(d: Any, logits: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    probs = d.log_prob(d.enumerate_support()).exp().detach()
    return probs @ outcome_gradients(d, logits, f)[0]


@pytest.mark.parametrize("p", [0.03, 0.3, 0.6, 0.85])
@pytest.mark.parametrize("power", [1, 2, 3, 5])
def test_the_bias_of_one_bernoulli_in_closed_form(p: float, power: int) -> None:
    def f(b: Tensor) -> Tensor:
        return (b - 0.499) ** power

    slope0, slope1 = power * (-0.499) ** (power - 1), power * 0.501 ** (power - 1)
    exact = p * (1 - p) * (0.501**power - (-0.499) ** power)
    expected = {
        "identity": p * slope1 + (1 - p) * slope0,
        "softmax": p * (1 - p) * (p * slope1 + (1 - p) * slope0),
        "reinmax": 0.5 * p * (1 - p) * (slope0 + slope1),
    }
    for jacobian, value in expected.items():
        logits = torch.tensor(math.log(p / (1 - p)), requires_grad=True)
        d = BernoulliST(logits=logits, jacobian=jacobian)
        assert mean_gradient(d, logits, f).item() == pytest.approx(value, abs=1e-14)
        exact_here = {"identity": False, "softmax": power == 1, "reinmax": power <= 2}[jacobian]
        assert (abs(value - exact) < 1e-14) == exact_here


def exact_categorical(logits: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    values = f(torch.eye(len(logits)))
    return torch.autograd.grad(logits.softmax(-1) @ values, logits)[0]


@pytest.mark.parametrize("jacobian", ["softmax", "reinmax"])
def test_what_is_exact_for_categories(jacobian: Any) -> None:
    """Affine costs for the softmax, quadratic ones for ReinMax: to rounding."""
    a, q = torch.randn(4), torch.randn(4, 4)
    logits = torch.randn(4, requires_grad=True)
    d = OneHotCategoricalST(logits=logits, jacobian=jacobian)
    for f, exact in ((lambda z: z @ a, True), (lambda z: z @ a + ((z @ q) * z).sum(-1), jacobian == "reinmax")):
        error = (mean_gradient(d, logits, f) - exact_categorical(logits, f)).abs().max()
        assert (error < 1e-13) == exact


@pytest.mark.parametrize(("jacobian", "order"), [("softmax", 2), ("reinmax", 3)])
def test_the_order_of_the_bias(jacobian: Any, order: int) -> None:
    """Of a smooth cost of size s: the softmax leaves out its second derivatives, ReinMax its third ones."""
    a = torch.randn(4)
    logits = torch.randn(4, requires_grad=True)
    d = OneHotCategoricalST(logits=logits, jacobian=jacobian)
    errors = []
    for s in (0.02, 0.01, 0.005):
        f = lambda z, s=s: (s * z @ a).exp()  # noqa: E731
        errors.append((mean_gradient(d, logits, f) - exact_categorical(logits, f)).norm())
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.05)


# Gumbel Jacobians: by quadrature, and by draws.


def gumbel_bernoulli(logit: float, temperature: float, slope0: float, slope1: float) -> float:
    """Over logistic noise x, whose sign at logit + x decides the draw."""
    nodes, weights = gauss_legendre(60, torch.zeros(()))
    total = 0.0
    breaks = torch.cat([torch.linspace(-45, 45, 181) - 0.0, -torch.tensor([logit])]).sort().values
    for low, high in itertools.pairwise(breaks.tolist()):
        x = low + (high - low) * nodes
        u = ((logit + x) / temperature).sigmoid()
        slope = slope1 if low >= -logit else slope0
        density = x.sigmoid() * (-x).sigmoid()
        total += float((weights * (high - low) * density * slope * u * (1 - u) / temperature).sum())
    return total


@pytest.mark.parametrize("jacobian", GUMBEL)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("logit", [-1.5, 0.4])
def test_the_bias_of_one_gumbel_bernoulli_by_quadrature(jacobian: Any, temperature: float, logit: float) -> None:
    logits = torch.full((100_000,), logit).requires_grad_()
    z = BernoulliST(logits=logits, jacobian=jacobian, temperature=temperature, num_draws=5).rsample()
    (z - 0.499).pow(3).sum().backward()
    expected = gumbel_bernoulli(logit, temperature, 3 * 0.499**2, 3 * 0.501**2)
    z_score = (logits.grad.mean() - expected) / (logits.grad.std() / math.sqrt(len(logits)))
    assert abs(z_score) < SEVERAL
    p = torch.tensor(logit).sigmoid()
    bias = expected - float(p * (1 - p) * (0.501**3 + 0.499**3))
    if temperature >= 1:
        assert abs(bias) > 1e-3  # more than 4 standard errors: it is not mistaken for an unbiased one


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_gumbel_rao_has_the_mean_of_gumbel_softmax_and_less_variance(temperature: float) -> None:
    a, b = torch.randn(5), torch.randn(5)
    row = torch.randn(5)
    means, variances = [], []
    for jacobian in GUMBEL:
        logits = row.expand(50_000, 5).clone().requires_grad_()
        d = OneHotCategoricalST(logits=logits, jacobian=jacobian, temperature=temperature)
        z = d.rsample()
        ((z @ a) ** 3 + z @ b).sum().backward()
        means.append(logits.grad.mean(0))
        variances.append(logits.grad.var(0))
    error = ((variances[0] + variances[1]) / 50_000).sqrt()
    assert ((means[0] - means[1]).abs() < SEVERAL * error).all()
    assert variances[1].sum() < 0.9 * variances[0].sum()


def test_more_draws_have_less_variance() -> None:
    variances = []
    for num_draws in (1, 10, 100):
        logits = torch.zeros(10_000, 3, requires_grad=True)
        d = OneHotCategoricalST(logits=logits, jacobian="gumbel-rao", temperature=0.2, num_draws=num_draws)
        (d.rsample() @ torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        variances.append(float(logits.grad.var(0).sum()))
    assert variances[0] > 1.5 * variances[1] > 1.5 * variances[2]


def test_gumbel_softmax_is_the_one_hot_with_that_jacobian() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    found = []
    for d in (
        GumbelSoftmaxST(0.4, logits=logits),
        OneHotCategoricalST(logits=logits, jacobian="gumbel-softmax", temperature=0.4),
    ):
        pyro.set_rng_seed(3)
        z = d.rsample()
        found.append((z.detach(), torch.autograd.grad((z * torch.arange(4.0)).sum(), logits)[0]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@each_jacobian
def test_a_bernoulli_is_the_first_of_two_outcomes(jacobian: Any) -> None:
    bit = torch.randn(6, requires_grad=True)
    pair = torch.stack([bit.detach(), torch.zeros(6)], -1).requires_grad_()
    found = []
    for d, logits in (
        (BernoulliST(logits=bit, jacobian=jacobian, temperature=0.4), bit),
        (OneHotCategoricalST(logits=pair, jacobian=jacobian, temperature=0.4), pair),
    ):
        pyro.set_rng_seed(5)
        z = d.rsample()
        first = z if logits is bit else z[:, 0]
        (gradient,) = torch.autograd.grad((first * torch.arange(1.0, 7.0)).sum(), d.logits)
        found.append((first.detach(), gradient if logits is bit else gradient[:, 0]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


# Temperatures.


@pytest.mark.parametrize("name", [name for name in MAKERS if "Gumbel" in name or "gumbel-softmax" in name])
def test_a_temperature_that_is_a_parameter_is_trained(name: str) -> None:
    temperature = nn.Parameter(torch.tensor(0.7))
    d = MAKERS[name](torch.randn(50, 4), temperature)
    for e in (d, d.expand((2, *d.batch_shape)), d.mask(True), d.to_event(1)):
        temperature.grad = None
        (e.rsample() * torch.arange(4.0)).sum().backward()
        assert temperature.grad.isfinite() and temperature.grad != 0


@pytest.mark.parametrize("jacobian", ["reinmax", *GUMBEL])
@pytest.mark.parametrize("family", [OneHotCategoricalST, BernoulliST])
def test_each_element_may_have_its_temperature(family: Any, jacobian: Any) -> None:
    """The same draws and gradients as alone, expanded or not."""
    logits = torch.randn(2, 3, 4, requires_grad=True)
    temperature = torch.tensor([0.1, 1.0, 5.0])
    if family is BernoulliST:
        temperature = temperature.unsqueeze(-1)

    def gradient(t: Any, shape: Any = None) -> Tensor:
        pyro.set_rng_seed(1)
        d = family(logits=logits, jacobian=jacobian, temperature=t)
        z = (d if shape is None else d.expand(shape)).rsample()
        return torch.autograd.grad((z * torch.arange(4.0)).sum(), logits)[0]

    together = gradient(temperature)
    for i in range(3):
        torch.testing.assert_close(together[:, i], gradient(float(temperature.flatten()[i]))[:, i])
    assert not torch.allclose(together[:, 0], gradient(1.0)[:, 0])
    batch = (2, 3) if family is OneHotCategoricalST else (2, 3, 4)
    torch.testing.assert_close(gradient(temperature, batch), together)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))], ids=["copy", "pickle"])
@each_family
def test_copies_keep_their_options(make: Any, duplicate: Any) -> None:
    """Of an expanded one with a temperature for each element."""
    logits = torch.randn(3, 4)
    event = bool(make(logits).event_shape)
    d = make(logits, torch.tensor([0.2, 1.0, 3.0]) if event else torch.tensor([[0.2], [1.0], [3.0]]))
    d.num_draws = 3
    d = d.expand((2, *d.batch_shape))
    twin = duplicate(d)
    assert type(twin) is type(d) and (twin.jacobian, twin.num_draws) == (d.jacobian, 3)
    draws = []
    for e in (d, twin):
        e.temperature.requires_grad_()
        pyro.set_rng_seed(2)
        z = e.rsample()
        draws.append(z.detach())
        if z.requires_grad:
            draws.append(torch.autograd.grad((z * torch.arange(4.0)).sum(), e.temperature)[0])
    half = len(draws) // 2
    assert all(torch.equal(a, b) for a, b in zip(draws[:half], draws[half:], strict=True))


# The KL divergence that is drawn.

COPIES = 50_000
UNIFORM_TO = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)  # logits of the prior


def kl_gradients(elbo: Any, prior: Any, copies: int = COPIES) -> Tensor:
    """By the logits of each of many copies of a uniform variable, of its KL divergence to the prior."""
    pyro.clear_param_store()
    logits = pyro.param("logits", torch.zeros(copies, 3))

    def guide() -> None:
        logits = pyro.param("logits")
        with pyro.plate("copies", copies):
            pyro.sample("z", OneHotCategoricalST(logits=logits))

    def model() -> None:
        with pyro.plate("copies", copies):
            pyro.sample("z", prior)

    elbo.loss_and_grads(model, guide)
    return logits.grad


EXACT_KL = torch.tensor([1 / 3, 0.0, -1 / 3], dtype=torch.float64)


def z_scores(gradients: Tensor, expected: Tensor) -> Tensor:
    error = gradients.std(0) / math.sqrt(len(gradients))
    return (gradients.mean(0) - expected).abs() / error.clamp(min=1e-12)


def test_a_drawn_kl_to_a_stock_prior_has_no_gradient() -> None:
    """The negative control: (-.010, .004, .006) was measured once for (.333, 0, -.333)."""
    gradients = kl_gradients(Trace_ELBO(), dist.OneHotCategorical(logits=UNIFORM_TO))
    assert (z_scores(gradients, torch.zeros(3)) < SEVERAL).all()
    assert (z_scores(gradients, EXACT_KL)[[0, 2]] > 100).all()


@pytest.mark.parametrize("family", [OneHotCategoricalST, lambda logits: GumbelSoftmaxST(0.5, logits=logits)])
def test_a_drawn_kl_to_a_linear_prior_is_right(family: Any) -> None:
    """It is affine in the value, so the softmax Jacobian has no bias here."""
    gradients = kl_gradients(Trace_ELBO(), family(logits=UNIFORM_TO))
    assert (z_scores(gradients, EXACT_KL) < SEVERAL).all()


@pytest.mark.parametrize("family", [OneHotCategoricalST, dist.OneHotCategorical])
@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO(), BaselineELBO(None, analytic_kl=True)])
def test_a_closed_form_kl_is_exact_whatever_the_prior(elbo: Any, family: Any) -> None:
    gradients = kl_gradients(elbo, family(logits=UNIFORM_TO), copies=3)
    torch.testing.assert_close(gradients, EXACT_KL.expand(3, 3))


# Bad input.

Z = torch.zeros(3, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, math.nan, torch.tensor(0.0), torch.tensor([1.0, -1.0])], ids=str)
@pytest.mark.parametrize("family", ["one-hot", "Gumbel", "bits"])
def test_a_temperature_that_is_not_positive(family: str, temperature: Any) -> None:
    logits = torch.zeros(2, 3)
    make = {
        "one-hot": lambda **k: OneHotCategoricalST(logits=logits, temperature=temperature, **k),
        "Gumbel": lambda **k: GumbelSoftmaxST(temperature, logits=logits, **k),
        "bits": lambda **k: BernoulliST(logits=logits[:, 0], temperature=temperature, **k),
    }[family]
    with pytest.raises(
        ValueError, match=r"^\w+ST\.temperature: expected a positive number.*, got .*\. Use, say, 0\.5\.$"
    ):
        make(validate_args=True)
    make(validate_args=False)


@pytest.mark.parametrize("family", [OneHotCategoricalST, BernoulliST])
def test_other_bad_options(family: Any) -> None:
    name = family.__name__
    for jacobian in ("softmx", None, "gumbel"):
        with pytest.raises(
            ValueError, match=rf"^{name}: expected a jacobian in \('identity', .*got {jacobian!r}\. .*\.$"
        ):
            family(logits=Z, jacobian=jacobian)
    for num_draws in (0, -1, 1.5):
        with pytest.raises(ValueError, match=rf"^{name}: expected num_draws of at least 1, got {num_draws}\. .*\.$"):
            family(logits=Z, jacobian="gumbel-rao", num_draws=num_draws)
    with pytest.raises(ValueError, match=rf"{name}\.temperature: .*broadcasts to the batch shape .*got \(7,\)"):
        family(logits=torch.zeros(2, 3), temperature=torch.ones(7))
    with pytest.raises(ValueError):
        family()
    with pytest.raises(ValueError):
        family(probs=torch.tensor([-0.1, 1.1]))


def test_an_index_is_not_a_unit_vector() -> None:
    d = OneHotCategoricalST(logits=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"OneHotCategoricalST\.log_prob: expected unit vectors.*one_hot"):
        d.log_prob(torch.tensor([0, 2]))
    for value in ([0.5, 0.5, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]):
        with pytest.raises(ValueError, match="within the support"):
            d.log_prob(torch.tensor(value))


def test_a_decoder_that_takes_indices_gets_no_silent_gradient() -> None:
    """An embedding refuses a unit vector; argmax cuts the gradient, which a distribution cannot know."""
    z = OneHotCategoricalST(logits=torch.zeros(2, 3, requires_grad=True)).rsample()
    with pytest.raises(RuntimeError, match=r"[Ii]ndices|Long"):
        nn.Embedding(3, 2)(z)
