"""A sparse mean-field guide of a model: its ELBO by dense enumeration, and the evidence once it is trained."""

from __future__ import annotations

import io
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuideList, AutoNormal

from pyro_sparse.distributions import SparseCategorical, SparseOneHotCategorical
from pyro_sparse.estimators import Exact
from pyro_sparse.infer import AutoSparseParallel, EstimatorELBO, SparseEnumELBO
from pyro_sparse.projections import entmax15, sparsemax

B, K = 4, 5
PRIOR = torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0], dtype=torch.float64)
LOC = torch.linspace(-2.0, 2.0, K, dtype=torch.float64)
X = torch.tensor([-1.9, -0.2, 0.4, 3.0], dtype=torch.float64)


def one_site(family: Any = SparseCategorical, subsample: int | None = None) -> None:
    with pyro.plate("N", B, subsample_size=subsample) as i:
        z = pyro.sample("z.in.part", family(probs=PRIOR))
        loc = LOC[z] if family in (SparseCategorical, dist.Categorical) else z @ LOC
        pyro.sample("x", dist.Normal(loc, 1.0), obs=X[i])


def two_sites() -> None:
    with pyro.plate("N", B):
        z = pyro.sample("z", SparseCategorical(probs=PRIOR).mask(torch.arange(B) > 0))
        y = pyro.sample("y", SparseOneHotCategorical(0.5 * torch.eye(K)[z]))
        pyro.sample("x", dist.Normal(LOC[z] + y @ LOC, 1.0), obs=X)


def moved(guide: AutoSparseParallel) -> None:
    with torch.no_grad():
        for scores in guide.parameters():
            scores.add_(0.6 * torch.randn(scores.shape))


FAMILIES = [SparseCategorical, SparseOneHotCategorical, dist.Categorical, dist.OneHotCategorical]


@pytest.mark.parametrize("elbo", [SparseEnumELBO(max_plate_nesting=1), EstimatorELBO(Exact(), max_plate_nesting=1)])
@pytest.mark.parametrize("model", [*(lambda f=f: one_site(f) for f in FAMILIES), two_sites])
def test_the_elbo_is_that_of_dense_enumeration(model: Any, elbo: Any) -> None:
    guide = AutoSparseParallel(model)
    guide()
    moved(guide)

    loss = elbo.loss(model, guide)
    expected = TraceEnum_ELBO(max_plate_nesting=1).loss(model, config_enumerate(guide))
    assert loss == pytest.approx(expected)
    values = poutine.trace(guide).get_trace()
    assert any((values.nodes[name]["fn"].support_size < K - 1).any() for name in values.stochastic_nodes if name != "N")


def evidence() -> float:
    return float((PRIOR.log() + dist.Normal(LOC, 1.0).log_prob(X[:, None])).logsumexp(-1).sum())


@pytest.mark.parametrize("projection", [sparsemax, entmax15])
def test_it_comes_to_the_evidence(projection: Any) -> None:
    """But for improbable outcomes, which it leaves out."""
    guide = AutoSparseParallel(one_site, projection)
    svi = SVI(one_site, guide, pyro.optim.Adam({"lr": 0.05}), SparseEnumELBO(max_plate_nesting=1))
    first, *_, last = (svi.step() for _ in range(100))
    assert -evidence() <= last < -evidence() + 0.02 < first - 1


def test_it_starts_at_the_prior() -> None:
    guide = AutoSparseParallel(one_site)
    guide()
    fn = poutine.trace(guide).get_trace().nodes["z.in.part"]["fn"]
    torch.testing.assert_close(fn.probs, PRIOR.expand(B, K))


def test_zeros_that_depend_on_another_draw_are_not_masked() -> None:
    def model() -> None:
        with pyro.plate("N", B):
            z = pyro.sample("z", SparseCategorical(probs=PRIOR))
            pyro.sample("y", SparseOneHotCategorical(2 * torch.eye(K)[z]))

    guide = AutoSparseParallel(model)
    guide()
    assert torch.equal(guide._closed["z"], (PRIOR == 0).expand(B, K)) and not guide._closed["y"].any()
    blocked = AutoSparseParallel(poutine.block(model, expose=["y"]))
    blocked()
    assert not blocked._closed["y"].any()
    with pytest.raises(ValueError, match="site 'y': expected a prior that is positive wherever the guide is"):
        SparseEnumELBO(max_plate_nesting=1).loss(model, guide)


def test_subsamples_take_their_own_rows() -> None:
    guide = AutoSparseParallel(lambda: one_site(subsample=2))
    guide()
    [scores] = guide.parameters()
    assert scores.shape == (B, K)
    moved(guide)
    for _ in range(5):
        trace = poutine.trace(guide).get_trace()
        rows, fn = trace.nodes["N"]["value"], trace.nodes["z.in.part"]["fn"]
        expected = SparseCategorical(scores[rows].masked_fill(PRIOR == 0, -torch.inf)).probs
        torch.testing.assert_close(fn.probs, expected)


def test_beside_another_guide_and_in_a_file() -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(LOC, 1.0).to_event(1))
        with pyro.plate("N", B):
            z = pyro.sample("z", SparseCategorical(probs=PRIOR))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=X)

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["z"])))
    guide.append(AutoSparseParallel(poutine.block(model, expose=["z"])))
    assert SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), SparseEnumELBO(max_plate_nesting=1)).step() > 0

    alone, file = AutoSparseParallel(one_site), io.BytesIO()
    before = alone()
    torch.save(alone, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)()["z.in.part"].shape == before["z.in.part"].shape


def test_what_it_does_not_serve() -> None:
    with pytest.raises(NotImplementedError, match=r"AutoSparseParallel, site 'b': expected .*, got Bernoulli.*Block"):
        AutoSparseParallel(lambda: pyro.sample("b", dist.Bernoulli(0.5)))()


def test_why_it_is_there() -> None:
    """Pyro's own compares exact types."""
    with pytest.raises(NotImplementedError, match="SparseCategorical is not supported"):
        AutoDiscreteParallel(one_site)()
