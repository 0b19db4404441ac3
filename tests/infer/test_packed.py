"""Packed rows: the same numbers as dense enumeration, at the cost of the outcomes that have probability."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, TraceEnum_ELBO, config_enumerate
from torch import Size, Tensor, nn

import pyro_sparse.distributions as sdist
from pyro_sparse.diagnostics import peak_memory
from pyro_sparse.distributions import SparseDistribution
from pyro_sparse.estimators import REBAR, Exact, LeaveOneOut, RaoBlackwell
from pyro_sparse.infer import EstimatorELBO, SparseEnumELBO
from pyro_sparse.infer.expansion import choice
from pyro_sparse.infer.expansion.layouts import Layout, padded
from pyro_sparse.infer.expansion.rows import Rows
from pyro_sparse.infer.runs.on_rows import OnRows
from pyro_sparse.testing.comparison import clean_room, wrong_quantities
from pyro_sparse.testing.elbo import check_elbo, evaluate
from pyro_sparse.testing.models import Case, packed_grid, table

B, K = 5, 4
Program = tuple[Callable[..., None], Callable[..., None]]


# On 200 programs.


def ours(how: str, case: Case) -> Callable[..., ELBO]:
    options: dict[str, Any] = {"rows": {}, "rows of 1": {"chunk_rows": 1}, "rows of 7": {"chunk_rows": 7}}[how]
    return partial(SparseEnumELBO, "packed", **options)


def with_exact(case: Case, mode: str) -> Callable[..., ELBO]:
    guide: Any = case.guide
    sites = [f"z{j}" for j in range(guide.__self__.options.sites)]
    return partial(EstimatorELBO, {name: Exact(mode) for name in sites})


def packs_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode "auto" takes packed rows wherever there are any, at the first step."""

    def cheapest(ratios: Any, nesting: int, uncounted: Any, taken: dict[str, str], unpackable: Any) -> Layout:
        def layout(name: str, fn: SparseDistribution, shared_dims: tuple[int, ...]) -> Tensor:
            taken[name] = "padded" if name in unpackable else "packed"
            return padded(name, fn, shared_dims)

        return layout

    everything = type("Everything", (set,), {"__contains__": lambda self, item: True})()
    monkeypatch.setattr(choice, "cheapest", cheapest)
    monkeypatch.setattr(choice, "WORTHWHILE", math.inf)
    monkeypatch.setattr(choice.Choice, "_meeting", property(lambda self: everything, lambda self, value: None), False)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("how", "case"),
    [  # each program on all rows at once, and in one of the other ways; some in the fast suite
        pytest.param(
            how, case, id=f"{how}-{case.name}", marks=[] if (i + 5) % 60 == 5 * j or i % 20 == j == 0 else SLOW
        )
        for i, case in enumerate(packed_grid(200))
        for j, how in enumerate(["rows", "rows of 1", "rows of 7", "estimator", "estimator, auto"])
        if j in (0, 1 + i % 4)
    ],
)
def test_equals_dense_enumeration(how: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = "packed"
    if how == "estimator, auto":
        mode = "auto"
        packs_all(monkeypatch)
    if not how.startswith("estimator"):
        check_elbo(ours(how, case), cases=[case])
    elif "monte_carlo" not in case.name and "guessed" not in case.name:
        check_elbo(with_exact(case, mode), cases=[case])
    else:  # under TraceEnum_ELBO a draw's score function has another cost, and guesses take random numbers
        with clean_room():
            expected = evaluate(with_exact(case, "padded"), case, case.guide)
        with clean_room():
            got = evaluate(with_exact(case, mode), case, case.guide)
        assert not wrong_quantities(expected, got, 1e-10)


CASE = packed_grid(20)[3]


def test_a_row_that_is_missing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_last(self: Rows, size: int | None) -> Any:
        yield self.part(0, self.count - 1)

    monkeypatch.setattr(Rows, "parts", without_last)
    with pytest.raises(AssertionError, match="1 of 1 cases differ"):
        check_elbo(partial(SparseEnumELBO, "packed", check=False), cases=[CASE])


def test_a_wrong_parent_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rows, "example", property(lambda self: self.index[-1].roll(1)))
    with pytest.raises(AssertionError, match="1 of 1 cases differ"):
        check_elbo(partial(SparseEnumELBO, "packed", check=False), cases=[CASE])


def test_a_dropped_scale_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = Vae()
    scored = OnRows._scored

    def without_scale(self: OnRows, node: Any, rows: Rows) -> Any:
        result = scored(self, node, rows)
        result.node["scale"] = 1.0
        return result

    monkeypatch.setattr(OnRows, "_scored", without_scale)
    with pytest.raises(AssertionError, match="not close"):
        assert_dense(vae, SparseEnumELBO("packed", max_plate_nesting=1, check=False), vae.images)


# What a user writes.


class Vae(nn.Module):
    """A code per image, and a style; the supports have one, some and all outcomes."""

    def __init__(self, size: int = B, codes: int = K) -> None:
        super().__init__()
        scores = 3 * table("scores", size, codes)
        scores[0], scores[1] = 9 * torch.eye(codes)[0], 0.0
        self.scores = nn.Parameter(scores)
        self.style = nn.Parameter(table("style", size))
        self.embed, self.out = nn.Embedding(codes, 3), nn.Linear(4, 2)
        self.images, self.total = table("images", size, 2), 3 * size

    def model(self, images: Tensor) -> None:
        with pyro.plate("data", self.total, subsample_size=len(images)):
            style = pyro.sample("style", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(self.embed.num_embeddings)))
            self.observe(images, z, style)

    def observe(self, images: Tensor, z: Tensor, style: Tensor) -> None:
        pyro.module("vae", self)
        z, style = torch.broadcast_tensors(z, style)
        h = torch.cat([self.embed(z), style[..., None]], -1)
        pyro.sample("x", dist.Normal(self.out(h).tanh(), 0.5).to_event(1), obs=images)

    def guide(self, images: Tensor) -> None:
        with pyro.plate("data", self.total, subsample_size=len(images)):
            pyro.sample("style", dist.Normal(self.style, 0.3))
            pyro.sample("z", sdist.SparseCategorical(self.scores))


def result(elbo: ELBO, vae: nn.Module, model: Any, guide: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    vae.zero_grad()
    pyro.set_rng_seed(3)
    loss = elbo.loss_and_grads(model, guide, *args, **kwargs)
    return [torch.tensor(loss), *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in vae.parameters())]


def assert_dense(vae: Any, elbo: ELBO, *args: Any, model: Any = None, guide: Any = None, **kwargs: Any) -> None:
    model, guide = model or vae.model, guide or vae.guide
    expected = result(TraceEnum_ELBO(max_plate_nesting=1), vae, model, config_enumerate(guide), *args, **kwargs)
    got = result(elbo, vae, model, guide, *args, **kwargs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


PACKED: dict[str, Callable[[], ELBO]] = {
    "packed": lambda: SparseEnumELBO("packed", max_plate_nesting=1),
    "one at a time": lambda: SparseEnumELBO("packed", chunk_rows=1, max_plate_nesting=1),
    "as many as images": lambda: SparseEnumELBO("packed", chunk_rows=B, max_plate_nesting=1),
    "all": lambda: SparseEnumELBO("packed", chunk_rows=3 * B, max_plate_nesting=1),
    "estimator": lambda: EstimatorELBO({"z": Exact("packed")}, max_plate_nesting=1),
    "estimator, chunks": lambda: EstimatorELBO({"z": Exact("packed", chunk_rows=2)}, max_plate_nesting=1),
    "auto": lambda: SparseEnumELBO("auto", max_plate_nesting=1),
}


@pytest.mark.parametrize("how", PACKED)
def test_a_vae(how: str) -> None:
    vae = Vae()
    assert_dense(vae, PACKED[how](), vae.images)


@pytest.mark.parametrize("how", ["packed", "one at a time", "estimator"])
def test_no_grad_and_inference_mode(how: str) -> None:
    vae, elbo = Vae(), PACKED[how]()
    losses = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        pyro.set_rng_seed(3)
        with context():
            losses.append(elbo.differentiable_loss(vae.model, vae.guide, vae.images).item())
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smaller_dtypes_are_the_padded_ones(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    vae = Vae().to(dtype)
    images = vae.images.to(dtype)
    padded = result(SparseEnumELBO(max_plate_nesting=1), vae, vae.model, vae.guide, images)
    packed = result(SparseEnumELBO("packed", max_plate_nesting=1), vae, vae.model, vae.guide, images)
    for a, b in zip(packed, padded, strict=True):  # sums in another order
        torch.testing.assert_close(a, b, rtol=0, atol=10 * torch.finfo(dtype).eps * b.abs().max().item())


def test_a_gradient_by_autograd_and_a_second_one() -> None:
    vae = Vae()

    def gradients(elbo: ELBO, guide: Any) -> list[Tensor]:
        pyro.set_rng_seed(3)
        loss = elbo.differentiable_loss(vae.model, guide, vae.images)
        first = torch.autograd.grad(loss, list(vae.parameters()), create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), vae.out.weight)]

    expected = gradients(TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(vae.guide))
    for a, b in zip(gradients(SparseEnumELBO("packed", max_plate_nesting=1), vae.guide), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_rows_are_the_outcomes_of_positive_probability() -> None:
    vae, elbo = Vae(), SparseEnumELBO("packed", max_plate_nesting=1)
    rows = int((sdist.SparseCategorical(vae.scores).probs > 0).sum())
    with pyro.validation_enabled(False):
        elbo.loss(vae.model, vae.guide, vae.images)
    stats = elbo.last_stats
    assert stats is not None and (stats.model_rows, stats.dense_rows, stats.max) == (rows, B * K, K)


def test_it_trains_as_dense_enumeration_does() -> None:
    losses = []
    for make in (lambda: TraceEnum_ELBO(max_plate_nesting=1), PACKED["packed"], PACKED["one at a time"]):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = Vae()
        guide = config_enumerate(vae.guide) if not losses else vae.guide

        svi = SVI(vae.model, guide, pyro.optim.Adam({"lr": 0.1}), make())
        pyro.set_rng_seed(0)
        losses.append([svi.step(vae.images) for _ in range(10)])
    for other in losses[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(losses[0]), rtol=1e-9, atol=1e-9)


# Where data come from.


def by_index(vae: Vae) -> Program:
    """Data, and parameters for each row, by the plate's indices."""

    def model(_: Tensor) -> None:
        with pyro.plate("data", B) as index:
            style = pyro.sample("style", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))
            own = pyro.param("own", table("own", B), event_dim=0)
            vae.observe(vae.images[index], z, style + own)

    def guide(_: Tensor) -> None:
        with pyro.plate("data", B):
            pyro.sample("style", dist.Normal(vae.style, 0.3))
            pyro.sample("z", sdist.SparseCategorical(vae.scores))

    return model, guide


def by_subsample(vae: Vae) -> Program:
    """The indices are an argument, and parameters are for all data."""

    def model(index: Tensor) -> None:
        with pyro.plate("data", 3 * B, subsample=index):
            style = pyro.sample("style", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))
            own = pyro.param("own", table("own", 3 * B), event_dim=0)
            images = pyro.subsample(table("all", 3 * B, 2), event_dim=1)
            vae.observe(images, z, style + own)

    def guide(index: Tensor) -> None:
        with pyro.plate("data", 3 * B, subsample=index):
            pyro.sample("style", dist.Normal(vae.style, 0.3))
            pyro.sample("z", sdist.SparseCategorical(vae.scores))

    return model, guide


def without_size(vae: Vae) -> Program:
    def model(images: Tensor) -> None:
        with pyro.plate("data"):
            style = pyro.sample("style", dist.Normal(torch.zeros(len(images)), 1.0))
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(len(images), K)))
            vae.observe(images, z, style)

    def guide(images: Tensor) -> None:
        with pyro.plate("data"):
            pyro.sample("style", dist.Normal(vae.style, 0.3))
            pyro.sample("z", sdist.SparseCategorical(vae.scores))

    return model, guide


def in_a_dict(vae: Vae) -> Program:
    def model(batch: dict[str, Any]) -> None:
        vae.model(batch["images"][0])

    def guide(batch: dict[str, Any]) -> None:
        vae.guide(batch["images"][0])

    return model, guide


PROGRAMS: dict[str, tuple[Callable[[Vae], Program], Callable[[Vae], Any]]] = {
    "by index": (by_index, lambda vae: vae.images),
    "by subsample": (by_subsample, lambda vae: torch.tensor([9, 3, 0, 14, 5])),
    "without a size": (without_size, lambda vae: vae.images),
    "in a dict": (in_a_dict, lambda vae: {"images": [vae.images, "name"], "n": 3}),
}


@pytest.mark.parametrize("where", PROGRAMS)
@pytest.mark.parametrize("how", ["packed", "one at a time", "as many as images", "estimator"])
def test_data(where: str, how: str) -> None:
    vae = Vae()
    make, argument = PROGRAMS[where]
    model, guide = make(vae)
    results = []
    for elbo, q in ((TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(guide)), (PACKED[how](), guide)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        results.append(result(elbo, vae, model, q, argument(vae)))
        if where.startswith("by"):
            results[-1].append(dict(pyro.get_param_store().named_parameters())["own"].grad.clone())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gather_places_what_the_rule_does_not() -> None:
    vae = Vae()
    columns = vae.images.T.contiguous()  # a row is an image in its last dim

    def model(columns: Tensor) -> None:
        vae.model(columns.T)

    def guide(columns: Tensor) -> None:
        vae.guide(columns.T)

    def gather(index: Tensor, columns: Tensor) -> Any:
        return (columns[:, index],), {}

    for elbo in (
        SparseEnumELBO("packed", gather=gather, max_plate_nesting=1),
        EstimatorELBO({"z": Exact("packed", gather=gather)}, max_plate_nesting=1),
    ):
        assert_dense(vae, elbo, columns, model=model, guide=guide)
    with pytest.raises(ValueError, match=r"plate 'data': .*got subsample_size=5.*gather="):
        SparseEnumELBO("packed", max_plate_nesting=1).loss(model, guide, columns)
    wrong = SparseEnumELBO("packed", gather=lambda index, columns: ((columns[:, :3],), {}), max_plate_nesting=1)
    with pytest.raises(ValueError, match=r"gather: expected tensors of \d+ rows, got args\[0\] of shape \(2, 3\)"):
        wrong.loss(model, guide, columns)


# What a model may do on rows.


@pytest.mark.parametrize("make", [partial(SparseEnumELBO, "packed", chunk_rows=1), "estimator"])
def test_a_decoder_may_branch_on_the_value(make: Any) -> None:
    vae = Vae()

    def branching(images: Tensor) -> None:
        pyro.module("vae", vae)
        with pyro.plate("data", len(images)):
            style = pyro.sample("style", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))
            if int(z) == 2:
                pyro.sample("extra", dist.Normal(style, 1.0), obs=images[..., 0])
            loc = style.unsqueeze(-1)
            for _ in range(int(z)):
                loc = loc.sin() + vae.embed.weight[0, :2]
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=images)

    def at_once(images: Tensor) -> None:
        pyro.module("vae", vae)
        with pyro.plate("data", len(images)):
            style = pyro.sample("style", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))
            with pyro.poutine.mask(mask=z == 2):
                pyro.sample("extra", dist.Normal(style, 1.0), obs=images[..., 0])
            loc, steps = style.unsqueeze(-1).expand(*style.shape, 1), []
            for _ in range(K):
                steps.append(loc.expand(*style.shape, 2))
                loc = loc.sin() + vae.embed.weight[0, :2]
            at = torch.eye(K)[z]
            pyro.sample("x", dist.Normal((at[..., None] * torch.stack(steps, -2)).sum(-2), 0.5).to_event(1), obs=images)

    def guide(images: Tensor) -> None:
        with pyro.plate("data", len(images)):
            pyro.sample("style", dist.Normal(vae.style, 0.3))
            pyro.sample("z", sdist.SparseCategorical(vae.scores))

    elbo = EstimatorELBO({"z": Exact("packed", chunk_rows=1)}) if make == "estimator" else make()
    expected = result(TraceEnum_ELBO(max_plate_nesting=1), vae, at_once, config_enumerate(guide), vae.images)
    elbo.loss(branching, guide, vae.images)  # counts the plates, for which it draws
    for a, b in zip(result(elbo, vae, branching, guide, vae.images), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_chunks_take_the_random_numbers_of_their_run_again() -> None:
    """Dropout in the decoder: the gradient is that of the loss, by finite differences along a direction."""
    vae = Vae()
    vae.out = nn.Sequential(nn.Dropout(0.4), nn.Linear(4, 2))  # type: ignore[assignment]
    elbo = SparseEnumELBO("packed", chunk_rows=2, max_plate_nesting=1)

    def loss() -> Tensor:
        pyro.set_rng_seed(11)
        return elbo.differentiable_loss(vae.model, vae.guide, vae.images)

    loss()  # the first is compared with an ordinary run
    weight = vae.embed.weight
    gradient, direction = torch.autograd.grad(loss(), weight)[0], table("direction", *weight.shape)
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight += step * direction
            values.append(loss())
            weight -= step * direction
    torch.testing.assert_close((gradient * direction).sum(), (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-6)


def test_memory_of_chunks_does_not_grow_with_the_rows() -> None:
    """But for a few numbers of each row: its log-probabilities and where it comes from."""
    peaks = {}
    for size, codes in ((16, 8), (32, 8), (16, 32)):
        vae = Vae(size, codes)
        with torch.no_grad():
            vae.scores.zero_()  # all outcomes
        vae.images, vae.out = table("wide", size, 2048), nn.Linear(4, 2048)
        for chunk in (16, None):
            elbo = SparseEnumELBO("packed", chunk_rows=chunk, max_plate_nesting=1, check=False)
            for _ in range(2):
                vae.zero_grad(set_to_none=False)
                with peak_memory() as memory:
                    elbo.loss_and_grads(vae.model, vae.guide, vae.images)
            peaks[size, codes, chunk] = memory.peak
    small = peaks[16, 8, 16]
    assert peaks[32, 8, 16] - small < 400 * 16 * 8 and peaks[16, 32, 16] - small < 400 * 16 * 24  # bytes for each row
    assert peaks[16, 32, None] > 10 * peaks[16, 32, 16]


# Beside other sites.


def test_beside_a_drawn_site() -> None:
    """A mean over draws of the neighbour is the gradient by enumeration of both."""
    vae = Vae()

    def model(images: Tensor) -> None:
        with pyro.plate("data", len(images)):
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))
            y = pyro.sample("y", dist.Bernoulli(0.4))
            vae.observe(images, z, y)

    def guide(images: Tensor) -> None:
        with pyro.plate("data", len(images)):
            z = pyro.sample("z", sdist.SparseCategorical(vae.scores))
            pyro.sample("y", dist.Bernoulli(logits=vae.style + z / 3))

    dense = TraceEnum_ELBO(max_plate_nesting=1)
    expected = result(dense, vae, model, config_enumerate(guide), vae.images)
    exact = EstimatorELBO({"z": Exact("packed"), "y": RaoBlackwell(2)}, max_plate_nesting=1)
    for a, b in zip(result(exact, vae, model, guide, vae.images), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    drawn = EstimatorELBO({"z": Exact("packed"), "y": LeaveOneOut(4)}, max_plate_nesting=1)
    padded = EstimatorELBO({"z": Exact(), "y": LeaveOneOut(4)}, max_plate_nesting=1)
    got = [result(elbo, vae, model, guide, vae.images) for elbo in (drawn, padded)]
    for a, b in zip(*got, strict=True):  # the same draws
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_site_in_a_deeper_plate_keeps_its_slots() -> None:
    vae = Vae()
    scores = vae.scores

    def model(images: Tensor) -> None:
        pyro.module("vae", vae)
        with pyro.plate("data", len(images), dim=-2):
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))
            with pyro.plate("parts", 2, dim=-1):
                y = pyro.sample("y", dist.Categorical(logits=torch.zeros(K)))
                pyro.sample("x", dist.Normal((z + 0.3 * y).sin(), 0.5), obs=images)

    def guide(images: Tensor) -> None:
        with pyro.plate("data", len(images), dim=-2):
            z = pyro.sample("z", sdist.SparseCategorical(scores[:, None]))
            with pyro.plate("parts", 2, dim=-1):
                rows = vae.embed.weight.T[:2].reshape(2, K) + z[..., None] / 5
                pyro.sample("y", sdist.SparseCategorical(rows))

    expected = result(TraceEnum_ELBO(max_plate_nesting=2), vae, model, config_enumerate(guide), vae.images)
    for elbo in (SparseEnumELBO("packed", max_plate_nesting=2), EstimatorELBO(Exact("packed"), max_plate_nesting=2)):
        for a, b in zip(result(elbo, vae, model, guide, vae.images), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# Which mode "auto" takes.


def two_codes(joint: bool) -> Program:
    """Two codes of 40 per image, with supports of one and of twenty outcomes; seen together, or each for itself."""
    probs = torch.zeros(2, 8, 40)
    probs[:, 1:, 7], probs[:, 0, :20] = 1.0, 0.05
    images, net = table("images", 8, 2), nn.Linear(80, 2)
    zero = torch.zeros(40)

    def model(images: Tensor) -> None:
        with pyro.plate("data", len(images)):
            a, b = (torch.eye(40)[pyro.sample(name, dist.Categorical(logits=zero))] for name in "ab")
            if joint:
                h = torch.cat(torch.broadcast_tensors(a, b), -1)
                pyro.sample("x", dist.Normal(net(h), 1.0).to_event(1), obs=images)
            else:
                pyro.sample("x", dist.Normal(a @ net.weight[0, :40], 1.0), obs=images[..., 0])
                pyro.sample("y", dist.Normal(b @ net.weight[1, :40], 1.0), obs=images[..., 1])

    def guide(images: Tensor) -> None:
        with pyro.plate("data", len(images)):
            for i, name in enumerate("ab"):
                pyro.sample(name, sdist.SparseCategorical(probs=probs[i]))

    return partial(model, images), partial(guide, images)


@pytest.mark.parametrize(("joint", "rows"), [(True, 400 + 7), (False, 20 * 8)])
def test_auto_packs_what_is_seen_together_only(joint: bool, rows: int) -> None:
    """Apart, each sum is taken by itself, on 20 slots of 8 images; the product would have 407 rows."""
    model, guide = two_codes(joint)
    images = table("images", 8, 2)
    elbo = SparseEnumELBO("auto", max_plate_nesting=1)
    losses = [elbo.loss(lambda x: model.func(x), lambda x: guide.func(x), images) for _ in range(3)]  # type: ignore[attr-defined]
    assert max(losses) - min(losses) < 1e-10
    assert elbo.last_stats is not None and elbo.last_stats.model_rows == rows


ELBOS: dict[str, Callable[[], Any]] = {
    "sparse": lambda: SparseEnumELBO("auto", max_plate_nesting=1),
    "Exact": lambda: EstimatorELBO(Exact("auto"), max_plate_nesting=1),
    "graph": lambda: EstimatorELBO({"a": Exact("auto"), "b": Exact("auto")}, costs="graph"),
}


@pytest.mark.parametrize("how", ["Exact", "graph"])
@pytest.mark.parametrize("joint", [True, False])
def test_exact_chooses_as_sparse_enum_does(joint: bool, how: str) -> None:
    (model, guide), images, found = two_codes(joint), table("images", 8, 2), []
    for name in ("sparse", how):
        elbo = ELBOS[name]()
        losses = [elbo.loss(lambda x: model.func(x), lambda x: guide.func(x), images) for _ in range(2)]  # type: ignore[attr-defined]
        found.append((elbo.last_stats, elbo._choice.ratios, losses))
    (stats, ratios, expected), (own_stats, own_ratios, losses) = found
    assert own_ratios == ratios and own_stats == stats
    assert losses == pytest.approx(expected, abs=1e-10)
    assert stats.layouts == dict.fromkeys("ab", "packed" if joint else "padded")


def test_nothing_is_packed_beside_a_closed_form() -> None:
    """A prior must be known in slots, of which mode "packed" tells the user."""
    model, guide = two_codes(True)
    images, losses = table("images", 8, 2), []
    for mode in ("padded", "auto"):
        elbo = EstimatorELBO(Exact(mode), analytic_kl=True, max_plate_nesting=1)
        losses += [elbo.loss(lambda x: model.func(x), lambda x: guide.func(x), images) for _ in range(3)]  # type: ignore[attr-defined]
    assert losses == pytest.approx([losses[0]] * 6, abs=1e-10)
    assert elbo.last_stats is not None and "packed" not in elbo.last_stats.layouts.values()


@pytest.mark.parametrize("make", [lambda: LeaveOneOut(3), lambda: RaoBlackwell(), lambda: REBAR()])
def test_exact_chooses_beside_drawn_sites(make: Callable[[], Any]) -> None:
    """The same draws, and the same gradient, on rows; counting leaves the generators as they were."""
    images, net = table("images", 8, 2), nn.Linear(40, 2)
    scores = torch.full((8, 40), -50.0)
    scores[1:, 7], scores[0, :20] = 0.0, 0.0

    def model(images: Tensor) -> None:
        with pyro.plate("data", len(images)):
            b = pyro.sample("b", dist.Bernoulli(0.4))
            z = torch.eye(40)[pyro.sample("z", dist.Categorical(logits=torch.zeros(40)))]
            pyro.sample("x", dist.Normal(torch.tanh(net(z) + b[..., None]), 1.0).to_event(1), obs=images)

    def guide(images: Tensor) -> None:
        with pyro.plate("data", len(images)):
            b = pyro.sample("b", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(8))))
            pyro.sample("z", sdist.SparseCategorical(pyro.param("scores", scores.clone()) + 0.1 * b[..., None]))

    found = []
    for mode in ("padded", "auto"):
        pyro.clear_param_store()
        elbo = EstimatorELBO({"z": Exact(mode), "b": make()})
        for seed in range(2):
            torch.manual_seed(seed)
            loss = elbo.loss_and_grads(model, guide, images)
        found.append([torch.tensor(loss), *(pyro.param(name).grad for name in ("logits", "scores"))])
        assert elbo.last_stats is not None
        assert elbo.last_stats.layouts == {"z": "packed" if mode == "auto" else "padded"}
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("mode", "options", "layout"),
    [
        ("padded", {}, "padded"),
        ("union", {}, "union"),
        ("packed", {}, "packed"),
        ("packed", {"enumerate_support": "dense"}, "packed"),
        ("padded", {"enumerate_support": "dense"}, "dense"),
    ],
)
def test_statistics_name_the_layout(mode: str, options: dict[str, str], layout: str) -> None:
    vae = Vae()
    guide = poutine.infer_config(vae.guide, lambda site: options if site["name"] == "z" else {})
    for elbo in (SparseEnumELBO(mode), EstimatorELBO({"z": Exact(mode)})):
        elbo.loss(vae.model, guide, vae.images)
        assert elbo.last_stats is not None and elbo.last_stats.layouts == {"z": layout}


def test_statistics_of_an_estimator() -> None:
    vae = Vae()
    sparse, elbo = SparseEnumELBO("packed"), EstimatorELBO({"z": Exact("packed")})
    assert elbo.last_stats is None
    for each in (sparse, elbo):
        each.loss(vae.model, vae.guide, vae.images)
    assert elbo.last_stats == sparse.last_stats


# A family whose outcomes nobody lists.


class SomeBits(SparseDistribution):
    """Vectors of 40 bits, of which a few have probability: the vertices are given, the scores say how much."""

    has_enumerate_support = False
    arg_constraints: dict[str, Any] = {}
    support = dist.constraints.independent(dist.constraints.boolean, 1)

    def __init__(self, vertices: Tensor, probs: Tensor) -> None:
        self.vertices, self.probs = vertices, probs  # (V, *batch, 40) and (V, *batch)
        super().__init__(probs.shape[1:], vertices.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        shape = Size(batch_shape)
        front = (1,) * (len(shape) - len(self.batch_shape))
        vertices = self.vertices.reshape(len(self.vertices), *front, *self.batch_shape, 40)
        probs = self.probs.reshape(len(self.probs), *front, *self.batch_shape)
        return SomeBits(vertices.expand(len(vertices), *shape, 40), probs.expand(len(probs), *shape))

    @property
    def support_size(self) -> Tensor:
        return (self.probs > 0).sum(0)

    def support_values(self, union_dims: Sequence[int] = ()) -> Tensor:
        if union_dims:  # a list for all: every vertex of every element
            assert len(union_dims) == len(self.batch_shape)
            return self.vertices.flatten(0, -2).unique(dim=0).reshape(-1, *(1,) * len(self.batch_shape), 40)
        order = (self.probs > 0).sort(dim=0, descending=True, stable=True).indices[: int(self.support_size.max())]
        return self.vertices.gather(0, order[..., None].expand(*order.shape, 40))

    def log_prob(self, value: Tensor) -> Tensor:
        same = (
            value.unsqueeze(0)
            == self.vertices.reshape(len(self.vertices), *self.batch_shape, 40)[
                (slice(None), *[None] * (value.dim() - self.vertices.dim() + 1))
            ]
        ).all(-1)
        probs = self.probs.reshape(len(self.probs), *(1,) * (value.dim() - self.vertices.dim() + 1), *self.batch_shape)
        total = torch.where(same, probs, 0.0).sum(0)
        return torch.where(total > 0, torch.where(total > 0, total, 1.0).log(), -math.inf)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        assert not sample_shape
        index = dist.Categorical(probs=self.probs.detach().movedim(0, -1)).sample()
        return self.vertices.gather(0, index[None, ..., None].expand(1, *self.batch_shape, 40))[0]


@pytest.mark.parametrize("how", ["padded", "union", "packed", "chunks", "auto", "exact", "exact packed", "exact auto"])
def test_a_family_over_2_to_the_40_vectors(how: str) -> None:
    vertices = (table("vertices", 3, B, 40) > 0).double()
    scores = nn.Parameter(2 * table("bits", B, 3))
    weights = table("weights", 40)
    images = table("data", B)

    def model(images: Tensor) -> None:
        with pyro.plate("data", len(images)):
            bits = pyro.sample("bits", dist.Bernoulli(0.3).expand([40]).to_event(1))
            pyro.sample("x", dist.Normal(bits @ weights, 1.0), obs=images)

    def guide(images: Tensor) -> None:
        pyro.param("scores", scores)
        with pyro.plate("data", B):
            pyro.sample("bits", SomeBits(vertices, sdist.SparseCategorical(scores).probs.movedim(-1, 0)))

    q = sdist.SparseCategorical(scores).probs
    log_p = torch.where(vertices > 0, math.log(0.3), math.log(0.7)).sum(-1)
    log_x = dist.Normal(vertices @ weights, 1.0).log_prob(images)
    safe = torch.where(q > 0, q, 1.0)
    elbo = (q * ((log_p + log_x).T - safe.log())).sum()
    expected = -torch.autograd.grad(elbo, scores)[0]
    options: Any = {"max_plate_nesting": 1}
    tested: ELBO
    if how.startswith("exact"):
        tested = EstimatorELBO(Exact(how.partition(" ")[2] or "padded"), **options)
    else:
        chunk = {"chunk_rows": 2} if how == "chunks" else {}
        tested = SparseEnumELBO("packed" if chunk else how, **chunk, **options)
    for _ in range(3):
        scores.grad = None
        loss = tested.loss_and_grads(model, guide, images)
        torch.testing.assert_close(loss, -elbo.item(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(scores.grad, expected, rtol=1e-10, atol=1e-10)
    stats = getattr(tested, "last_stats", None)
    assert stats is None or stats.dense_rows is None


def test_support_rows() -> None:
    d = sdist.SparseOneHotCategorical(Vae().scores.detach()[:, None].expand(B, 2, K))
    (first, second), values, log_probs = d.support_rows()
    assert len(values) == int(d.support_size.sum()) and values.shape[1:] == (K,)
    for i, j, value, log_prob in zip(first, second, values, log_probs, strict=True):
        assert torch.equal(log_prob, d.log_prob(value)[i, j]) and log_prob > -math.inf
    masked = d.mask(False)
    assert all(torch.equal(a, b) for a, b in zip(masked.support_rows()[1:], (values, log_probs), strict=True))


# What is refused.


def test_rows_that_see_each_other() -> None:
    vae = Vae(size=7)
    normalised = nn.BatchNorm1d(2)

    def model(images: Tensor) -> None:
        pyro.module("vae", vae)
        with pyro.plate("data", len(images)):
            style = pyro.sample("style", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))
            h = torch.cat([vae.embed(z), style[..., None]], -1)
            pyro.sample("x", dist.Normal(normalised(vae.out(h)), 0.5).to_event(1), obs=images)

    def guide(images: Tensor) -> None:
        with pyro.plate("data", len(images)):
            pyro.sample("style", dist.Normal(vae.style, 0.3))
            pyro.sample("z", sdist.SparseCategorical(vae.scores))

    with pytest.raises(
        ValueError, match=r"plate 'data': .*the same on packed rows as on the batch.*at \['x'\].*gather="
    ):
        SparseEnumELBO("packed").loss_and_grads(model, guide, vae.images)
    with pytest.raises(ValueError, match=r"plate 'data': .*the same on packed rows as on the batch"):
        EstimatorELBO({"z": Exact("packed")}).loss_and_grads(model, guide, vae.images)
    SparseEnumELBO("packed", check=False).loss_and_grads(model, guide, vae.images)


def test_a_table_as_long_as_the_batch_is_no_row_of_it() -> None:
    vae = Vae(size=K, codes=K)  # B equals K

    def model(images: Tensor, table: Tensor) -> None:
        pyro.module("vae", vae)
        with pyro.plate("data", len(images)):
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))
            pyro.sample("x", dist.Normal(table[z], 0.5).to_event(1), obs=images)

    def guide(images: Tensor, table: Tensor) -> None:
        with pyro.plate("data", len(images)):
            pyro.sample("z", sdist.SparseCategorical(vae.scores))

    def gather(index: Tensor, images: Tensor, table: Tensor) -> Any:
        return (images[index], table), {}

    arguments = vae.images, table("outcomes", K, 2)
    with pytest.raises(ValueError, match=r"other log-probabilities at \['x'\].*args\[1\] of shape \(4, 2\).*gather="):
        SparseEnumELBO("packed", max_plate_nesting=1).loss_and_grads(model, guide, *arguments)
    elbo = SparseEnumELBO("packed", gather=gather, max_plate_nesting=1)
    assert_dense(vae, elbo, *arguments, model=model, guide=guide)
    assert_dense(vae, SparseEnumELBO("auto", max_plate_nesting=1), *arguments, model=model, guide=guide)


def test_data_that_are_captured() -> None:
    vae = Vae()

    def model() -> None:
        pyro.module("vae", vae)
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))
            vae.observe(vae.images, z, torch.zeros(()))

    def guide() -> None:
        with pyro.plate("data", B):
            pyro.sample("z", sdist.SparseCategorical(vae.scores))

    with pytest.raises(ValueError, match=r"plate 'data': .*runs on packed rows, got one that raises.*as arguments"):
        SparseEnumELBO("packed", max_plate_nesting=1).loss_and_grads(model, guide)
    assert_dense(vae, SparseEnumELBO("auto", max_plate_nesting=1), model=model, guide=guide)


def test_an_error_of_the_users_own_is_raised_as_it_is() -> None:
    vae = Vae()

    def model(images: Tensor) -> None:
        with pyro.plate("data", len(images)):
            pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))
            raise KeyError("num_layers")

    def guide(images: Tensor) -> None:
        with pyro.plate("data", len(images)):
            pyro.sample("z", sdist.SparseCategorical(vae.scores))

    for elbo in (SparseEnumELBO("packed"), EstimatorELBO({"z": Exact("packed")})):
        with pytest.raises(KeyError, match="num_layers"):
            elbo.loss_and_grads(model, guide, vae.images)


def chain(in_plate: bool) -> Program:
    def model() -> None:
        with pyro.plate("data", B if in_plate else 1):
            for i in pyro.markov(range(2)):
                pyro.sample(f"z{i}", dist.Categorical(logits=torch.zeros(K)))

    def guide() -> None:
        with pyro.plate("data", B if in_plate else 1):
            for i in pyro.markov(range(2)):
                pyro.sample(f"z{i}", sdist.SparseCategorical(pyro.param("s", table("s", K))))

    return model, guide


def outside() -> Program:
    def model() -> None:
        pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))

    def guide() -> None:
        pyro.sample("z", sdist.SparseCategorical(pyro.param("s", table("s", K))))

    return model, guide


def constant_size() -> Program:
    def model() -> None:
        with pyro.plate("data", 9, subsample_size=B):
            pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))

    def guide() -> None:
        with pyro.plate("data", 9, subsample_size=B):
            pyro.sample("z", sdist.SparseCategorical(pyro.param("s", table("s", K))))

    return model, guide


def deeper() -> Program:
    def model() -> None:
        with pyro.plate("data", B), pyro.plate("parts", 2):
            pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))

    def guide() -> None:
        with pyro.plate("data", B), pyro.plate("parts", 2):
            pyro.sample("z", sdist.SparseCategorical(pyro.param("s", table("s", K))))

    return model, guide


def other_plate() -> Program:
    model, _ = outside()

    def in_another() -> None:
        with pyro.plate("images", B):
            model()

    def guide() -> None:
        with pyro.plate("data", B):
            pyro.sample("z", sdist.SparseCategorical(pyro.param("s", table("s", K))))

    return in_another, guide


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (chain(True), r"site 'z0'.*pyro\.markov"),
        (outside(), r"site 'z', mode 'packed': expected a site in a plate"),
        (constant_size(), r"plate 'data': .*subsample_size=5.*Use subsample_size=len\(x\)"),
        (deeper(), r"site 'z'.*in one plate alone, got this in \['data', 'parts'\]"),
        (other_plate(), r"site 'z': expected it in plate 'data' in the model, as in the guide, got \['images'\]"),
    ],
    ids=["markov", "no plate", "constant size", "two plates", "another plate"],
)
def test_programs_without_rows(program: Program, message: str) -> None:
    for elbo in (SparseEnumELBO("packed"), EstimatorELBO(Exact("packed"))):
        pyro.clear_param_store()
        with pytest.raises(ValueError, match=message):
            elbo.loss_and_grads(*program)
        assert all(p.grad is None for p in pyro.get_param_store()._params.values())


@pytest.mark.parametrize("make", [SparseEnumELBO, Exact])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "rows"}, ValueError, "expected mode in"),
        ({"mode": "packed", "chunk_rows": 0}, ValueError, "expected chunk_rows of at least 1, got 0"),
        ({"mode": "packed", "chunk_rows": 2.5}, ValueError, "expected chunk_rows of at least 1, got 2.5"),
        ({"mode": "packed", "chunk_rows": True}, ValueError, "expected chunk_rows of at least 1, got True"),
        ({"mode": "padded", "chunk_rows": 2}, ValueError, "expected chunk_rows with mode='packed'"),
        ({"mode": "union", "gather": print}, ValueError, "expected gather with mode='packed' or 'auto'"),
        ({"mode": "packed", "gather": 3}, TypeError, "gather: expected a function"),
        ({"max_support": 0}, ValueError, "expected max_support >= 1"),
    ],
)
def test_bad_options(make: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{make.__name__}.*{message}"):
        make(**options)


def test_packed_sites_share_their_options_and_have_no_closed_forms() -> None:
    vae = Vae()
    guide = vae.guide
    with pytest.raises(ValueError, match=r"site 'style': expected no closed-form KL divergence beside packed rows"):
        EstimatorELBO({"z": Exact("packed")}, analytic_kl=True).loss_and_grads(vae.model, guide, vae.images)
    with pytest.raises(ValueError, match=r"site 'z': expected supports of at most max_support=2"):
        EstimatorELBO({"z": Exact("packed", max_support=2)}).loss_and_grads(vae.model, guide, vae.images)


# What changes from step to step, and from part to part.


def scores_of(*sizes: int, codes: int = K) -> nn.Parameter:
    """Of supports of these sizes."""
    scores = torch.where(torch.arange(codes) < torch.tensor(sizes)[:, None], 0.0, -9.0)
    return nn.Parameter(scores + 0.01 * table("jitter", len(sizes), codes))


def simple(observe: Callable[..., None], scores: nn.Parameter, full: int | None = None) -> Program:
    def model(x: Tensor, *rest: Any) -> None:
        pyro.param("scores", scores)
        with pyro.plate("data", full or len(x), subsample_size=len(x)):
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(scores.shape[1])))
            observe(x, z, *rest)

    def guide(x: Tensor, *rest: Any) -> None:
        with pyro.plate("data", full or len(x), subsample_size=len(x)):
            pyro.sample("z", sdist.SparseCategorical(scores[: len(x)]))

    return model, guide


def same_as_dense(program: Program, elbo: ELBO, *args: Any) -> None:
    model, guide = program
    losses, gradients = [], []
    for each, q in ((TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(guide)), (elbo, guide)):
        for p in pyro.get_param_store()._params.values():
            p.grad = None
        losses.append(torch.tensor(each.loss_and_grads(model, q, *args)))
        gradients.append(pyro.get_param_store()._params["scores"].grad.clone())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


def normal(x: Tensor, loc: Tensor) -> None:
    pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def two_plates(latent: bool) -> Program:
    """A second plate that takes its size from the first one's data."""
    scores, locs = scores_of(1, 4, 2, 3, 1), 3 * table("locs", K)

    def model(x: Tensor) -> None:
        with pyro.plate("second", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), obs=None if latent else x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(K)))
            pyro.sample("x", dist.Normal(locs[z] + u, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        if latent:
            with pyro.plate("second", len(x)):
                pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", sdist.SparseCategorical(pyro.param("scores", scores)))

    return model, guide


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("latent", [True, False])
def test_a_second_plate_of_the_same_size_is_named(latent: bool, check: bool) -> None:
    if not latent and not check:
        return  # nothing compares it
    elbos = SparseEnumELBO("packed", check=check), EstimatorELBO({"z": Exact("packed", check=check)})
    expected = r"plate 'second': expected 5 elements" if latent else r"plate 'second' of 11 elements, not 5.*args\[0\]"
    for elbo in elbos:
        with pytest.raises(ValueError, match=expected):
            elbo.loss(*two_plates(latent), table("x", 5))
        pyro.clear_param_store()
    if not latent:
        same_as_dense(two_plates(latent), SparseEnumELBO("auto", max_plate_nesting=1), table("x", 5))


@pytest.mark.parametrize("forgotten", [0, 1])
def test_what_gather_leaves_as_it_was_is_named(forgotten: int) -> None:
    program = simple(lambda x, z, y: normal(x, z + y), scores_of(1, 4, 2, 3, 1))
    elbo = SparseEnumELBO("packed", max_plate_nesting=1)

    def gather(index: Tensor, *args: Tensor) -> Any:
        return [a if i == forgotten else a[index] for i, a in enumerate(args)], {}

    elbo.gather = lambda *args: tuple(gather(*args))
    with pytest.raises(
        ValueError, match=rf"what gather= returned, args\[{forgotten}\] of shape \(5,\) as given, without"
    ):
        elbo.loss(*program, table("x", 5), table("y", 5))
    elbo.gather = lambda index, x, y: ((x[index], y[index][1:]), {})
    with pytest.raises(ValueError, match=r"expected tensors of 11 rows, got args\[1\] of shape \(10,\)"):
        elbo.loss(*program, table("x", 5), table("y", 5))


@pytest.mark.parametrize("mode", ["packed", "auto"])
def test_supports_that_widen_do_not_hide_rows_that_see_each_other(mode: str) -> None:
    """As many rows as images at the first step: compared all the same."""
    sees_others = simple(lambda x, z: normal(x, z + x.mean()), scores_of(1, 1, 1, 1, 1))
    elbo = SparseEnumELBO(mode, max_plate_nesting=1)
    if mode == "packed":
        with pytest.raises(ValueError, match="the same on packed rows as on the batch"):
            elbo.loss(*sees_others, table("x", 5))
        return
    for sizes in ((1, 1, 1, 1, 1), (1, 4, 1, 1, 2)):
        pyro.clear_param_store()
        same_as_dense(simple(lambda x, z: normal(x, z + x.mean()), scores_of(*sizes)), elbo, table("x", 5))


@pytest.mark.parametrize("mode", ["packed", "auto"])
def test_a_later_batch_as_long_as_a_table(mode: str) -> None:
    program = simple(lambda x, z, locs: normal(x, locs[z]), scores_of(1, 4, 2, 3, 1))
    elbo, locs = SparseEnumELBO(mode, max_plate_nesting=1), 3 * table("locs", K)
    same_as_dense(program, elbo, table("x", 5), locs)
    last = table("x", 5)[:K]  # B equals K
    if mode == "packed":
        with pytest.raises(ValueError, match="the same on packed rows as on the batch"):
            elbo.loss(*program, last, locs)
    else:
        same_as_dense(program, elbo, last, locs)


def test_a_switch_that_is_turned_later() -> None:
    program = simple(lambda x, z, seen: normal(x, z + x.mean() * seen), scores_of(1, 4, 2, 3, 1))
    elbo = SparseEnumELBO("packed", max_plate_nesting=1)
    elbo.loss(*program, table("x", 5), False)
    with pytest.raises(ValueError, match=r"args\[0\] of shape \(5,\) got a row for each"):
        elbo.loss(*program, table("x", 5), True)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("estimator", [False, True])
def test_a_model_that_branches_is_told_of_single_rows(chunk: int | None, estimator: bool) -> None:
    """By trying it on one; what raises there, too, is raised as it is."""
    program = simple(lambda x, z: normal(x, torch.zeros(()) if z > 1 else z), scores_of(1, 4, 2, 3, 1))
    broken = simple(lambda x, z: normal(x, torch.zeros(2)[int(z) + 9]), scores_of(1, 4, 2, 3, 1))

    def elbo(chunk_rows: int | None) -> ELBO:
        if estimator:
            return EstimatorELBO({"z": Exact("packed", chunk_rows=chunk_rows)}, max_plate_nesting=1)
        return SparseEnumELBO("packed", chunk_rows=chunk_rows, max_plate_nesting=1)

    with pytest.raises(ValueError, match=r"plate 'data': .* a single one only .*Use chunk_rows=1") as error:
        elbo(chunk).loss(*program, table("x", 5))
    assert isinstance(error.value.__cause__, RuntimeError)
    assert elbo(1).loss(*program, table("x", 5)) > 0
    with pytest.raises(ValueError, match="only one element tensors") as raised:  # torch's own
        elbo(chunk).loss(*broken, table("x", 5))
    assert "chunk_rows" not in str(raised.value)


def test_a_module_that_trains_later() -> None:
    norm = nn.BatchNorm1d(1).eval()
    program = simple(lambda x, z: normal(x, norm(z.double()[:, None])[:, 0]), scores_of(1, 4, 2, 3, 1))
    elbo = SparseEnumELBO("packed", max_plate_nesting=1)
    elbo.loss(*program, table("x", 5))
    norm.train()
    with pytest.raises(ValueError, match="the same on packed rows as on the batch"):
        elbo.loss(*program, table("x", 5))


@pytest.mark.parametrize("full", [5, 6, 7, 8, 9, 40])
@pytest.mark.parametrize("chunk", [None, 1, 4, 5, 6, 7])
def test_numbers_of_rows_that_are_those_of_something_else(full: int, chunk: int | None) -> None:
    """N is 7, B is 5; all data are 5 to 40."""
    pyro.param("own", table("own", full))

    def observe(x: Tensor, z: Tensor) -> None:
        normal(x, z + pyro.param("own", event_dim=0))

    program = simple(observe, scores_of(1, 3, 1, 1, 1), full)
    model, guide = program
    index = torch.arange(full - 5, full)

    def subsampled(f: Callable[..., None]) -> Callable[..., None]:
        return pyro.poutine.replay(f, trace=given)

    given = pyro.poutine.Trace()
    given.add_node("data", type="sample", name="data", value=index, is_observed=False, infer={})
    losses = []
    for elbo, q in (
        (TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(guide)),
        (SparseEnumELBO("packed", chunk_rows=chunk, max_plate_nesting=1, check=False), guide),
    ):
        losses.append(torch.tensor(elbo.loss(model, subsampled(q), table("x", 5))))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_scales_of_rows(chunk: int | None) -> None:
    def weighted(x: Tensor, z: Tensor, w: Tensor) -> None:
        with pyro.poutine.scale(scale=w):
            normal(x, z.double())

    program = simple(weighted, scores_of(1, 4, 2, 3, 1))
    elbo = SparseEnumELBO("packed", chunk_rows=chunk, max_plate_nesting=1)
    for w in (torch.ones(5), 1 + table("w", 5).square()):
        same_as_dense(program, elbo, table("x", 5), w)


def test_a_scale_by_the_value() -> None:
    def by_value(x: Tensor, z: Tensor) -> None:
        with pyro.poutine.scale(scale=2.0 if z.numel() == 1 and int(z) == 0 else 1.0):
            normal(x, z.double())

    def at_once(x: Tensor, z: Tensor) -> None:
        with pyro.poutine.scale(scale=torch.where(z == 0, 2.0, 1.0)):
            normal(x, z.double())

    scores = scores_of(1, 4, 2, 3, 1)
    model, guide = simple(by_value, scores)
    expected = TraceEnum_ELBO(max_plate_nesting=1).loss(
        simple(at_once, scores)[0], config_enumerate(guide), table("x", 5)
    )
    got = SparseEnumELBO("packed", chunk_rows=1, max_plate_nesting=1, check=False).loss(model, guide, table("x", 5))
    assert got == pytest.approx(expected, rel=1e-12)


def test_inner_plates_of_different_sizes_are_refused() -> None:
    def ragged(x: Tensor, z: Tensor, lengths: Tensor) -> None:
        with pyro.plate("t", int(lengths[0]), dim=-2):
            normal(x, z.double())

    model, guide = simple(ragged, scores_of(1, 2, 1, 1, 1))
    elbo = SparseEnumELBO("packed", chunk_rows=1, max_plate_nesting=2)
    with pytest.raises(ValueError, match=r"site 'x': expected plates of the same sizes for all rows, got .*'t', 3"):
        elbo.loss(model, guide, table("x", 5), torch.tensor([3, 1, 3, 1, 3]))


def test_a_parameter_that_begins_on_rows_is_refused() -> None:
    def observe(x: Tensor, z: Tensor) -> None:
        normal(x, z + pyro.param("own", torch.zeros(len(x)), event_dim=0))

    program = simple(observe, scores_of(1, 4, 2, 3, 1))
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"param 'own'.*before the first run"):
        SparseEnumELBO("packed", max_plate_nesting=1).loss(*program, table("x", 5))


def test_chunks_under_handlers_are_refused_and_take_any_noise_again() -> None:
    program = simple(lambda x, z: normal(x, z.double()), scores_of(1, 4, 2, 3, 1))
    elbo = SparseEnumELBO("packed", chunk_rows=2, max_plate_nesting=1)
    with pyro.poutine.scale(scale=2.0), pytest.raises(ValueError, match=r"chunk_rows: .*ScaleMessenger.*around model"):
        elbo.loss(*program, table("x", 5))

    def noisy(x: Tensor, z: Tensor) -> None:
        start = pyro.param("start", lambda: torch.randn(()))  # drawn once, in the first part
        normal(x, (z + 1.0) * start * random.random() * torch.rand(()))

    program = simple(noisy, scores_of(1, 4, 2, 3, 1))

    def loss() -> Tensor:
        random.seed(3), torch.manual_seed(3)
        return elbo.differentiable_loss(*program, table("x", 5))

    with pyro.validation_enabled(False):
        loss().backward()
        start = pyro.get_param_store()._params["start"]
        values = []
        for step in (1e-6, -1e-6):
            start.data += step
            values.append(loss().item())
            start.data -= step
        start.grad = None
        loss().backward()
    assert start.grad.item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_scripted_decoder() -> None:
    net = torch.jit.script(nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)))
    program = simple(lambda x, z: normal(x, net(z.double()[..., None])[..., 0]), scores_of(1, 4, 2, 3, 1))
    same_as_dense(program, SparseEnumELBO("packed", max_plate_nesting=1), table("x", 5))


@pytest.mark.parametrize("result", [None, 3, (torch.zeros(3),), (torch.zeros(3), None)])
def test_what_gather_must_return(result: Any) -> None:
    program = simple(lambda x, z: normal(x, z.double()), scores_of(1, 4, 2, 3, 1))
    with pytest.raises(TypeError, match=r"gather: expected \(args, kwargs\)"):
        SparseEnumELBO("packed", gather=lambda *args: result, max_plate_nesting=1).loss(*program, table("x", 5))


@pytest.mark.parametrize("how", ["sparse", "estimator"])
def test_chunks_take_the_subsample_of_another_plate_again(how: str) -> None:
    """The backward pass runs the model on the indices that the loss was taken on."""
    scores, data = scores_of(1, 4, 2, 3, 1), table("others", 30)
    pyro.param("loc", torch.tensor(0.3))

    def model(x: Tensor) -> None:
        pyro.param("scores", scores)
        with pyro.plate("others", 30, subsample_size=2, dim=-2) as index:
            pyro.sample("y", dist.Normal(pyro.param("loc") * data[index][:, None], 1.0), obs=torch.ones(2, 1))
        with pyro.plate("data", len(x), dim=-1):
            normal(x, pyro.sample("z", dist.Categorical(logits=torch.zeros(K))).double() * pyro.param("loc"))

    def guide(x: Tensor) -> None:
        pyro.plate("others", 30, subsample_size=2, dim=-2)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", sdist.SparseCategorical(scores))

    gradients = []
    for chunk in (None, 2):
        elbo: ELBO = SparseEnumELBO("packed", chunk_rows=chunk, max_plate_nesting=2)
        if how == "estimator":
            elbo = EstimatorELBO(Exact("packed", chunk_rows=chunk), max_plate_nesting=2)
        elbo.loss(model, guide, table("x", 5))
        pyro.set_rng_seed(7)
        elbo.loss_and_grads(model, guide, table("x", 5))
        loc = pyro.get_param_store()._params["loc"]
        gradients.append(loc.grad.clone())
        loc.grad = None
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
