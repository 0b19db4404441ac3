"""
Pyro's own examples, rebuilt small, under the ELBOs of this package with model and guide as they are: the loss and every
gradient are those of the ELBO that the example uses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from pyro_sparse.estimators import Exact
from pyro_sparse.infer import BaselineELBO, EstimatorELBO, SparseEnumELBO
from tests.infer.collapsed_examples import (
    ANIMALS,
    DOCUMENTS,
    GROUPS,
    LENGTH,
    LENGTHS,
    MISSING,
    STEPS,
    TONES,
    TOPICS,
    TRACKS,
    WORDS,
    YEARS,
    CaptureRecapture,
    Tones,
    factorial,
    hmm_0,
    hmm_1,
    hmm_2,
    hmm_5,
    hmm_6,
    lda_guide,
    lda_model,
    table_guide,
    table_model,
    tracks_guide,
    tracks_model,
)
from tests.infer.neural_examples import GENES, IMAGES, LABELS, SIDE, Cells, Scenes, SemiSupervised, network

Program = Callable[..., Any]


def sparse_enum(**kwargs: Any) -> ELBO:
    """In place of TraceEnum_ELBO; these examples have no sparse site, and it would say so."""
    return SparseEnumELBO(strict_enumeration_warning=False, **kwargs)


def exact(**kwargs: Any) -> ELBO:
    return EstimatorELBO(Exact(), **kwargs)


def loss_and_gradients(elbo: ELBO, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """As a step of SVI computes them."""
    with poutine.trace(param_only=True) as capture:
        loss = elbo.loss_and_grads(model, guide, *args, **kwargs)
    found = {"loss": torch.tensor(loss)}
    for name, site in capture.trace.nodes.items():
        parameter = site["value"].unconstrained()
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


def both(stock: ELBO, ours: ELBO, model: Program, guide: Program, *args: Any, **kwargs: Any) -> list[dict[str, Tensor]]:
    """What each of them finds from one state of the generators."""
    stock.loss(model, guide, *args, **kwargs)  # which makes the parameters
    start = get_rng_state()
    expected = loss_and_gradients(stock, model, guide, *args, **kwargs)
    set_rng_state(start)
    return [expected, loss_and_gradients(ours, model, guide, *args, **kwargs)]


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    assert any(value.any() for name, value in expected.items() if name != "loss")
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def check(stock: ELBO, ours: ELBO, model: Program, guide: Program, *args: Any, **kwargs: Any) -> None:
    expected, got = both(stock, ours, model, guide, *args, **kwargs)
    assert_equal(got, expected)


# Networks in model and guide.

each_label = pytest.mark.parametrize("labels", [None, LABELS], ids=["unlabelled", "labelled"])
each_plate = pytest.mark.parametrize("plate", [{}, {"size": 4}], ids=["no-size", "size"])


@each_plate
@each_label
@pytest.mark.parametrize("ours", [sparse_enum, exact])
def test_semi_supervised_vae(ours: Any, labels: Tensor | None, plate: dict[str, int]) -> None:
    vae = SemiSupervised(**plate)
    guide = config_enumerate(vae.guide, "parallel", expand=True)
    stock = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    check(stock, ours(max_plate_nesting=1), vae.model, guide, IMAGES, labels)


@each_plate
@pytest.mark.parametrize("ours", [BaselineELBO, exact])
def test_auxiliary_classifier(ours: Any, plate: dict[str, int]) -> None:
    vae = SemiSupervised(**plate)
    check(Trace_ELBO(), ours(), vae.model_classify, vae.guide_classify, IMAGES, LABELS)


@each_label
@pytest.mark.parametrize("ours", [sparse_enum, exact])
def test_scanvi(ours: Any, labels: Tensor | None) -> None:
    """
    The guide's classification loss depends on nothing that was drawn outside of a sample statement, whatever it says of
    itself. Pyro's ELBO takes it at its word, and gives it a score function; ours differentiate it.
    """
    cells = Cells()
    guide = config_enumerate(cells.guide, "parallel", expand=True)
    counts = torch.randint(9, (len(LABELS), GENES)).double()
    stock = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)

    def found(elbo: ELBO, has_rsample: bool) -> dict[str, Tensor]:
        set_rng_state(start)
        cells.has_rsample = has_rsample
        return loss_and_gradients(elbo, cells.model, guide, counts, labels)

    start = get_rng_state()
    stock.loss(cells.model, guide, counts, labels)  # which makes the parameters
    expected = found(stock, has_rsample=True)
    assert_equal(found(ours(max_plate_nesting=1), has_rsample=False), expected)
    if labels is not None:
        with pytest.raises(AssertionError, match="z2l_net"):
            assert_equal(found(stock, has_rsample=False), expected)


# AIR. Pyro scales the cost that a baseline predicts by the size of the data over that of the minibatch; here it is per
# datum, whatever the minibatch.


@pytest.mark.parametrize("batch_size", [3, 5])
def test_air_without_baselines(batch_size: int) -> None:
    scenes, data = Scenes(None), torch.rand(5, SIDE, SIDE)
    for stock, ours in ((Trace_ELBO(), BaselineELBO()), (TraceGraph_ELBO(), BaselineELBO(costs="graph"))):
        check(stock, ours, scenes.model, scenes.guide, data, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [3, 5])
def test_air_with_baselines(batch_size: int) -> None:
    scenes, data, scale = Scenes(1.0), torch.rand(5, SIDE, SIDE), 5 / batch_size
    stock, ours = TraceGraph_ELBO(), BaselineELBO(costs="graph")
    ours.loss(scenes.model, scenes.guide, data, batch_size=batch_size)  # which makes the parameters
    start = get_rng_state()
    got = loss_and_gradients(ours, scenes.model, scenes.guide, data, batch_size=batch_size)
    set_rng_state(start)
    scenes.baseline = scale
    expected = loss_and_gradients(stock, scenes.model, scenes.guide, data, batch_size=batch_size)
    baselines = [name for name in expected if "baseline" in name]  # their loss is a squared error
    assert len(baselines) == 6
    assert_equal(got, expected | {name: expected[name] / scale**2 for name in baselines})


# Discrete sites of the model alone, which the guide lacks.

collapsed = pytest.mark.parametrize("ours", [sparse_enum, exact])


@collapsed
def test_mixture(ours: Any) -> None:
    seen = {name: torch.rand(7).round() for name in "ac"}
    check(TraceEnum_ELBO(max_plate_nesting=1), ours(max_plate_nesting=1), table_model, table_guide, seen, 7)


HMMS: dict[str, Program] = {
    "0": hmm_0,
    "1": hmm_1,
    "1-batches": partial(hmm_1, batch_size=2, prior=False),
    "2": hmm_2,
    "3": partial(factorial, coupled=False),
    "4": partial(factorial, coupled=True),
    "5": hmm_5,
    "6": hmm_6,
    "6-raftery": partial(hmm_6, raftery=True),
}


@collapsed
@pytest.mark.parametrize("name", HMMS)
def test_hidden_markov_model(ours: Any, name: str) -> None:
    model = partial(hmm_5, net=Tones()) if name == "5" else HMMS[name]
    guide = AutoDelta(poutine.block(model, expose_fn=lambda msg: msg["name"].startswith("probs_")))
    nesting = 1 if name == "0" else 2
    chords = torch.rand(len(LENGTHS), int(LENGTHS.max()), TONES).round()
    check(TraceEnum_ELBO(max_plate_nesting=nesting), ours(max_plate_nesting=nesting), model, guide, chords, LENGTHS)


@collapsed
@pytest.mark.parametrize("batch_size", [None, 3])
def test_latent_dirichlet_allocation(ours: Any, batch_size: int | None) -> None:
    data = torch.randint(WORDS, (LENGTH, DOCUMENTS))
    guide = partial(lda_guide, network(WORDS, 4, TOPICS))
    stock = TraceEnum_ELBO(max_plate_nesting=2)
    check(stock, ours(max_plate_nesting=2), lda_model, guide, data, batch_size=batch_size)


@collapsed
@pytest.mark.parametrize(("variant", "vectorize"), [(1, True), (2, True), (3, True), (4, True), (5, True), (1, False)])
def test_capture_recapture(ours: Any, variant: int, vectorize: bool) -> None:
    captures, sex = torch.rand(ANIMALS, YEARS).round(), torch.rand(ANIMALS).round()
    model = CaptureRecapture(variant)
    guide = AutoDiagonalNormal(poutine.block(model, expose_fn=lambda msg: msg["name"][:3] in ("phi", "rho")))
    options = {"max_plate_nesting": 1, "num_particles": 3, "vectorize_particles": vectorize}
    check(TraceEnum_ELBO(**options), ours(**options), model, guide, captures, sex)


@collapsed
@pytest.mark.parametrize(
    "kinds", [("none", "discrete"), ("discrete", "continuous"), ("continuous", "discrete")], ids="-".join
)
def test_mixed_hidden_markov_model(ours: Any, kinds: tuple[str, str]) -> None:
    size = (TRACKS, GROUPS, STEPS)
    steps, angles, turns = torch.rand(size), 2 * torch.rand(size) - 1, torch.rand(size)
    steps[0, 0, 1] = turns[1, 1, 0] = MISSING
    there = torch.tensor([[True, True], [True, True], [True, False]])
    until = torch.tensor([[2, 1], [1, 2], [2, 2]])
    masks = (there, torch.arange(STEPS) < until[..., None])
    model, guide = partial(tracks_model, kinds), partial(tracks_guide, kinds)
    stock = TraceEnum_ELBO(max_plate_nesting=2)
    check(stock, ours(max_plate_nesting=2), model, guide, steps, angles, turns, masks)
