"""How often a step would wait for a GPU, on the CPU: counts that cannot grow in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

import pyro_sparse
import pyro_sparse.distributions as sdist
from pyro_sparse.distributions.mixed.base import UnknownDivergence
from pyro_sparse.estimators import (
    ARMS,
    REBAR,
    RELAX,
    VIMCO,
    DisARM,
    DoubleControlVariate,
    Exact,
    LeaveOneOut,
    LocalExpectation,
    MovingAverage,
    MuProp,
    NeuralBaseline,
    RaoBlackwell,
    SampleBaseline,
    ScoreFunction,
    SelfCritic,
    StraightThrough,
    UnorderedSet,
)
from pyro_sparse.infer import EstimatorELBO, SparseEnumELBO
from pyro_sparse.projections import (
    entmax,
    entmax15,
    entmax15_loss,
    entmax_loss,
    sparsemax,
    sparsemax_loss,
    topk_sparsemax,
)
from pyro_sparse.testing import count_host_waits
from pyro_sparse.testing.host_waits import HostWaits

K, B, X = 12, 20, 5
PACKAGE = str(pyro_sparse.__path__[0])


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("simplex", "losses"):  # which look at values only on the CPU
        monkeypatch.setattr(f"pyro_sparse.projections.{module}._can_branch_on", lambda x: False)


def own(waits: HostWaits) -> int:
    """Those that our lines make; Pyro's and torch's are theirs."""
    return sum(n for place, n in waits.places.items() if place.startswith(PACKAGE))


@pytest.mark.parametrize(
    ("wait", "expected"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: str(x), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.clone().__setitem__(x > 0, x[:1].clone()), 1),
        (lambda x: (x > 0).nonzero(), 1),
        (lambda x: x.masked_select(x > 0), 1),
        (lambda x: x.long().unique(), 1),
        (lambda x: x.long().abs().bincount(), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.repeat_interleave(x.long().abs()), 1),
        (lambda x: x.new_tensor([1.0, 2.0]), 1),
        (lambda x: torch.tensor(2.0), 1),
        (lambda x: x.repeat_interleave(torch.ones(3).long(), output_size=3), 0),
        (lambda x: x[torch.zeros(2).long()], 0),
        (lambda x: torch.where(x > 0, x, 0.0) + x.new_full((), 2.0) + torch.as_tensor(x), 0),
    ],
)
def test_what_is_counted(wait: Callable[[Tensor], Any], expected: int) -> None:
    x = torch.tensor([1.0, -2.0, 3.0])
    with count_host_waits() as waits:
        wait(x)
    assert waits.total >= expected if expected else waits.total == 0
    assert all("test_host_waits.py" in place for place in waits.places) and f"total={waits.total}" in repr(waits)


class Program(nn.Module):
    def __init__(self, family: Callable[[Tensor], Any], prior: Any) -> None:
        super().__init__()
        self.family, self.prior = family, prior
        self.encoder, self.decoder = nn.Linear(X, K), nn.Linear(K, X)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            z = z if z.is_floating_point() else torch.eye(K)[z]
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.family(self.encoder(x)))


def waits_of_a_step(elbo: Any, family: Callable[[Tensor], Any], prior: Any, validated: bool = False) -> HostWaits:
    """Of the second step: the first looks at the program."""
    program, x = Program(family, prior), torch.randn(B, X)
    with pyro.validation_enabled(validated):
        elbo.differentiable_loss(program.model, program.guide, x).backward()
        with count_host_waits() as waits:
            elbo.differentiable_loss(program.model, program.guide, x).backward()
    return waits


SPARSE = (sdist.SparseCategorical, lambda: dist.Categorical(logits=torch.zeros(K)))
ONE_HOT = (lambda logits: dist.OneHotCategorical(logits=logits), lambda: dist.OneHotCategorical(logits=torch.zeros(K)))
BITS = (
    lambda logits: dist.Bernoulli(logits=logits).to_event(1),
    lambda: dist.Bernoulli(logits=torch.zeros(K)).to_event(1),
)
GATES = (
    lambda logits: sdist.HardConcrete(0.5, logits).to_event(1),
    lambda: sdist.HardConcrete(0.5, torch.zeros(K)).to_event(1),
)

#: for the supports, for a zero prior; packed: for the rows; auto: for a second layout, for the means
MODES = {"padded": 2, "union": 2, "packed": 3, "auto": 5}


@pytest.mark.parametrize("mode", MODES)
def test_steps_of_sparse_enumeration(mode: str) -> None:
    waits = waits_of_a_step(SparseEnumELBO(mode, max_plate_nesting=1), *SPARSE)
    assert own(waits) <= MODES[mode], waits


@pytest.mark.parametrize("mode", ["padded", "packed"])
def test_steps_under_validation(mode: str) -> None:
    """What checks look at comes on top: the guide's probabilities, its values, and its scores."""
    waits = waits_of_a_step(SparseEnumELBO(mode, max_plate_nesting=1), *SPARSE, validated=True)
    assert own(waits) <= MODES[mode] + 4, waits


def test_chunks_wait_no_more() -> None:
    waits = waits_of_a_step(SparseEnumELBO("packed", chunk_rows=7, max_plate_nesting=1), *SPARSE)
    assert own(waits) <= MODES["packed"], waits


ESTIMATORS: dict[str, tuple[Any, Any, int]] = {
    "Exact": (Exact, SPARSE, 1),
    "Exact packed": (lambda: Exact("packed"), SPARSE, 2),
    "ScoreFunction": (ScoreFunction, SPARSE, 0),
    "LeaveOneOut": (lambda: LeaveOneOut(4), SPARSE, 0),
    "RaoBlackwell": (lambda: RaoBlackwell(2), SPARSE, 0),
    "RaoBlackwell by coverage": (lambda: RaoBlackwell(coverage=0.9), SPARSE, 1),
    "UnorderedSet": (lambda: UnorderedSet(3), SPARSE, 0),
    "MovingAverage": (MovingAverage, SPARSE, 0),
    "NeuralBaseline": (lambda: NeuralBaseline(nn.Linear(X, 1)), SPARSE, 1),  # for NaN
    "SelfCritic": (SelfCritic, SPARSE, 0),
    "SampleBaseline": (SampleBaseline, SPARSE, 0),
    "VIMCO": (lambda: VIMCO(3), SPARSE, 0),
    "DisARM": (DisARM, BITS, 0),
    "ARMS": (lambda: ARMS(3), BITS, 0),
    "REBAR": (REBAR, ONE_HOT, 0),
    "RELAX": (lambda: RELAX(nn.Linear(K, 1)), BITS, 0),
    "MuProp": (MuProp, BITS, 0),
    "DoubleControlVariate": (lambda: DoubleControlVariate(2), BITS, 0),
    "LocalExpectation": (LocalExpectation, BITS, 0),
    "StraightThrough": (StraightThrough, ONE_HOT, 0),
    "pathwise": (dict, GATES, 0),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_steps_of_estimators(name: str) -> None:
    make, program, expected = ESTIMATORS[name]
    waits = waits_of_a_step(EstimatorELBO(make(), max_plate_nesting=1), *program)
    assert own(waits) == expected, waits


@pytest.mark.parametrize(
    "project",
    [
        sparsemax,
        entmax15,
        lambda x: entmax(x, 1.3),
        lambda x: topk_sparsemax(x, 2),
        lambda x: sparsemax_loss(x, torch.zeros(B).long()),
        lambda x: entmax15_loss(x, torch.zeros(B).long()),
        lambda x: entmax_loss(x, torch.zeros(B).long(), 1.3),
    ],
)
def test_projections(project: Callable[[Tensor], Tensor]) -> None:
    scores = torch.randn(B, K, requires_grad=True)
    with count_host_waits() as waits:
        project(scores).square().sum().backward()
    assert own(waits) == 0, waits


def families() -> dict[str, tuple[Callable[[], Any], dict[str, int]]]:
    """Each family, and what of it waits: as its docstring says."""
    a, t, three = torch.randn(4, 5), torch.rand(4, 5) + 0.5, torch.randn(4, 5, 3)
    slab, bits, hot = dist.Normal(a, t), torch.rand(4, 5), torch.tensor(0.5)
    return {
        "SparseCategorical": (lambda: sdist.SparseCategorical(a), {}),
        "SparseOneHotCategorical": (lambda: sdist.SparseOneHotCategorical(a), {}),
        "SparseHMM": (
            lambda: sdist.SparseHMM(
                a[0], sdist.SparseCategorical(torch.eye(5) + 0.1), dist.Normal(a[0], t[0]), duration=6
            ),
            {"log_prob": 2},
        ),
        "HardConcrete": (lambda: sdist.HardConcrete(0.5, a), {}),
        "HardKumaraswamy": (lambda: sdist.HardKumaraswamy(t, 1.0), {}),
        "RectifiedNormal": (lambda: sdist.RectifiedNormal(a, 1.0), {}),
        "Rectified": (lambda: sdist.Rectified(slab), {"entropy": 1, "mean": 1, "kl": 2}),
        "StretchedRectified": (
            lambda: sdist.StretchedRectified(slab, -0.1, 1.1),
            {"entropy": 1, "mean": 1, "kl": 2},
        ),
        "SpikeAndSlab": (lambda: sdist.SpikeAndSlab(slab, logits=a), {"rsample": 1}),
        "SpikeAndExponential": (lambda: sdist.SpikeAndExponential(t, logits=a), {"rsample": 1}),
        "ZeroOneInflated": (lambda: sdist.ZeroOneInflated(dist.Beta(t, t), logits=three), {}),
        "GibbsFaces": (lambda: sdist.GibbsFaces(a), {}),
        "MaxEntropyFaces": (lambda: sdist.MaxEntropyFaces(5, bits[:, 0] + 1.5), {}),
        "FaceDirichlet": (lambda: sdist.FaceDirichlet(t), {}),
        "MixedDirichlet": (lambda: sdist.MixedDirichlet(a, t), {}),
        "MixedLogisticNormal": (lambda: sdist.MixedLogisticNormal(a, a, t), {"entropy": 4, "mean": 4}),
        "GaussianSparsemax": (lambda: sdist.GaussianSparsemax(a, t), {"log_prob": 1}),
        "HardConcreteSimplex": (lambda: sdist.HardConcreteSimplex(0.5, a, 0.1), {"log_prob": 1}),
        "GumbelSoftmaxST": (lambda: sdist.GumbelSoftmaxST(hot, logits=a), {}),
        "OneHotCategoricalST": (lambda: sdist.OneHotCategoricalST(a), {}),
        "BernoulliST": (lambda: sdist.BernoulliST(a), {}),
    }


@pytest.mark.parametrize("name", families())
def test_distributions(name: str) -> None:
    with pyro.validation_enabled(False):
        make, expected = families()[name]
        d = make()
        value = d.sample((3,))
        calls: dict[str, Callable[[], Any]] = {
            "make": make,
            "sample": lambda: d.sample((3,)),
            "rsample": lambda: d.rsample((3,)),
            "log_prob": lambda: d.log_prob(value),
            "entropy": d.entropy,
            "mean": lambda: d.mean,
            "kl": lambda: kl_divergence(d, d),
        }
        found = {}
        for what, call in calls.items():
            with count_host_waits() as waits:
                try:
                    call()
                except (NotImplementedError, UnknownDivergence):
                    continue
            if own(waits):
                found[what] = own(waits)
    assert found == expected
