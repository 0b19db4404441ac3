"""
Sparse sites in ``pyro.markov``, in the guide, in the model and in both, in the shapes of Pyro's HMM example: loss and
every gradient are those of dense enumeration.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_sparse.diagnostics import peak_memory
from pyro_sparse.distributions import SparseCategorical, SparseOneHotCategorical
from pyro_sparse.estimators import Exact
from pyro_sparse.infer import EstimatorELBO, SparseEnumELBO, infer_discrete
from pyro_sparse.infer.expansion import layouts
from pyro_sparse.projections import entmax15

PARALLEL = {"enumerate": "parallel"}
LENGTHS = torch.tensor([3, 1, 2])
B, T, TONES = 3, 3, 2


class Chain(NamedTuple):
    """What a program below is made with: model and guide may share the parameters of one prefix."""

    K: int
    prefix: str = "p_"
    sparse: bool = False
    y: Tensor | None = None  # (B, T): in a model; None in a guide
    infer: Any = None
    masked: bool = True

    def table(self, name: str, *given: int) -> Tensor:
        """Scores of each row of outcomes, one of which every second row rules out: not the same one."""

        def scores() -> Tensor:
            rows = 0.4 * torch.randn(*given, self.K)
            odd = torch.arange(1, len(rows.flatten(0, -2)), 2)
            rows.view(-1, self.K)[odd, odd % self.K] -= 5.0
            return rows

        table: Tensor = pyro.param(self.prefix + name, scores)
        return table

    def state(self, name: str, row: Tensor) -> Tensor:
        d = SparseCategorical(row, entmax15) if self.sparse else dist.Categorical(logits=row)
        z: Tensor = pyro.sample(name, d, infer=self.infer)
        return z

    def emit(self, name: str, t: int, *states: Tensor, before: Tensor | float = 0.0, i: Any = ...) -> Any:
        if self.y is None:
            return 0.0
        loc = pyro.param("loc", lambda: torch.randn([self.K] * len(states)))
        y = self.y[i, t % T]
        return pyro.sample(name, dist.Normal(Vindex(loc)[states] + 0.5 * before, 1.0), obs=y)

    def steps(self, count: int = T, **kwargs: Any) -> Iterator[int]:
        """In sequences that end at their lengths."""
        for t in pyro.markov(range(count), **kwargs):
            with poutine.mask(mask=(t < LENGTHS) if self.masked else True):
                yield t


def plain(c: Chain) -> None:
    table, z = c.table("z", c.K), torch.tensor(0)
    with pyro.plate("sequences", B):
        for t in c.steps():
            z = c.state(f"z_{t}", table[z])
            c.emit(f"y_{t}", t, z)


def of_each_row(c: Chain) -> None:
    """Each sequence has a transition of its own at each step, as an amortised guide."""
    table, z, row = c.table("rows", T, B, c.K), torch.tensor(0), torch.arange(B)
    with pyro.plate("sequences", B):
        for t in c.steps():
            z = c.state(f"z_{t}", Vindex(table[t])[row, z])
            c.emit(f"y_{t}", t, z)


def autoregressive(c: Chain) -> None:
    table, z, y = c.table("z", c.K), torch.tensor(0), 0.0
    with pyro.plate("sequences", B):
        for t in c.steps():
            z = c.state(f"z_{t}", table[z])
            y = c.emit(f"y_{t}", t, z, before=y)


def factorial(c: Chain, coupled: bool = False) -> None:
    """Two chains, the second one perhaps driven by the first."""
    table = c.table("w", c.K)
    both = c.table("wz", c.K, c.K) if coupled else c.table("z", c.K)
    w = z = torch.tensor(0)
    with pyro.plate("sequences", B):
        for t in c.steps():
            w = c.state(f"w_{t}", table[w])
            z = c.state(f"z_{t}", Vindex(both)[w, z] if coupled else both[z])
            c.emit(f"y_{t}", t, w, z)


def second_order(c: Chain) -> None:
    table, now, before = c.table("zz", c.K, c.K), torch.tensor(0), torch.tensor(0)
    with pyro.plate("sequences", B):
        for t in c.steps(T + 1, history=2):
            before, now = now, c.state(f"z_{t}", Vindex(table)[before, now])
            c.emit(f"y_{t}", t, now)


def one_by_one(c: Chain) -> None:
    """A sequential plate around the loops."""
    table = c.table("z", c.K)
    for i in pyro.plate("sequences", B):
        z = torch.tensor(0)
        for t in pyro.markov(range(int(LENGTHS[i]))):
            z = c.state(f"z_{i}_{t}", table[z])
            c.emit(f"y_{i}_{t}", t, z, i=i)


def in_each_step(c: Chain) -> None:
    """A chain in each step of a chain."""
    table, both, w = c.table("w", c.K), c.table("wz", c.K, c.K), torch.tensor(0)
    for t in pyro.markov(range(2)):
        w, z = c.state(f"w_{t}", table[w]), torch.tensor(0)
        for s in pyro.markov(range(2)):
            z = c.state(f"z_{t}_{s}", Vindex(both)[w, z])
            c.emit(f"y_{t}_{s}", s, w, z, i=t)


def tree(c: Chain, keep: bool = False) -> None:
    """Each state has two children, who do not see each other."""
    table, context = c.table("z", c.K), pyro.markov(keep=keep)

    def grow(name: str, parent: Tensor) -> None:
        with context:
            z = c.state(f"z{name}", table[parent])
            c.emit(f"y{name}", len(name), z, i=0)
            for side in "lr" if len(name) < 2 else "":
                grow(name + side, z)

    grow("", torch.tensor(0))


def siblings(c: Chain) -> None:
    """Each child sees the one before."""
    both, context = c.table("zz", c.K, c.K), pyro.markov(keep=True)
    with context:
        parent, before = c.state("z", both[0, 0]), torch.tensor(0)
        for i in range(3):
            with context:
                before = c.state(f"z_{i}", Vindex(both)[parent, before])
                c.emit(f"y_{i}", i, before, i=0)


coupled = functools.partial(factorial, coupled=True)
PROGRAMS: dict[str, Callable[[Chain], None]] = {
    "plain": plain,
    "of each row": of_each_row,
    "autoregressive": autoregressive,
    "factorial": factorial,
    "coupled": coupled,
    "second order": second_order,
    "one by one": one_by_one,
    "in each step": in_each_step,
    "tree": tree,
    "siblings": siblings,
}
SIDES = ("guide", "model", "both")
MODES = ("padded", "union", "auto")


def pair(program: Callable[[Chain], None], K: int, side: str, **kwargs: Any) -> tuple[Any, Any]:
    """Model and guide. A sparse model shares the guide's table: it is not zero where the guide is not."""
    y = torch.linspace(-1.0, 1.0, B * T).reshape(B, T)
    if side == "model":
        return functools.partial(program, Chain(K, sparse=True, y=y, infer=PARALLEL, **kwargs)), lambda: None
    guide = functools.partial(program, Chain(K, "q_", sparse=True, **kwargs))
    prior = ("q_", True) if side == "both" else ("p_", False)
    return functools.partial(program, Chain(K, *prior, y=y, **kwargs)), guide


def step(elbo: Any, model: Any, guide: Any) -> dict[str, Tensor]:
    """The loss and all gradients."""
    with poutine.trace(param_only=True) as capture:
        found = {"loss": torch.tensor(elbo.loss_and_grads(model, guide))}
    for name, site in capture.trace.nodes.items():
        parameter = site["value"].unconstrained()
        found[name], parameter.grad = parameter.grad, None
    return found


def dense(model: Any, guide: Any) -> dict[str, Tensor]:
    return step(TraceEnum_ELBO(max_plate_nesting=1), model, config_enumerate(guide))


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def supports_differ(prefix: str) -> bool:
    """Whether some states are ruled out, and not the same ones by all parents."""
    tables = [table.detach() for name, table in pyro.get_param_store().items() if name.startswith(prefix)]
    rows = [entmax15(table).flatten(0, -2) > 0 for table in tables]
    return all(bool((row != row[0]).any()) for row in rows)


@pytest.mark.parametrize(
    ("program", "side", "mode", "K"),
    [  # each program once in the fast suite
        pytest.param(p, s, m, K, marks=[] if (i % 3, i % 3, i % 2) == (j, k, K == 5) else pytest.mark.slow)
        for i, p in enumerate(PROGRAMS)
        for j, s in enumerate(SIDES)
        for k, m in enumerate(MODES)
        for K in (2, 5)
    ],
)
def test_equals_dense_enumeration(program: str, side: str, mode: str, K: int) -> None:
    model, guide = pair(PROGRAMS[program], K, side)
    expected = dense(model, guide)
    assert supports_differ("p_" if side == "model" else "q_")
    elbo = SparseEnumELBO(mode, max_plate_nesting=1)
    assert_same(step(elbo, model, guide), expected)
    assert_same(step(elbo, model, guide), expected)  # without the checks of the first


@pytest.mark.parametrize("program", [pytest.param(p, marks=[] if p == "plain" else pytest.mark.slow) for p in PROGRAMS])
def test_exact_sums_the_models_states_out(program: str) -> None:
    model, guide = pair(PROGRAMS[program], 3, "model")
    assert_same(step(EstimatorELBO(Exact(), max_plate_nesting=1), model, guide), dense(model, guide))


def test_one_hot_states() -> None:
    def program(family: Any, y: Tensor | None = None) -> None:
        table = pyro.param("table", lambda: 2 * torch.randn(4, 4))
        z = torch.eye(4)[0]
        with pyro.plate("sequences", B):
            for t in pyro.markov(range(T)):
                z = pyro.sample(f"z_{t}", family(z @ table))
                if y is not None:
                    pyro.sample(f"y_{t}", dist.Normal(z @ torch.arange(4.0), 1.0), obs=y[:, t])

    guide = functools.partial(program, SparseOneHotCategorical)
    model = functools.partial(program, lambda s: dist.OneHotCategorical(logits=s), torch.randn(B, T))
    assert_same(step(SparseEnumELBO(max_plate_nesting=1), model, guide), dense(model, guide))


def test_particles() -> None:
    model, guide = pair(plain, 4, "guide")
    expected = dense(model, guide)
    for vectorize in (False, True):
        elbo = SparseEnumELBO(num_particles=2, vectorize_particles=vectorize, max_plate_nesting=1)
        assert_same(step(elbo, model, guide), expected)


@pytest.mark.parametrize("side", ["guide", "model"])
def test_a_dropped_mask_is_seen(side: str) -> None:
    model, guide = pair(plain, 3, side)
    expected = dense(*pair(plain, 3, side, masked=False))
    with pytest.raises(AssertionError):
        assert_same(step(SparseEnumELBO(max_plate_nesting=1), model, guide), expected)


# What a longer chain costs.


def long_chain(steps: int, K: int, shapes: list[torch.Size], y: Tensor | None = None) -> None:
    table, z = pyro.param("table", lambda: 3 * torch.randn(K, K)), torch.tensor(0)
    for t in pyro.markov(range(steps)):
        d = SparseCategorical(table[z], entmax15)
        z = pyro.sample(f"z_{t}", d)
        shapes += [z.shape, d.log_prob(z).shape]
        if y is not None:
            pyro.sample(f"y_{t}", dist.Normal(z.to(table.dtype), 1.0), obs=y)


def costs_of(steps: int, K: int = 6) -> tuple[int, int, int]:
    """Bytes of a step of SVI; the largest number of dims of values and log-probabilities, and of elements."""
    shapes: list[torch.Size] = []
    guide = functools.partial(long_chain, steps, K, shapes)
    model = functools.partial(long_chain, steps, K, shapes, torch.tensor(0.3))
    elbo = SparseEnumELBO(max_plate_nesting=0)
    with pyro.validation_enabled(False):
        elbo.loss_and_grads(model, guide)
        with peak_memory() as memory:
            elbo.loss_and_grads(model, guide)
    return memory.peak, max(map(len, shapes)), max(shape.numel() for shape in shapes)


@pytest.mark.slow
def test_memory_is_in_proportion_to_the_length() -> None:
    (first, *sizes), (second, *twice), (third, *again) = map(costs_of, (4, 8, 16))
    assert sizes == twice == again and sizes[0] == 2 and sizes[1] <= 6**2
    assert third - second == pytest.approx(2 * (second - first), rel=0.1)


def test_values_with_the_dims_of_parents_grow(monkeypatch: Any) -> None:
    """Were each parent to have its own support, a value had the dims of all steps before."""
    monkeypatch.setattr(layouts, "padded", lambda name, fn, shared: fn.support_values())
    (first, *sizes), (second, *more) = map(costs_of, (3, 6))
    assert second > 10 * first and more[0] == sizes[0] + 3 and more[1] > 10 * sizes[1]


# What it refuses.


def test_packed_refuses_by_name() -> None:
    model, guide = pair(plain, 3, "guide")
    with pytest.raises(ValueError, match=r"site 'z_0', mode 'packed': expected a site outside of pyro.markov"):
        SparseEnumELBO("packed", max_plate_nesting=1).loss(model, guide)


def test_exact_refuses_a_guide_site_by_name() -> None:
    model, guide = pair(plain, 3, "guide")
    with pytest.raises(ValueError, match=r"site 'z_0': expected no pyro.markov around a site with Exact"):
        EstimatorELBO(Exact(), max_plate_nesting=1).loss(model, guide)


def lagged(c: Chain, lag: int, history: int, emission: bool = False) -> None:
    """A state, or else what is seen of it, depends on the state so many steps before."""
    table, states = c.table("z", c.K), [torch.tensor(0)] * lag
    for t in pyro.markov(range(5), history=history):
        states.append(c.state(f"z_{t}", table[states[-1 if emission else -lag]]))
        c.emit(f"y_{t}", t, states[-1 - lag if emission else -1], i=0)


def afterwards(c: Chain) -> None:
    """The loop has ended."""
    table, z = c.table("z", c.K), torch.tensor(0)
    for t in pyro.markov(range(3)):
        z = c.state(f"z_{t}", table[z])
    z = c.state("z_3", table[z])
    c.emit("y", 0, z, i=0)


def no_keep(c: Chain) -> None:
    """Each child sees the one before, which has gone."""
    both, context, before = c.table("zz", c.K, c.K), pyro.markov(), torch.tensor(0)
    for i in range(3):
        with context:
            before = c.state(f"z_{i}", both[0][before])
            c.emit(f"y_{i}", i, before, i=0)


OUTSIDE: dict[str, tuple[Callable[[Chain], None], str]] = {
    "history 0": (functools.partial(lagged, lag=1, history=0), "z_1"),
    "lag 2": (functools.partial(lagged, lag=2, history=1), "z_2"),
    "lag 3": (functools.partial(lagged, lag=3, history=1), "z_3"),
    "lag 3 of 2": (functools.partial(lagged, lag=3, history=2), "z_3"),
    "emission": (functools.partial(lagged, lag=2, history=1, emission=True), "y_2"),
    "afterwards": (afterwards, "z_3"),
    "no keep": (no_keep, "z_1"),
    "tree with keep": (functools.partial(tree, keep=True), "zrl"),
}


@pytest.mark.parametrize("side", ["guide", "model"])
@pytest.mark.parametrize("program", OUTSIDE)
def test_refuses_a_step_outside_of_the_window(program: str, side: str) -> None:
    """Pyro gives its dim to others, and does not look: some of these it computes, wrongly."""
    make, site = OUTSIDE[program]
    model, guide = pair(make, 3, side)
    for elbo in (SparseEnumELBO, functools.partial(EstimatorELBO, {})) if side == "model" else (SparseEnumELBO,):
        with pytest.raises(
            ValueError, match=rf"site '{site}': expected .* within pyro.markov's window only, got one that"
        ):
            elbo(max_plate_nesting=0).loss(model, guide)


def growing(c: Chain, steps: int = 4) -> None:
    """What is seen depends on the first state, which is in the window of the second step only."""
    table, states = c.table("z", c.K), [torch.tensor(0)]
    for t in pyro.markov(range(steps)):
        states.append(c.state(f"z_{t}", table[states[-1]]))
        c.emit(f"y_{t}", t, states[1], states[-1], i=0)


@pytest.mark.parametrize(
    ("make", "side"),
    [(SparseEnumELBO, "guide"), (SparseEnumELBO, "model"), (functools.partial(EstimatorELBO, {}), "model")],
)
def test_looks_again_when_the_chain_is_longer(make: Callable[..., Any], side: str) -> None:
    elbo = make(max_plate_nesting=0)
    elbo.loss(*pair(functools.partial(growing, steps=2), 3, side))
    for _ in range(2):  # what was refused is refused again
        with pytest.raises(
            ValueError, match=r"site 'y_\d': expected .* within pyro.markov's window only, got one that"
        ):
            elbo.loss(*pair(growing, 3, side))


def test_posteriors_look_at_the_window_too() -> None:
    model, guide = pair(growing, 3, "model")
    elbo = SparseEnumELBO(max_plate_nesting=0)
    short, _ = pair(functools.partial(growing, steps=2), 3, "model")
    infer_discrete(short, -1)()
    for call in (
        infer_discrete(model, -1),
        functools.partial(elbo.compute_marginals, model, guide),
        functools.partial(elbo.sample_posterior, model, guide),
    ):
        with pytest.raises(
            ValueError, match=r"site 'y_\d': expected .* within pyro.markov's window only, got one that"
        ):
            call()


@pytest.mark.parametrize("program", ["lag 3", "emission"])
def test_pyro_computes_some_of_these_wrongly(program: str, monkeypatch: Any) -> None:
    """So there is no number to be equal to."""
    model, guide = pair(OUTSIDE[program][0], 2, "model")
    wrong = TraceEnum_ELBO(max_plate_nesting=0).loss(model, guide)
    all_apart = lambda steps=None, **kwargs: contextlib.nullcontext() if steps is None else steps  # noqa: E731
    monkeypatch.setattr(pyro, "markov", all_apart)
    right = TraceEnum_ELBO(max_plate_nesting=0).loss(model, guide)
    assert right == pytest.approx(SparseEnumELBO(max_plate_nesting=0).loss(model, guide), abs=1e-10)
    assert abs(wrong - right) > 1e-3
