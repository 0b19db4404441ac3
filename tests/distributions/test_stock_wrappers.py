"""Pyro's wrappers around our families: by constructor as by method, right where there is no method, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.distribution import COERCIONS
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.transforms import AffineTransform
from pyro.infer import Trace_ELBO
from torch import Size, Tensor

from pyro_sparse.distributions import (
    BernoulliST,
    FaceDirichlet,
    GaussianSparsemax,
    GibbsFaces,
    GumbelSoftmaxST,
    HardConcrete,
    HardConcreteSimplex,
    MaxEntropyFaces,
    SparseCategorical,
    SparseOneHotCategorical,
    SpikeAndSlab,
    ZeroOneInflated,
    stock_wrappers,
)
from pyro_sparse.testing.properties import leaves
from pyro_sparse.testing.quadrature import integrate
from tests.distributions.simplex.simplex_zoo import KINDS, attached, make, random_parameters
from tests.distributions.univariate.mixed_zoo import MILD, UNIT, mild

MASK = torch.tensor([True, False, True])
#: by constructor and by method, of a batch of three
WRAPPERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "mask": (lambda d: dist.MaskedDistribution(d, MASK), lambda d: d.mask(MASK)),
    "mask by keywords": (lambda d: dist.MaskedDistribution(base_dist=d, mask=MASK), lambda d: d.mask(MASK)),
    "mask of nothing": (lambda d: dist.MaskedDistribution(d, True), lambda d: d.mask(True)),
    "expand": (lambda d: ExpandedDistribution(d, Size((2, 3))), lambda d: d.expand((2, 3))),
    "to_event": (lambda d: dist.Independent(d, 1), lambda d: d.to_event(1)),
    "mask of to_event": (lambda d: dist.MaskedDistribution(dist.Independent(d, 1), True), lambda d: d.to_event(1)),
    "to_event of mask": (
        lambda d: dist.Independent(dist.MaskedDistribution(d, MASK), 1),
        lambda d: d.mask(MASK).to_event(1),
    ),
    "expand of to_event": (
        lambda d: ExpandedDistribution(dist.Independent(d, 1), Size((4,))),
        lambda d: d.to_event(1).expand((4,)),
    ),
}


def leaf(*shape: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, Size(shape).numel()).reshape(shape).requires_grad_()


FAMILIES: dict[str, Callable[[], Any]] = {
    **{kind: lambda kind=kind: make(kind, attached(random_parameters(3))) for kind in KINDS},
    "HardConcrete": lambda: HardConcrete(0.5, leaf(3)),
    "SpikeAndSlab": lambda: SpikeAndSlab(dist.Normal(leaf(3), 1.0), logits=leaf(3)),
    "a slab without gradient": lambda: SpikeAndSlab(dist.Normal(leaf(3), 1.0).has_rsample_(False), logits=leaf(3)),
    "ZeroOneInflated": lambda: ZeroOneInflated(dist.Beta(leaf(3).exp(), 2.0), leaf(3, 3)),
    "pathwise": lambda: HardConcrete(0.5, leaf(3)).has_rsample_(True),
    "GaussianSparsemax": lambda: GaussianSparsemax(leaf(3, 4), 0.5),
    "HardConcreteSimplex": lambda: HardConcreteSimplex(0.5, leaf(3, 2), 1.2),
    "FaceDirichlet": lambda: FaceDirichlet(leaf(3, 4).exp()),
    "GibbsFaces": lambda: GibbsFaces(leaf(3, 4)),
    "MaxEntropyFaces": lambda: MaxEntropyFaces(4, leaf(3)),
    "SparseCategorical": lambda: SparseCategorical(leaf(3, 4)),
    "SparseOneHotCategorical": lambda: SparseOneHotCategorical(leaf(3, 4)),
    "GumbelSoftmaxST": lambda: GumbelSoftmaxST(0.5, logits=leaf(3, 4)),
    "BernoulliST": lambda: BernoulliST(logits=leaf(3)),
}


def elbo_gradient(d: Any) -> list[Tensor]:
    """Under Trace_ELBO, of a guide that draws from d, by all that d depends on; at a fixed seed."""

    def model() -> None:
        with pyro.poutine.mask(mask=False):
            z = pyro.sample("z", d)
        weights = torch.arange(1.0, 1 + z.numel()).reshape(z.shape).cos()
        pyro.factor("x", (weights * z).sin().sum())

    pyro.set_rng_seed(0)
    with pyro.validation_enabled(False):  # no plates: all dims have one cost
        loss = Trace_ELBO().differentiable_loss(model, lambda: pyro.sample("z", d))
    return list(torch.autograd.grad(loss, list(leaves(loss))))


def build(family: str) -> Any:
    torch.manual_seed(1)
    return FAMILIES[family]()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrapper", [w if " " not in w else pytest.param(w, marks=pytest.mark.slow) for w in WRAPPERS])
def test_by_constructor_as_by_method(family: str, wrapper: str) -> None:
    """The same log_prob, the same draw, the same gradient of an ELBO."""
    built, called = (wrap(build(family)) for wrap in WRAPPERS[wrapper])
    assert (built.batch_shape, built.event_shape) == (called.batch_shape, called.event_shape)
    value = called.sample()
    torch.testing.assert_close(built.log_prob(value), called.log_prob(value), rtol=0, atol=0)
    for draw in (lambda d: d.sample((2,)), lambda d: d()):
        results = []
        for d in (built, called):
            pyro.set_rng_seed(2)
            results.append(draw(d))
        assert torch.equal(*results) and results[0].requires_grad == results[1].requires_grad
    for got, expected in zip(elbo_gradient(built), elbo_gradient(called), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_the_stock_form_has_another_gradient() -> None:
    """What the answer to the constructor is for: a subclass, which nobody answers for, loses the draw's gradient."""

    class Stock(dist.MaskedDistribution):
        pass

    (stock,), (ours,) = (elbo_gradient(wrap(HardConcrete(0.5, leaf(3)), MASK)) for wrap in (Stock, HardConcrete.mask))
    assert (stock - ours).abs().max() > 1e-3


@pytest.mark.parametrize("name", MILD)
def test_mixed_families_by_constructor(name: str) -> None:
    mask = torch.tensor([True, False])
    for built, called in (
        (lambda d: dist.MaskedDistribution(d, mask), lambda d: d.mask(mask)),
        (lambda d: ExpandedDistribution(d, Size((3, 2))), lambda d: d.expand((3, 2))),
    ):
        for got, expected in zip(elbo_gradient(built(mild(name))), elbo_gradient(called(mild(name))), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in MILD if "Slab" not in name and name != "SpikeAndExponential"])
def test_mixtures_have_mass_one_and_the_full_score(name: str) -> None:
    """A draw without gradient, and all of a log-probability that is normalised as the score: unbiased."""
    weights = dist.Categorical(torch.tensor([0.3, 0.7]))
    choice = torch.tensor([True, False])
    for d in (dist.MixtureSameFamily(weights, mild(name)), dist.MaskedMixture(choice, mild(name), mild(name))):
        z = d()
        parts = d.score_parts(z)
        assert not z.requires_grad and parts.entropy_term == 0
        assert torch.equal(parts.score_function, d.log_prob(z))

        def density(z: Tensor, d: Any = d) -> Tensor:
            return d.log_prob(z.reshape(-1, *(1,) * len(d.batch_shape))).exp()

        with torch.no_grad():
            atoms = sum(d.log_prob(torch.tensor(atom)).exp() for atom in (0.0, 1.0))
            torch.testing.assert_close(atoms + integrate(density, UNIT), torch.ones(d.batch_shape), rtol=1e-7, atol=0)


def test_a_mixture_with_atoms_is_no_slab() -> None:
    """What has atoms is found through what wraps it."""
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), HardConcrete(0.5, torch.zeros(2)))
    chosen = dist.MaskedMixture(torch.tensor(True), dist.Normal(0.0, 1.0), HardConcrete(0.5, torch.tensor(0.0)))
    scaled = dist.TransformedDistribution(HardConcrete(0.5, torch.tensor(0.0)), [AffineTransform(0.0, 2.0)])
    for slab in (mixture, chosen, scaled, HardConcrete(0.5, 0.0).mask(torch.tensor(True))):
        with pytest.raises(ValueError, match=r"expected a continuous distribution, got .* which has atoms"):
            SpikeAndSlab(slab, probs=0.5)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("HardConcrete", "SpikeAndSlab", "pathwise")])
def test_a_jacobian_is_refused_off_the_line(family: str) -> None:
    d = build(family)
    if family in ("ZeroOneInflated", "a slab without gradient"):
        d = dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), d)
    for base in (d, d.mask(True)):
        with pytest.raises(ValueError, match=r"(?s)expected an affine map of a univariate mixed .*draw from this dist"):
            dist.TransformedDistribution(base, [AffineTransform(0.0, 2.0)])


def test_what_is_not_ours_is_left_alone() -> None:
    assert COERCIONS.count(stock_wrappers._answer) == 1
    normal = dist.Normal(torch.zeros(3), 1.0)
    exp = dist.transforms.ExpTransform()
    for built, cls in (
        (dist.MaskedDistribution(normal, MASK), dist.MaskedDistribution),
        (dist.Independent(normal, 1), dist.Independent),
        (ExpandedDistribution(normal, Size((2, 3))), ExpandedDistribution),
        (dist.TransformedDistribution(normal, [exp]), dist.TransformedDistribution),
        (dist.FoldedDistribution(normal), dist.FoldedDistribution),
        (dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), normal), dist.MixtureSameFamily),
    ):
        assert type(built) is cls
    assert type(copy.copy(dist.Independent(normal, 1))) is dist.Independent
