"""Errors on several values at once: those that are about that say so, and a user's own go on as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_sparse.distributions import SparseCategorical
from pyro_sparse.estimators import (
    REBAR,
    VIMCO,
    DisARM,
    DoubleControlVariate,
    Estimator,
    Exact,
    LeaveOneOut,
    LocalExpectation,
    MuProp,
    RaoBlackwell,
    StraightThrough,
)
from pyro_sparse.infer import EstimatorELBO, SparseEnumELBO

B, C = 4, 3
X = torch.tensor([0, 2, 1, 1])
Decoder = Callable[[Tensor], Tensor]


def table() -> Tensor:
    return torch.tensor([[0.5, -1.0, 0.3], [1.0, 0.2, -0.7]])


def scores(z: Tensor) -> Tensor:
    return torch.stack([z, 1 - z], -1) @ table()


def program(decode: Decoder) -> tuple[Any, Any]:
    def model() -> None:
        with pyro.plate("N", B):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Categorical(probs=decode(z)), obs=X)

    def guide() -> None:
        with pyro.plate("N", B):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(B))))

    return model, guide


def normalised(flat: bool) -> Decoder:
    norm = nn.BatchNorm1d(C)

    def decode(z: Tensor) -> Tensor:
        out = norm(scores(z).reshape(-1, C)).reshape(*z.shape, C) if flat else norm(scores(z))
        return out.softmax(-1)

    return decode


def dropped(z: Tensor) -> Tensor:
    return nn.functional.dropout(scores(z), 0.5).softmax(-1)


ON_ONE_ONLY: dict[str, Callable[[], Decoder]] = {
    "branch": lambda: lambda z: (scores(z) if z[..., 0] else -scores(z)).softmax(-1),
    "view": lambda: lambda z: (z.view(B)[:, None] * scores(z)).softmax(-1),
    "cat": lambda: lambda z: torch.cat([torch.zeros(B, 2), scores(z)], -1)[..., 2:].softmax(-1),
    "batch normalisation": lambda: normalised(False),
    "matrix": lambda: lambda z: torch.mm(torch.stack([z, 1 - z], -1), table()).softmax(-1),
}
MIXED: dict[str, Callable[[], Decoder]] = {
    "softmax(1)": lambda: lambda z: scores(z).softmax(1),
    "sum": lambda: lambda z: (scores(z) * z.sum()).softmax(-1),
}
OWN: dict[str, tuple[Decoder, type[Exception]]] = {
    "index": (lambda z: table()[z.long() + 1], IndexError),
    "division": (lambda z: scores(z) / (1 // 0), ZeroDivisionError),
    "shape": (lambda z: torch.zeros(7) + torch.zeros(3), RuntimeError),
    "words": (lambda z: _raise("num_layers must be an integer: indices of a single one"), ValueError),
}


def _raise(text: str) -> Tensor:
    raise ValueError(text)


SEVERAL = [LeaveOneOut(5), RaoBlackwell(), Exact(), VIMCO(5)]


@pytest.mark.parametrize("estimator", SEVERAL, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", ON_ONE_ONLY)
def test_a_program_for_one_value_at_a_time(name: str, estimator: Estimator) -> None:
    """And one value at a time it is run."""
    model, guide = program(ON_ONE_ONLY[name]())
    match = rf"site 'z' \({type(estimator).__name__}\): .*on a single one at a time.*vectorized=False"
    with pytest.raises(ValueError, match=match) as info:
        EstimatorELBO(estimator).loss_and_grads(model, guide)
    assert info.value.__cause__ is not None and str(info.value.__cause__).splitlines()[0] in str(info.value)
    assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())
    assert EstimatorELBO(LeaveOneOut(2, vectorized=False)).loss_and_grads(model, guide) > 0


@pytest.mark.parametrize("estimator", [*SEVERAL, StraightThrough()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", OWN)
def test_a_users_own_mistake_is_raised_as_it_is(name: str, estimator: Estimator) -> None:
    """Whatever its text says."""
    decode, kind = OWN[name]
    with pytest.raises(kind) as info:
        EstimatorELBO(estimator, max_plate_nesting=1).loss_and_grads(*program(decode))
    assert "EstimatorELBO" not in str(info.value)


@pytest.mark.parametrize("estimator", SEVERAL, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", MIXED)
def test_a_program_that_mixes_values_is_refused_at_every_first_step(name: str, estimator: Estimator) -> None:
    elbo = EstimatorELBO(estimator)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"site 'z' .*the same on several values at once .*\['x'\].*vectorized=F"):
            elbo.loss_and_grads(*program(MIXED[name]()))
    assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())


def test_without_validation_it_is_another_number() -> None:
    """The negative control: what the check is there for. Row by row it is the mean of what single runs give."""
    model, guide = program(MIXED["softmax(1)"]())
    with pyro.validation_enabled(False):
        wrong = EstimatorELBO(Exact()).loss(model, guide)
    right = EstimatorELBO(Exact()).loss(*program(lambda z: _by_row(z)))
    assert abs(wrong - right) > 0.1


def _by_row(z: Tensor) -> Tensor:
    return scores(z).softmax(-1)


@pytest.mark.parametrize("estimator", SEVERAL, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("make", [lambda: _by_row, lambda: dropped, lambda: normalised(True)])
def test_programs_that_are_the_same(make: Any, estimator: Estimator) -> None:
    """Noise is no difference, nor is what batch normalisation does in training."""
    elbo = EstimatorELBO(estimator)
    elbo.loss_and_grads(*program(make()))
    assert elbo._compared


def test_the_check_moves_nothing() -> None:
    results = []
    for check in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        with pyro.validation_enabled(check):
            elbo = EstimatorELBO(LeaveOneOut(3))
            results.append(elbo.loss_and_grads(*program(_by_row)))
            results.append(torch.rand(()).item())
    assert results[:2] == results[2:]


def test_relaxed_values_are_told_from_several() -> None:
    def model() -> None:
        with pyro.plate("N", B):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(2)))
            assert ((y == 0) | (y == 1)).all(), "one-hot vectors, please"
            pyro.sample("x", dist.Categorical(logits=y @ table()), obs=X)

    def guide() -> None:
        with pyro.plate("N", B):
            pyro.sample("y", dist.OneHotCategorical(logits=pyro.param("logits", torch.zeros(B, 2))))

    with pytest.raises(ValueError, match=r"site 'y' \(REBAR\): expected a model that takes one-hot vectors .*please"):
        EstimatorELBO(REBAR()).loss_and_grads(model, guide)
    pyro.clear_param_store()
    assert EstimatorELBO(RaoBlackwell()).loss_and_grads(model, guide) > 0


# Sites that each carry a dim of their own


def two(combine: Callable[..., Tensor], family: Any = lambda s: dist.Bernoulli(logits=s)) -> tuple[Any, Any]:
    """Two discrete sites and one that is reparameterised."""

    def model() -> None:
        with pyro.plate("N", B):
            a, b = (pyro.sample(name, family(torch.zeros(B))) for name in "ab")
            c = pyro.sample("c", dist.Normal(torch.zeros(B), 1.0))
            pyro.sample("x", dist.Normal(combine(a, b, c), 1.0), obs=X.double())

    def guide() -> None:
        s = pyro.param("s", torch.tensor([[0.3], [-0.8]]).double() * torch.ones(B))
        with pyro.plate("N", B):
            for name, own in zip("ab", s, strict=True):
                pyro.sample(name, family(own))
            pyro.sample("c", dist.Delta(torch.full((B,), 0.1)))

    return model, guide


def sparse(s: Tensor) -> SparseCategorical:
    return SparseCategorical(torch.stack([torch.zeros_like(s), s], -1))


def stacked(*values: Tensor) -> Tensor:
    return (torch.stack([v.double() for v in values], -1) * torch.tensor([1.0, -2.0, 3.0][: len(values)])).sum(-1)


APART: dict[str, tuple[Callable[..., Tensor], str]] = {
    "stack": (lambda a, b, c: stacked(a, b), "a, b"),
    "cat": (lambda a, b, c: torch.cat([a.double()[..., None], b.double()[..., None]], -1).sum(-1) + c, "a, b"),
    "with a continuous one": (lambda a, b, c: stacked(b, c) + a, "b, c"),
    "all": (lambda a, b, c: stacked(a, b, c), "a, b, c"),
}
IN_ONE_DIM = [Exact(), DisARM(), RaoBlackwell(), LocalExpectation(), REBAR(), MuProp(), DoubleControlVariate(2)]


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("elbo", [*IN_ONE_DIM, None], ids=lambda e: type(e).__name__)
def test_values_that_are_combined_without_broadcasting(elbo: Estimator | None, name: str) -> None:
    combine, sites = APART[name]
    loss = SparseEnumELBO() if elbo is None else EstimatorELBO({"a": elbo, "b": elbo})
    first, second = sites.split(", ")[:2]
    given = "" if elbo is None else rf" \({type(elbo).__name__}\)"
    match = rf"site '{first}'{given} and '{second}'.*a dim.* on the left.*\(torch.broadcast_tensors\({sites}\)\)"
    with pytest.raises(ValueError, match=match) as info:
        loss.loss_and_grads(*two(combine, sparse if elbo is None else two.__defaults__[0]))  # type: ignore[index]
    assert isinstance(info.value.__cause__, RuntimeError) and "one-hot" not in str(info.value)


@pytest.mark.parametrize("name", APART)
def test_the_fix_that_is_named(name: str) -> None:
    """Broadcast, the same program has the loss of the one that adds up what it would stack."""
    combine, _ = APART[name]

    def broadcast(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return combine(*torch.broadcast_tensors(a, b, c))

    loss = EstimatorELBO(Exact()).loss(*two(broadcast))
    assert loss == pytest.approx(SparseEnumELBO(max_plate_nesting=1).loss(*two(broadcast, with_same_probabilities)))


def with_same_probabilities(s: Tensor) -> SparseCategorical:
    return SparseCategorical(probs=torch.stack([torch.sigmoid(-s), torch.sigmoid(s)], -1))


ENUMERATED: list[dict[str, Any]] = [{}, {"mode": "auto"}, {"num_particles": 3, "vectorize_particles": True}]


@pytest.mark.parametrize("options", ENUMERATED, ids=str)
@pytest.mark.parametrize("name", ON_ONE_ONLY)
def test_a_program_for_one_value_at_a_time_under_enumeration(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"SparseEnumELBO, site 'z': .*on a single one at a time.*vectorized=False"):
        SparseEnumELBO(**options).loss_and_grads(*enumerable(ON_ONE_ONLY[name]()))


@pytest.mark.parametrize("name", OWN)
def test_a_users_own_mistake_under_enumeration(name: str) -> None:
    decode, kind = OWN[name]
    with pytest.raises(kind) as info:
        SparseEnumELBO(max_plate_nesting=1).loss_and_grads(*enumerable(decode))
    assert "SparseEnumELBO" not in str(info.value)


@pytest.mark.parametrize("options", ENUMERATED, ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_a_program_that_mixes_outcomes_is_refused_at_every_first_step(name: str, options: dict[str, Any]) -> None:
    elbo = SparseEnumELBO(**options)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"SparseEnumELBO, site 'z': .*the same on several values.*\['x'\].*vect"):
            elbo.loss_and_grads(*enumerable(MIXED[name]()))
    assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())


def test_without_validation_the_sum_over_outcomes_is_another_number() -> None:
    with pyro.validation_enabled(False):
        wrong = SparseEnumELBO().loss(*enumerable(MIXED["softmax(1)"]()))
    assert abs(wrong - SparseEnumELBO().loss(*enumerable(_by_row))) > 0.1


@pytest.mark.parametrize("options", ENUMERATED, ids=str)
@pytest.mark.parametrize("make", [lambda: _by_row, lambda: dropped, lambda: normalised(True)])
def test_programs_that_are_the_same_under_enumeration(make: Any, options: dict[str, Any]) -> None:
    elbo = SparseEnumELBO(**options)
    elbo.loss_and_grads(*enumerable(make()))
    assert elbo._compared


def test_the_check_of_outcomes_moves_nothing() -> None:
    """Neither random numbers nor a batch normalisation; and is made once."""
    results: list[list[Any]] = []
    for check in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        norm, calls = nn.BatchNorm1d(C), []

        def decode(z: Tensor, norm: nn.Module = norm, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return nn.functional.dropout(norm(scores(z).reshape(-1, C)).reshape(*z.shape, C)).softmax(-1)

        elbo = SparseEnumELBO(max_plate_nesting=1)
        with pyro.validation_enabled(check):
            losses = [elbo.loss(*enumerable(decode)) for _ in range(2)]
        results.append([losses, torch.rand(()).item(), norm.running_mean.tolist(), int(norm.num_batches_tracked)])
        # Three on single values, one on all, and, since noise makes a difference, one to see what it reaches.
        assert len(calls) == (2 + 3 + 1 + 1 if check else 2)
    assert results[0] == results[1]


@pytest.mark.parametrize("make", [lambda: EstimatorELBO({"z": Exact()}), SparseEnumELBO], ids=["estimator", "sparse"])
def test_what_the_other_sites_drew_once_has_no_dim_of_its_own(make: Any) -> None:
    """A table of means that is drawn once and indexed, as in a mixture, is the same for all outcomes."""
    seen = []

    def program(of_model: bool) -> None:
        loc = pyro.param("loc", torch.arange(2.0))
        with pyro.plate("K", 2):
            mean = pyro.sample("mean", dist.Normal(loc, 1.0))
        with pyro.plate("N", 2):
            z = pyro.sample("z", sparse(torch.zeros(2) if of_model else loc))
            if of_model:
                seen.append(mean.shape)
                pyro.sample("x", dist.Normal(mean[z], 1.0), obs=torch.tensor([0.3, 2.0]))

    assert math.isfinite(make().loss(lambda: program(True), lambda: program(False)))
    assert set(seen) == {(2,)} and len(seen) > 4


def enumerable(decode: Decoder) -> tuple[Any, Any]:
    """:func:`program` with sparse sites."""

    def model() -> None:
        with pyro.plate("N", B):
            z = pyro.sample("z", sparse(torch.zeros(B))).to(table().dtype)
            pyro.sample("x", dist.Categorical(probs=decode(z)), obs=X)

    def guide() -> None:
        with pyro.plate("N", B):
            pyro.sample("z", sparse(pyro.param("logits", torch.zeros(B))))

    return model, guide


# Modules that take one batch dim


def over_leading_dims(network: Callable[[Tensor], Tensor], h: Tensor, event_dim: int) -> Tensor:
    leading = h.shape[:-event_dim]
    out = network(h.reshape(-1, *h.shape[-event_dim:]))
    return out.reshape(*leading, *out.shape[1:])


class Sub(nn.Module):
    """A user's own, of which the outermost that will do is to be named."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, C, 2), nn.Flatten(), nn.Linear(C, C))

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.net(h.unsqueeze(-2))
        return out


def last(lstm: nn.LSTM) -> Decoder:
    return lambda h: lstm(h)[0][..., -1, :]


#: with the shape of an event, and what is called
ONE_BATCH_DIM: dict[str, tuple[Callable[[], Any], tuple[int, ...], Callable[[Any], Decoder]]] = {
    "Conv2d": (lambda: nn.Conv2d(1, C, 2), (1, 2, 2), lambda net: lambda h: net(h).flatten(-3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, C, 1), (2, 1), lambda net: lambda h: net(h).flatten(-2)),
    "LSTM": (lambda: nn.LSTM(2, C, batch_first=True), (5, 2), last),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(C), (C,), lambda net: net),
    "Sub": (Sub, (2,), lambda net: net),
}


@pytest.mark.parametrize("elbo", [Exact(), LeaveOneOut(5), None], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", ONE_BATCH_DIM)
def test_modules_that_take_one_batch_dim(name: str, elbo: Estimator | None) -> None:
    """They are named with the fix, and with that it runs."""
    make, shape, call = ONE_BATCH_DIM[name]
    net, event = make(), torch.linspace(-1.0, 1.0, 24)[: math.prod(shape)].reshape(shape)

    def decode(z: Tensor, fixed: bool = False) -> Tensor:
        h = (z + torch.arange(B))[(..., *(None,) * len(shape))] * event
        return (over_leading_dims(call(net), h, len(shape)) if fixed else call(net)(h)).softmax(-1)

    def loss(decode: Decoder) -> float:
        made = SparseEnumELBO() if elbo is None else EstimatorELBO(elbo)
        value: float = made.loss(*(enumerable if elbo is None else program)(decode))
        return value

    fix = rf"Call {name}, which .*over_leading_dims\(network, h, event_dim={len(shape)}\)"
    with pytest.raises(ValueError, match=rf"site 'z'.*on a single one at a time.*{fix}"):
        loss(decode)
    assert loss(lambda z: decode(z, True)) > 0


def test_modules_that_take_any_leading_dims_are_not_named() -> None:
    net = nn.Linear(2, C)
    model, guide = program(lambda z: net(torch.stack([z, 1 - z], -1).view(B, 2)).softmax(-1))
    with pytest.raises(ValueError, match="on a single one at a time") as info:
        EstimatorELBO(Exact()).loss(model, guide)
    assert "over_leading_dims" not in str(info.value)
