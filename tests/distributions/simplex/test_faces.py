"""Distributions over faces: everything against the sum over all of them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sparse.distributions import GibbsFaces, MaxEntropyFaces
from pyro_sparse.distributions.simplex.gibbs_faces import log_poisson_binomial
from pyro_sparse.estimators import Exact, RaoBlackwell
from pyro_sparse.testing import check_distribution, check_estimator
from pyro_sparse.testing.estimator_models import EstimatorModel
from tests.distributions.simplex.simplex_zoo import all_faces, close


def gibbs(scores: Tensor) -> Tensor:
    """The log-probabilities of all faces, by the definition."""
    faces = all_faces(scores.shape[-1])
    energy = (scores * (2 * faces - 1)).sum(-1)
    return energy - energy.logsumexp(0)


def max_entropy(K: int, bits: Tensor) -> Tensor:
    size = all_faces(K).sum(-1)
    weight = bits * math.log(2) * (size - 1) - torch.lgamma(size)
    return weight - weight.logsumexp(0)


SCORES = {
    "two": torch.tensor([0.3, -0.4], dtype=torch.float64),
    "three": torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64),
    "six": torch.tensor([1.5, -0.7, 0.2, -3.0, 0.9, 0.0], dtype=torch.float64),
    "rare": torch.tensor([-50.0, -49.0, -50.5, -50.0], dtype=torch.float64),
    "likely": torch.tensor([10.1, -12.0, 11.0, -20.0], dtype=torch.float64),
    "all": torch.tensor([50.0, 48.0, 50.0], dtype=torch.float64),
    "both": torch.tensor([50.0, -50.0, 0.5, 3.0], dtype=torch.float64),
}
CASES: dict[str, tuple[Any, Tensor]] = {name: (GibbsFaces(s), gibbs(s)) for name, s in SCORES.items()}
for K, bits in ((2, 0.0), (3, 4.0), (6, -2.0), (6, 0.0), (5, 30.0)):
    CASES[f"max entropy {K}, {bits}"] = (
        MaxEntropyFaces(K, torch.tensor(bits, dtype=torch.float64)),
        max_entropy(K, torch.tensor(bits, dtype=torch.float64)),
    )
each = pytest.mark.parametrize("name", CASES)


@each
def test_against_the_sum_over_all_faces(name: str) -> None:
    d, log_p = CASES[name]
    faces, p = all_faces(d.num_classes), log_p.exp()
    close(d.log_prob(faces), log_p)
    assert abs(d.log_prob(d.enumerate_support()).exp().sum() - 1) < 1e-12
    close(d.entropy(), -(p * log_p).sum())
    close(d.marginals, (p[:, None] * faces).sum(0))
    close(d.expected_size, (p * faces.sum(-1)).sum())
    sizes = torch.stack([p[faces.sum(-1) == n].sum() for n in range(1, d.num_classes + 1)])
    close(d.size_log_probs.exp(), sizes)
    close(d.log_prob(d.mode), log_p.max())


@pytest.mark.parametrize(("p", "q"), [*itertools.product(CASES, repeat=2)])
def test_kl(p: str, q: str) -> None:
    (first, log_p), (second, log_q) = CASES[p], CASES[q]
    if first.num_classes != second.num_classes:
        with pytest.raises(ValueError, match="as many vertices"):
            kl_divergence(first, second)
    else:
        kl = (log_p.exp() * (log_p - log_q)).sum()
        close(kl_divergence(first, second), kl)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("rare", "all", "both", "max entropy 5, 30.0")])
def test_draws(name: str) -> None:
    """Chi-square, p > 1e-6: fails by chance once in 100 000 runs of all."""
    d, log_p = CASES[name]
    faces = d.sample((20_000,))
    assert d.support.check(faces).all()
    weights = 2 ** torch.arange(d.num_classes)
    number, order = (faces * weights).sum(-1).long(), (all_faces(d.num_classes) * weights).sum(-1).long()
    counts = torch.stack([(number == n).sum() for n in order]).double()
    expected = 20_000 * log_p.exp()
    often = expected > 5
    rest = [[x[~often].sum()] if (~often).any() else [] for x in (counts, expected)]
    observed = torch.cat([counts[often], torch.tensor(rest[0])])
    wanted = torch.cat([expected[often], torch.tensor(rest[1])])
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-6


def test_gradients_are_those_of_the_sums() -> None:
    scores = SCORES["six"].clone().requires_grad_()
    d, log_p, prior = GibbsFaces(scores), gibbs(scores), MaxEntropyFaces(6, 1.0)
    log_q = max_entropy(6, torch.tensor(1.0))
    pairs = [
        (d.entropy(), -(log_p.exp() * log_p).sum()),
        (kl_divergence(d, prior), (log_p.exp() * (log_p - log_q)).sum()),
        (kl_divergence(prior, d), (log_q.exp() * (log_q - log_p)).sum()),
        (d.marginals[2], (log_p.exp() * all_faces(6)[:, 2]).sum()),
        (d.log_prob(all_faces(6)[17]), log_p[17]),
    ]
    for ours, theirs in pairs:
        close(*(torch.autograd.grad(x, scores, retain_graph=True)[0] for x in (ours, theirs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [-50.0, 0.0, 50.0])
def test_many_vertices_and_extreme_scores(dtype: torch.dtype, value: float) -> None:
    scores = (value + torch.randn(4, 200).to(dtype)).requires_grad_()
    d, prior = GibbsFaces(scores), MaxEntropyFaces(200, torch.tensor(0.5, dtype=dtype))
    faces = d.sample()
    total = d.entropy() + kl_divergence(d, prior) + kl_divergence(prior, d) + d.log_prob(faces) + d.marginals.sum(-1)
    assert total.isfinite().all() and total.dtype == dtype
    (gradient,) = torch.autograd.grad(total.sum(), scores)
    assert gradient.isfinite().all()
    close(d.size_log_probs.exp().sum(-1), torch.ones(4), tol=1e-4 if dtype == torch.float32 else 1e-11)
    assert (prior.sample((3,)).sum(-1) >= 1).all()


@each
def test_float32(name: str) -> None:
    d, log_p = CASES[name]
    if isinstance(d, GibbsFaces):
        single: Any = GibbsFaces(d.scores.float())
    else:
        single = MaxEntropyFaces(d.num_classes, d.bits.float())
    close(single.log_prob(all_faces(d.num_classes).float()), log_p, tol=1e-5)
    close(single.entropy(), d.entropy(), tol=1e-4 if name == "rare" else 1e-5)  # there it is left of terms of 100
    close(single.marginals, d.marginals, tol=1e-5)


def test_a_vertex_that_is_ruled_out() -> None:
    scores = torch.tensor([1.0, -math.inf, -2.0], requires_grad=True)
    d, small = GibbsFaces(scores), GibbsFaces(torch.tensor([1.0, -2.0]))
    close(d.log_prob(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])), small.log_prob(all_faces(2)[[1, 2]]))
    assert d.log_prob(torch.tensor([0.0, 1.0, 0.0])) == -math.inf
    close(d.entropy(), small.entropy())
    assert d.marginals[1] == 0 and not d.sample((500,))[:, 1].any()
    assert kl_divergence(GibbsFaces(torch.zeros(3)), d) == math.inf
    close(d.size_log_probs.exp(), torch.cat([small.size_log_probs.exp(), torch.zeros(1)]))
    total = d.entropy() + kl_divergence(d, MaxEntropyFaces(3, 0.0)) + d.marginals.sum() + d.size_log_probs[:2].sum()
    assert torch.autograd.grad(total, scores)[0].isfinite().all()


def test_maximum_entropy() -> None:
    """No distribution over faces, with a uniform point in each, has more; 10 vertices without bits: 5.090 nats."""

    def total(d: Any) -> Tensor:
        sizes = torch.arange(1, d.num_classes + 1).double()
        entropy: Tensor = d.entropy() - (d.size_log_probs.exp() * torch.lgamma(sizes)).sum(-1)
        return entropy

    best = total(MaxEntropyFaces(10, 0.0))
    assert abs(best - 5.090) < 5e-4
    close(total(MaxEntropyFaces(2, 0.0)), torch.tensor(3.0).log())
    for scores in (torch.zeros(10), torch.full((10,), -0.3), torch.randn(20, 10)):
        assert (total(GibbsFaces(scores)) < best).all()
    assert total(MaxEntropyFaces(10, 1.0)) < best and total(MaxEntropyFaces(10, -1.0)) < best


def test_poisson_binomial() -> None:
    logits = 3 * torch.randn(4, 7)
    bits = torch.tensor([*itertools.product([0.0, 1.0], repeat=7)])
    p = dist.Bernoulli(logits=logits).log_prob(bits[:, None]).sum(-1).exp()
    direct = torch.stack([p[bits.sum(-1) == n].sum(0) for n in range(8)], -1)
    torch.testing.assert_close(log_poisson_binomial(logits), direct.log(), rtol=1e-13, atol=1e-13)


def test_conformance() -> None:
    check_distribution(GibbsFaces(torch.randn(2, 4)))
    check_distribution(MaxEntropyFaces(4, torch.randn(2)))


@pytest.mark.parametrize("estimator", [Exact, RaoBlackwell])
def test_as_a_site(estimator: Any) -> None:
    def program(side: str) -> None:
        f = pyro.sample("f", GibbsFaces(pyro.param(f"{side}.scores", lambda: torch.randn(3))))
        if side == "model":
            loc = f @ pyro.param("weights", lambda: torch.randn(3)) + f.prod(-1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(0.7))

    model = EstimatorModel("faces", lambda: program("model"), lambda: program("guide"))
    check_estimator(estimator(), models=[model])


def test_bad_input() -> None:
    for make, message in {
        lambda: GibbsFaces(torch.zeros(1)): "GibbsFaces: expected at least two vertices",
        lambda: GibbsFaces(torch.tensor(0.0)): "GibbsFaces: expected at least two vertices",
        lambda: GibbsFaces(torch.tensor([0.0, math.inf])): r"GibbsFaces.scores: expected real numbers or -inf, got inf",
        lambda: GibbsFaces(torch.full((2, 3), -math.inf)): r"GibbsFaces.scores: expected a vertex with a score above",
        lambda: GibbsFaces(torch.tensor([0.0, math.nan])): "scores",
        lambda: MaxEntropyFaces(1, 0.0): "MaxEntropyFaces: expected at least two vertices",
        lambda: MaxEntropyFaces(3, math.nan): "bits",
        lambda: GibbsFaces(torch.zeros(3)).log_prob(torch.zeros(3)): "support",
        lambda: GibbsFaces(torch.zeros(3)).log_prob(torch.tensor([0.5, 0.5, 1.0])): "support",
        lambda: MaxEntropyFaces(3, 0.0).log_prob(torch.zeros(3)): "support",
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(NotImplementedError, match="expected at most 12 vertices, got 13"):
        GibbsFaces(torch.zeros(13)).enumerate_support()
