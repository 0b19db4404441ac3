"""Mixed variables under an affine map: densities between the atoms, probabilities at them, by every way to ask."""

from __future__ import annotations

import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import AffineTransform, ExpTransform
from pyro.infer import Trace_ELBO
from pyro.infer.reparam import TransformReparam
from torch import Tensor
from torch.distributions import ComposeTransform, biject_to, kl_divergence

from pyro_sparse.distributions import HardConcrete, RectifiedNormal, SpikeAndSlab, ZeroOneInflated
from pyro_sparse.distributions.univariate.affine import AffineMixed
from pyro_sparse.testing import check_distribution
from tests.distributions.univariate.mixed_zoo import LINE, MILD, UNIT, expected_value, mild

each = pytest.mark.parametrize("name", MILD)
maps = pytest.mark.parametrize("loc, scale", [(0.3, -0.7), pytest.param(0.0, 100.0, marks=pytest.mark.slow)])


def affine(d: Any, loc: Any, scale: Any, **kwargs: Any) -> Any:
    return dist.TransformedDistribution(d, [AffineTransform(loc, scale, **kwargs)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cdf_in_half_precision(dtype: torch.dtype) -> None:
    loc, scale = torch.tensor(0.3, dtype=dtype), torch.tensor(1.0, dtype=dtype)
    d = affine(RectifiedNormal(loc, scale), 0.0, -2.0)
    values = torch.tensor([-2.0, -1.5, -0.5, 0.0], dtype=dtype)
    expected = affine(RectifiedNormal(loc.double(), scale.double()), 0.0, -2.0).cdf(values.double())
    torch.testing.assert_close(d.cdf(values), expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0.0)


def test_a_percentage() -> None:
    zoi = ZeroOneInflated(dist.Beta(2.0, 3.0), probs=torch.tensor([0.2, 0.1, 0.7]))
    d = affine(zoi, 0.0, 100.0)
    torch.testing.assert_close(d.log_prob(torch.tensor([0.0, 100.0])).exp(), torch.tensor([0.2, 0.1]))
    inside = 0.7 * dist.Beta(2.0, 3.0).log_prob(torch.tensor(0.4)).exp() / 100
    torch.testing.assert_close(d.log_prob(torch.tensor(40.0)).exp(), inside)
    torch.testing.assert_close(d.mean, 100 * zoi.mean)
    torch.testing.assert_close(d.variance, 1e4 * zoi.variance)
    with pytest.raises(ValueError, match=r"within the support \(0 \+ 100 \* mixed\(.*"):
        d.log_prob(torch.tensor(100.5))


@each
@maps
def test_mass_moments_entropy_and_cdf(name: str, loc: float, scale: float) -> None:
    """Atoms exactly, the rest by quadrature of log_prob where the map takes the panels."""
    base = mild(name)
    d = affine(base, loc, scale)
    mean, point = d.mean.detach(), loc + scale * 0.3

    def image(z: Tensor) -> Tensor:
        return loc + scale * z

    class Pulled:
        """d by coordinates of its base: a density times |s|, a probability at an atom."""

        batch_shape, support = base.batch_shape, base.support

        def log_prob(self, z: Tensor) -> Tensor:
            at_atom = torch.stack([z == atom for atom in base._atoms]).any(0)
            return d.log_prob(image(z)) + torch.where(at_atom, 0.0, torch.tensor(scale).abs().log())

    breaks = UNIT if "Slab" not in name else LINE.clamp(min=0.0) if "of probs" in name else LINE
    breaks = torch.cat([breaks, breaks.new_tensor([0.3])]).unique()

    def log_p(z: Tensor) -> Tensor:
        return d.log_prob(image(z))

    facts: dict[str, tuple[Tensor, Any]] = {
        "mass": (torch.ones(2), lambda z, _: torch.ones_like(z)),
        "mean": (d.mean, lambda z, _: image(z)),
        "variance": (d.variance, lambda z, _: (image(z) - mean).square()),
        "entropy": (d.entropy(), lambda z, _: -log_p(z)),
    }
    if name != "ZeroOneInflated":  # a Beta slab has no cdf
        facts["cdf"] = d.cdf(torch.tensor(point)), lambda z, _: (image(z) <= point + 1e-13).double()
    for fact, (got, of) in facts.items():
        expected = expected_value(Pulled(), of, breaks)
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7, msg=lambda m, f=fact: f"{f}: {m}")


@pytest.mark.parametrize("name", [name for name in MILD if name != "ZeroOneInflated"])
@maps
def test_cdf_jumps_at_the_atoms_and_icdf_inverts(name: str, loc: float, scale: float) -> None:
    base = mild(name)
    d = affine(base, loc, scale)

    def jump(y: Tensor) -> Tensor:
        at_atom = torch.stack([y == loc + scale * atom for atom in base._atoms]).any(0)
        return torch.where(at_atom, d.log_prob(y).exp(), 0.0)

    with pyro.validation_enabled(False):
        quiet = affine(mild(name), loc, scale)
    for atom in base._atoms:
        y, step = loc + scale * torch.tensor(atom), 1e-9 * abs(scale)
        torch.testing.assert_close(quiet.cdf(y) - quiet.cdf(y - step), jump(y), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(d.log_prob(y), base.log_prob(torch.tensor(atom)))
    u = torch.tensor([[0.02], [0.37], [0.81], [0.995]])
    y = d.icdf(u)  # the smallest y at which the cdf is u, up to rounding
    assert (d.cdf(y) >= u - 1e-9).all() and (d.cdf(y) - jump(y) <= u + 1e-9).all()


@each
def test_draws_gradients_and_score_parts_are_those_of_the_base(name: str) -> None:
    """Under Trace_ELBO as the base with its value mapped by hand, at the same seed; learnt loc and scale included."""

    def gradients(by_hand: bool) -> list[Tensor]:
        parameters = [torch.tensor(v, requires_grad=True) for v in MILD[name][1]]
        loc, scale = torch.tensor(0.3, requires_grad=True), torch.tensor(-0.7, requires_grad=True)
        pyro.set_rng_seed(3)

        def model() -> None:
            # With the same log-density up to a term that both have, whatever the base is.
            with pyro.plate("rows", 2):
                if by_hand:
                    y = loc + scale * pyro.sample("y", base)
                else:
                    y = pyro.sample("y", affine(base, loc, scale))
                pyro.factor("x", y.sin() - y.square())

        def guide() -> None:
            with pyro.plate("rows", 2):
                d = MILD[name][0](*parameters)
                pyro.sample("y", d if by_hand else affine(d, loc, scale))

        base = mild(name)
        loss = Trace_ELBO(num_particles=3).differentiable_loss(model, guide)
        return list(torch.autograd.grad(loss, [*parameters, loc, scale]))

    for got, expected in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_pathwise_draws() -> None:
    d = affine(HardConcrete(0.5, torch.zeros(2, requires_grad=True)), 0.0, 3.0)
    pathwise = d.has_rsample_(True)
    assert pathwise.has_rsample and not d.base_dist.__class__.has_rsample
    assert pathwise().requires_grad and pathwise.score_parts(pathwise()).score_function == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_lies_between_the_atoms_stays_there(dtype: torch.dtype) -> None:
    """Rounding neither makes nor unmakes an atom, where the map takes all digits of what is near one."""
    slab = dist.Beta(torch.tensor(0.05, dtype=dtype), torch.tensor(0.05, dtype=dtype))
    base = ZeroOneInflated(slab, probs=torch.tensor([0.25, 0.25, 0.5], dtype=dtype))
    for loc, scale in ((1000.0, 0.1), (0.1, -0.7), (0.0, 1e-30), (3.0, 3e5)):
        d = affine(base, loc, scale)
        pyro.set_rng_seed(0)
        z = base.sample((2000,))
        pyro.set_rng_seed(0)
        y = d.sample((2000,))
        back = d.inverse(y)
        assert torch.equal(back == 0, z == 0) and torch.equal(back == 1, z == 1)
        assert d.support.check(y).all() and d.log_prob(y).isfinite().all()


def test_an_atom_is_where_the_map_puts_it_to_rounding() -> None:
    d = affine(HardConcrete(0.5, torch.tensor(0.3)), 0.1, 0.7)
    assert 0.1 + 0.7 != 0.8
    torch.testing.assert_close(d.log_prob(torch.tensor([0.8, 0.1 + 0.7])).exp(), d.base_dist.prob_one.expand(2))


def test_composed_inverted_and_wrapped_maps() -> None:
    base, y = HardConcrete(0.5, torch.tensor([0.3, -1.0])), torch.tensor([1.0, 2.3])
    expected = affine(base, 1.0, 2.0)
    twice = affine(affine(base, 0.5, 1.0), 0.0, 2.0)
    ways = {
        "twice": twice,
        "list": dist.TransformedDistribution(base, [AffineTransform(0.5, 1.0), AffineTransform(0.0, 2.0)]),
        "compose": dist.TransformedDistribution(
            base, ComposeTransform([AffineTransform(0.5, 1.0), AffineTransform(0.0, 2.0)])
        ),
        "inverse": dist.TransformedDistribution(base, AffineTransform(-0.5, 0.5).inv),
        "rv": base.rv.mul(2.0).add(1.0).dist,
    }
    for how, d in ways.items():
        assert isinstance(d, AffineMixed), how
        torch.testing.assert_close(d.log_prob(y), expected.log_prob(y))
    mask = torch.tensor([True, False])
    rows = torch.tensor([[0.0], [1.0]])
    for wrapped, by_hand in (
        (affine(base.to_event(1), 1.0, 2.0), expected.to_event(1)),
        (affine(base, 1.0, 2.0, event_dim=1), expected.to_event(1)),
        (affine(base.to_event(1), 1.0, 2.0, event_dim=1), expected.to_event(1)),
        (affine(base.mask(mask), 1.0, 2.0), expected.mask(mask)),
        (affine(base, 1.0 + 0 * rows, 2.0), expected.expand((2, 2))),
        (affine(base.to_event(1), torch.tensor([1.0, 1.0]), 2.0), expected.to_event(1)),
    ):
        assert (wrapped.batch_shape, wrapped.event_shape) == (by_hand.batch_shape, by_hand.event_shape)
        torch.testing.assert_close(wrapped.log_prob(y), by_hand.log_prob(y))
    assert dist.TransformedDistribution(base, []) is base


def test_other_maps_and_factors_are_refused() -> None:
    d = HardConcrete(0.5, torch.tensor(0.3))
    for make in (
        lambda: dist.TransformedDistribution(d, [ExpTransform()]),
        lambda: dist.TransformedDistribution(d.to_event(0), [AffineTransform(0.0, 2.0), ExpTransform()]),
        lambda: dist.TransformedDistribution(affine(d, 1.0, 2.0), [ExpTransform()]),
        lambda: dist.FoldedDistribution(SpikeAndSlab(dist.Normal(0.0, 1.0), probs=0.5)),
        lambda: d.rv.exp().dist,
    ):
        with pytest.raises(
            ValueError, match=r"expected an affine map of a univariate mixed .*draw from this distribut"
        ):
            make()
    with pytest.raises(ValueError, match=r"AffineTransform.scale: expected a number that is not zero, got 0.0"):
        affine(d, 1.0, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"AffineMixed.log_prob: expected a floating-point value"):
        affine(d, 1.0, 2.0).log_prob(torch.tensor(1))


def test_divergences() -> None:
    p, q = HardConcrete(0.5, torch.tensor([0.3, -1.0])), HardConcrete(0.7, torch.tensor(0.1))
    same = kl_divergence(affine(p, 1.0, 2.0), affine(q, 1.0, 2.0))
    torch.testing.assert_close(same, kl_divergence(p, q))
    torch.testing.assert_close(
        kl_divergence(affine(p, 1.0, 2.0).to_event(1), affine(q.expand((2,)), 1.0, 2.0).to_event(1)), same.sum()
    )
    a, normal = affine(p, 1.0, 2.0), dist.Normal(0.0, 1.0)
    for other in (affine(q, 1.0, 3.0), q, normal, normal.expand((2,)).to_event(1), dist.LogNormal(0.0, 1.0)):
        for pair in ((a, other), (other, a)):
            with pytest.raises(TypeError, match="expected a pair with a known divergence"):
                kl_divergence(*pair)
    delta = dist.Delta(torch.tensor(1.0))
    torch.testing.assert_close(kl_divergence(delta, a), -a.log_prob(delta.v))


def test_in_the_hands_of_pyro() -> None:
    d = affine(HardConcrete(0.5, torch.tensor([0.3, -1.0])), 1.0, 2.0)
    check_distribution(d)
    twin = pickle.loads(pickle.dumps(d))
    y = torch.tensor([1.0, 1.7])
    torch.testing.assert_close(twin.log_prob(y), d.log_prob(y))
    with pytest.raises(NotImplementedError, match=r"expected a domain without atoms, got 1 \+ 2"):
        biject_to(d.support)
    with pyro.poutine.reparam(config={"y": TransformReparam()}):
        trace = pyro.poutine.trace(lambda: pyro.sample("y", d)).get_trace()
    assert isinstance(trace.nodes["y_base"]["fn"], HardConcrete)
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), d)
    torch.testing.assert_close(mixture.log_prob(torch.tensor(1.0)).exp(), d.base_dist.prob_zero.mean())
    with pytest.raises(ValueError, match="expected components with the same atoms"):
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), affine(d.base_dist, 0.0, torch.tensor([1.0, 2.0])))


@pytest.mark.slow
@each
def test_conventions(name: str) -> None:
    check_distribution(affine(mild(name), 0.3, -0.7))
