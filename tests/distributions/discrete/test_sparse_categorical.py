"""What SparseCategorical and SparseOneHotCategorical compute: values, gradients, wrappers, samples, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_sparse.distributions import MaskedSparseDistribution, SparseCategorical, SparseOneHotCategorical
from pyro_sparse.projections import entmax, entmax15, sparsemax, topk_sparsemax
from pyro_sparse.testing.distributions import check_distribution

FAMILIES = [SparseCategorical, SparseOneHotCategorical]
INF = math.inf

each_family = pytest.mark.parametrize("family", FAMILIES)


def scores(*shape: int, scale: float = 1.5) -> Tensor:
    return (scale * torch.randn(shape)).requires_grad_()


class CountedSparsemax:
    """Sparsemax that knows how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, scores: Tensor) -> Tensor:
        self.calls += 1
        return sparsemax(scores)


# The conventions of Pyro.


@each_family
@pytest.mark.parametrize("shape", [(5,), (1, 1), (4, 1, 5), (3, 2, 5)], ids=str)
@pytest.mark.parametrize("projection", [sparsemax, entmax15], ids=lambda f: f.__name__)
def test_keeps_the_conventions_of_pyro(family: Any, shape: tuple[int, ...], projection: Any) -> None:
    check_distribution(family(scores(*shape), projection))


@each_family
@pytest.mark.parametrize(
    "make",
    [
        lambda family: family(scores(3, 5), partial(entmax, alpha=nn.Parameter(torch.tensor(1.3)))),
        lambda family: family(scores(3, 5), partial(topk_sparsemax, k=2)),
        lambda family: family(scores(3, 5, scale=1e3)),  # one outcome
        lambda family: family(scores(3, 5, scale=1e-3)),  # all outcomes
        lambda family: family(torch.tensor([[0.1, -INF, 0.3], [-INF, -INF, 1.0]], requires_grad=True), entmax15),
        lambda family: family(probs=torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.25, 0.25]], requires_grad=True)),
        lambda family: family(scores(2, 1, 5)).expand((4, 2, 3)),
        lambda family: family(scores(3, 5).float().detach().requires_grad_(), entmax15),
        lambda family: family(torch.randn(3, 5, dtype=torch.float16)),
        lambda family: family(torch.randn(3, 5, dtype=torch.bfloat16)),
    ],
    ids=[
        "learnable alpha",
        "top-k",
        "one outcome",
        "all",
        "masked",
        "probs",
        "expanded",
        "float32",
        "half",
        "bfloat16",
    ],
)
def test_keeps_the_conventions_of_pyro_when(family: Any, make: Callable[[Any], Any]) -> None:
    check_distribution(make(family))


@each_family
def test_keeps_the_conventions_of_pyro_under_to_event(family: Any) -> None:
    check_distribution(family(scores(3, 2, 5)).to_event(1))


# Values, worked out by hand: sparsemax of these scores is (0.8, 0, 0.2).

BY_HAND = torch.tensor([1.0, -2.0, 0.4], dtype=torch.float64)


def test_values_by_hand() -> None:
    d = SparseCategorical(BY_HAND)
    log_probs = [math.log(0.8), -INF, math.log(0.2)]
    torch.testing.assert_close(d.probs, torch.tensor([0.8, 0.0, 0.2]))
    torch.testing.assert_close(d.logits, torch.tensor(log_probs))
    torch.testing.assert_close(d.log_prob(torch.arange(3)), torch.tensor(log_probs))
    torch.testing.assert_close(d.entropy(), torch.tensor(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)))
    assert d.mode == 0
    assert d.support_size == 2
    assert d.num_outcomes == 3
    assert d.mean.isnan() and d.variance.isnan()  # labels, as in torch
    assert d.sparse_support()[0].tolist() == [0, 2]


def test_one_hot_values_by_hand() -> None:
    d = SparseOneHotCategorical(BY_HAND)
    torch.testing.assert_close(d.mean, torch.tensor([0.8, 0.0, 0.2]))
    torch.testing.assert_close(d.variance, torch.tensor([0.16, 0.0, 0.16]))
    assert d.mode.tolist() == [1.0, 0.0, 0.0]
    assert d.sparse_support()[0].tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    torch.testing.assert_close(d.log_prob(torch.eye(3)), SparseCategorical(BY_HAND).logits)


@each_family
def test_the_support_is_padded_with_other_outcomes(family: Any) -> None:
    d = family(probs=torch.tensor([[0.0, 0.0, 1.0], [0.3, 0.0, 0.7]]))
    values, log_probs = d.sparse_support()
    index = values if family is SparseCategorical else values.argmax(-1)
    assert index[0].tolist() == [2, 2]
    assert index[1, 1] == 0
    assert index[1, 0] in (0, 1)  # either outcome of probability zero
    torch.testing.assert_close(log_probs.exp(), torch.tensor([[1.0, 0.7], [0.0, 0.3]]))


def test_a_union_lists_what_any_row_uses() -> None:
    d = SparseCategorical(probs=torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.3, 0.0, 0.7, 0.0]]))
    assert sorted(d.support_values((-1,)).flatten().tolist()) == [0, 2]


@each_family
def test_entropy_at_zero_and_its_gradient(family: Any) -> None:
    s = torch.tensor([9.0, 0.0, 1.0], requires_grad=True)  # one outcome: 1 log 1 + 0 log 0 + 0 log 0
    entropy = family(s, entmax15).entropy()
    assert entropy == 0
    assert torch.autograd.grad(entropy, s)[0].tolist() == [0, 0, 0]


@each_family
def test_given_probabilities_are_kept_as_they_are(family: Any) -> None:
    K = 1000
    p = sparsemax(torch.randn(7, K))
    assert torch.equal(family(probs=p).probs, p)
    almost = p * (1 + 4 * torch.finfo(p.dtype).eps * K)  # within the tolerance: neither refused nor renormalised
    assert torch.equal(family(probs=almost).probs, almost)
    with pytest.raises(ValueError, match="sum off by"):
        family(probs=p * (1 + 16 * torch.finfo(p.dtype).eps * K))
    assert family(probs=p).scores is None
    assert family(probs=p).projection is None


def test_stock_categorical_would_not_keep_zeros() -> None:
    """Why the families exist: torch gives each of many zeros some mass, and the sum of logs is far from exact."""
    p = one_hot(torch.tensor(0), 4096).float()
    assert dist.Categorical(probs=p).log_prob(torch.tensor(1)) > -20
    assert SparseCategorical(probs=p).log_prob(torch.tensor(1)) == -INF


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    s = torch.tensor([1.0, 0.4, -2.0], dtype=dtype)
    d = SparseCategorical(s)
    assert {x.dtype for x in (d.probs, d.logits, d.scores, d.entropy(), d.mean, d.sparse_support()[1])} == {dtype}
    assert {x.dtype for x in (d.sample(), d.mode, d.support_size, d.sparse_support()[0])} == {torch.long}
    d = SparseOneHotCategorical(s)
    assert {x.dtype for x in (d.sample(), d.mode, d.mean, d.enumerate_support(), d.sparse_support()[0])} == {dtype}


def test_integer_values_of_any_dtype() -> None:
    d = SparseCategorical(scores(3, 5))
    value = d.sample()
    for dtype in (torch.uint8, torch.int32, torch.float32):
        assert torch.equal(d.log_prob(value.to(dtype)), d.log_prob(value))


# Gradients.


@each_family
def test_log_prob_gradient_by_hand(family: Any) -> None:
    s = scores(4, 6)
    p = sparsemax(s.detach())
    on = (p > 0).double()
    values = family(s).enumerate_support()
    for k in range(6):
        # d sparsemax / ds = diag(on) - on on^T / |S|, so d log p_k / ds = (e_k - on / |S|) / p_k on the support.
        expected = torch.where(
            p[:, k, None] > 0, (one_hot(torch.tensor(k), 6) - on / on.sum(-1, keepdim=True)) * on / p[:, k, None], 0.0
        )
        (gradient,) = torch.autograd.grad(family(s).log_prob(values[k]).masked_fill(p[:, k] == 0, 0.0).sum(), s)
        torch.testing.assert_close(gradient, expected)


@each_family
@pytest.mark.parametrize("projection", [sparsemax, entmax15, partial(entmax, alpha=1.2)], ids=["2", "1.5", "1.2"])
def test_log_prob_gradient_is_finite_beside_zeros(family: Any, projection: Any) -> None:
    s = scores(20, 8, scale=3.0)
    d = family(s, projection)
    log_probs = d.log_prob(d.enumerate_support())
    assert (log_probs == -INF).any()
    # As in an ELBO: -inf terms are multiplied by zero probabilities, here as weights of the backward pass.
    (gradient,) = torch.autograd.grad(log_probs, s, log_probs.exp().detach(), retain_graph=True)
    assert gradient.isfinite().all()
    assert torch.autograd.grad(d.logits, s, d.probs.detach())[0].isfinite().all()


def test_log_prob_gradient_of_a_naive_log_is_nan() -> None:
    """The negative control of the test above. (In sparsemax and entmax15 a relu happens to stop the NaN.)"""
    s = scores(20, 8, scale=3.0)
    p = entmax(s, 1.2)
    (gradient,) = torch.autograd.grad(p.log(), s, p.detach())
    assert gradient.isnan().any()


def test_second_derivatives_are_finite() -> None:
    s = scores(4, 6)
    assert torch.autograd.gradgradcheck(lambda s: SparseCategorical(s, entmax15).entropy(), s)


@each_family
def test_alpha_learns(family: Any) -> None:
    alpha = nn.Parameter(torch.tensor(1.4))
    s = torch.tensor([1.0, 0.4, -2.0])

    def entropy(a: Tensor) -> Tensor:
        return family(s, partial(entmax, alpha=a)).entropy()

    assert torch.autograd.gradcheck(entropy, alpha)


# What expand, mask and to_event keep.


@each_family
def test_the_projection_is_called_once(family: Any) -> None:
    projection = CountedSparsemax()
    d = family(scores(3, 1, 5), projection)
    for e in (d, d.expand((3, 2)), d.expand_by((4,)), d.expand((3, 2)).expand((2, 3, 2)), d.mask(True).expand((3, 2))):
        e.log_prob(e.sample())
        e.sparse_support()
        e.to_event(1)
    assert projection.calls == 1


@each_family
@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 2), (3, 1)], ids=str)
def test_expand_refuses_shapes_that_do_not_fit(family: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="expand"):
        family(scores(1, 5)).expand((3,)).expand(shape)


@each_family
def test_expand_is_a_view(family: Any) -> None:
    d = family(scores(1, 5))
    e = d.expand((1000, 1000))
    assert e.probs.data_ptr() == d.probs.data_ptr()
    assert e.scores.shape == e.probs.shape == e.logits.shape == (1000, 1000, 5)


@each_family
@pytest.mark.parametrize("mask", [True, False, torch.tensor([True, False, True])], ids=["true", "false", "tensor"])
def test_a_masked_distribution_keeps_its_sparse_support(family: Any, mask: bool | Tensor) -> None:
    d = family(scores(3, 5))
    value = d.mode
    wide = torch.broadcast_to(torch.as_tensor(mask), (3,))
    for masked in (d.mask(mask), d.mask(mask).expand((2, 3)), d.mask(True).mask(mask)):
        assert isinstance(masked, MaskedSparseDistribution)
        assert masked.has_sparse_support and masked.has_enumerate_support
        assert masked.num_outcomes == 5
        expected = torch.where(wide, d.log_prob(value), 0.0).expand(masked.batch_shape)
        torch.testing.assert_close(masked.log_prob(value), expected)
        torch.testing.assert_close(masked.to_dense().log_prob(value), expected)
        assert torch.equal(masked.support_size, d.support_size.expand(masked.batch_shape))
        for got, unmasked in zip(masked.sparse_support(), d.expand(masked.batch_shape).sparse_support(), strict=True):
            assert torch.equal(got, unmasked)


@each_family
def test_to_event_and_mask_in_either_order(family: Any) -> None:
    d = family(scores(3, 2, 5))
    value = d.mode
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    expected = torch.where(mask, d.log_prob(value), 0.0).sum(-1)
    torch.testing.assert_close(d.mask(mask).to_event(1).log_prob(value), expected)
    mask = torch.tensor([True, False, True])
    expected = torch.where(mask, d.log_prob(value).sum(-1), 0.0)
    torch.testing.assert_close(d.to_event(1).mask(mask).log_prob(value), expected)
    assert d.to_event(1).event_shape == (2, *d.event_shape)


# What Pyro asks of the class.


@pytest.mark.parametrize("name", ["scores", "probs"])
def test_infer_shapes(name: str) -> None:
    shape = torch.Size((4, 3, 5))
    assert SparseCategorical.infer_shapes(**{name: shape}) == (shape[:-1], ())
    assert SparseOneHotCategorical.infer_shapes(**{name: shape}) == (shape[:-1], (5,))


@each_family
def test_arg_constraints_hold(family: Any) -> None:
    assert set(family.arg_constraints) == {"scores", "probs", "logits"}
    d = family(torch.tensor([[0.0, -INF, 0.5], [1.0, 0.0, 0.2]]))
    for name, constraint in family.arg_constraints.items():
        assert constraint.check(getattr(d, name)).all()
        assert constraint.event_dim == 1


def test_support() -> None:
    d = SparseCategorical(scores(3, 5))
    assert d.support.is_discrete and d.support.event_dim == 0
    assert (d.support.lower_bound, d.support.upper_bound) == (0, 4)
    assert SparseOneHotCategorical(scores(3, 5)).support is constraints.one_hot
    assert not d.has_rsample


@each_family
def test_repr_tells_how_it_was_made(family: Any) -> None:
    name = family.__name__
    assert repr(family(scores(3, 5), entmax15)) == f"{name}(scores: (3, 5), projection=entmax15)"
    assert repr(family(probs=torch.ones(2, 1)).expand((3, 2))) == f"{name}(probs: (3, 2, 1))"
    assert repr(family(logits=scores(3, 5))) == f"{name}(logits: (3, 5))"
    assert "alpha=1.3" in repr(family(scores(5), partial(entmax, alpha=1.3)))


@each_family
def test_a_batch_may_be_empty(family: Any) -> None:
    d = family(torch.randn(0, 5))
    assert d.sample().shape == (0, *d.event_shape)
    assert d.log_prob(d.sample()).shape == (0,)
    assert d.sparse_support()[1].shape == (1, 0)


# Samples.


@each_family
def test_samples_are_those_of_the_stock_family(family: Any) -> None:
    """Same seed, same draws: swapping the guide's distribution does not change a run's noise."""
    d = family(scores(4, 6, scale=0.1))
    torch.manual_seed(1)
    ours = d.sample((3,))
    torch.manual_seed(1)
    assert torch.equal(ours, d.to_dense().sample((3,)))


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_are_never_outcomes_of_probability_zero(family: Any, dtype: torch.dtype) -> None:
    d = family(scores(8, 40).to(dtype))
    assert (d.support_size < 40).all()
    assert d.log_prob(d.sample((20_000,))).min() > -INF


# Memory.


class LargestStorage(TorchDispatchMode):
    """Records the size in bytes of the largest storage that an operation returns; views cost nothing."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def test_log_prob_takes_memory_for_the_values_only() -> None:
    """A prior over K outcomes, scored at S values for each of B examples: O(S B + K), where torch takes O(S B K)."""
    S, B, K = 3, 50, 1000
    probs = torch.full((K,), 1 / K).requires_grad_()
    values = torch.randint(K, (S, B))

    def largest(d: Any) -> int:
        with LargestStorage() as mode:
            torch.autograd.grad(d.expand((B,)).log_prob(values).sum(), probs)
        return mode.largest // probs.element_size()

    assert largest(SparseCategorical(probs=probs, validate_args=False)) <= K
    assert largest(dist.Categorical(probs=probs, validate_args=False)) >= S * B * K


def test_logits_that_underflow_are_exact_zeros() -> None:
    """As the documentation says, at the bound that it gives."""
    logits = torch.tensor([[0.0, -103.0], [0.0, -104.5]], dtype=torch.float32)
    assert SparseCategorical(logits=logits).support_size.tolist() == [2, 1]
