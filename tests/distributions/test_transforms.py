"""Every family under what torch and Pyro do to tensors: provenance, ``torch.func``, draws of no elements."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Size, Tensor
from torch.distributions import kl_divergence
from torch.func import grad, jacrev, vmap

from pyro_sparse._autograd import is_true, unwrapped
from pyro_sparse.distributions import (
    BernoulliST,
    FaceDirichlet,
    FaceLogisticNormal,
    GaussianSparsemax,
    GibbsFaces,
    GumbelSoftmaxST,
    HardConcrete,
    HardConcreteSimplex,
    MaxEntropyFaces,
    OneHotCategoricalST,
    SparseCategorical,
    SparseOneHotCategorical,
)
from pyro_sparse.infer import BaselineELBO
from pyro_sparse.projections import entmax, entmax15, topk_sparsemax
from tests.distributions.simplex.simplex_zoo import KINDS, make, random_parameters
from tests.distributions.univariate.mixed_zoo import MILD

NAMES = tuple(random_parameters(3))
ROWS = torch.tensor([[0.3, -0.2, 1.0, 0.1], [2.0, 0.5, 0.4, -1.0], [0.0, 0.1, 0.2, 0.0]], dtype=torch.float64)
#: what makes a distribution of its parameters, and parameters for a batch
FAMILIES: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    **{name: (f, [torch.tensor(p, dtype=torch.float64) for p in values]) for name, (f, values) in MILD.items()},
    **{
        kind: (lambda *p, kind=kind: make(kind, dict(zip(NAMES, p, strict=True))), [])  # type: ignore[misc]
        for kind in KINDS
    },
    "SparseCategorical": (SparseCategorical, [ROWS]),
    "SparseCategorical, entmax15": (lambda s: SparseCategorical(s, entmax15), [ROWS]),
    "SparseCategorical, entmax": (lambda s, a: SparseCategorical(s, lambda x: entmax(x, 1 + a.sigmoid())), [ROWS]),
    "SparseCategorical, topk": (lambda s: SparseCategorical(s, functools.partial(topk_sparsemax, k=2)), [ROWS]),
    "SparseCategorical of logits": (lambda s: SparseCategorical(logits=s), [ROWS]),
    "SparseOneHotCategorical": (SparseOneHotCategorical, [ROWS]),
    "GibbsFaces": (GibbsFaces, [ROWS]),
    "MaxEntropyFaces": (lambda bits: MaxEntropyFaces(4, bits), [ROWS[:, 0]]),
    "FaceDirichlet": (lambda a: FaceDirichlet(a.exp()), [ROWS]),
    "FaceLogisticNormal": (lambda m, s: FaceLogisticNormal(m, s.exp()), [ROWS, ROWS / 2]),
    "GaussianSparsemax": (lambda m, s: GaussianSparsemax(m, s.exp()), [ROWS, ROWS / 2]),
    "HardConcreteSimplex": (lambda x, t: HardConcreteSimplex(t.exp(), x, 1.2), [ROWS, ROWS[:, 0]]),
    "GumbelSoftmaxST": (lambda x: GumbelSoftmaxST(0.5, logits=x), [ROWS]),
    "OneHotCategoricalST": (lambda x: OneHotCategoricalST(logits=x), [ROWS]),
    "BernoulliST": (lambda x: BernoulliST(logits=x), [ROWS[:, 0]]),
}
FAMILIES |= {kind: (FAMILIES[kind][0], list(random_parameters(3).values())) for kind in KINDS}
FAMILIES["SparseCategorical, entmax"][1].append(torch.tensor(0.2, dtype=torch.float64).expand(3, 1))

FACTS: dict[str, Callable[[Any], Any]] = {
    "mean": lambda d: d.mean,
    "variance": lambda d: d.variance,
    "entropy": lambda d: d.entropy(),
    "divergence": lambda d: kl_divergence(d, d),
    "enumerate_support": lambda d: d.log_prob(d.enumerate_support()),
    "support_size": lambda d: d.support_size,
    "point_estimate": lambda d: d.point_estimate("mode"),
}
each_family = pytest.mark.parametrize("name", FAMILIES)
#: these have their facts by integrals over many nodes, so that all of them take long
LONG = [n for n in FAMILIES if n.startswith(("Stretched", "Hard", "Rectified", "Mixed", "Face", "MaxEntropyFaces, "))]
LONG.remove("HardConcreteSimplex")
each_in_time = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in FAMILIES]
)


def skip_if_stock_looks(name: str) -> None:
    """Of the slabs that torch makes under vmap."""
    if "Kumaraswamy" in name:
        try:
            vmap(lambda a: dist.Kumaraswamy(a, a).log_prob(torch.tensor(0.5)))(torch.ones(2))
        except RuntimeError:
            pytest.skip("this torch's own Kumaraswamy, as that of 2.7, branches on its parameters")


def facts(name: str) -> dict[str, Callable[..., Tensor]]:
    """What a family offers, as functions of its parameters; log_prob at draws that stay where they are."""
    build, parameters = FAMILIES[name]
    d = build(*parameters)
    z = d.sample()
    found: dict[str, Callable[..., Tensor]] = {"log_prob": lambda *p: build(*p).log_prob(z)}
    for key, fact in FACTS.items():
        try:
            fact(d)
        except (NotImplementedError, AttributeError, TypeError):
            continue
        found[key] = lambda *p, fact=fact: fact(build(*p))  # type: ignore[misc]
    return found


# Provenance.


@each_in_time
def test_facts_under_provenance(name: str) -> None:
    parameters = FAMILIES[name][1]
    tracked = [track_provenance(p, frozenset({"a"})) for p in parameters]
    for key, fact in facts(name).items():
        value = fact(*tracked)
        assert get_provenance(value) == {"a"}, (key, value)
        torch.testing.assert_close(detach_provenance(value), fact(*parameters), equal_nan=True)


#: its base draws by torch's own categorical variable, which refuses to draw none
MIXTURE = "StretchedRectified of a mixture"
#: made with parameters that are tracked, torch's own draw with another shape: it takes the shape for data
STOCK_DRAWS = ("Rectified", "SpikeAndSlab of probs")


@each_family
def test_draws_under_provenance(name: str) -> None:
    build, parameters = FAMILIES[name]
    d, tracked = build(*parameters), build(*(track_provenance(p, frozenset({"a"})) for p in parameters))
    if name not in STOCK_DRAWS:
        for shape in ((), (4,), (0,))[: 2 if name == MIXTURE else 3]:
            z = tracked.sample(shape)
            assert get_provenance(z) == {"a"} and z.shape == d.sample(shape).shape
    if getattr(d, "has_sparse_support", False):
        for x, y in zip(d.sparse_support(), tracked.sparse_support(), strict=True):
            torch.testing.assert_close(x, detach_provenance(y))


def test_stock_draws_under_provenance_are_wrong() -> None:
    """Negative control of the exception above: it can go when torch or Pyro mend this."""
    rate = track_provenance(torch.ones(2), frozenset({"a"}))
    assert dist.Exponential(rate).sample((4,)).shape == (2,)


@pytest.mark.parametrize("family", [SparseCategorical, SparseOneHotCategorical])
def test_programs_that_are_tracked(family: Any) -> None:
    def program(p: Tensor) -> None:
        a = pyro.sample("a", dist.Bernoulli(p))
        with pyro.plate("d", 3):
            pyro.sample("z", family(torch.stack([a, 1 - a, 0.5 * a])))

    def model() -> None:
        program(torch.tensor(0.5))

    def guide() -> None:
        program(pyro.param("p", torch.tensor(0.4)))

    assert pyro.infer.inspect.get_dependencies(model)["prior_dependencies"]["z"] == {"z": set(), "a": set()}
    for elbo in (TraceGraph_ELBO(), BaselineELBO(costs="graph")):
        assert math.isfinite(elbo.loss_and_grads(model, guide))


# torch.func.

slow_but_right = pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")  # log_ndtr

#: torch's own fails in these: the divergence of uniform variables
REFUSED = {("ZeroOneInflated, Kumaraswamy", "divergence")}


@slow_but_right
@each_in_time
def test_vmap(name: str) -> None:
    """Over parameters, with validation: as one call for each."""
    skip_if_stock_looks(name)
    parameters = FAMILIES[name][1]
    examples = [parameters, [p.flip(0) for p in parameters]]
    stacked = [torch.stack(both) for both in zip(*examples, strict=True)]
    for key, fact in facts(name).items():
        if (name, key) not in REFUSED:
            expected = torch.stack([fact(*example) for example in examples])
            torch.testing.assert_close(vmap(fact)(*stacked), expected, equal_nan=True)


@slow_but_right
@each_in_time
def test_gradients_by_torch_func(name: str) -> None:
    """One for each example, and those of autograd."""
    skip_if_stock_looks(name)
    parameters = FAMILIES[name][1]
    which, found = tuple(range(len(parameters))), facts(name)
    for key in {"log_prob", "entropy", "divergence"} & set(found):
        if (name, key) in REFUSED:
            continue

        def total(*p: Tensor, key: str = key) -> Tensor:
            value = found[key](*p)
            return torch.where(value.isfinite(), value, 0.0).sum()

        leaves = [p.clone().requires_grad_() for p in parameters]
        expected = torch.autograd.grad(total(*leaves), leaves, allow_unused=True, materialize_grads=True)
        each = vmap(grad(total, which))(*(torch.stack([p, p]) for p in parameters))
        for x, y, z in zip(expected, grad(total, which)(*parameters), each, strict=True):
            torch.testing.assert_close(x, y)
            torch.testing.assert_close(torch.stack([x, x]), z)


@pytest.mark.parametrize("name", ["MaxEntropyFaces, Dirichlet", "MixedLogisticNormal", "HardConcrete"])
def test_entropies_by_torch_func(name: str) -> None:
    parameters, entropy = FAMILIES[name][1], facts(name)["entropy"]
    found = vmap(entropy)(*(torch.stack([p, p.flip(0)]) for p in parameters))
    torch.testing.assert_close(found, torch.stack([entropy(*parameters), entropy(*parameters).flip(0)]))


@pytest.mark.parametrize("name", ["MaxEntropyFaces, Dirichlet", "MixedLogisticNormal", "HardConcrete"])
def test_second_derivative_by_torch_func(name: str) -> None:
    parameters, entropy = FAMILIES[name][1], facts(name)["entropy"]
    first, rest = parameters[-1], parameters[:-1]

    def total(p: Tensor) -> Tensor:
        return entropy(*rest, p).sum()

    torch.testing.assert_close(jacrev(grad(total))(first), torch.autograd.functional.hessian(total, first))  # type: ignore[no-untyped-call]


#: noise is drawn in place, by torch's own distributions, which vmap refuses, or by an old-style function
IN_PLACE = ("Rectified", "SpikeAndSlab of probs", "ZeroOneInflated")


@slow_but_right
@each_family
def test_draws_under_vmap(name: str) -> None:
    skip_if_stock_looks(name)
    build, parameters = FAMILIES[name]
    if name not in IN_PLACE:
        stacked = [torch.stack([p] * 40) for p in parameters]
        z = vmap(lambda *p: build(*p).sample(), randomness="different")(*stacked)
        assert z.shape == (40, *build(*parameters).sample().shape) and (z != z[:1]).any()


def test_checks_under_vmap_see_all_examples() -> None:
    with pytest.raises(ValueError, match=r"^HardConcrete.temperature: expected a positive number, got -1\.0"):
        vmap(lambda t: HardConcrete(t, 0.0).mean, in_dims=1)(torch.tensor([[1.0, 2.0, -1.0]]))
    with pytest.raises(ValueError, match=r"^SparseCategorical.probs: .* minimum -0\.5 and a sum off by up to 0\.1"):
        vmap(lambda p: SparseCategorical(probs=p).entropy())(torch.tensor([[0.5, 0.5], [-0.5, 1.5], [0.5, 0.6]]))


def test_unwrapped_puts_examples_first() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    seen = []

    def look(row: Tensor) -> Tensor:
        seen.append(unwrapped(row))
        assert is_true(row >= 0) and not is_true(row < 23)
        return (row * row).sum()

    vmap(grad(look), in_dims=2)(x)
    vmap(vmap(look, in_dims=1), in_dims=1)(x)
    assert torch.equal(seen[0], x.movedim(2, 0)) and seen[1].shape == (3, 4, 2)
    assert not torch.compiler.is_compiling() and torch.equal(unwrapped(x), x)


# Draws of no elements.


@each_family
def test_no_draws(name: str) -> None:
    build, parameters = FAMILIES[name]
    if name == MIXTURE:
        return
    d = build(*parameters)
    for z in (d.sample((0,)), d((0,)), d.expand((2, *d.batch_shape)).sample(Size((3, 0)))):
        assert z.numel() == 0 and z.dtype == d.sample().dtype
    z = d.sample((0,))
    assert z.shape == (0, *d.sample().shape) and d.log_prob(z).shape == (0, *d.batch_shape)


# Rebuilding.


@pytest.mark.parametrize("family", [SparseCategorical, SparseOneHotCategorical])
def test_marginals_by_bayes(family: Any) -> None:
    """Pyro makes a distribution of the marginal by ``type(d)(logits=...)``."""
    x = torch.tensor([0.3, 1.2])

    @config_enumerate
    def model() -> None:
        with pyro.plate("d", 2):
            k = pyro.sample("k", family(torch.tensor([1.0, 0.4, -2.0])))
            number = k if family is SparseCategorical else k @ torch.arange(3.0)
            pyro.sample("x", dist.Normal(number.to(x.dtype), 1.0), obs=x)

    found = TraceEnum_ELBO(max_plate_nesting=1).compute_marginals(model, lambda: None)["k"]
    joint = torch.tensor([0.8, 0.2, 0.0]) * (-(x.unsqueeze(-1) - torch.arange(3)).square() / 2).exp()
    assert type(found) is family and (found.probs[:, 2] == 0).all() and (found.support_size == 2).all()
    torch.testing.assert_close(found.probs, joint / joint.sum(-1, keepdim=True))


@pytest.mark.parametrize("family", [SparseCategorical, SparseOneHotCategorical])
def test_logits(family: Any) -> None:
    """As stock distributions read them, and zeros as we do."""
    logits = torch.tensor([[1.0, -math.inf, 3.0], [0.0, 0.0, -math.inf]], requires_grad=True)
    d = family(logits=logits)
    torch.testing.assert_close(d.logits, logits.log_softmax(-1))
    assert torch.equal(d.probs == 0, logits == -math.inf) and d.support_size.tolist() == [2, 2]
    (gradient,) = torch.autograd.grad(d.entropy().sum(), logits)
    assert gradient.isfinite().all()
    again = family(logits=d.logits)
    torch.testing.assert_close(again.probs, d.probs)
    with pytest.raises(ValueError, match=r"logits: expected finite logits or -inf, got NaN or \+inf"):
        family(logits=torch.tensor([0.0, math.nan]))


# Inference mode.


@each_in_time
def test_inference_mode(name: str) -> None:
    """As under no_grad, of all that a family offers."""
    parameters = FAMILIES[name][1]
    for fact in facts(name).values():
        with torch.no_grad():
            expected = fact(*parameters)
        with torch.inference_mode():
            found = fact(*parameters)
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_divergence_over_faces_in_inference_mode() -> None:
    """It takes a derivative of a derivative."""
    name = "MaxEntropyFaces, LogisticNormal"
    parameters, divergence = FAMILIES[name][1], facts(name)["divergence"]
    with torch.inference_mode():
        found = divergence(*parameters)
    torch.testing.assert_close(found, divergence(*parameters))
