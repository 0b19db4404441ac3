"""What SparseCategorical and SparseOneHotCategorical refuse, and what they say."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from pyro_sparse.distributions import SparseCategorical, SparseOneHotCategorical
from pyro_sparse.distributions.discrete.projected import ProjectedDistribution
from pyro_sparse.projections import entmax15, sparsemax, topk_sparsemax

INF, NAN = math.inf, math.nan

each_family = pytest.mark.parametrize("family", [SparseCategorical, SparseOneHotCategorical])


@each_family
@pytest.mark.parametrize(
    "kwargs, expected, got",
    [
        ({}, "scores, probs or logits", "none"),
        ({"scores": torch.zeros(3), "probs": torch.ones(1)}, "scores, probs or logits", "scores and probs"),
        ({"scores": torch.zeros(3, dtype=torch.long)}, "floating-point", "torch.int64"),
        ({"probs": torch.ones(1, dtype=torch.long)}, "floating-point", "torch.int64"),
        ({"scores": [1.0, 2.0]}, "floating-point", "list"),
        ({"scores": torch.zeros(2, 0)}, "K >= 1", r"\(2, 0\)"),
        ({"scores": torch.tensor(1.0)}, "K >= 1", r"\(\)"),
        ({"scores": torch.tensor([[0.0, 1.0], [0.0, NAN]])}, "finite scores or -inf", "NaN"),
        ({"scores": torch.tensor([[0.0, 1.0], [0.0, INF]])}, "finite scores or -inf", r"\+inf"),
        ({"scores": torch.tensor([[0.0, 1.0], [-INF, -INF]])}, "above -inf in every row", "-inf only"),
        ({"scores": torch.tensor([-INF, -INF])}, "above -inf in every row", "-inf only"),
        ({"scores": torch.tensor([NAN, 0.0])}, "finite scores or -inf", "NaN"),
        ({"probs": torch.tensor([0.5, 0.6])}, "sum to one", "sum off by up to 0.1"),
        ({"probs": torch.tensor([-0.5, 1.5])}, "non-negative", "minimum -0.5"),
        ({"probs": torch.tensor([NAN, 1.0])}, "non-negative", "nan"),
        ({"scores": torch.zeros(2, 3), "projection": lambda s: s.sum(-1)}, r"shape \(2, 3\)", r"\(2,\)"),
        ({"scores": torch.zeros(2, 3), "projection": lambda s: s + 1.0}, "sum to one", "sum off by up to 2"),
        (
            {"scores": torch.zeros(2), "projection": lambda s: s + torch.tensor([2.0, -1.0])},
            "non-negative",
            "minimum -1",
        ),
    ],
)
def test_bad_parameters(family: Any, kwargs: dict[str, Any], expected: str, got: str) -> None:
    """Each message names the object, what was expected, what was got, and ends with a sentence on how to mend it."""
    with pytest.raises(
        (TypeError, ValueError), match=rf"^Sparse\w+(\.\w+)?: expected .*{expected}.*got .*{got}.*\. [A-Z].*\.$"
    ):
        family(**kwargs)


@pytest.mark.parametrize("value", [-1, 5, 1.5, NAN])
def test_values_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"(?s)within the support .*SparseCategorical\(scores: \(3, 5\)"):
        SparseCategorical(torch.randn(3, 5)).log_prob(torch.tensor(value))


@pytest.mark.parametrize("value", [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
def test_values_that_are_not_one_hot(value: list[float]) -> None:
    with pytest.raises(ValueError, match=r"(?s)within the support .*SparseOneHotCategorical\(scores: \(4, 3\)"):
        SparseOneHotCategorical(torch.randn(4, 3)).log_prob(torch.tensor(value))


@each_family
def test_values_of_a_wrong_shape(family: Any) -> None:
    with pytest.raises(ValueError, match=r"broadcastable with batch_shape"):
        family(torch.randn(3, 5)).log_prob(family(torch.randn(2, 5)).mode)


@each_family
def test_validation_can_be_switched_off(family: Any) -> None:
    p = torch.tensor([0.5, 0.6])
    assert torch.equal(family(probs=p, validate_args=False).probs, p)
    with pytest.raises(ValueError):
        family(probs=p, validate_args=True)


@pytest.fixture
def not_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProjectedDistribution, "_has_warned", False)


@each_family
@pytest.mark.usefixtures("not_warned_yet")
@pytest.mark.parametrize("projection", [sparsemax, entmax15])
def test_probabilities_in_place_of_scores_are_warned_of_once(family: Any, projection: Any) -> None:
    p = torch.randn(4, 5).softmax(-1)
    with pytest.warns(
        UserWarning, match=rf"^{family.__name__}.scores: expected unnormalised scores, .* pass probs=\.$"
    ):
        family(p, projection)
    family(p, projection)  # warnings are errors


@each_family
@pytest.mark.usefixtures("not_warned_yet")
def test_scores_that_may_be_meant_are_not_warned_of(family: Any) -> None:
    p = torch.randn(4, 5).softmax(-1)
    family(p, validate_args=False)
    family(probs=p)
    family(logits=p)
    family(torch.cat([p, torch.randn(1, 5)]))  # not all rows
    family(torch.tensor([0.5, 0.5, 0.0]))  # a zero is made
    family(p, functools.partial(topk_sparsemax, k=2))
    family(torch.ones(3, 1))
    family(torch.ones(0, 3))
