"""
Marginals, posterior draws and best outcomes of the model's own discrete sites, family by family, against Bayes' rule by
hand over all outcomes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

import pyro_sparse.distributions as sdist
from pyro_sparse.infer import SparseEnumELBO, infer_discrete

SCORES = torch.tensor([1.0, 0.4, -2.0], dtype=torch.float64)
DATA = torch.tensor([0.3, 1.2, 2.0], dtype=torch.float64)
OPEN = torch.tensor([True, False, True])
COPIES = 2000

FAMILIES: dict[str, tuple[Callable[[], Any], type]] = {
    "SparseCategorical": (lambda: sdist.SparseCategorical(SCORES), sdist.SparseCategorical),
    "SparseOneHotCategorical": (lambda: sdist.SparseOneHotCategorical(SCORES), sdist.SparseOneHotCategorical),
    "GibbsFaces": (lambda: sdist.GibbsFaces(SCORES), dist.Categorical),
    "MaxEntropyFaces": (lambda: sdist.MaxEntropyFaces(3, torch.tensor(0.5)), dist.Categorical),
    "GumbelSoftmaxST": (lambda: sdist.GumbelSoftmaxST(0.5, logits=SCORES), sdist.GumbelSoftmaxST),
    "OneHotCategoricalST": (lambda: sdist.OneHotCategoricalST(logits=SCORES), sdist.OneHotCategoricalST),
    "BernoulliST": (lambda: sdist.BernoulliST(logits=SCORES[1]), sdist.BernoulliST),
    "OneHotCategorical": (lambda: dist.OneHotCategorical(logits=SCORES), dist.OneHotCategorical),
    "Bernoulli": (lambda: dist.Bernoulli(logits=SCORES[1]), dist.Bernoulli),
    "Binomial": (lambda: dist.Binomial(3, SCORES[1]), dist.Categorical),
}
each_family = pytest.mark.parametrize("name", FAMILIES)
each_mask = pytest.mark.parametrize("mask", ["none", "site", "True", "handler", "both"])


def number(z: Tensor, d: Any) -> Tensor:
    return (z * torch.arange(1.0, z.shape[-1] + 1)).sum(-1) if d.event_dim else z.to(DATA.dtype)


def model(name: str, mask: str = "none", copies: int | None = None) -> Tensor:
    d = FAMILIES[name][0]()
    if mask != "none":
        masked = d.expand([3])
        d = masked.mask(True) if mask == "True" else masked.mask(OPEN) if mask != "handler" else masked
    several = contextlib.nullcontext() if copies is None else pyro.plate("copies", copies, dim=-2)
    with several, pyro.plate("data", 3, dim=-1):
        with poutine.mask(mask=OPEN if mask in ("handler", "both") else torch.tensor(True)):
            z: Tensor = pyro.sample("z", d, infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(number(z, d), 1.0), obs=DATA)
    return z


def bayes(name: str, mask: str) -> tuple[Tensor, Tensor]:
    """The logarithm of the joint probability of each datum and outcome, (3, K); the outcomes, (K, *event)."""
    d = FAMILIES[name][0]()
    outcomes = d.enumerate_support()
    prior = d.log_prob(outcomes).expand(3, -1)
    likelihood = dist.Normal(number(outcomes, d), 1.0).log_prob(DATA[:, None])
    if mask in ("site", "both"):  # where the density is one at each outcome
        prior = prior.where(OPEN[:, None], 0.0)
    if mask in ("handler", "both"):
        likelihood = likelihood.where(OPEN[:, None], 0.0)
    return prior + likelihood, outcomes


def no_guide(*args: Any) -> None:
    pass


def make_elbo(**kwargs: Any) -> SparseEnumELBO:
    return SparseEnumELBO(max_plate_nesting=2, strict_enumeration_warning=False, **kwargs)


@each_mask
@each_family
def test_the_evidence(name: str, mask: str) -> None:
    """A masked row has all K outcomes, whatever support it and the others have; stock Pyro says the same."""
    joint, _ = bayes(name, mask)
    expected = pytest.approx(-joint.logsumexp(-1).sum().item(), abs=1e-10)
    assert make_elbo().loss(model, no_guide, name, mask) == expected
    assert TraceEnum_ELBO(max_plate_nesting=2).loss(model, no_guide, name, mask) == expected


@pytest.mark.parametrize("inner", [OPEN, torch.tensor(True)])
def test_the_evidence_under_two_masks(inner: Tensor) -> None:
    """Whichever of them is the inner one."""
    outer = torch.tensor(True) if inner is OPEN else OPEN

    def program() -> None:
        with pyro.plate("data", 3):
            d = FAMILIES["SparseCategorical"][0]().expand([3])
            z = pyro.sample("z", d.mask(inner).mask(outer), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(number(z, d), 1.0), obs=DATA)

    expected = -bayes("SparseCategorical", "site")[0].logsumexp(-1).sum().item()
    assert make_elbo().loss(program, no_guide) == pytest.approx(expected, abs=1e-10)


@each_mask
@each_family
def test_marginals(name: str, mask: str) -> None:
    joint, _ = bayes(name, mask)
    found = make_elbo().compute_marginals(model, no_guide, name, mask)["z"]
    assert type(found) is FAMILIES[name][1]
    probs = torch.stack([1 - found.probs, found.probs], -1) if "Bernoulli" in name else found.probs
    torch.testing.assert_close(probs, joint.softmax(-1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mask", ["none", "both"])
@each_family
def test_draws(name: str, mask: str) -> None:
    """Of 2000 copies. Each of < 500 frequencies leaves six standard errors with probability < 3e-9."""
    joint, outcomes = bayes(name, mask)
    p = joint.softmax(-1)
    for z in (
        make_elbo().sample_posterior(model, no_guide, name, mask, COPIES),
        infer_discrete(model, first_available_dim=-3)(name, mask, COPIES),
    ):
        assert z.shape == (COPIES, 3, *outcomes.shape[1:]) and z.dtype == outcomes.dtype
        same = z.unsqueeze(2) == outcomes
        frequencies = (same.all(-1) if outcomes.dim() > 1 else same).double().mean(0)
        assert ((frequencies - p).abs() <= 6 * (p * (1 - p) / COPIES).sqrt()).all()


@each_mask
@each_family
def test_the_best_outcome(name: str, mask: str) -> None:
    joint, outcomes = bayes(name, mask)
    best = infer_discrete(model, first_available_dim=-3, temperature=0)(name, mask)
    same = best.unsqueeze(1) == outcomes
    found = same.all(-1) if outcomes.dim() > 1 else same
    torch.testing.assert_close(joint[found], joint.amax(-1))  # several are equally good at times


def test_what_is_around_sees_outcomes() -> None:
    for run in (
        lambda: infer_discrete(model, first_available_dim=-3)("GibbsFaces"),
        lambda: make_elbo().sample_posterior(model, no_guide, "GibbsFaces"),
    ):
        trace = poutine.trace(run).get_trace()
        node = trace.nodes["z"]
        assert isinstance(node["fn"], sdist.GibbsFaces) and torch.equal(node["value"], trace.nodes["_RETURN"]["value"])
        trace.compute_log_prob()


def test_a_guide_is_drawn() -> None:
    """Its sparse sites too: what follows is given the draw."""

    table = torch.stack([SCORES.roll(k) for k in range(3)])

    def program() -> Tensor:
        a: Tensor = pyro.sample("a", sdist.SparseCategorical(SCORES))
        z = pyro.sample("z", sdist.SparseOneHotCategorical(table[a]), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z @ torch.arange(3.0), 1.0), obs=DATA[0])
        return a

    def guide() -> None:
        pyro.sample("a", sdist.SparseCategorical(probs=torch.tensor([0.0, 1.0, 0.0])))

    elbo = SparseEnumELBO(max_plate_nesting=0)
    prior = sdist.SparseCategorical(SCORES.roll(1)).probs
    expected = prior * dist.Normal(torch.arange(3.0), 1.0).log_prob(DATA[0]).exp()
    torch.testing.assert_close(elbo.compute_marginals(program, guide)["z"].probs, expected / expected.sum())
    assert elbo.sample_posterior(program, guide) == 1
    marked = poutine.infer_config(guide, config_fn=lambda site: {"enumerate": "parallel"})
    with pytest.raises(NotImplementedError, match=r"compute_marginals, site 'a': expected a guide site that is drawn"):
        elbo.compute_marginals(program, marked)


def test_a_chain() -> None:
    """Against all paths, states as unit vectors."""
    table, T = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.5, 0.5], [0.3, 0.0, 0.7]]), 3
    loc = torch.arange(3.0)

    def chain() -> None:
        z = torch.eye(3)[0]
        for t in pyro.markov(range(T)):
            z = pyro.sample(f"z_{t}", sdist.SparseOneHotCategorical(probs=z @ table), infer={"enumerate": "parallel"})
            pyro.sample(f"x_{t}", dist.Normal(z @ loc, 1.0), obs=DATA[t])

    paths = [*itertools.product(range(3), repeat=T)]
    joint = torch.stack(
        [
            sum(
                (table[before, k].log() + dist.Normal(loc[k], 1.0).log_prob(x))
                for before, k, x in zip((0, *path), path, DATA, strict=False)
            )
            for path in paths
        ]
    )
    found = make_elbo().compute_marginals(chain, no_guide)
    for t in range(T):
        p = torch.zeros(3).index_add(0, torch.tensor(paths)[:, t], joint.softmax(0))
        torch.testing.assert_close(found[f"z_{t}"].probs, p)
    best = infer_discrete(chain, first_available_dim=-1, temperature=0)
    trace = poutine.trace(best).get_trace()
    states = [int(trace.nodes[f"z_{t}"]["value"].argmax()) for t in range(T)]
    assert tuple(states) == paths[int(joint.argmax())]


# What is refused, and where Pyro's own functions stop.


@each_family
def test_pyros_own_marginals(name: str) -> None:
    """Where a family is made of other parameters than logits of its outcomes, it says so."""
    stock = TraceEnum_ELBO(max_plate_nesting=2)
    if "Faces" in name:
        with pytest.raises(TypeError, match=rf"^{name}: expected its own parameters, got logits.*SparseEnumELBO"):
            stock.compute_marginals(model, no_guide, name)
    elif name != "Binomial":  # of which Pyro makes something else
        found = stock.compute_marginals(model, no_guide, name)["z"]
        probs = torch.stack([1 - found.probs, found.probs], -1) if "Bernoulli" in name else found.probs
        torch.testing.assert_close(probs, bayes(name, "none")[0].softmax(-1))


def test_pyros_own_marginals_of_masked_sites() -> None:
    with pytest.raises(TypeError, match=r"^MaskedSparseDistribution: expected its own parameters, got logits"):
        TraceEnum_ELBO(max_plate_nesting=2).compute_marginals(model, no_guide, "SparseCategorical", "site")


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="expected a negative first_available_dim, got 0"):
        infer_discrete(model, first_available_dim=0)
    with pytest.raises(ValueError, match=r"expected temperature 0 or 1, got 0\.5"):
        infer_discrete(model, first_available_dim=-1, temperature=0.5)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="expected num_particles=1, got 2"):
        make_elbo(num_particles=2).sample_posterior(model, no_guide, "Bernoulli")
