"""check_distribution on mixed families: it accepts all of ours, and catches small wrongs in an otherwise right one."""

from __future__ import annotations

import copy
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions.kl import register_kl

from pyro_sparse.distributions import (
    GumbelSoftmaxST,
    HardConcrete,
    HardKumaraswamy,
    Rectified,
    RectifiedNormal,
    SpikeAndExponential,
    SpikeAndSlab,
    StretchedRectified,
    ZeroOneInflated,
    stock_wrappers,
)
from pyro_sparse.testing import check_distribution


def real(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def positive(*shape: int) -> Tensor:
    return (0.5 + torch.rand(shape)).requires_grad_()


RIGHT: dict[str, Any] = {
    "HardConcrete": lambda: HardConcrete(positive(3, 1), real(2)),
    "HardKumaraswamy": lambda: HardKumaraswamy(positive(3, 1), positive(2), low=-positive(3, 2)),
    "RectifiedNormal": lambda: RectifiedNormal(real(3, 1), positive(2)),
    "SpikeAndSlab": lambda: SpikeAndSlab(dist.Normal(real(3, 1), positive(2)), logits=real(2)),
    "SpikeAndExponential": lambda: SpikeAndExponential(real(3, 1), probs=torch.tensor([0.0, 0.7])),
    "ZeroOneInflated": lambda: ZeroOneInflated(dist.Beta(positive(3, 2), positive(2)), real(2, 3)),
}
#: float64 only
MORE: dict[str, Any] = {
    "StretchedRectified": lambda: StretchedRectified(dist.Normal(real(3, 2), positive(2)), -0.2, 1.1),
    "Rectified": lambda: Rectified(dist.Cauchy(real(2), positive(2))),
    "scalar": lambda: HardConcrete(positive(), real()),
    "to_event": lambda: HardConcrete(positive(3, 1), real(2)).to_event(1),
    "has_rsample_": lambda: HardConcrete(positive(2), real(2)).has_rsample_(True),
    "a slab that is not reparameterised": lambda: SpikeAndSlab(
        dist.Normal(real(2), positive(2)).has_rsample_(False), logits=real(2)
    ),
    "a positive slab": lambda: SpikeAndSlab(dist.Gamma(torch.tensor([0.5, 2.0]), positive(2)), logits=real(2)),
    "a uniform slab": lambda: ZeroOneInflated(dist.Uniform(torch.zeros(()), 1.0), real(2, 3)),
    "a Cauchy slab": lambda: SpikeAndSlab(dist.Cauchy(real(2), positive(2)), logits=real(2)),
}
FAST = ("HardConcrete", "SpikeAndSlab", "SpikeAndExponential")


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        pytest.param(
            make,
            dtype,
            id=f"{name}, {dtype}",
            marks=[] if name in FAST and dtype is torch.float64 else pytest.mark.slow,
        )
        for name, make in RIGHT.items()
        for dtype in (torch.float64, torch.float32)
    ],
)
def test_right_ones_pass(make: Any, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    check_distribution(make())


@pytest.mark.slow
@pytest.mark.parametrize("make", MORE.values(), ids=MORE)
def test_more_right_ones_pass(make: Any) -> None:
    check_distribution(make())


# Broken ones.


class DensityTooLarge(HardConcrete):
    def _log_density_of(self, log_k: Tensor, log_rest: Tensor) -> Tensor:
        return super()._log_density_of(log_k, log_rest) + 1e-5


class AtomTooLikely(HardConcrete):
    def _log_weights(self) -> Any:
        zero, *others = super()._log_weights()
        return (zero + 1e-5, *others)


class AtomNotAsSaid(HardConcrete):
    @property
    def prob_one(self) -> Tensor:
        return super().prob_one + 1e-5


class ComplementOfTheWrongAtom(HardConcrete):
    @property
    def prob_nonzero(self) -> Tensor:
        return 1 - self.prob_one


class EntropyOfTheInside(HardConcrete):
    def _atoms_entropy(self) -> Tensor:
        return torch.zeros_like(self.prob_zero)


class MeanOfTheInside(HardConcrete):
    @property
    def mean(self) -> Tensor:
        return super().mean - self.prob_one


class VarianceIsTheSecondMoment(HardConcrete):
    @property
    def variance(self) -> Tensor:
        return super().variance + self.mean.square()


class CdfHasNoJumps(HardConcrete):
    def cdf(self, value: Tensor) -> Tensor:
        return super().cdf(value) - self.prob_zero


class IcdfHasNoAtoms(HardConcrete):
    def icdf(self, value: Tensor) -> Tensor:
        return super().icdf(self.prob_zero + self.prob_interior * torch.as_tensor(value))


class IcdfDropsTheBatch(HardConcrete):
    def icdf(self, value: Tensor) -> Tensor:
        return super().icdf(value)[..., :1]


class ModeDropsTheBatch(HardConcrete):
    def point_estimate(self, kind: str = "mean") -> Tensor:
        return super().point_estimate(kind)[..., 0]


class NaivePathwise(HardConcrete):
    """What published implementations do."""

    def _stratified(self, shape: Any) -> Tensor:
        return self._pathwise(self._draw(shape))


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, log_mass: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return z.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad * ctx.saved_tensors[0], None


class FirstDerivativeByHand(HardConcrete):
    """Its second derivative is a constant to autograd.grad, whatever once_differentiable says."""

    def icdf(self, value: Tensor) -> Tensor:
        z = super().icdf(value).detach()
        inner = self._inside(z)
        log_mass = self._log_cdf(inner)
        slope = torch.where(self._is_inside(z), -(log_mass - self._log_density(inner)).exp(), 0.0)
        return _ByHand.apply(z, log_mass, slope.detach())


class ConstantByContext(HardConcrete):
    """The draw has no gradient in an eager run; torch.jit.trace does not record no_grad."""

    def _stratified(self, shape: Any) -> Tensor:
        with torch.no_grad():
            z = self._draw(shape)
        inner, log_inside = self._inside(z), self._log_weights()[-1]
        log_mass = self._log_mass(self._zero, inner) - log_inside
        slope = torch.where(self._is_inside(z), -(log_mass + log_inside - self._log_density(inner)).exp(), 0.0)
        return _ByHand.apply(z, log_mass, slope.detach())


class NoPathInside(HardConcrete):
    def _stratified(self, shape: Any) -> Tensor:
        return self._draw(shape).detach()


class ScoreCountsTheInsideTwice(HardConcrete):
    def _inside_score(self, z: Tensor, log_inside: Tensor) -> Tensor:
        return self._log_density(z)


class PathwiseKeepsItsScore(HardConcrete):
    def score_parts(self, value: Tensor) -> ScoreParts:
        flag, self.has_rsample = self.has_rsample, False
        parts = super().score_parts(value)
        self.has_rsample = flag
        return parts


class PathwiseForgetsTheAtoms(HardConcrete):
    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self._stratified(self._extended_shape(sample_shape))


class StockMask(HardConcrete):
    def mask(self, mask: Any) -> Any:
        return MaskedDistribution(self, mask)


class StockToEvent(HardConcrete):
    def to_event(self, reinterpreted_batch_ndims: Any = None) -> Any:
        return Independent(self, reinterpreted_batch_ndims)


class StockMaskOfTensors(HardConcrete):
    def mask(self, mask: Any) -> Any:
        return super().mask(mask) if mask is True else MaskedDistribution(self, mask)


class StockExpand(HardConcrete):
    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return ExpandedDistribution(copy.copy(self), batch_shape)


class ExpandForgetsTheFlag(HardConcrete):
    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = super().expand(batch_shape)
        new.has_rsample = False
        return new


class MaskSharesTheFlag(HardConcrete):
    def mask(self, mask: Any) -> Any:
        return self if mask is True else super().mask(mask)


class DivergenceIsNotZero(HardConcrete):
    pass


class DivergenceIsNotImplemented(HardConcrete):
    pass


@register_kl(DivergenceIsNotZero, DivergenceIsNotZero)
def _not_zero(p: Any, q: Any) -> Tensor:
    return torch.full_like(p.prob_zero, 1e-5)


@register_kl(DivergenceIsNotImplemented, DivergenceIsNotImplemented)
def _not_implemented(p: Any, q: Any) -> Tensor:
    raise NotImplementedError


@pytest.mark.parametrize(
    "family, message",
    [
        (DensityTooLarge, "sum of the atoms and the integral of the density: expected"),
        (AtomTooLikely, r"prob_zero \+ prob_one \+ prob_interior: expected"),
        (AtomNotAsSaid, r"prob_zero \+ prob_one \+ prob_interior: expected"),
        (ComplementOfTheWrongAtom, r"prob_zero \+ prob_nonzero: expected"),
        (EntropyOfTheInside, "entropy: expected"),
        (MeanOfTheInside, "mean: expected"),
        (VarianceIsTheSecondMoment, "variance: expected"),
        (CdfHasNoJumps, r"cdf\(0.3\): expected"),
        (IcdfHasNoAtoms, r"cdf\(icdf\(u\)\): expected u = .* or a jump over it"),
        (IcdfDropsTheBatch, "shape of icdf: expected"),
        (ModeDropsTheBatch, r"shape of point_estimate\('mode'\): expected"),
        (NaivePathwise, r"gradient of d\(\): expected"),
        (ConstantByContext, r"gradient of d\(\) under torch.jit.trace: expected"),
        (FirstDerivativeByHand, "derivative of the gradient of icdf: expected"),
        (NoPathInside, r"gradient of the score function of d\(\): expected"),
        (ScoreCountsTheInsideTwice, r"gradient of the score function of d\(\): expected"),
        (PathwiseKeepsItsScore, r"score function of d\(\) after has_rsample_\(True\): expected 0"),
        (PathwiseForgetsTheAtoms, r"gradient of d\(\) after has_rsample_\(True\): expected"),
        (StockMask, "expected no error, got AttributeError.*'has_rsample' of 'MaskedDistribution'"),
        (StockMaskOfTensors, r"gradient of the score function of d\(\)\.mask\(m\): expected"),
        (StockToEvent, "expected no error, got AttributeError.*'has_rsample' of 'Independent'"),
        (StockExpand, "after expand"),
        (ExpandForgetsTheFlag, r"has_rsample of d\(\)\.expand after has_rsample_\(True\): expected True"),
        (MaskSharesTheFlag, r"has_rsample of d after that of d\.mask\(True\) was set: expected False"),
        (DivergenceIsNotZero, r"kl_divergence\(d, d\): expected"),
        (DivergenceIsNotImplemented, "expected no error, got NotImplementedError"),
    ],
)
def test_broken_ones_are_caught(family: type[HardConcrete], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)^check_distribution\({family.__name__}.*\): .*{message}"):
        check_distribution(family(positive(3, 1), real(2)))


# Pyro's own constructors, as they are where nobody answers for them.


@pytest.mark.parametrize(
    "wrapper, message",
    [
        (dist.MaskedDistribution, r"gradient of the score function of d\(\), MaskedDistribution\(d, m\): expected"),
        (ExpandedDistribution, r"gradient of the score function of d\(\), ExpandedDistribution\(d, shape\): expected"),
        (Independent, r"expected no error, got AttributeError.*'has_rsample' of 'Independent'"),
        (
            dist.TransformedDistribution,
            r"log_prob of TransformedDistribution\(d, AffineTransform\(\)\) at 0.5: expected",
        ),
    ],
)
def test_stock_wrappers_are_caught(monkeypatch: pytest.MonkeyPatch, wrapper: Any, message: str) -> None:
    monkeypatch.delitem(stock_wrappers._ANSWERS, wrapper)
    with pytest.raises(AssertionError, match=rf"(?s)^check_distribution\(HardConcrete.*\): .*{message}"):
        check_distribution(HardConcrete(positive(3, 1), real(2)))


class NanIsAPointInside(HardConcrete):
    """What a comparison makes of it."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(torch.where(value.isnan(), 0.5, value))


class NanIsLarge(HardConcrete):
    def cdf(self, value: Tensor) -> Tensor:
        return super().cdf(value.nan_to_num(nan=1.0))


class TemperatureKeepsItsDtype(HardConcrete):
    """As by torch's own broadcasting."""

    def __init__(self, temperature: Tensor, logits: Tensor, **kwargs: Any) -> None:
        super().__init__(temperature, logits, **kwargs)
        self.temperature, _ = torch.broadcast_tensors(temperature, logits)


class StretchKeepsItsDtype(HardConcrete):
    def __init__(self, temperature: Tensor, logits: Tensor) -> None:
        super().__init__(temperature, logits)
        self.low = torch.tensor(-0.1, dtype=torch.float64)


class TemperatureWidensDraws(GumbelSoftmaxST):
    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        hard = super().rsample(sample_shape)
        soft = (self.logits / self.temperature.unsqueeze(-1)).softmax(-1)
        return hard + (soft - soft.detach())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: NanIsAPointInside(positive(3, 1), real(2)), "log_prob of NaN, validation off: expected NaN"),
        (lambda: NanIsLarge(positive(3, 1), real(2)), "cdf of NaN, validation off: expected NaN"),
        (lambda: TemperatureKeepsItsDtype(torch.tensor(0.5), real(2).float()), "dtype of the parameters: expected one"),
        (
            lambda: StretchKeepsItsDtype(torch.tensor(0.5), real(2).float()),
            "dtype of log_prob after expand: expected torch.float32",
        ),
        (
            lambda: TemperatureWidensDraws(torch.tensor(0.5), logits=real(3).float()),
            "dtype of .*expected torch.float32",
        ),
    ],
)
def test_nan_and_dtypes_are_caught(make: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)^check_distribution\(.*\): .*{message}"):
        check_distribution(make())


def test_other_dtypes_beside_the_main_parameter_pass() -> None:
    check_distribution(HardConcrete(torch.tensor(0.5), real(2).float().detach().requires_grad_(), torch.tensor(-0.2)))
