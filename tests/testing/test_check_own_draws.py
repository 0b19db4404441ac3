"""check_distribution at many draws: log_prob there, and the law in half precision. Negative controls: how it was."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_sparse.distributions import (
    BernoulliST,
    FaceDirichlet,
    FaceLogisticNormal,
    GaussianSparsemax,
    GibbsFaces,
    GumbelSoftmaxST,
    HardConcrete,
    HardConcreteSimplex,
    HardKumaraswamy,
    MaxEntropyFaces,
    MixedDirichlet,
    MixedLogisticNormal,
    OneHotCategoricalST,
    RectifiedNormal,
    SparseCategorical,
    SparseOneHotCategorical,
    SpikeAndExponential,
    SpikeAndSlab,
    StretchedRectified,
    ZeroOneInflated,
)
from pyro_sparse.testing import check_distribution
from pyro_sparse.testing.own_draws import own_draws

HALVES = [torch.bfloat16, torch.float16]
#: made of two vectors of three
FAMILIES: dict[str, Any] = {
    "HardConcrete": lambda a, b: HardConcrete(2 / 3, 4 * a),
    "HardKumaraswamy": lambda a, b: HardKumaraswamy(a.exp(), b.exp()),
    "RectifiedNormal": lambda a, b: RectifiedNormal(a, b.exp()),
    "SpikeAndExponential": lambda a, b: SpikeAndExponential(5 * a, logits=b),
    "HardConcreteSimplex": lambda a, b: HardConcreteSimplex(0.5, a[:2], 1.2),
    "GaussianSparsemax": lambda a, b: GaussianSparsemax(a, b.exp()),
    "GibbsFaces": lambda a, b: GibbsFaces(a),
    "MaxEntropyFaces": lambda a, b: MaxEntropyFaces(4, a),
    "FaceDirichlet": lambda a, b: FaceDirichlet(a.exp()),
    "FaceLogisticNormal": lambda a, b: FaceLogisticNormal(a, b.exp()),
    "MixedDirichlet": lambda a, b: MixedDirichlet(a, b.exp()),
    "MixedLogisticNormal": lambda a, b: MixedLogisticNormal(a, b, 1.0),
    "OneHotCategoricalST": lambda a, b: OneHotCategoricalST(logits=a),
    "OneHotCategoricalST, probs": lambda a, b: OneHotCategoricalST(probs=(4 * a).float().softmax(-1).to(a.dtype)),
    "GumbelSoftmaxST": lambda a, b: GumbelSoftmaxST(0.5, logits=a),
    "BernoulliST": lambda a, b: BernoulliST(logits=a),
    "BernoulliST, probs": lambda a, b: BernoulliST(probs=(4 * a).float().sigmoid().to(a.dtype)),
    "SparseCategorical": lambda a, b: SparseCategorical(a),
    "SparseOneHotCategorical": lambda a, b: SparseOneHotCategorical(a),
}


def half(name: str, dtype: torch.dtype) -> Any:
    a = torch.tensor([0.5, -1.0, 2.0], dtype=dtype, requires_grad=True)
    b = torch.tensor([1.0, -0.5, 0.25], dtype=dtype, requires_grad=True)
    return FAMILIES[name](a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_families_pass_in_bfloat16(name: str) -> None:
    check_distribution(half(name, torch.bfloat16), draws=300 if "Gaussian" in name else 3_000)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FAMILIES)
def test_all_families_pass_in_half_precision(name: str, dtype: torch.dtype) -> None:
    check_distribution(half(name, dtype), draws=20_000 if "Gaussian" in name else 250_000)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_stock_part_in_half_precision_is_refused(dtype: torch.dtype) -> None:
    loc = torch.zeros(2, dtype=dtype)
    for make in (
        lambda: SpikeAndSlab(dist.Normal(loc, loc + 1), logits=loc),
        lambda: ZeroOneInflated(dist.Beta(loc + 1, loc + 1), torch.zeros(2, 3)),
        lambda: StretchedRectified(dist.Normal(loc, loc + 1), -0.1, 1.1),
    ):
        with pytest.raises(
            TypeError, match=r"(slab|base): expected parameters in float32 or float64, got .*\.float\(\)"
        ):
            make()


def test_strata_in_half_precision_with_a_slab_in_float32_are_computed_in_float32() -> None:
    logits = torch.tensor([1.3, -2.1], dtype=torch.bfloat16)
    slab = dist.Normal(torch.zeros(2, dtype=torch.float32), 1.0)
    d, wide = SpikeAndSlab(slab, logits=logits), SpikeAndSlab(slab, logits=logits.float())
    assert d.sample().dtype == torch.float32
    torch.testing.assert_close(d.prob_zero, wide.prob_zero)
    torch.testing.assert_close(d.entropy(), wide.entropy())


# Negative controls.


class DrawnInHalf(HardConcrete):
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        with torch.no_grad():
            info, shape = torch.finfo(self.logits.dtype), self._extended_shape(sample_shape)
            u = torch.rand(shape, dtype=self.logits.dtype).clamp(info.tiny, 1 - info.eps)
            y = (torch.logit(u) + self.logits) / self.temperature
            return (self.low + (self.high - self.low) * y.sigmoid()).clamp(0.0, 1.0)

    sample.in_float32 = True  # type: ignore[attr-defined]  # it is not wrapped


class RoundedToTheAtoms(HardConcrete):
    def _rounded(self, draw: Tensor, dtype: torch.dtype) -> Tensor:
        return draw.to(dtype)


class StockSlab(ZeroOneInflated):
    """The slab is evaluated by the stock chain of transforms."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__(dist.Kumaraswamy(a, b), a.new_zeros(3))
        self.slab = dist.Kumaraswamy(a, b)


class ReadAsAnAtom(SpikeAndSlab):
    """Draws of the slab that are rounded to zero stay there, and the density beside them is that of the slab."""

    def _off_atoms(self, z: Tensor, inside: Tensor | None = None) -> Tensor:
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        return self._log_density(value)


def test_a_draw_in_half_precision_is_caught() -> None:
    logits = torch.tensor(8.0, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"law of 200000 draws in half precision"):
        check_distribution(DrawnInHalf(2 / 3, logits), draws=200_000)
    check_distribution(HardConcrete(2 / 3, logits), draws=200_000)


def test_draws_that_are_rounded_to_an_atom_are_caught() -> None:
    logits = torch.tensor(0.0, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"law of 100000 draws in half precision"):
        check_distribution(RoundedToTheAtoms(0.2, logits, -0.002, 1.002), draws=100_000)
    check_distribution(HardConcrete(0.2, logits, -0.002, 1.002), draws=100_000)


def test_a_density_that_is_nan_at_its_own_draws_is_caught() -> None:
    a, b = (torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in (0.5, 0.1))
    with pytest.raises(AssertionError, match="log_prob of 10000 own draws: expected finite values"):
        own_draws(StockSlab(a, b), 10_000)
    own_draws(ZeroOneInflated(dist.Kumaraswamy(a, b), torch.zeros(3, dtype=torch.float32)), 10_000)


def test_draws_of_a_slab_that_are_rounded_to_its_atom_are_caught() -> None:
    concentration = torch.tensor(0.06, dtype=torch.float32, requires_grad=True)
    slab, logits = (
        dist.Weibull(torch.ones((), dtype=torch.float32), concentration, validate_args=False),
        torch.zeros((), dtype=torch.float32),
    )
    with pytest.raises(AssertionError, match=r"log_prob of 10000 own draws"):
        own_draws(ReadAsAnAtom(slab, logits=logits), 10_000)
    own_draws(SpikeAndSlab(slab, logits=logits), 10_000)
