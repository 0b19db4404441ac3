"""Runs on the side leave the param store and modules' buffers as they were."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_sparse.distributions import SparseCategorical
from pyro_sparse.estimators import Exact, LeaveOneOut, MovingAverage, SampleBaseline, ScoreFunction, SelfCritic
from pyro_sparse.infer import EstimatorELBO, SparseEnumELBO
from pyro_sparse.infer.expansion.estimator_messenger import mode
from pyro_sparse.infer.pyro_internals import no_new_parameters
from pyro_sparse.infer.runs.undisturbed import buffers_as_they_were

X = torch.tensor([[0.3, -1.0], [1.0, 0.2], [-0.4, 0.1]], dtype=torch.float64)


def two_names(network: nn.Module) -> tuple[Any, Any]:
    def model() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(z.to(X), 1.0), obs=X[:, 0])

    def guide() -> None:
        pyro.module("vae", nn.ModuleDict({"encoder": network}))
        pyro.module("encoder", network)
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Categorical(logits=network(X)))

    return model, guide


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("estimator", [ScoreFunction(), ScoreFunction(MovingAverage()), Exact()])
def test_one_parameter_under_two_names(estimator: Any, known: bool) -> None:
    """The numbers of ``Trace_ELBO`` where they are to be equal; under one of the names it may be known already."""
    network = nn.Linear(2, 3)
    model, guide = two_names(network)
    if known:
        pyro.module("encoder", network)
    losses = []
    for elbo in (EstimatorELBO(estimator), Trace_ELBO()):
        pyro.set_rng_seed(1)
        losses.append(SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), elbo).step())
    assert losses[0] == pytest.approx(losses[1], abs=1e-12) or isinstance(estimator, Exact)
    store = pyro.get_param_store()
    assert store["vae$$$encoder.weight"] is store["encoder$$$weight"] is network.weight
    assert store.param_name(network.weight) is not None


def test_what_is_left_of_a_run() -> None:
    store, weight = pyro.get_param_store(), nn.Parameter(torch.zeros(2))
    pyro.param("first", weight)
    with pytest.raises(ZeroDivisionError), no_new_parameters():
        pyro.param("second", weight)
        pyro.param("third", torch.ones(1), constraint=dist.constraints.positive)
        raise ZeroDivisionError
    assert list(store.keys()) == ["first"] and store.param_name(weight) == "first"
    assert list(store._constraints) == ["first"]


def normalised() -> tuple[Any, Any, nn.BatchNorm1d]:
    norm = nn.BatchNorm1d(2)
    logits = nn.Linear(2, 1)

    def model() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X[:, 0])

    def guide() -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(logits=logits(norm(X)).squeeze(-1)))

    return model, guide, norm


def statistics(elbo: Any, steps: int = 2) -> tuple[int, Tensor]:
    pyro.set_rng_seed(0)
    model, guide, norm = normalised()
    for _ in range(steps):
        elbo.loss_and_grads(model, guide)
    assert norm.num_batches_tracked is not None and norm.running_mean is not None
    return int(norm.num_batches_tracked), norm.running_mean


@pytest.mark.parametrize(
    "elbo",
    [
        EstimatorELBO(ScoreFunction(SelfCritic())),
        EstimatorELBO(ScoreFunction(SampleBaseline())),
        EstimatorELBO(Exact()),
        EstimatorELBO(LeaveOneOut(2)),
        SparseEnumELBO("auto", max_plate_nesting=1, strict_enumeration_warning=False),
    ],
    ids=["self-critic", "sample", "exact", "particles", "auto"],
)
def test_batch_normalisation_counts_each_step_once(elbo: Any) -> None:
    """Whatever else is run to find plates, to learn what slots cost, or for a baseline. As under ``Trace_ELBO``."""
    count, mean = statistics(Trace_ELBO())
    assert count == 2
    got, got_mean = statistics(elbo)
    assert got == count
    torch.testing.assert_close(got_mean, mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Multinomial(2, probs=torch.ones(3)),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Poisson(torch.ones(2))),
    ],
)
def test_self_critic_without_a_mode(fn: Any) -> None:
    """Named, before any gradient; a second draw serves."""

    def program() -> None:
        weight = pyro.param("weight", torch.tensor(0.5))
        pyro.sample("z", fn)
        pyro.factor("f", weight, has_rsample=True)

    with pytest.raises(
        ValueError, match=r"(?s)SelfCritic, site 'z': expected a distribution with a mode.*SampleBaseline"
    ):
        EstimatorELBO(ScoreFunction(SelfCritic())).loss_and_grads(program, program)
    assert pyro.param("weight").grad is None
    EstimatorELBO(ScoreFunction(SampleBaseline())).loss_and_grads(program, program)


def test_the_mode_of_a_wrapped_distribution() -> None:
    poisson = dist.ExpandedDistribution(dist.Poisson(torch.tensor(2.5)), torch.Size([3]))
    assert mode(poisson, "z").tolist() == [2.0, 2.0, 2.0]
    assert mode(poisson.to_event(1), "z").tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_a_side_run_leaves_in_buffers(compiled: bool) -> None:
    """Neither values nor versions, by which a graph from before knows what it saved."""
    norm = nn.BatchNorm1d(2)
    network: Any = torch.compile(norm, backend="eager") if compiled else norm
    loss = network(X).square().sum()
    before = {name: (buffer, buffer.clone(), buffer._version) for name, buffer in norm.named_buffers()}
    with buffers_as_they_were():
        network(X + 1)
    for name, buffer in norm.named_buffers():
        held, value, version = before[name]
        assert buffer is held and torch.equal(buffer, value) and buffer._version == version
    loss.backward()
    with pytest.raises(ZeroDivisionError), buffers_as_they_were():
        network(X)
        raise ZeroDivisionError
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("elbo", [lambda: SparseEnumELBO(), lambda: EstimatorELBO(Exact())])
@pytest.mark.parametrize("lazy", [False, True])
def test_the_first_step_counts_once(lazy: bool, elbo: Any) -> None:
    """Whatever is run to find the plates, or to be compared; a lazy module gets its sizes."""
    norm = nn.LazyBatchNorm1d() if lazy else nn.BatchNorm1d(2)

    def program(scores: Tensor) -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", SparseCategorical(scores))

    elbo().loss(lambda: program(torch.zeros(2)), lambda: program(norm(X)))
    assert int(norm.num_batches_tracked) == 1
