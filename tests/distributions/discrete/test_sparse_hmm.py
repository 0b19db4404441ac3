"""SparseHMM against stock DiscreteHMM, and against the enumeration of paths."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import DiscreteHMM
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_sparse.diagnostics.memory import peak_memory
from pyro_sparse.distributions import SparseCategorical, SparseHMM
from pyro_sparse.distributions.discrete import edges
from pyro_sparse.infer import SparseEnumELBO
from pyro_sparse.projections import entmax15, sparsemax

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
Parts = dict[str, Tensor]


def parts(S: int = 3, batch: tuple[int, ...] = (), T: int = 4, dtype: torch.dtype = torch.float64, **in_: Any) -> Parts:
    """Parameters; ``in_`` says which of them vary in the batch and in time."""
    dims = {
        name: (*(batch if in_.get(name, "") in ("batch", "both") else ()),)
        for name in ("initial", "transition", "observation")
    }
    times = {name: (T,) if in_.get(name) in ("time", "both") else (1,) for name in dims}
    scores = 2 * torch.randn(*dims["transition"], *times["transition"], S, S, dtype=dtype)
    return {
        "initial": torch.randn(*dims["initial"], S, dtype=dtype).requires_grad_(),
        "scores": (scores + 4 * torch.eye(S)).requires_grad_(),  # each state can be reached
        "means": torch.randn(*dims["observation"], *times["observation"], S, dtype=dtype).requires_grad_(),
    }


def sparse(p: Parts, projection: Callable[[Tensor], Tensor] = sparsemax, **kwargs: Any) -> SparseHMM:
    return SparseHMM(p["initial"], SparseCategorical(p["scores"], projection), dist.Normal(p["means"], 0.7), **kwargs)


def stock(p: Parts, projection: Callable[[Tensor], Tensor] = sparsemax, **kwargs: Any) -> DiscreteHMM:
    logits = SparseCategorical(p["scores"], projection).logits
    return DiscreteHMM(p["initial"], logits, dist.Normal(p["means"], 0.7), **kwargs)


def gradients(p: Parts, value: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value.sum(), [*p.values(), *more], retain_graph=True)


def joint(d: SparseHMM, value: Tensor) -> tuple[Tensor, Tensor]:
    """All paths of a single chain, and the log-probability of each with the observations, by hand."""
    S, T = d.num_states, len(value)
    rows = d.transition.logits.expand(T, S, S)
    seen = d.observation_dist.log_prob(value.unsqueeze(-1)).expand(T, S)
    paths = torch.tensor(list(itertools.product(range(S), repeat=T)))
    first = (d.initial_logits.unsqueeze(-1) + rows[0]).logsumexp(0)
    total = first[paths[:, 0]] + seen[0, paths[:, 0]]
    for t in range(1, T):
        total = total + rows[t, paths[:, t - 1], paths[:, t]] + seen[t, paths[:, t]]
    return paths, total


GRID = [
    pytest.param(i, t, o, id=f"initial {i or 'one'}, transition {t or 'one'}, observation {o or 'one'}")
    for i, t, o in itertools.product(("", "batch"), ("", "batch", "time", "both"), ("", "batch", "time", "both"))
]


@pytest.mark.parametrize(("initial", "transition", "observation"), GRID)
@pytest.mark.parametrize(("S", "batch"), [(2, (3,)), (5, (2, 3))])
def test_agrees_with_the_dense_one(
    initial: str, transition: str, observation: str, S: int, batch: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    p = parts(S, batch, initial=initial, transition=transition, observation=observation)
    ours, theirs = sparse(p, entmax15), stock(p, entmax15)
    assert (ours.batch_shape, ours.event_shape, ours.duration) == (
        theirs.batch_shape,
        theirs.event_shape,
        theirs.duration,
    )
    value = torch.randn(*batch, 4)
    assert (SparseCategorical(p["scores"], entmax15).probs == 0).any()  # or nothing is tried
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value), **CLOSE)
    torch.testing.assert_close(ours.filter(value).logits, theirs.filter(value).logits, **CLOSE)
    for a, b in zip(gradients(p, ours.log_prob(value)), gradients(p, theirs.log_prob(value)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    expanded = ours.expand(torch.Size((2, *batch)))
    torch.testing.assert_close(expanded.log_prob(value), theirs.log_prob(value).expand(2, *batch), **CLOSE)
    more = torch.randn(7, 1, *batch, 4)  # dims of a sample
    torch.testing.assert_close(expanded.log_prob(more), theirs.expand((2, *batch)).log_prob(more), **CLOSE)


SMALL = [
    pytest.param({"S": 1}, id="one state"),
    pytest.param({"S": 2}, id="two states"),
    pytest.param({"S": 3}, id="three"),
    pytest.param({"S": 3, "T": 1}, id="one step"),
    pytest.param({"S": 5, "T": 3, "transition": "time"}, id="transitions in time"),
    pytest.param({"S": 3, "T": 5, "observation": "time"}, id="observations in time"),
]


@pytest.mark.parametrize("options", SMALL)
@pytest.mark.parametrize("prepared", ["as it is", "-inf initial", "one edge"])
def test_posterior_of_paths_by_enumeration(options: Any, prepared: str) -> None:
    torch.manual_seed(1)
    p = parts(**{"T": 4, **options})
    if prepared == "-inf initial" and options["S"] > 1:
        p["initial"] = p["initial"].detach().masked_fill(torch.arange(options["S"]) == 0, -math.inf)
    if prepared == "one edge":
        p["scores"] = p["scores"].detach()
        p["scores"][..., 0, :] = torch.arange(options["S"]).mul(5.0)
    d = sparse(p)
    value = torch.randn(options.get("T", 4))
    paths, log_joint = joint(d, value)
    posterior = log_joint.softmax(0)
    torch.testing.assert_close(d.log_prob(value), log_joint.logsumexp(0), **CLOSE)
    marginals = torch.nn.functional.one_hot(paths, d.num_states) * posterior[:, None, None]
    torch.testing.assert_close(d.smooth(value).probs, marginals.sum(0), **CLOSE)
    torch.testing.assert_close(d.smooth(value).probs[-1], d.filter(value).probs, **CLOSE)
    entropy = torch.special.entr(posterior).sum()
    torch.testing.assert_close(d.posterior_entropy(value), entropy, **CLOSE)
    assert d.viterbi(value).tolist() == paths[log_joint.argmax()].tolist()


def test_derivatives_of_the_posterior() -> None:
    torch.manual_seed(2)
    p = parts(3, T=3)
    value = torch.randn(3)

    d = sparse(p)
    paths, log_joint = joint(d, value)
    kept = log_joint.detach() > -math.inf
    assert not kept.all()
    posterior = log_joint[kept].softmax(0)
    marginals = torch.nn.functional.one_hot(paths[kept], 3).mul(posterior[:, None, None]).sum(0)
    weights = torch.arange(9.0).reshape(3, 3)
    for ours, theirs in (
        (d.posterior_entropy(value), -(posterior * posterior.log()).sum()),
        ((d.smooth(value).probs * weights).sum(), (marginals * weights).sum()),
    ):
        for a, b in zip(gradients(p, ours), gradients(p, theirs), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_second_derivatives() -> None:
    torch.manual_seed(3)
    transition = torch.tensor([[1.0, 0.6, -2.0], [-2.0, 1.0, 0.6], [0.6, -2.0, 1.0]])
    value = torch.randn(3)

    def log_prob(initial: Tensor, scores: Tensor, means: Tensor) -> Tensor:
        d = SparseHMM(initial, SparseCategorical(scores), dist.Normal(means, 1.0), validate_args=False)
        return d.log_prob(value)

    inputs = [x.requires_grad_() for x in (torch.randn(3), transition, torch.randn(3))]
    assert torch.autograd.gradcheck(log_prob, inputs)
    assert torch.autograd.gradgradcheck(log_prob, inputs)


@pytest.mark.parametrize("transition", ["", "batch", "time"])
def test_lengths(transition: str) -> None:
    """Each chain of its length is a chain on its own; what comes after is ignored, NaN too, and has no gradient."""
    torch.manual_seed(4)
    lengths = torch.tensor([4, 1, 3])
    p = parts(3, (3,), transition=transition)
    d = sparse(p, duration=4, lengths=lengths)
    value = torch.randn(3, 4)
    value[1, 1:] = math.nan
    value.requires_grad_()
    total = d.log_prob(value)
    grads = gradients(p, total, value)
    smooth, paths, entropy = d.smooth(value).probs, d.viterbi(value), d.posterior_entropy(value)
    drawn = d.sample_posterior(value, (50,))
    alone = 0.0
    for b, n in enumerate(lengths.tolist()):
        scores = p["scores"][b] if transition == "batch" else p["scores"]
        one = SparseHMM(
            p["initial"],
            SparseCategorical(scores[:n] if transition == "time" else scores),
            dist.Normal(p["means"], 0.7),
            duration=n,
        )
        seen = value[b, :n]
        alone = alone + one.log_prob(seen)
        torch.testing.assert_close(total[b], one.log_prob(seen), **CLOSE)
        torch.testing.assert_close(d.filter(value).probs[b], one.filter(seen).probs, **CLOSE)
        torch.testing.assert_close(smooth[b, :n], one.smooth(seen).probs, **CLOSE)
        torch.testing.assert_close(smooth[b, n:], smooth[b, n - 1].expand(4 - n, 3), **CLOSE)
        torch.testing.assert_close(entropy[b], one.posterior_entropy(seen), **CLOSE)
        assert paths[b].tolist() == one.viterbi(seen).tolist() + [int(paths[b, n - 1])] * (4 - n)
        assert (drawn[:, b, n:] == drawn[:, b, n - 1 : n]).all()
    for a, b in zip(grads, gradients(p, alone, value), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b, **CLOSE)


def test_paths_drawn_from_the_posterior() -> None:
    """Frequencies of all 81 paths: the chi-square statistic, of at most 80 degrees, above 160 in one of 10^6 runs."""
    torch.manual_seed(5)
    d = sparse(parts(3, T=4), projection=entmax15)
    value = torch.randn(4)
    _, log_joint = joint(d, value)
    drawn = d.sample_posterior(value, (20_000,))
    number = (drawn * torch.tensor([27, 9, 3, 1])).sum(-1)
    expected = 20_000 * log_joint.softmax(0)
    counts = torch.bincount(number, minlength=81).double()
    assert (counts[expected == 0] == 0).all()
    kept = expected > 5
    assert ((counts - expected).square() / expected)[kept].sum() < 160


def test_draws() -> None:
    """Of observations that tell the state, all sequences of three: the same bound on the chi-square statistic."""
    torch.manual_seed(6)
    p = parts(3, (2,), T=3, transition="batch")
    d = SparseHMM(p["initial"], SparseCategorical(p["scores"]), SparseCategorical(probs=torch.eye(3)), duration=3)
    drawn = d.sample((20_000,))
    assert drawn.shape == (20_000, 2, 3)
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    log_probs = d.log_prob(every.unsqueeze(1).expand(27, 2, 3))
    torch.testing.assert_close(log_probs.exp().sum(0), torch.ones(2), **CLOSE)
    for b in range(2):
        counts = torch.bincount((drawn[:, b] * torch.tensor([9, 3, 1])).sum(-1), minlength=27).double()
        expected = 20_000 * log_probs[:, b].exp()
        assert (counts[expected == 0] == 0).all()
        kept = expected > 5
        assert ((counts - expected).square() / expected)[kept].sum() < 160


def test_observations_that_are_vectors() -> None:
    torch.manual_seed(7)
    p, means = parts(4), torch.randn(4, 2)
    seen = dist.Normal(means, 1.0).to_event(1)
    ours = SparseHMM(p["initial"], SparseCategorical(p["scores"]), seen, duration=5)
    theirs = DiscreteHMM(p["initial"], SparseCategorical(p["scores"]).logits, seen, duration=5)
    value = torch.randn(3, 5, 2)
    assert ours.event_shape == theirs.event_shape == (5, 2)
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value), **CLOSE)
    assert ours.sample((6,)).shape == (6, 5, 2)


def test_any_length_where_nothing_varies_in_time() -> None:
    torch.manual_seed(8)
    p = parts(3)
    d, e = sparse(p), stock(p)
    assert d.duration is e.duration is None
    for T in (1, 2, 9):
        value = torch.randn(T)
        torch.testing.assert_close(d.log_prob(value), e.log_prob(value), **CLOSE)
        assert d.smooth(value).batch_shape == (T,)
    with pytest.raises(ValueError, match=r"SparseHMM\.sample: expected a number of steps, .* Give duration="):
        d.sample()


@pytest.mark.parametrize("S", [8, 64])
def test_float32_at_length_1000(S: int) -> None:
    torch.manual_seed(9)
    wide = parts(S)
    wide["scores"] = wide["scores"].detach().mul(3).requires_grad_()
    narrow = {name: x.detach().float().requires_grad_() for name, x in wide.items()}
    value = torch.randn(2, 1000)
    exact, rounded = sparse(wide).log_prob(value), sparse(narrow).log_prob(value.float())
    assert rounded.dtype is torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=0.0)
    for a, b in zip(gradients(wide, exact), gradients(narrow, rounded), strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(10)
    half = {name: x.detach().to(dtype) for name, x in parts(4).items()}
    seen = dist.Categorical(logits=torch.randn(4, 5, dtype=torch.float32))
    d = SparseHMM(half["initial"], SparseCategorical(half["scores"]), seen, duration=20)
    same = SparseHMM(
        half["initial"].float(),
        SparseCategorical(probs=d.transition.probs.float(), validate_args=False),
        seen,
        duration=20,
    )
    value = torch.randint(5, (20,))
    assert d.log_prob(value).dtype is torch.float32
    torch.testing.assert_close(d.log_prob(value), same.log_prob(value))


def test_far_below_the_best_state() -> None:
    """A state 1000 nats below the others is the only one that can have gone on: one maximum for all would lose it."""
    transition = SparseCategorical(probs=torch.eye(2, dtype=torch.float32))
    logits = torch.tensor([[0.0, -1000.0], [-math.inf, 0.0]])

    class Given(dist.TorchDistribution):
        """Log-likelihoods as they are."""

        arg_constraints = {}
        support = dist.constraints.real

        def log_prob(self, value: Tensor) -> Tensor:
            return logits.float() + 0 * value

    d = SparseHMM(torch.zeros(2), transition, Given((2, 2), validate_args=False), validate_args=False)
    assert d.log_prob(torch.zeros(2)).item() == pytest.approx(-1000 - math.log(2), rel=1e-6)
    # The mechanism that it is not: weights relative to the best of all states.
    graph = edges.edges_of(transition.probs.reshape(1, 1, 2, 2))[0]
    message = logits[0].float().unsqueeze(1)
    assert ((message - message.max()).exp()[graph.source].log() == -math.inf).any()


def test_what_nothing_can_have_given() -> None:
    """It has probability zero, with gradient zero; a posterior it does not have."""
    transition = SparseCategorical(probs=torch.tensor([[0.0, 1.0], [0.0, 1.0]]).requires_grad_())
    seen = SparseCategorical(probs=torch.eye(2))
    initial = torch.zeros(2, requires_grad=True)
    d = SparseHMM(initial, transition, seen, duration=2)
    impossible = torch.tensor([1, 0])
    total = d.log_prob(torch.stack([impossible, torch.tensor([1, 1])]))
    assert total.tolist() == [-math.inf, 0.0]
    (grad,) = torch.autograd.grad(total.sum(), [initial])
    assert grad.isfinite().all()
    for method in ("filter", "smooth", "viterbi", "sample_posterior", "posterior_entropy"):
        with pytest.raises(ValueError, match=r"SparseHMM: expected an observation that some path can give"):
            getattr(d, method)(impossible)


def test_transforms_and_contexts() -> None:
    torch.manual_seed(11)
    p = parts(4)
    d, value = sparse(p), torch.randn(6, 5)
    expected = d.log_prob(value).detach()
    torch.testing.assert_close(torch.func.vmap(d.log_prob)(value), expected, **CLOSE)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(sparse(p).log_prob(value), expected, **CLOSE)
    (a,) = torch.autograd.grad(expected.new_tensor(0.0) + d.log_prob(value)[0], [p["means"]])
    frozen = {**p, "means": p["means"].detach()}

    def one(means: Tensor) -> Tensor:
        return sparse({**frozen, "means": means}, validate_args=False).log_prob(value[0])

    torch.testing.assert_close(torch.func.grad(one)(p["means"].detach()), a, **CLOSE)
    with (
        warnings.catch_warnings(),
        pytest.raises(RuntimeError, match=r"SparseHMM: expected an eager run, got one under torch\.jit\.trace"),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(d.log_prob, value)  # type: ignore[no-untyped-call]


def test_copies() -> None:
    torch.manual_seed(12)
    p = parts(3)
    d, value = sparse(p), torch.randn(5)
    detached = sparse({name: x.detach() for name, x in p.items()})
    for other in (copy.copy(d), pickle.loads(pickle.dumps(detached)), copy.deepcopy(detached)):
        torch.testing.assert_close(other.log_prob(value), d.log_prob(value), **CLOSE)


def test_memory_goes_with_the_states_not_with_the_square() -> None:
    S, T = 200, 30
    probs = torch.zeros(S, S).index_put(
        (torch.arange(S).repeat(2), torch.cat([torch.arange(S), torch.arange(S).roll(1)])), torch.tensor(0.5)
    )
    d = SparseHMM(torch.zeros(S), SparseCategorical(probs=probs), dist.Normal(torch.randn(S).requires_grad_(), 1.0))

    def grown(T: int) -> int:
        value = torch.randn(8, T)
        with peak_memory() as memory:
            d.log_prob(value).sum().backward(retain_graph=True)
        return memory.peak

    short, long = grown(T), grown(2 * T)
    assert long - short < 1.3 * T * 8 * S * 8 * 8  # at most eight numbers for each state, chain and step
    assert long - short < T * 8 * S * S  # a dense step keeps S^2 of them at least


@pytest.mark.parametrize("elbo", [Trace_ELBO, functools.partial(SparseEnumELBO, strict_enumeration_warning=False)])
def test_learns_a_matrix_in_a_model(elbo: Any) -> None:
    """A cycle of three states, from its draws, in a subsampled plate: the matrix gets its zeros."""
    torch.manual_seed(13)
    pyro.clear_param_store()
    cycle = SparseCategorical(probs=torch.tensor([[0.1, 0.9, 0.0], [0.0, 0.1, 0.9], [0.9, 0.0, 0.1]]))
    seen = dist.Normal(torch.tensor([-3.0, 0.0, 3.0]), 0.5)
    data = SparseHMM(torch.zeros(3), cycle, seen, duration=8).sample((40,))

    def model() -> None:
        scores = pyro.param("scores", lambda: 0.1 * torch.randn(3, 3))
        with pyro.plate("chains", len(data), subsample_size=20) as index:
            pyro.sample("y", SparseHMM(torch.zeros(3), SparseCategorical(scores), seen, duration=8), obs=data[index])

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.05}), elbo())
    for _ in range(80):
        svi.step()
    found = SparseCategorical(pyro.param("scores")).probs
    assert (found.argmax(-1) == torch.tensor([1, 2, 0])).all()
    torch.testing.assert_close(found[[0, 1, 2], [1, 2, 0]], torch.full((3,), 0.9), atol=0.08, rtol=0.0)
    assert (found == 0).sum() >= 2


def made(initial: Any = None, transition: Any = None, seen: Any = None, **kwargs: Any) -> SparseHMM:
    initial = torch.zeros(3) if initial is None else initial
    transition = SparseCategorical(torch.eye(3)) if transition is None else transition
    seen = dist.Normal(torch.zeros(3), 1.0) if seen is None else seen
    return SparseHMM(initial, transition, seen, **kwargs)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integers": (
        lambda: made(torch.zeros(3).long()),
        TypeError,
        r"initial_logits: expected a floating-point tensor, got torch.int64",
    ),
    "stock transition": (
        lambda: made(transition=dist.Categorical(torch.eye(3))),
        TypeError,
        r"transition: expected a SparseCategorical, got Categorical",
    ),
    "masked transition": (
        lambda: made(transition=SparseCategorical(torch.eye(3)).mask(True)),
        TypeError,
        r"transition: expected a SparseCategorical, got MaskedSparseDistribution",
    ),
    "not square": (
        lambda: made(torch.zeros(4), SparseCategorical(torch.zeros(3, 4))),
        ValueError,
        r"transition\.batch_shape: expected to end in 4, .* got \(3,\)",
    ),
    "no rows": (
        lambda: made(transition=SparseCategorical(torch.zeros(3))),
        ValueError,
        r"transition\.batch_shape: expected to end in 3, .* got \(\)",
    ),
    "initial": (lambda: made(torch.zeros(4)), ValueError, r"initial_logits: expected to end in 3, .* got \(4,\)"),
    "observations": (
        lambda: made(seen=dist.Normal(torch.zeros(2), 1.0)),
        ValueError,
        r"observation_dist\.batch_shape: expected to end in 3, .* got \(2,\)",
    ),
    "a matrix for each chain": (
        lambda: made(torch.zeros(2, 3), SparseCategorical(torch.zeros(2, 3, 3)), dist.Normal(torch.zeros(5, 3), 1.0)),
        ValueError,
        r"batch shape \(B, 1, 3\)",
    ),
    "duration": (
        lambda: made(seen=dist.Normal(torch.zeros(5, 3), 1.0), duration=4),
        ValueError,
        r"duration: expected 5, the steps of its parameters, got 4",
    ),
    "NaN logits": (
        lambda: made(torch.tensor([0.0, math.nan, 0.0])),
        ValueError,
        r"initial_logits: expected numbers or -inf",
    ),
    "-inf only": (lambda: made(torch.full((3,), -math.inf)), ValueError, r"initial_logits: expected numbers or -inf"),
    "NaN values": (
        lambda: made().log_prob(torch.tensor([0.0, math.nan])),
        ValueError,
        r"expected observations without NaN",
    ),
    "no steps": (
        lambda: made().log_prob(torch.zeros(0)),
        ValueError,
        r"expected one or more observations of shape \(\), got \(0,\)",
    ),
    "other steps": (
        lambda: made(duration=4).log_prob(torch.zeros(5)),
        ValueError,
        r"expected 4 observations of shape \(\), got \(5,\)",
    ),
    "length 0": (
        lambda: made(duration=4, lengths=torch.tensor([2, 0])),
        ValueError,
        r"lengths: expected 1 to 4 steps, got 0 to 2",
    ),
    "length above": (
        lambda: made(lengths=torch.tensor(5)).log_prob(torch.zeros(4)),
        ValueError,
        r"lengths: expected 1 to 4 steps, got 5 to 5",
    ),
    "float lengths": (
        lambda: made(lengths=torch.tensor(5.0)),
        TypeError,
        r"lengths: expected a tensor of integers, got torch.float64",
    ),
    "a mask for lengths": (
        lambda: made(lengths=torch.tensor([True, False])),
        TypeError,
        r"lengths: expected a tensor of integers, got torch.bool",
    ),
    "no duration": (lambda: made(duration=0), ValueError, r"duration: expected a positive number of steps, got 0"),
    "lengths of another batch": (
        lambda: made(torch.zeros(3, 3), lengths=torch.tensor([1, 2])),
        ValueError,
        r"expected shapes that broadcast .* lengths \(2,\)",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input(name: str) -> None:
    make, error, message = BAD[name]
    with pytest.raises(error, match=r"SparseHMM.*" + message):
        make()


@pytest.mark.parametrize("transition", ["", "batch"])
def test_no_chains(transition: str) -> None:
    # torch's own check of values knows no empty batch.
    d = sparse(parts(3, (0,), transition=transition), duration=4, validate_args=False).expand((0,))
    value = torch.zeros(0, 4)
    assert d.log_prob(value).shape == d.posterior_entropy(value).shape == (0,)
    assert d.smooth(value).probs.shape == (0, 4, 3)
    assert d.viterbi(value).shape == d.sample_posterior(value).shape == d.sample().shape == (0, 4)


def test_no_chains_of_any_length() -> None:
    d = sparse(parts(3, (0,), transition="batch"), lengths=torch.zeros(0, dtype=torch.long), validate_args=False)
    assert d.viterbi(torch.zeros(0, 4)).shape == d.sample_posterior(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("T", [3, 5])
def test_states_with_supports_of_their_own(T: int) -> None:
    """A count above what a state can give is of probability zero there, however many steps there are."""
    torch.manual_seed(15)
    p = parts(3)
    seen = dist.Binomial(torch.tensor([2.0, 5.0, 9.0]), torch.tensor([0.3, 0.4, 0.5]), validate_args=False)
    d, value = SparseHMM(p["initial"], SparseCategorical(p["scores"], entmax15), seen), torch.randint(3, (T,)).double()
    torch.testing.assert_close(d.log_prob(value), joint(d, value)[1].logsumexp(0), **CLOSE)


def test_the_dtype_of_the_transitions_counts() -> None:
    rare = SparseCategorical(probs=torch.tensor([[1 - 1e-50, 1e-50], [0.0, 1.0]], dtype=torch.float64))
    seen = SparseCategorical(probs=torch.eye(2, dtype=torch.float32))
    d = SparseHMM(torch.tensor([0.0, -math.inf], dtype=torch.float32), rare, seen)
    assert d.log_prob(torch.tensor([1])).item() == pytest.approx(math.log(1e-50))


def test_nan_is_no_missing_transition() -> None:
    probs = torch.tensor([[0.5, 0.5], [math.nan, 0.5]])
    d = SparseHMM(torch.zeros(2), SparseCategorical(probs=probs, validate_args=False), dist.Normal(torch.zeros(2), 1.0))
    assert d.log_prob(torch.zeros(3)).isnan()


def test_masked_and_nested() -> None:
    torch.manual_seed(14)
    d = sparse({name: x.detach() for name, x in parts(3, (2, 5), observation="batch").items()})
    value = torch.randn(2, 5, 4)
    total = d.log_prob(value)
    mask = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(d.mask(mask).log_prob(value), torch.where(mask, total, 0.0), **CLOSE)
    torch.testing.assert_close(d.to_event(1).log_prob(value), total.sum(-1), **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile's own
        compiled = torch.compile(d.log_prob, backend="eager")(value)
    torch.testing.assert_close(compiled, total, **CLOSE)
