"""Copies of distributions: pickled to another process and deep copied, expanded and with a projection that learns."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_sparse.distributions import SparseCategorical, SparseOneHotCategorical
from pyro_sparse.projections import entmax, entmax15, sparsemax

each_family = pytest.mark.parametrize("family", [SparseCategorical, SparseOneHotCategorical])


def zoo() -> dict[str, Any]:
    """One of everything that should survive the trip; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {}
    for family in (SparseCategorical, SparseOneHotCategorical):
        scores = nn.Parameter(torch.randn(3, 1, 5, generator=generator))
        alpha = nn.Parameter(torch.tensor([1.3, 1.6]).reshape(2, 1))
        learnable = family(scores.detach().expand(3, 2, 5), partial(entmax, alpha=alpha))
        variants = {
            "scores": family(scores, entmax15),
            "expanded": family(scores, sparsemax).expand((4, 3, 2)),
            "probs": family(probs=sparsemax(scores.detach())),
            "learnable alpha": learnable,
            "learnable alpha, expanded": learnable.expand((4, 3, 2)),
            "masked": family(scores).mask(torch.tensor([True, False])),
            "to_event": family(scores).expand((3, 2)).to_event(1),
        }
        made.update({f"{family.__name__}, {name}": d for name, d in variants.items()})
    return made


def facts(d: Any) -> list[Tensor]:
    """What a copy must agree on: values at its most likely outcome, and the gradient to its own parameters."""
    base = d
    while hasattr(base, "base_dist"):
        base = base.base_dist
    value = base.mode
    log_prob = d.log_prob(value)
    results = [value, log_prob, base.probs, base.support_size, base.sparse_support()[0]]
    if log_prob.requires_grad:
        source = getattr(base, "_categorical", base)._source
        parameter = source if source.requires_grad else base.projection.keywords["alpha"]
        results += torch.autograd.grad(log_prob.sum(), parameter, retain_graph=True)
    return [result.detach() for result in results]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


CHILD = """
import pickle
from tests.distributions.discrete.test_pickle import facts
with open({path!r}, "rb") as file:
    distributions = pickle.load(file)
results = {{name: (type(d).__name__, tuple(d.batch_shape), facts(d)) for name, d in distributions.items()}}
with open({path!r}, "wb") as file:
    pickle.dump(results, file)
"""


def test_pickles_load_in_a_new_process(tmp_path: Path) -> None:
    path = tmp_path / "distributions.pickle"
    path.write_bytes(pickle.dumps(zoo()))
    child = CHILD.format(path=str(path))
    subprocess.run([sys.executable, "-c", child], check=True, cwd=Path(__file__).parents[3])
    results = pickle.loads(path.read_bytes())
    assert set(results) == set(zoo())
    for name, d in zoo().items():
        kind, batch_shape, values = results[name]
        assert kind == type(d).__name__
        assert batch_shape == d.batch_shape
        assert_same(values, facts(d))


@pytest.mark.parametrize("name", zoo())
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy], ids=lambda f: f.__name__)
def test_copies(duplicate: Callable[[Any], Any], name: str) -> None:
    d = zoo()[name]
    twin = duplicate(d)
    assert type(twin) is type(d)
    assert twin.batch_shape == d.batch_shape
    assert_same(facts(twin), facts(d))


@each_family
def test_a_deep_copy_has_an_alpha_of_its_own(family: Any) -> None:
    alpha = nn.Parameter(torch.tensor(1.3))
    d = family(torch.randn(3, 5), partial(entmax, alpha=alpha)).expand((2, 3))
    for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        own = twin.projection.keywords["alpha"]
        assert isinstance(own, nn.Parameter) and own is not alpha
        twin.entropy().sum().backward()
        assert own.grad is not None and alpha.grad is None


@each_family
def test_validation_stays_as_it_was(family: Any) -> None:
    for flag in (True, False):
        twin = pickle.loads(pickle.dumps(family(torch.randn(5), validate_args=flag)))
        assert twin._validate_args is flag


@each_family
def test_a_lambda_cannot_be_pickled(family: Any) -> None:
    assert "cannot be pickled" in (SparseCategorical.__doc__ or "")
    d = family(torch.randn(5), lambda s: sparsemax(s))
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(d)
