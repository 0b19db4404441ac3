"""Masked rows of a guide site: they set neither supports nor statistics, and the ELBO is what it is without them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

from pyro_sparse.distributions import (
    MaskedSparseDistribution,
    SparseCategorical,
    SparseDistribution,
    SparseOneHotCategorical,
)
from pyro_sparse.estimators import Exact, StraightThrough
from pyro_sparse.infer import EstimatorELBO, SparseEnumELBO
from pyro_sparse.infer.expansion.masked_rows import mask_of
from pyro_sparse.infer.terms import masked

K, T, B = 6, 3, 4
REAL = torch.arange(T)[:, None] < torch.tensor([3, 1, 2, 1])
#: in masked rows every outcome has mass, in the others few have
SCORES = torch.where(REAL.unsqueeze(-1), 4 * torch.randn(T, B, K, generator=torch.Generator().manual_seed(0)), 0.0)
X = torch.linspace(-1.0, 1.0, T * B).reshape(T, B)
WEIGHT = torch.linspace(-2.0, 2.0, K)
Program = Callable[[], None]


def scores() -> Tensor:
    value: Tensor = pyro.param("scores", SCORES.clone().double())
    return value


def decoded(z: Tensor) -> Tensor:
    return pyro.param("weight", WEIGHT.clone().double())[z]  # type: ignore[no-any-return]


def plates() -> Any:
    return pyro.plate("B", B, dim=-1), pyro.plate("T", T, dim=-2)


def prior() -> SparseCategorical:
    return SparseCategorical(probs=torch.full((K,), 1 / K))


def around() -> tuple[Program, Program]:
    """The mask around all sites."""

    def model() -> None:
        b, t = plates()
        with b, t, poutine.mask(mask=REAL):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(decoded(z), 1.0), obs=X)

    def guide() -> None:
        b, t = plates()
        with b, t, poutine.mask(mask=REAL):
            pyro.sample("z", SparseCategorical(scores()))

    return model, guide


def of_distributions(seen: bool = False, also: bool = False) -> tuple[Program, Program]:
    """The mask of distributions; ``seen``: the data's have none; ``also``: nor has another variable and its data."""

    def model() -> None:
        b, t = plates()
        with b, t:
            z = pyro.sample("z", prior().mask(REAL))
            x = dist.Normal(decoded(z), 1.0)
            pyro.sample("x", x if seen else x.mask(REAL), obs=X)
            if also:
                y = pyro.sample("y", prior())
                pyro.sample("w", dist.Normal(decoded(y), 2.0), obs=X)

    def guide() -> None:
        b, t = plates()
        with b, t:
            pyro.sample("z", SparseCategorical(scores()).mask(REAL))
            if also:
                pyro.sample("y", SparseCategorical(2 * scores()))

    return model, guide


def chain() -> tuple[Program, Program]:
    """Word by word: a mask on each, the next depends on the last."""

    def program(of_model: bool) -> None:
        s = scores()
        with pyro.plate("B", B, dim=-1):
            z = torch.zeros((), dtype=torch.long)
            for t in range(T):
                with poutine.mask(mask=REAL[t]):
                    bump = 0.3 * decoded(z).unsqueeze(-1) * torch.arange(K)
                    z = pyro.sample(f"z{t}", prior() if of_model else SparseCategorical(s[t] + bump))
                    if of_model:
                        pyro.sample(f"x{t}", dist.Normal(decoded(z), 1.0), obs=X[t])

    return lambda: program(True), lambda: program(False)


def through_another(how: str, markov: bool = True) -> tuple[Program, Program]:
    """Two sites under one mask, and data of the second that have none: so the first matters, too."""
    recycled = pyro.markov if markov else nullcontext

    def bumped(z: Tensor) -> Tensor:
        return scores()[1] + 0.3 * decoded(z).unsqueeze(-1) * torch.arange(K)

    def guide() -> None:
        with pyro.plate("B", B, dim=-1), poutine.mask(mask=REAL[1]), recycled():
            y = pyro.sample("y", SparseCategorical(scores()[0]))
            if how == "of the model":
                return
            if how == "sparse":
                pyro.sample("z", SparseCategorical(bumped(y)))
            else:
                pyro.sample("z", dist.Categorical(logits=bumped(y)), infer={"enumerate": how})

    def model() -> None:
        marked = {"enumerate": "parallel"} if how == "of the model" else {}
        with pyro.plate("B", B, dim=-1), recycled():
            with poutine.mask(mask=REAL[1]):
                y = pyro.sample("y", prior())
                z = pyro.sample("z", dist.Categorical(logits=bumped(y).detach()), infer=marked)
            pyro.sample("x", dist.Normal(decoded(z), 1.0), obs=X[1])

    return model, guide


CASES: dict[str, Callable[[], tuple[Program, Program]]] = {
    "around": around,
    "of distributions": of_distributions,
    "seen by the data": lambda: of_distributions(seen=True),
    "beside another": lambda: of_distributions(also=True),
    "chain": chain,
    **{f"through another, {how}": partial(through_another, how) for how in ("sparse", "parallel", "of the model")},
}
WHOLE = {
    "seen by the data": {"z"},
    "through another, sparse": {"y", "z"},
    "through another, parallel": {"y"},
    "through another, of the model": {"y"},
}


def loss_and_gradients(elbo: Any, model: Program, guide: Program) -> list[Tensor]:
    pyro.clear_param_store()
    loss = elbo.loss_and_grads(model, guide)
    leaves = [p.unconstrained() for _, p in sorted(pyro.get_param_store().named_parameters())]
    return [torch.as_tensor(loss), *(torch.zeros_like(p) if p.grad is None else p.grad for p in leaves)]


def estimator_elbo(others: Any = None, **options: Any) -> EstimatorELBO:
    return EstimatorELBO({"*": Exact()} if others is None else {"z": Exact(), "*": others}, **options)


def dense(model: Program, guide: Program) -> list[Tensor]:
    return loss_and_gradients(TraceEnum_ELBO(max_plate_nesting=2), model, config_enumerate(guide))


@pytest.mark.parametrize("mode", ["padded", "union", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_the_elbo_is_the_dense_one(name: str, mode: str) -> None:
    model, guide = CASES[name]()
    expected = dense(model, guide)
    elbo = SparseEnumELBO(mode, max_plate_nesting=2)
    for _ in range(2):
        for x, y in zip(loss_and_gradients(elbo, model, guide), expected, strict=True):
            torch.testing.assert_close(x, y)
    assert elbo._rows.whole == WHOLE.get(name, set())


@pytest.mark.parametrize("options", [{}, {"costs": "graph"}, {"analytic_kl": True}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_estimators_elbo_is_the_dense_one(name: str, options: dict[str, Any]) -> None:
    another = name.startswith("through another")  # Exact takes no markov
    model, guide = through_another(name.split(", ")[1], markov=False) if another else CASES[name]()
    expected = dense(model, guide)
    elbo = estimator_elbo(max_plate_nesting=2, **options)
    for _ in range(2):
        for x, y in zip(loss_and_gradients(elbo, model, guide), expected, strict=True):
            torch.testing.assert_close(x, y)
    assert elbo._rows.whole == WHOLE.get(name, set())


@pytest.mark.parametrize("seen", [False, True])
def test_rows_of_the_estimators_elbo(seen: bool) -> None:
    """Those that are masked do not set how many outcomes the model runs on."""
    sizes = SparseCategorical(SCORES).support_size
    model, guide = of_distributions(seen)
    slots = []

    def program() -> None:
        with poutine.trace() as trace:
            model()
        slots.append(len(trace.trace.nodes["z"]["value"]))

    elbo = estimator_elbo(max_plate_nesting=2)
    elbo.loss(program, guide)
    assert slots[-1] == int(sizes.max() if seen else sizes[REAL].max())


def test_a_straight_through_site_that_sees_masked_rows() -> None:
    """Its divergence stands for its log-probabilities, and depends on what is drawn there."""

    def program(of_model: bool, family: Any) -> None:
        with pyro.plate("B", B):
            y = pyro.sample("y", (prior() if of_model else SparseCategorical(scores()[0])).mask(REAL[1]))
            logits = torch.zeros(K) if of_model else scores()[1] + 0.3 * decoded(y).unsqueeze(-1) * torch.arange(K)
            pyro.sample("z", family(logits=logits))

    elbo = EstimatorELBO({"y": Exact(), "z": StraightThrough()}, max_plate_nesting=1)
    loss = elbo.loss(lambda: program(True, dist.OneHotCategorical), lambda: program(False, dist.OneHotCategorical))
    exact = dense(lambda: program(True, dist.Categorical), lambda: program(False, dist.Categorical))[0]
    assert elbo._rows.whole == {"y"} and loss == pytest.approx(exact.item())


@pytest.mark.parametrize("name", ["around", "of distributions"])
def test_statistics_are_those_of_the_rest(name: str) -> None:
    sizes = SparseCategorical(SCORES).support_size
    largest = int(sizes[REAL].max())
    assert largest < int(sizes.max()) == K
    elbo = SparseEnumELBO(max_plate_nesting=2, max_support=largest)
    elbo.loss(*CASES[name]())
    stats = elbo.last_stats
    assert stats is not None and stats.max == largest and stats.model_rows == largest * T * B
    assert stats.mean == pytest.approx(sizes[REAL].double().mean().item())


def test_a_run_that_is_done_again_has_the_same_subsample() -> None:
    """Else subsamples without a masked row would come too often."""

    def program(of_model: bool) -> None:
        with pyro.plate("d", 8, subsample_size=1) as i, poutine.mask(mask=(i < 4)):
            z = pyro.sample("z", prior() if of_model else SparseCategorical(torch.zeros(K)))
        if of_model:
            with pyro.plate("data", 1):
                pyro.sample("x", dist.Normal(WEIGHT.double()[z], 1.0), obs=i.double())

    losses = []
    for whole in (set(), {"z"}):
        pyro.set_rng_seed(3)
        elbo = SparseEnumELBO(max_plate_nesting=1)
        elbo._rows.whole = whole
        losses.append([elbo.loss(lambda: program(True), lambda: program(False)) for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize("make", [SparseEnumELBO, estimator_elbo], ids=["sparse", "estimators"])
@pytest.mark.parametrize("in_guide, particles", [(False, 1), (False, 2), (True, 2)])
def test_a_run_that_is_done_again_moves_buffers_once(in_guide: bool, particles: int, make: Any) -> None:
    """A batch normalisation counts the step once, with the statistics of the run that counts."""

    class Codebook(nn.Module):
        """Its buffers are replaced, and not written to."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + x.detach().sum()
            return x + self.mean

    norm, book, frozen = nn.BatchNorm1d(1), Codebook(), nn.BatchNorm1d(1).eval()

    def shifted(x: Tensor) -> Tensor:
        return frozen(book(norm(x.double().reshape(-1, 1)))).reshape(x.shape)

    def program(of_model: bool) -> None:
        b, t = plates()
        bump = shifted(X).unsqueeze(-1) if in_guide and not of_model else 0.0
        with b, t:
            z = pyro.sample("z", (prior() if of_model else SparseCategorical(scores() + bump)).mask(REAL))
            if of_model:
                loc = decoded(z)
                pyro.sample("x", dist.Normal(loc if in_guide else shifted(loc), 1.0), obs=X)

    results = []
    for whole in (set(), {"z"}):
        for module in (norm, frozen):
            module.reset_running_stats()
        book.mean = torch.zeros(())
        buffers = list(norm.buffers())
        elbo = make(max_plate_nesting=2, num_particles=particles)
        elbo._rows.whole = whole
        values = loss_and_gradients(elbo, lambda: program(True), lambda: program(False))
        assert elbo._rows.whole == {"z"} and all(x is y for x, y in zip(norm.buffers(), buffers, strict=True))
        assert int(norm.num_batches_tracked) == particles
        results.append([*values, *(x.clone() for x in norm.buffers()), book.mean.clone()])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


def test_without_the_look_at_the_terms_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: what a masked row draws matters to data that have no mask."""
    model, guide = of_distributions(seen=True)
    expected = dense(model, guide)[0]
    monkeypatch.setattr(masked, "reaching_unmasked", lambda *_: set())
    assert abs(loss_and_gradients(SparseEnumELBO(max_plate_nesting=2), model, guide)[0] - expected) > 0.1


@pytest.mark.parametrize("seen", [False, True])
def test_supports_of_one_outcome(seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot would do; it is seen all the same whether the data depend on it."""
    monkeypatch.setitem(globals(), "SCORES", torch.where(REAL.unsqueeze(-1), 50 * SCORES, 0.0))
    model, guide = of_distributions(seen)
    elbo = SparseEnumELBO(max_plate_nesting=2)
    for x, y in zip(loss_and_gradients(elbo, model, guide), dense(model, guide), strict=True):
        torch.testing.assert_close(x, y)
    assert elbo.last_stats is not None and elbo.last_stats.max == (K if seen else 1)


def test_rows_that_are_all_masked() -> None:
    def program() -> None:
        with pyro.plate("d", 2), poutine.mask(mask=torch.tensor([False, False])):
            pyro.sample("z", SparseCategorical(torch.zeros(3)))

    elbo = SparseEnumELBO(max_plate_nesting=1)
    assert elbo.loss(program, program) == 0.0
    assert elbo.last_stats is not None and (elbo.last_stats.mean, elbo.last_stats.max) == (0.0, 0)


def test_narrowed() -> None:
    keep = torch.tensor([True, False])
    for d in (SparseCategorical(torch.tensor([[0.1, 0.3, 0.0]] * 2)), SparseOneHotCategorical(torch.zeros(2, 3))):
        for e in (d.narrowed(keep), d.mask(keep).narrowed(keep)):
            assert e.support_size.tolist() == [3, 1] and isinstance(e, (type(d), MaskedSparseDistribution))
        torch.testing.assert_close(d.narrowed(keep).probs[0], d.probs[0])

    class Own(SparseDistribution):
        """A family that cannot."""

    own = object.__new__(Own)
    assert own.narrowed(keep) is own


def test_masks_of_a_site() -> None:
    """Those of the messenger and of all wrappers; of a mask within an event, the rows with any part open."""
    a, b = torch.tensor([True, True, False]), torch.tensor([[True, False], [False, False], [True, True]])
    value = torch.zeros(3)
    node = {"value": value, "mask": a, "fn": dist.Normal(torch.zeros(3, 2), 1.0).mask(b).to_event(1)}
    assert mask_of(node).tolist() == [True, False, False]  # type: ignore[union-attr]
    assert mask_of({"value": value, "mask": None, "fn": dist.Normal(0.0, 1.0)}) is None
    assert mask_of({"value": value, "mask": False, "fn": dist.Normal(0.0, 1.0).mask(True)}).item() is False  # type: ignore[union-attr]
