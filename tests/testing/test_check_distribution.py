"""check_distribution accepts what is right, and catches each of many small wrongs in an otherwise right family."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_sparse.distributions import SparseCategorical, SparseDistribution, SparseOneHotCategorical
from pyro_sparse.projections import entmax
from pyro_sparse.testing.distributions import check_distribution


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


# Right ones.


@pytest.mark.parametrize(
    "make",
    [
        lambda: dist.Normal(leaf(3, 2), 1.0),
        lambda: dist.Normal(leaf(3, 2), 1.0).to_event(1),
        lambda: dist.MultivariateNormal(leaf(2, 3), torch.eye(3)),
        lambda: dist.Gamma(leaf(3, 2).exp(), 1.0),
        lambda: dist.Poisson(leaf(3).exp()),
        lambda: dist.Bernoulli(logits=leaf(3, 1)),
        lambda: dist.Binomial(3, logits=leaf(2)),
        lambda: dist.Categorical(logits=leaf(3, 5)),
        lambda: dist.Categorical(probs=torch.tensor([0.5, 0.5, 0.0])),
        lambda: dist.OneHotCategorical(logits=leaf(5)),
        lambda: SparseCategorical(leaf(3, 5)),
        lambda: SparseOneHotCategorical(leaf(2, 1, 5)),
    ],
)
def test_right_ones_pass(make: Any) -> None:
    check_distribution(make())


def test_the_second_derivative_that_torch_gets_wrong_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"Dirichlet\): derivative of the gradient of d\(\): expected"):
        check_distribution(dist.Dirichlet(leaf(3, 2).exp()))


def test_the_random_state_is_put_back() -> None:
    before = torch.random.get_rng_state()
    check_distribution(SparseCategorical(torch.randn(3)))
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(before)
    torch.randn(3)
    assert torch.equal(torch.random.get_rng_state(), after)


def test_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected an instance of a Pyro distribution, got \w+Meta\. Build one"):
        check_distribution(SparseCategorical)
    with pytest.raises(TypeError, match=r"got Normal\. .*use pyro.distributions in place"):
        check_distribution(torch.distributions.Normal(0.0, 1.0))


# Broken ones. They start from a family that is right and small enough to be broken in one place.


class Sparse(SparseDistribution):
    """A plain sparse categorical over integers, from a table of probabilities; all methods in their simplest form."""

    arg_constraints = {"probs": dist.constraints.simplex}

    def __init__(self, probs: Tensor) -> None:
        self.probs = probs
        super().__init__(probs.shape[:-1], torch.Size(), validate_args=False)

    @dist.constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        return dist.constraints.integer_interval(0, self.num_outcomes - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return type(self)(self.probs.expand(*batch_shape, -1))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.to_dense().sample(torch.Size(sample_shape))

    def log(self, p: Tensor) -> Tensor:
        return torch.where(p > 0, torch.where(p > 0, p, 1.0).log(), -math.inf)

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        index = value.long().expand(shape).unsqueeze(-1)
        return self.log(self.probs.expand(*shape, -1)).gather(-1, index).squeeze(-1)

    def entropy(self) -> Tensor:
        return -(self.probs * self.log(torch.where(self.probs > 0, self.probs, 1.0))).sum(-1)

    @property
    def mode(self) -> Tensor:
        return self.probs.argmax(-1)

    @property
    def num_outcomes(self) -> int:
        return self.probs.shape[-1]

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = torch.arange(self.num_outcomes).reshape(-1, *(1,) * len(self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values

    @property
    def support_size(self) -> Tensor:
        return (self.probs > 0).sum(-1)

    def support_values(self, union_dims: Any = ()) -> Tensor:
        p = self.probs.detach()
        if union_dims:
            p = p.amax([dim - 1 for dim in union_dims], keepdim=True)
        return p.topk(int((p > 0).sum(-1).max()), dim=-1).indices.movedim(-1, 0)

    def to_dense(self) -> Any:
        return dist.Categorical(logits=self.log(self.probs))

    def __copy__(self) -> Any:
        return type(self)(self.probs)


class NotNormalised(Sparse):
    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) + 0.01


class ExpandForgetsTheBatch(Sparse):
    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return type(self)(self.probs)


class ExpandShrinks(Sparse):
    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        rows = self.probs[0] if self.batch_shape == (2, 3) else self.probs
        return type(self)(rows.expand(*batch_shape, -1))


class StockExpand(Sparse):
    expand = TorchDistribution.expand


class ExpandMixesRows(Sparse):
    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return type(self)(self.probs.expand(*batch_shape, -1).flip(0 if len(batch_shape) < 2 else 1))


class EntropyIsNanAtZero(Sparse):
    def entropy(self) -> Tensor:
        return -(self.probs * self.log(self.probs)).sum(-1)


class EntropyOfBase2(Sparse):
    def entropy(self) -> Tensor:
        return super().entropy() / math.log(2)


class EntropyKeepsADim(Sparse):
    def entropy(self) -> Tensor:
        return super().entropy().unsqueeze(-1)


class NaiveLog(Sparse):
    def log(self, p: Tensor) -> Tensor:
        return p.log()


class LogProbIgnoresTheBatch(Sparse):
    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value.expand(torch.broadcast_shapes(value.shape, self.batch_shape)))[..., :1]


class LogProbDoesNotBroadcast(Sparse):
    def log_prob(self, value: Tensor) -> Tensor:
        return self.log(self.probs).gather(-1, value.unsqueeze(-1)).squeeze(-1)


class FollowsTheDefaultDtype(Sparse):
    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) + torch.zeros(1)[0]  # harmless in type promotion

    def entropy(self) -> Tensor:
        return super().entropy().to(torch.get_default_dtype())


class SampleOfShapeOne(Sparse):
    def sample(self, sample_shape: Any = ()) -> Tensor:
        return super().sample(sample_shape).unsqueeze(0)


class SamplesOutsideTheSupport(Sparse):
    def sample(self, sample_shape: Any = ()) -> Tensor:
        return super().sample(sample_shape) + 1


class SamplesOutcomesOfProbabilityZero(Sparse):
    def sample(self, sample_shape: Any = ()) -> Tensor:
        return super().sample(sample_shape) * 0 + self.probs.argmin(-1)


class ModeIsTheLeast(Sparse):
    @property
    def mode(self) -> Tensor:
        return self.probs.argmin(-1)


class EnumeratesWideAlways(Sparse):
    def enumerate_support(self, expand: bool = True) -> Tensor:
        return super().enumerate_support(True)


class EnumeratesSparsely(Sparse):
    def enumerate_support(self, expand: bool = True) -> Tensor:
        return super().enumerate_support(expand)[:-1]


class PadsWithDuplicates(Sparse):
    def support_values(self, union_dims: Any = ()) -> Tensor:
        values = super().support_values(union_dims)
        return torch.where(self.log_prob(values).exp() > 0, values, values[0])


class PadsTooMuch(Sparse):
    def support_values(self, union_dims: Any = ()) -> Tensor:
        return self.probs.topk(self.num_outcomes, -1).indices.movedim(-1, 0)


class MissesAnOutcome(Sparse):
    def support_values(self, union_dims: Any = ()) -> Tensor:
        values = super().support_values(union_dims).clone()
        values[-1] = self.probs.argmin(-1)
        return values


class UnionIgnoresOtherRows(Sparse):
    def support_values(self, union_dims: Any = ()) -> Tensor:
        values = super().support_values(())
        return values[:, :1] if union_dims else values


class PaddingHasFiniteLogProb(Sparse):
    def sparse_support(self, expand: bool = True) -> tuple[Tensor, Tensor]:
        values, log_probs = super().sparse_support(expand)
        return values, log_probs.clamp(min=-1e3)


class SupportSizeCountsAll(Sparse):
    @property
    def support_size(self) -> Tensor:
        return torch.full(self.batch_shape, self.num_outcomes)


class RowsAreOthers(Sparse):
    def support_rows(self) -> Any:
        index, values, log_probs = super().support_rows()
        return index, values, 3 * log_probs


class RowsMissOne(Sparse):
    def support_rows(self) -> Any:
        index, values, log_probs = super().support_rows()
        return tuple(i[1:] for i in index), values[1:], log_probs[1:]


class DenseIsUniform(Sparse):
    def to_dense(self) -> Any:
        return dist.Categorical(torch.ones_like(self.probs))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return super().to_dense().sample(torch.Size(sample_shape))


class StockMask(Sparse):
    def mask(self, mask: Any) -> Any:
        return dist.MaskedDistribution(self, mask)


class MaskIsIgnored(Sparse):
    def mask(self, mask: Any) -> Any:
        return super().mask(True).expand(torch.broadcast_shapes(mask.shape, self.batch_shape))


class CannotBePickled(Sparse):
    def __init__(self, probs: Tensor) -> None:
        super().__init__(probs)
        self.log = lambda p: Sparse.log(self, p)  # type: ignore[method-assign]


class PickleForgets(Sparse):
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "probs": torch.full_like(self.probs, 1 / self.num_outcomes)}


class PickleLosesTheGraph(Sparse):
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "probs": self.probs.detach()}


class HasNoName(Sparse):
    def __repr__(self) -> str:
        return ""


class SaysTheWrongThingAboutItself(Sparse):
    arg_constraints = {"probs": dist.constraints.greater_than(0.0)}


class Crashes(Sparse):
    def entropy(self) -> Tensor:
        raise ZeroDivisionError("no luck")


@pytest.mark.parametrize(
    "family, message",
    [
        (NotNormalised, r"sum of probabilities over enumerate_support\(\): expected .*1"),
        (ExpandForgetsTheBatch, "batch_shape after expand: expected .2, 3"),
        (ExpandShrinks, r"expand of batch shape \(2, 3\) to \(3, 3\): expected an error"),
        (StockExpand, "entropy after expand: expected to be kept"),
        (ExpandMixesRows, "log_prob after expand: expected"),
        (EntropyIsNanAtZero, "entropy: expected"),
        (EntropyOfBase2, "entropy: expected"),
        (EntropyKeepsADim, "shape of entropy: expected"),
        (NaiveLog, "gradient of log_prob over all outcomes: expected finite values"),
        (LogProbIgnoresTheBatch, "shape of log_prob: expected"),
        (LogProbDoesNotBroadcast, "expected no error, got RuntimeError.*Index tensor"),
        (FollowsTheDefaultDtype, "dtype of entropy under another default dtype: expected"),
        (SampleOfShapeOne, r"shape of sample\(\(\)\): expected"),
        (SamplesOutsideTheSupport, "sample: expected values in the support"),
        (SamplesOutcomesOfProbabilityZero, "log_prob of a sample: expected finite values"),
        (ModeIsTheLeast, "log_prob of the mode: expected"),
        (EnumeratesWideAlways, r"shape of enumerate_support\(expand=False\): expected"),
        (EnumeratesSparsely, r"sum of probabilities over enumerate_support\(\): expected"),
        (PadsWithDuplicates, r"sparse_support\(\): expected each outcome at most once"),
        (PadsTooMuch, r"shape of the values of sparse_support\(\): expected"),
        (MissesAnOutcome, r"sparse_support\(\): expected all outcomes with positive probability"),
        (UnionIgnoresOtherRows, r"support_values\(\(-1,\)\): expected"),
        (PaddingHasFiniteLogProb, r"log_probs of sparse_support\(\): expected"),
        (SupportSizeCountsAll, "support_size: expected"),
        (RowsAreOthers, r"log_probs of support_rows\(\): expected"),
        (RowsMissOne, r"rows of each element in support_rows\(\): expected"),
        (DenseIsUniform, r"log_prob of to_dense\(\): expected"),
        (StockMask, "has_sparse_support after mask: expected True"),
        (MaskIsIgnored, "log_prob after mask: expected"),
        (CannotBePickled, "copies: expected no error, got .*lambda"),
        (PickleForgets, "log_prob after pickle: expected"),
        (PickleLosesTheGraph, "requires_grad of log_prob after pickle: expected True"),
        (HasNoName, "repr: expected one that names HasNoName"),
        (SaysTheWrongThingAboutItself, "parameter probs: expected"),
        (Crashes, "expected no error, got ZeroDivisionError"),
    ],
)
def test_broken_ones_are_caught(family: type[Sparse], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)^check_distribution\({family.__name__}.*\): .*{message}"):
        check_distribution(family(PROBS.clone().requires_grad_()))


PROBS = torch.tensor([[0.5, 0.2, 0.3, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.4, 0.0, 0.6]], dtype=torch.float64)


def test_unbroken_it_passes() -> None:
    check_distribution(Sparse(PROBS.clone().requires_grad_()))


def test_a_naive_log_is_caught_behind_a_projection() -> None:
    class Naive(Sparse):
        def log(self, p: Tensor) -> Tensor:
            return p.log()

        def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
            return Naive(self.probs.expand(*batch_shape, -1))

    scores = torch.tensor([1.0, 0.5, -4.0], requires_grad=True)
    with pytest.raises(AssertionError):
        check_distribution(Naive(entmax(scores, 1.2)))
