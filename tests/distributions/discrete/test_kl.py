"""KL divergences of the sparse families, to and from the stock ones and each other, against sums over all outcomes."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sparse.distributions import SparseCategorical, SparseOneHotCategorical
from pyro_sparse.distributions.discrete.kl import kl_categorical
from pyro_sparse.projections import entmax15, sparsemax

K = 6
INF = math.inf


def sparse(one_hot: bool, projection: Any, scores: Tensor) -> Any:
    return (SparseOneHotCategorical if one_hot else SparseCategorical)(scores, projection)


def stock(one_hot: bool, scores: Tensor) -> Any:
    return (dist.OneHotCategorical if one_hot else dist.Categorical)(logits=scores)


def from_probs(one_hot: bool, scores: Tensor) -> Any:
    """A stock distribution that was made from probabilities with exact zeros."""
    return (dist.OneHotCategorical if one_hot else dist.Categorical)(probs=sparsemax(scores))


def brute_force(p: Any, q: Any) -> Tensor:
    """The sum over all outcomes, one at a time, of those with p > 0."""
    total = torch.zeros(torch.broadcast_shapes(p.batch_shape, q.batch_shape))
    for k in range(K):
        pk, qk = p.probs[..., k], q.probs[..., k]
        term = torch.where(pk > 0, pk, 1.0) * (torch.where(pk > 0, pk, 1.0) / torch.where(pk > 0, qk, 1.0)).log()
        total = total + torch.where(pk > 0, term, 0.0)
    return total


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


@pytest.mark.parametrize("one_hot", [False, True], ids=["categorical", "one-hot"])
@pytest.mark.parametrize("projection", [sparsemax, entmax15], ids=lambda f: f.__name__)
@pytest.mark.parametrize("pair", ["sparse, stock", "stock, sparse", "sparse, sparse", "sparse, wide", "wide, sparse"])
def test_value_and_gradient(one_hot: bool, projection: Any, pair: str) -> None:
    # "wide" scores are close together and so have a full support: no divergence to them is inf.
    make = {
        "sparse": lambda s: sparse(one_hot, projection, 2 * s),
        "wide": lambda s: sparse(one_hot, projection, 0.05 * s),
        "stock": lambda s: stock(one_hot, s),
    }
    first, second = pair.split(", ")
    s, t = leaf(4, 1, K), leaf(3, K)
    got = kl_divergence(make[first](s), make[second](t))
    expected = brute_force(make[first](s), make[second](t))
    assert got.shape == (4, 3)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert (got >= 0).all()
    assert got.isfinite().all() == (second != "sparse")
    # Zero weight for what is inf, as a mask would give: the gradients of the others have to come through unharmed.
    ours = torch.autograd.grad(got, (s, t), got.isfinite().double())
    theirs = [torch.zeros_like(s), torch.zeros_like(t)]
    for i, j in got.isfinite().nonzero():
        alone = brute_force(make[first](s[i, 0]), make[second](t[j]))
        theirs = [a + b for a, b in zip(theirs, torch.autograd.grad(alone, (s, t)), strict=True)]
    torch.testing.assert_close(list(ours), theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("one_hot", [False, True], ids=["categorical", "one-hot"])
def test_inf_exactly_where_the_second_lacks_an_outcome(one_hot: bool) -> None:
    p = sparse(one_hot, sparsemax, torch.tensor([[1.0, 1.0, -9.0], [1.0, -9.0, -9.0], [1.0, 0.5, 1.0]]))
    q = sparse(one_hot, sparsemax, torch.tensor([1.0, 0.5, -9.0]))
    log_ratio = math.log(0.5 / 0.75), math.log(0.5 / 0.25), math.log(1 / 0.75)
    expected = torch.tensor([0.5 * log_ratio[0] + 0.5 * log_ratio[1], log_ratio[2], INF])
    torch.testing.assert_close(kl_divergence(p, q), expected)


@pytest.mark.parametrize("one_hot", [False, True], ids=["categorical", "one-hot"])
def test_zeros_of_a_stock_distribution(one_hot: bool) -> None:
    """Torch clamps the logits of an exact zero that it was given, but its probabilities still tell."""
    s = torch.tensor([1.0, 0.5, -9.0])
    narrow, wide = sparse(one_hot, sparsemax, s), sparse(one_hot, sparsemax, torch.zeros(3))
    torch.testing.assert_close(kl_divergence(narrow, from_probs(one_hot, s)), torch.tensor(0.0))
    torch.testing.assert_close(kl_divergence(from_probs(one_hot, s), narrow), torch.tensor(0.0))
    assert kl_divergence(wide, from_probs(one_hot, s)) == INF
    assert kl_divergence(wide, stock(one_hot, torch.tensor([1.0, 0.5, -INF]))) == INF
    assert kl_divergence(from_probs(one_hot, s), wide).isfinite()


def test_a_logit_that_only_underflows_is_not_a_zero() -> None:
    q = dist.Categorical(logits=torch.tensor([0.0, -1000.0]))
    assert q.probs[1] == 0
    p = SparseCategorical(torch.zeros(2))
    expected = 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 1000.0)
    torch.testing.assert_close(kl_divergence(p, q), torch.tensor(expected))


@pytest.mark.parametrize("one_hot", [False, True], ids=["categorical", "one-hot"])
def test_a_distribution_and_itself(one_hot: bool) -> None:
    s = (3 * torch.randn(20, K)).requires_grad_()
    p = sparse(one_hot, entmax15, s)
    assert (p.support_size < K).any()
    kl = kl_divergence(p, p.expand((2, 20)))
    assert kl.shape == (2, 20)
    assert (kl == 0).all()
    assert torch.autograd.grad(kl.sum(), s)[0].isfinite().all()


@pytest.mark.parametrize("one_hot", [False, True], ids=["categorical", "one-hot"])
def test_through_to_event_and_mask(one_hot: bool) -> None:
    p, q = sparse(one_hot, sparsemax, 2 * leaf(3, 2, K)), stock(one_hot, leaf(3, 2, K))
    kl = kl_divergence(p, q)
    torch.testing.assert_close(kl_divergence(p.to_event(1), q.to_event(1)), kl.sum(-1))
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    torch.testing.assert_close(kl_divergence(p.mask(mask), q.mask(mask)), torch.where(mask, kl, 0.0))


def test_different_numbers_of_outcomes() -> None:
    with pytest.raises(ValueError, match=r"kl_divergence\(.*\): expected as many outcomes in both, got 6 and 1\. \w+"):
        kl_divergence(SparseCategorical(leaf(K)), SparseCategorical(leaf(1)))


def test_indices_and_one_hot_vectors_do_not_compare() -> None:
    with pytest.raises(NotImplementedError):
        kl_divergence(SparseCategorical(leaf(K)), SparseOneHotCategorical(leaf(K)))


# Stock distributions, which torch's own would leave with NaN gradients: what ELBOs take in its place.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["logits", "probs"])
@pytest.mark.parametrize("make", [dist.Categorical, dist.OneHotCategorical], ids=["categorical", "one-hot"])
def test_zeros_of_stock_distributions(make: Any, form: str, dtype: torch.dtype) -> None:
    """Value and gradient are those of the outcomes that are possible."""
    p = torch.tensor([[0.2, 0.5, 0.3, 0.0], [0.0, 1.0, 0.0, 0.0], [0.4, 0.0, 0.6, 0.0]], dtype=dtype)
    q = torch.tensor([0.1, 0.6, 0.3, 0.0], dtype=dtype)
    found = []
    for keep in (slice(None), slice(0, 3)):
        given = [(x[..., keep] if form == "probs" else x[..., keep].log()).requires_grad_() for x in (p, q)]
        kl = kl_categorical(make(**{form: given[0]}), make(**{form: given[1]}))
        found.append([kl.detach(), *torch.autograd.grad(kl.sum(), given)])
    for four, three in zip(*found, strict=True):
        assert four.isfinite().all() and four.dtype == dtype
        torch.testing.assert_close(four[..., :3], three)
    exact = torch.special.xlogy(p[:, :3], p[:, :3] / q[:3]).sum(-1)
    torch.testing.assert_close(found[0][0], exact)


def test_torchs_own_has_nan_gradients_there() -> None:
    logits = torch.tensor([0.3, 0.1, -INF], requires_grad=True)
    for kl, ours in ((kl_divergence, False), (kl_categorical, True)):
        (g,) = torch.autograd.grad(kl(dist.Categorical(logits=logits), dist.Categorical(torch.ones(3))), logits)
        assert g.isfinite().all() == ours


def test_stock_distributions_far_apart() -> None:
    """Infinite where the second lacks an outcome, and there alone; not where its probability only underflows."""
    p = dist.Categorical(logits=torch.tensor([[0.0, 0.0], [-INF, 0.0]]).requires_grad_())
    assert kl_categorical(p, dist.Categorical(logits=torch.tensor([-INF, 0.0]))).tolist() == [INF, 0.0]
    far = kl_categorical(p, dist.Categorical(logits=torch.tensor([-1000.0, 0.0])))
    torch.testing.assert_close(far, torch.tensor([500.0 - math.log(2), 0.0]))
    s = torch.randn(50, K).requires_grad_()
    got, theirs = (f(stock(False, s), stock(False, s.roll(1, 0))) for f in (kl_categorical, kl_divergence))
    torch.testing.assert_close(got, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [SparseCategorical, SparseOneHotCategorical], ids=lambda f: f.__name__)
def test_half_precision_is_computed_in_float32(family: Any, dtype: torch.dtype) -> None:
    """A divergence of close ones is what rounding leaves, and never negative; the control: in half it is."""
    scores = torch.randn(200, 32).to(dtype)
    p, q = family(scores), family((1.05 * scores).to(dtype))
    kl = kl_divergence(p, q)
    finite = kl.isfinite()
    assert kl.dtype == dtype and finite.any() and (kl[finite] >= -1e-6).all()
    assert torch.equal(kl_divergence(p, p), torch.zeros(200, dtype=dtype))
    exact = [d.probs.double() / d.probs.double().sum(-1, keepdim=True) for d in (p, q)]
    expected = kl_divergence(SparseCategorical(probs=exact[0]), SparseCategorical(probs=exact[1]))
    torch.testing.assert_close(kl[finite].double(), expected[finite], rtol=torch.finfo(dtype).eps, atol=1e-6)
    in_half = (p.probs * (p.logits - q.logits)).nan_to_num(0.0, 0.0, 0.0).sum(-1)
    assert (in_half[finite] < -1e-4).any()
