"""What the mixed families refuse, and what they say: the object, what was expected, what was got, how to mend it."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sparse.distributions import (
    HardConcrete,
    HardKumaraswamy,
    Rectified,
    RectifiedNormal,
    SpikeAndExponential,
    SpikeAndSlab,
    StretchedRectified,
    ZeroOneInflated,
)

NAN, INF = math.nan, math.inf
NORMAL, UNIFORM = dist.Normal(0.0, 1.0), dist.Uniform(0.0, 1.0)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    "family, args, kwargs, expected, got",
    [
        (HardConcrete, (0.0, 1.0), {}, "temperature: expected a positive number", "0.0"),
        (HardConcrete, (tensor(1.0, -0.5), 1.0), {}, "temperature: expected a positive number", "-0.5"),
        (HardConcrete, (NAN, 1.0), {}, "temperature: expected a positive number", "nan"),
        (HardConcrete, (INF, 1.0), {}, "temperature: expected a positive number", "inf"),
        (HardConcrete, (0.5, tensor(0.0, NAN)), {}, "logits: expected a finite number", "nan"),
        (HardConcrete, (0.5, INF), {}, "logits: expected a finite number", "inf"),
        (HardConcrete, (0.5, 0.0), {"low": 0.0}, "low: expected a number below 0", "0.0"),
        (HardConcrete, (0.5, 0.0), {"low": tensor(-0.1, 0.1)}, "low: expected a number below 0", "0.1"),
        (HardConcrete, (0.5, 0.0), {"low": NAN}, "low: expected a number below 0", "nan"),
        (HardConcrete, (0.5, 0.0), {"high": 1.0}, "high: expected a number above 1", "1.0"),
        (HardConcrete, (0.5, 0.0), {"high": tensor(NAN)}, "high: expected a number above 1", "nan"),
        (HardConcrete, (0.5, 0.0), {"low": -INF}, "low: expected a (finite )?number", "-inf"),
        (HardConcrete, (0.5, 0.0), {"high": INF}, "high: expected a (finite )?number", "inf"),
        (HardConcrete, (0.5, 0.0), {"nodes": 0}, "nodes: expected", "0"),
        (HardKumaraswamy, (0.0, 1.0), {}, "concentration1: expected a positive number", "0.0"),
        (HardKumaraswamy, (1.0, tensor(1.0, NAN)), {}, "concentration0: expected a positive number", "nan"),
        (HardKumaraswamy, (1.0, INF), {}, "concentration0: expected a positive number", "inf"),
        (HardKumaraswamy, (1.0, 1.0), {"low": 0.5}, "low: expected a number below 0", "0.5"),
        (HardKumaraswamy, (1.0, 1.0), {"high": 0.5}, "high: expected a number above 1", "0.5"),
        (RectifiedNormal, (0.0, 0.0), {}, "scale: expected a positive number", "0.0"),
        (RectifiedNormal, (0.0, tensor(1.0, -1.0)), {}, "scale: expected a positive number", "-1.0"),
        (RectifiedNormal, (NAN, 1.0), {}, "loc: expected a finite number", "nan"),
        (StretchedRectified, (NORMAL, 0.0, 1.1), {}, "low: expected a number below 0", "0.0"),
        (StretchedRectified, (NORMAL, -0.1, 1.0), {}, "high: expected a number above 1", "1.0"),
        (StretchedRectified, (dist.Beta(1.0, 1.0), -0.1, 1.1), {}, "base: expected a distribution with a cdf", "Beta"),
        (Rectified, (dist.StudentT(3.0),), {}, "base: expected a distribution with a cdf", "StudentT"),
        (Rectified, (dist.Poisson(3.0),), {}, "base: expected a continuous distribution", "Poisson"),
        (Rectified, (NORMAL.expand([2]).to_event(1),), {}, "base: expected a univariate distribution", r".*\(2,\)"),
        (Rectified, (HardConcrete(0.5, 0.0),), {}, "base: expected a continuous distribution", "HardConcrete"),
        (SpikeAndSlab, (NORMAL,), {}, "expected either logits or probs", "neither"),
        (SpikeAndSlab, (NORMAL,), {"logits": 0.0, "probs": 0.5}, "expected either logits or probs", "both"),
        (SpikeAndSlab, (NORMAL,), {"probs": 1.5}, r"probs: expected a number in \[0, 1\]", "1.5"),
        (SpikeAndSlab, (NORMAL,), {"probs": tensor(0.5, NAN)}, r"probs: expected a number in \[0, 1\]", "nan"),
        (SpikeAndSlab, (NORMAL,), {"logits": NAN}, "logits: expected a finite number", "nan"),
        (SpikeAndSlab, (dist.Bernoulli(0.5),), {"probs": 0.5}, "slab: expected a continuous distribution", "Bernoulli"),
        (SpikeAndSlab, (dist.Dirichlet(tensor(1, 1.0)),), {"probs": 0.5}, "slab: expected a univariate", "Dirichlet"),
        (SpikeAndSlab, (HardConcrete(0.5, 0.0),), {"probs": 0.5}, "slab: expected a continuous", "HardConcrete"),
        (SpikeAndExponential, (1.0,), {}, "expected either logits or probs", "neither"),
        (SpikeAndExponential, (1.0,), {"logits": 0.0, "probs": 0.5}, "expected either logits or probs", "both"),
        (SpikeAndExponential, (NAN,), {"probs": 0.5}, "rate: expected a finite number", "nan"),
        (SpikeAndExponential, (tensor(1.0, INF),), {"probs": 0.5}, "rate: expected a finite number", "inf"),
        (ZeroOneInflated, (UNIFORM,), {}, "expected either logits or probs", "neither"),
        (ZeroOneInflated, (UNIFORM, tensor(0, 0, 0.0)), {"probs": tensor(0, 0, 1.0)}, "expected either", "both"),
        (ZeroOneInflated, (UNIFORM, tensor(0.0, 0.0)), {}, "expected 3 in the last dim", r"shape \(2,\)"),
        (ZeroOneInflated, (UNIFORM, torch.tensor(0.0)), {}, "expected 3 in the last dim", r"shape \(\)"),
        (ZeroOneInflated, (UNIFORM, tensor(0.0, NAN, 0.0)), {}, "logits: expected numbers or -inf", "nan"),
        (ZeroOneInflated, (UNIFORM, tensor(0.0, INF, 0.0)), {}, "logits: expected numbers or -inf", "inf"),
        (ZeroOneInflated, (UNIFORM, tensor(-INF, -INF, -INF)), {}, "logits: expected a finite logit", "-inf"),
        (ZeroOneInflated, (UNIFORM,), {"probs": tensor(0.5, 0.2, 0.2)}, "probs: expected .*sum to one", "0.5"),
        (ZeroOneInflated, (UNIFORM,), {"probs": tensor(1.5, -0.5, 0.0)}, "probs: expected non-negative", "-0.5"),
        (ZeroOneInflated, (NORMAL, tensor(0.0, 0.0, 0.0)), {}, r"slab: expected a distribution on \[0, 1\]", "support"),
        (ZeroOneInflated, (dist.Gamma(1.0, 1.0), tensor(0.0, 0.0, 0.0)), {}, r"slab: .* on \[0, 1\]", "support"),
        (ZeroOneInflated, (HardConcrete(0.5, 0.0), tensor(0, 0, 0.0)), {}, "slab: expected a continuous", "HardC"),
    ],
)
def test_parameters(family: Any, args: Any, kwargs: Any, expected: str, got: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^{family.__name__}[.:].*{expected}.*, got {got}.*\. [A-Z].*\.$"):
        family(*args, **kwargs)


@pytest.mark.parametrize("slab", [torch.distributions.Normal(0.0, 1.0), 1.0, dist.Normal])
def test_a_slab_that_is_no_pyro_distribution(slab: Any) -> None:
    for make in (
        lambda: SpikeAndSlab(slab, probs=0.5),
        lambda: Rectified(slab),
        lambda: ZeroOneInflated(slab, tensor(0, 0, 0.0)),
    ):
        with pytest.raises(
            TypeError, match=r"^\w+\.(slab|base): expected a Pyro distribution, got \w+\. Build \w+.*\.$"
        ):
            make()


EACH = {
    "HardConcrete": lambda: HardConcrete(0.5, torch.zeros(2)),
    "HardKumaraswamy": lambda: HardKumaraswamy(0.5, torch.ones(2)),
    "RectifiedNormal": lambda: RectifiedNormal(0.5, torch.ones(2)),
    "StretchedRectified": lambda: StretchedRectified(dist.Normal(torch.zeros(2), 1.0), -0.1, 1.1),
    "Rectified": lambda: Rectified(dist.Normal(torch.zeros(2), 1.0)),
    "SpikeAndSlab": lambda: SpikeAndSlab(dist.Exponential(torch.ones(2)), probs=0.5),
    "SpikeAndExponential": lambda: SpikeAndExponential(torch.ones(2), probs=0.5),
    "ZeroOneInflated": lambda: ZeroOneInflated(dist.Uniform(torch.zeros(2), 1.0), torch.zeros(3)),
}
each = pytest.mark.parametrize("make", EACH.values(), ids=EACH)


@each
@pytest.mark.parametrize("value", [-0.1, 1.1, NAN])
def test_values_outside_the_support(make: Any, value: float) -> None:
    d = make()
    if value > 1 and type(d) is SpikeAndSlab:
        value = -1.0
    for method in (d.log_prob, d.score_parts):
        with pytest.raises(ValueError, match=rf"(?s)within the support .*{type(d).__name__}"):
            method(torch.tensor(value))


@each
def test_values_of_a_wrong_dtype(make: Any) -> None:
    d = make()
    for value in (torch.tensor([0, 1]), torch.tensor([True, False])):
        for method in (d.log_prob, d.score_parts):
            message = rf"^{type(d).__name__}.log_prob: expected a floating-point value, got torch\.\w+\. Convert .*\.$"
            with pytest.raises(ValueError, match=message):
                method(value)


@each
def test_values_of_a_wrong_shape(make: Any) -> None:
    with pytest.raises(ValueError, match="broadcastable"):
        make().log_prob(torch.zeros(3))


@each
@pytest.mark.parametrize("u", [-0.1, 1.1, NAN])
def test_probabilities_outside_the_unit_interval(make: Any, u: float) -> None:
    d = make()
    with pytest.raises(ValueError, match=rf"^{type(d).__name__}\.icdf: expected .*, got .*\. [A-Z].*\.$"):
        d.icdf(torch.tensor(u))


@each
def test_shapes_that_do_not_expand(make: Any) -> None:
    d = make()
    for shape in ((3,), (2, 3), ()):
        with pytest.raises(ValueError, match=rf"^{type(d).__name__}\.expand: expected .*\(2,\).*got .*\. [A-Z].*\.$"):
            d.expand(shape)


@each
def test_kinds_of_point_estimates(make: Any) -> None:
    d = make()
    for kind in ("max", "l0", None):
        if isinstance(d, HardConcrete) and kind == "l0":
            continue
        with pytest.raises(
            ValueError, match=rf"^{type(d).__name__}.point_estimate: expected 'mean', .*got {kind!r}\. "
        ):
            d.point_estimate(kind)


@each
def test_has_rsample_takes_a_bool(make: Any) -> None:
    d = make()
    for value in (1, None, "yes"):
        with pytest.raises(
            ValueError, match=rf"^{type(d).__name__}.has_rsample_: expected True or False, got {value!r}"
        ):
            d.has_rsample_(value)


@each
def test_too_many_event_dims(make: Any) -> None:
    for d in (make(), make().mask(True)):
        with pytest.raises(ValueError, match=r"Expected reinterpreted_batch_ndims <= len"):
            d.to_event(2)
        with pytest.raises(ValueError, match=r"to_event: expected as many event dims .* got -1 after removal\. \w+"):
            d.to_event(1).to_event(-2)


def test_a_pathwise_draw_needs_a_slab_that_reaches_zero() -> None:
    d = SpikeAndSlab(dist.Uniform(1.0, 2.0), probs=0.5)
    d()
    for method in (d.rsample, lambda: d.has_rsample_(True)):
        with pytest.raises(ValueError, match=r"^SpikeAndSlab.rsample: expected a slab that reaches zero, got .*\. \w+"):
            method()


def test_validation_can_be_switched_off() -> None:
    for make in (
        lambda flag: HardConcrete(-1.0, NAN, validate_args=flag),
        lambda flag: HardKumaraswamy(-1.0, NAN, validate_args=flag),
        lambda flag: RectifiedNormal(NAN, -1.0, validate_args=flag),
        lambda flag: SpikeAndSlab(NORMAL, probs=2.0, validate_args=flag),
        lambda flag: SpikeAndExponential(NAN, probs=0.5, validate_args=flag),
        lambda flag: ZeroOneInflated(NORMAL, tensor(0.0, 0.0, 0.0), validate_args=flag),
    ):
        make(False)
        with pytest.raises(ValueError):
            make(True)
        with pyro.validation_enabled(False):
            make(None)
