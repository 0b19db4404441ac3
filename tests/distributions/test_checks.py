"""What all families make of parameters that are integers or of another dtype, and of values that are NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_sparse._relaxation import JACOBIANS, draw_with_stand_in
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
    MixedSimplex,
    OneHotCategoricalST,
    RectifiedNormal,
    SparseCategorical,
    SparseOneHotCategorical,
    SpikeAndExponential,
    SpikeAndSlab,
    StretchedRectified,
    ZeroOneInflated,
)
from pyro_sparse.testing.properties import leaves as all_leaves
from tests.distributions.simplex.simplex_zoo import KINDS, make, random_parameters
from tests.distributions.univariate.mixed_zoo import MILD, leaves

F32, F64 = torch.float32, torch.float64
normal, ints = dist.Normal(0.0, 1.0), torch.tensor([1, 2])
rows = torch.tensor([[1, 1, 1]])

INTEGERS: list[Callable[[], Any]] = [
    lambda: HardConcrete(1, ints),
    lambda: HardConcrete(ints, 1.0),
    lambda: HardConcrete(0.5, 0.0, low=-ints),
    lambda: HardKumaraswamy(ints, 1.0),
    lambda: HardKumaraswamy(1.0, ints),
    lambda: RectifiedNormal(ints, 1.0),
    lambda: RectifiedNormal(0.0, ints),
    lambda: StretchedRectified(normal, -ints, 2.0),
    lambda: StretchedRectified(normal, -1.0, ints + 1),
    lambda: SpikeAndSlab(normal, logits=ints),
    lambda: SpikeAndSlab(normal, probs=torch.tensor(True)),
    lambda: SpikeAndExponential(ints, probs=0.5),
    lambda: SpikeAndExponential(1.0, logits=ints),
    lambda: ZeroOneInflated(dist.Beta(1.0, 1.0), rows),
    lambda: ZeroOneInflated(dist.Beta(1.0, 1.0), probs=torch.tensor([0, 0, 1])),
    lambda: MixedDirichlet(rows, torch.ones(3)),
    lambda: FaceDirichlet(rows),
    lambda: FaceLogisticNormal(torch.zeros(3), rows),
    lambda: GibbsFaces(rows),
    lambda: MaxEntropyFaces(3, ints),
    lambda: GaussianSparsemax(rows, 1.0),
    lambda: GaussianSparsemax(torch.zeros(3), rows),
    lambda: HardConcreteSimplex(ints, torch.zeros(2, 2), 1.2),
    lambda: SparseCategorical(rows),
    lambda: SparseOneHotCategorical(probs=torch.tensor([1, 0])),
    lambda: BernoulliST(logits=ints),
    lambda: BernoulliST(probs=torch.tensor([1, 0])),
    lambda: OneHotCategoricalST(logits=rows),
    lambda: GumbelSoftmaxST(torch.tensor(1), logits=torch.zeros(3)),
    lambda: dist.TransformedDistribution(HardConcrete(0.5, 0.0), [dist.transforms.AffineTransform(ints, 2.0)]),
]


@pytest.mark.parametrize("build", INTEGERS)
@pytest.mark.parametrize("validate", [True, False])
def test_tensors_of_integers_are_refused(build: Callable[[], Any], validate: bool) -> None:
    """One error for all families, with validation and without: a type is no value."""
    torch.distributions.Distribution.set_default_validate_args(validate)
    try:
        with pytest.raises(TypeError, match=r"^\w+\.\w+: expected a floating-point tensor, got torch\.\w+\. \w+.*\.$"):
            build()
    finally:
        torch.distributions.Distribution.set_default_validate_args(True)


def test_numbers_become_floating_point() -> None:
    torch.testing.assert_close(
        HardConcrete(1, torch.tensor([0.0, 1.0])).icdf(torch.tensor(0.3)),
        HardConcrete(1.0, torch.tensor([0.0, 1.0])).icdf(torch.tensor(0.3)),
    )
    for d in (HardConcrete(1, 0), RectifiedNormal(0, 1), SpikeAndExponential(2, probs=1), HardKumaraswamy(1, 2)):
        assert d.mean.dtype == d.sample().dtype == torch.get_default_dtype()


def wide(x: float) -> Tensor:
    return torch.tensor(x, dtype=F64)


zeros, halves = torch.zeros(3, dtype=F32), torch.full((3,), 0.5, dtype=F32)
narrow_normal = dist.Normal(zeros, torch.ones(3, dtype=F32))
table = torch.zeros(2, 3, dtype=F32)
#: the main parameter in float32, one beside it in float64
MIXED: dict[str, Callable[[], Any]] = {
    "HardConcrete": lambda: HardConcrete(wide(0.5), zeros),
    "HardConcrete of scalars": lambda: HardConcrete(wide(0.5), zeros[0]),
    "HardConcrete, low and high": lambda: HardConcrete(0.5, zeros[0], wide(-0.2), wide(1.3)),
    "HardKumaraswamy": lambda: HardKumaraswamy(halves, wide(2.0)),
    "HardKumaraswamy, low": lambda: HardKumaraswamy(halves[0], 2.0, wide(-0.2)),
    "RectifiedNormal": lambda: RectifiedNormal(zeros, wide(0.5)),
    "StretchedRectified": lambda: StretchedRectified(narrow_normal, wide(-0.2), wide(1.3)),
    "SpikeAndSlab": lambda: SpikeAndSlab(narrow_normal, probs=wide(0.3)),
    "SpikeAndSlab of a number": lambda: SpikeAndSlab(narrow_normal, probs=0.3),
    "SpikeAndExponential": lambda: SpikeAndExponential(zeros, probs=wide(0.3)),
    "SpikeAndExponential of a rate that is a number": lambda: SpikeAndExponential(1.0, probs=halves),
    "ZeroOneInflated": lambda: ZeroOneInflated(dist.Uniform(zeros, halves + 0.5), table[0].double()),
    "affine": lambda: dist.TransformedDistribution(
        HardConcrete(0.5, zeros), [dist.transforms.AffineTransform(wide(1.0), wide(2.0))]
    ),
    "FaceLogisticNormal": lambda: FaceLogisticNormal(zeros, wide(0.5)),
    "MixedLogisticNormal": lambda: MixedLogisticNormal(zeros, zeros, wide(0.5)),
    "MixedSimplex": lambda: MixedSimplex(MaxEntropyFaces(3, wide(1.0)), FaceDirichlet(halves)),
    "GaussianSparsemax": lambda: GaussianSparsemax(zeros, wide(0.5)),
    "HardConcreteSimplex": lambda: HardConcreteSimplex(wide(0.5), zeros[:2], wide(1.2)),
    "GumbelSoftmaxST": lambda: GumbelSoftmaxST(wide(0.5), logits=zeros),
    "OneHotCategoricalST": lambda: OneHotCategoricalST(logits=zeros, jacobian="reinmax", temperature=wide(0.5)),
    "BernoulliST": lambda: BernoulliST(logits=zeros, jacobian="gumbel-rao", temperature=wide(0.5)),
}


@pytest.mark.parametrize("name", MIXED)
def test_draws_follow_the_main_parameter(name: str) -> None:
    d = MIXED[name]()
    shape = (2, *d.batch_shape)
    for e in (d, d.expand(shape), d.expand(shape).to_event(1), d.mask(torch.tensor(True))):
        value = e.sample()
        results = {"sample": value, "d()": e(), "log_prob": e.log_prob(value)}
        for fact in ("mean", "variance", "entropy"):
            try:
                result = getattr(e, fact)
                results[fact] = result() if callable(result) else result
            except NotImplementedError:
                continue
        assert {k: x.dtype for k, x in results.items()} == dict.fromkeys(results, F32)


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_stand_ins_follow_the_logits(jacobian: Any) -> None:
    for draw in draw_with_stand_in(zeros.clone().requires_grad_(), jacobian, wide(0.5).requires_grad_(), 3):
        assert draw.dtype == F32


@pytest.mark.parametrize("name", MILD)
def test_nan_in_nan_out_of_univariate_families(name: str) -> None:
    d = MILD[name][0](*leaves(name))
    for part in (d, getattr(d, "slab", None), getattr(d, "base_dist", None)):
        if part is not None:
            part._validate_args = False
    values = torch.tensor([[math.nan], [0.3], [-0.5], [0.0]])
    facts = {"log_prob": d.log_prob(values), "score_parts": d.score_parts(values).log_prob}
    if name != "ZeroOneInflated":  # a Beta slab has no cdf
        facts["cdf"] = d.cdf(values)
        facts["icdf"] = d.icdf(values.clamp(0.0, 1.0))
    for fact in facts.values():
        assert fact[0].isnan().all() and not fact[1:].isnan().any()
    # Nothing of it reaches the parameters.
    for gradient in torch.autograd.grad(facts["log_prob"][:2].nan_to_num().sum(), list(all_leaves(facts["log_prob"]))):
        assert gradient.isfinite().all()


SIMPLEX: dict[str, Callable[[], Any]] = {
    **{kind: lambda kind=kind: make(kind, random_parameters(3)) for kind in KINDS},  # type: ignore[misc]
    "GaussianSparsemax": lambda: GaussianSparsemax(torch.zeros(3, 3), 0.5),
    "HardConcreteSimplex": lambda: HardConcreteSimplex(0.5, torch.zeros(3, 2), 1.2),
    "FaceDirichlet": lambda: FaceDirichlet(torch.ones(3, 3)),
    "FaceDirichlet on a face": lambda: FaceDirichlet(torch.ones(3, 3), torch.tensor([1.0, 1.0, 0.0])),
    "FaceLogisticNormal": lambda: FaceLogisticNormal(torch.zeros(3, 3), 1.0),
    "GibbsFaces": lambda: GibbsFaces(torch.zeros(3, 3)),
    "MaxEntropyFaces": lambda: MaxEntropyFaces(3, torch.zeros(3)),
    "SparseOneHotCategorical": lambda: SparseOneHotCategorical(torch.zeros(3, 3)),
    "OneHotCategoricalST": lambda: OneHotCategoricalST(logits=torch.zeros(3, 3)),
    "SparseCategorical": lambda: SparseCategorical(torch.zeros(3, 3)),
    "BernoulliST": lambda: BernoulliST(logits=torch.zeros(3)),
}


@pytest.mark.parametrize("name", SIMPLEX)
def test_nan_in_nan_out_of_vectors(name: str) -> None:
    d = SIMPLEX[name]()
    good = d.sample((2,)).double()
    d._validate_args = False
    for last in ([..., 0], [..., slice(None)]):  # one coordinate, or all
        value = good.clone()
        value[(0, *(last if d.event_shape else [...]))] = math.nan
        log_prob = d.log_prob(value)
        assert log_prob[0].isnan().all()
        torch.testing.assert_close(log_prob[1], d.log_prob(good)[1])


def test_what_is_no_face_has_no_probability() -> None:
    for d in (GibbsFaces(torch.zeros(3), validate_args=False), MaxEntropyFaces(3, 0.0, validate_args=False)):
        assert d.log_prob(torch.tensor([[0.0, 0.0, 0.0], [0.5, 1.0, 0.0]])).tolist() == [-math.inf, -math.inf]
