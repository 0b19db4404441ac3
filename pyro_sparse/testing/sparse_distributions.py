"""What :func:`check_distribution` checks of families that know which outcomes have probability zero."""

from __future__ import annotations

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_sparse.testing.properties import require, same


def log_probs_of(d: TorchDistributionMixin) -> tuple[Tensor, Tensor]:
    """All n outcomes, shape ``(n, *batch, *event)``, and their log-probabilities, shape ``(n, *batch)``."""
    values = d.enumerate_support()
    return values, d.log_prob(values)


# Every distribution.


def _covered(d: TorchDistributionMixin, values: Tensor, name: str) -> Tensor:
    """Which outcomes are among the values of each row, shape ``(n, *batch)``; each value must be one, at most once."""
    dense, values = d.enumerate_support().unsqueeze(1), values.expand(len(values), *d.batch_shape, *d.event_shape)
    equal = dense == values
    match = equal.flatten(equal.dim() - len(d.event_shape)).all(-1) if d.event_shape else equal
    require((match.sum(0) == 1).all(), name, "outcomes of enumerate_support()", values)
    require((match.sum(1) <= 1).all(), name, "each outcome at most once", values)
    return match.any(1)


def support_rows(d: TorchDistributionMixin) -> None:
    index, values, log_probs = d.support_rows()
    require(len(index) == len(d.batch_shape), "indices of support_rows()", len(d.batch_shape), len(index))
    element = torch.zeros_like(log_probs, dtype=torch.long)
    for each, size in zip(index, d.batch_shape, strict=True):
        element = element * size + each
    require((element.diff() >= 0).all(), "support_rows()", "rows ordered by element", element)
    same(
        "rows of each element in support_rows()",
        element.bincount(minlength=d.batch_shape.numel()),
        d.support_size.flatten(),
    )
    of_all = d.log_prob(values.reshape(len(values), *(1,) * len(index), *d.event_shape))
    own = of_all[(torch.arange(len(values), device=values.device), *index)]
    same("log_probs of support_rows()", log_probs, own)
    total = torch.zeros(d.batch_shape.numel(), dtype=own.dtype, device=own.device).index_add(0, element, own.exp())
    same("sum of probabilities over support_rows()", total, torch.ones_like(total))


def sparse_support(d: TorchDistributionMixin) -> None:
    values, log_probs = d.sparse_support()
    positive = log_probs_of(d)[1].exp() > 0
    size = positive.sum(0)
    same("support_size", d.support_size, size)
    expected = (int(size.max()), *d.batch_shape, *d.event_shape)
    require(values.shape == expected, "shape of the values of sparse_support()", expected, tuple(values.shape))
    covered = _covered(d, values, "sparse_support()")
    require((covered | ~positive).all(), "sparse_support()", "all outcomes with positive probability", values)
    same("log_probs of sparse_support()", log_probs, d.log_prob(values))
    padding = log_probs.exp() == 0
    same("number of paddings in sparse_support()", padding.sum(0), len(values) - size)
    require((log_probs[padding] == -torch.inf).all(), "log_probs of padding in sparse_support()", "-inf", log_probs)

    narrow, narrow_log_probs = d.sparse_support(expand=False)
    same("values of sparse_support(expand=False), expanded", narrow.expand(values.shape), values)
    same("log_probs of sparse_support(expand=False), expanded", narrow_log_probs.expand(log_probs.shape), log_probs)


def unions(d: TorchDistributionMixin) -> None:
    positive = log_probs_of(d)[1].exp() > 0
    dims = range(-len(d.batch_shape), 0)
    for union_dims in {(), *((dim,) for dim in dims), tuple(dims)}:
        name = f"support_values({union_dims})"
        values = d.support_values(union_dims)
        used = positive.any(union_dims, keepdim=True) if union_dims else positive
        require(len(values) == used.sum(0).max(), f"number of {name}", int(used.sum(0).max()), len(values))
        batch = values.shape[1 : values.dim() - len(d.event_shape)]
        shared = len(batch) == len(dims) and all(batch[dim] == 1 for dim in union_dims)
        require(shared, f"batch shape of {name}", "size one at these dims", tuple(batch))
        covered = _covered(d, values, name)
        require((covered | ~positive).all(), name, "all outcomes with positive probability", values)


def sparse_family(d: TorchDistributionMixin) -> None:
    values, log_probs = log_probs_of(d)
    require(d.num_outcomes == len(values), "num_outcomes", len(values), d.num_outcomes)
    same("log_prob of to_dense()", d.to_dense().log_prob(values), log_probs)
    masked = d.mask(torch.zeros(d.batch_shape, dtype=torch.bool, device=values.device))
    require(getattr(masked, "has_sparse_support", False), "has_sparse_support after mask", True, False)
    same("support_size after mask", masked.support_size, d.support_size)
    for got, expected in zip(masked.sparse_support(), d.sparse_support(), strict=True):
        same("sparse_support() after mask", got, expected)
