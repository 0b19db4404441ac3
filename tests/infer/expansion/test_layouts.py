"""How supports are laid out, what a slot is counted to cost, and what mode "auto" makes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_sparse.distributions as sdist
from pyro_sparse.infer import SparseEnumELBO
from pyro_sparse.infer.expansion.layouts import Layout, cheapest, dense, padded, size, union
from pyro_sparse.infer.expansion.work import ELEMENT_FLOPS, CountWork


@pytest.mark.parametrize("layout", [padded, union, dense])
@pytest.mark.parametrize("batch", [(), (4,), (3, 1, 4)])
def test_every_row_finds_its_support_once(layout: Layout, batch: tuple[int, ...]) -> None:
    d = sdist.SparseCategorical(2 * torch.randn(*batch, 7))
    values = layout("z", d, ())
    assert values.dim() == 1 + len(batch)
    slots = values.expand(values.shape[:1] + d.batch_shape)
    counts = torch.nn.functional.one_hot(slots, 7).sum(0)
    assert counts.max() == 1
    assert torch.equal(counts * (d.probs > 0), (d.probs > 0).long())


def test_union_shares_and_padded_does_not() -> None:
    d = sdist.SparseCategorical(probs=torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]))
    assert padded("z", d, ()).shape == (2, 2)
    assert sorted(union("z", d, ()).flatten().tolist()) == [0, 1, 2]
    assert padded("z", d, (-1,)).shape == (3, 1)  # a dim that must share


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(1.0, padded), (1.4, padded), (3.0, union), (10.0, dense)],
)
def test_cheapest_compares_slots_with_outcomes(ratio: float, expected: Layout) -> None:
    """S=2 slots, a union of U=4 outcomes, K=8."""
    probs = torch.zeros(2, 8)
    probs[0, :2], probs[1, 2:4] = 0.5, 0.5
    d = sdist.SparseCategorical(probs=probs)
    assert torch.equal(cheapest({size("z", (2,), 8, 1): ratio}, 1, set())("z", d, ()), expected("z", d, ()))


def test_cheapest_pads_a_site_that_was_not_counted() -> None:
    d = sdist.SparseCategorical(torch.randn(3, 5))
    uncounted: set[Any] = set()
    assert torch.equal(cheapest({}, 1, uncounted)("z", d, ()), padded("z", d, ()))
    assert uncounted == {size("z", (3,), 5, 1)}


def test_cheapest_is_dense_where_little_is_saved() -> None:
    d = sdist.SparseCategorical(torch.zeros(3, 5))
    assert torch.equal(cheapest({size("z", (3,), 5, 1): 1.0}, 1, set())("z", d, ()), dense("z", d, ()))


def test_work_counts_products_by_flops_and_writes_by_elements() -> None:
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with CountWork() as count:
        a @ b
    assert count.total == 2 * 3 * 4 * 5 + ELEMENT_FLOPS * 15
    with CountWork() as count:
        a.expand(7, 3, 4).transpose(0, 1).unsqueeze(0)
    assert count.total == 0  # views write nothing
    with CountWork() as count:
        a + 1
    assert count.total == ELEMENT_FLOPS * 12


def make_vae(batch: int, outcomes: int, sees_style: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    images = (torch.rand(batch, 64) < 0.3).double()
    encoder = nn.Linear(64, outcomes)
    embed, net = nn.Embedding(outcomes, 16), nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 64))

    def model() -> None:
        with pyro.plate("data", batch):
            z = pyro.sample("z", dist.Categorical(logits=torch.zeros(outcomes)))
            h: Tensor = embed(z)
            if sees_style:
                h = h + pyro.sample("style", dist.Normal(torch.zeros(16), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net(h)).to_event(1), obs=images)

    def guide() -> None:
        with pyro.plate("data", batch):
            if sees_style:
                pyro.sample("style", dist.Normal(torch.zeros(16), 1.0).to_event(1))
            pyro.sample("z", sdist.SparseCategorical(20 * encoder(images)))

    return model, guide


@pytest.mark.parametrize(
    ("outcomes", "sees_style", "shared"), [(8, False, True), (500, True, False), (500, False, False)]
)
def test_auto_picks_by_what_the_decoder_sees(outcomes: int, sees_style: bool, shared: bool) -> None:
    model, guide = make_vae(64, outcomes, sees_style)
    elbo = SparseEnumELBO("auto", max_plate_nesting=1)
    elbo.loss(model, guide)  # finds out that its data, which are no argument, cannot be packed
    guide_trace = next(elbo._get_traces(model, guide, (), {}))[1]
    slots, rows = guide_trace.nodes["z"]["value"].shape
    assert rows == (1 if shared else 64)
    assert slots < outcomes


def test_auto_counts_once_and_leaves_the_generators_alone() -> None:
    model, guide = make_vae(8, 16, True)
    calls = []
    elbo = SparseEnumELBO("auto", max_plate_nesting=1)
    padded_elbo = SparseEnumELBO("padded", max_plate_nesting=1)
    losses = []
    for some_elbo in (elbo, padded_elbo):
        calls.clear()
        pyro.set_rng_seed(5)
        losses.append(some_elbo.loss(functools.partial(_counted, calls, model), guide))
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)
    pyro.set_rng_seed(5)
    calls.clear()
    with pyro.validation_enabled(False):  # which compares the first run with others
        SparseEnumELBO("auto", max_plate_nesting=1).loss(functools.partial(_counted, calls, model), guide)
    assert len(calls) == 7  # 1 + 2 for the only sparse site, 3 to find out that it cannot be packed, and the step
    calls.clear()
    elbo.loss(functools.partial(_counted, calls, model), guide)
    assert len(calls) == 1


def _counted(calls: list[int], model: Callable[[], None]) -> None:
    calls.append(1)
    model()


def test_auto_is_counted_again_for_batches_of_another_size() -> None:
    """What a batch of two rows costs decides nothing for one of 64; nor does a labelled batch, without the site."""
    scores = torch.randn(64, 40)
    of_outcome, of_row, out = nn.Linear(40, 50), nn.Linear(3, 50), nn.Linear(50, 1)

    def draw(x: Tensor, y: Tensor | None) -> Tensor:
        return pyro.sample("z", sdist.SparseOneHotCategorical(2 * scores[: len(x)])) if y is None else y

    def guide(x: Tensor, y: Tensor | None) -> None:
        with pyro.plate("data", len(x)):
            draw(x, y)

    def model(x: Tensor, y: Tensor | None) -> None:
        with pyro.plate("data", len(x)):
            z = draw(x, y)
            loc = out((of_outcome(z) + of_row(x)).tanh()).squeeze(-1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x.mean(-1))

    def sizes(*batches: tuple[int, bool]) -> dict[Any, float]:
        elbo = SparseEnumELBO("auto", max_plate_nesting=1, strict_enumeration_warning=False)
        for rows, labelled in batches:
            y = torch.nn.functional.one_hot(torch.zeros(rows).long(), 40).to(scores) if labelled else None
            elbo.loss_and_grads(model, guide, torch.randn(rows, 3), y)
        return dict(elbo._choice.ratios)

    assert sizes((64, True), (2, False), (64, False)) == {**sizes((64, False)), **sizes((2, False))}
