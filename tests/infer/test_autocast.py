"""Losses and gradients under bfloat16 autocast, beside those in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor, nn

import pyro_sparse.distributions as sdist
import pyro_sparse.infer.expansion.estimator_messenger as estimator_messenger
from pyro_sparse.estimators import (
    ARMS,
    REBAR,
    RELAX,
    VIMCO,
    DisARM,
    DoubleControlVariate,
    Exact,
    LeaveOneOut,
    LocalExpectation,
    MovingAverage,
    MuProp,
    NeuralBaseline,
    RaoBlackwell,
    SampleBaseline,
    ScoreFunction,
    SelfCritic,
    StraightThrough,
    UnorderedSet,
)
from pyro_sparse.infer import BaselineELBO, EstimatorELBO, SparseEnumELBO
from pyro_sparse.projections import entmax, entmax15, sparsemax, topk_sparsemax

K, B, X = 12, 20, 16
OFFSET = 1000.0  # as costs of images and texts are: a derivative that is rounded by it is nothing but rounding


@pytest.fixture(autouse=True)
def float32(fresh_state: None) -> None:
    torch.set_default_dtype(torch.float32)  # autocast leaves float64 alone


class Program(pyro.nn.PyroModule):  # type: ignore[misc]
    """An autoencoder with a latent variable of some family, made of a network's output."""

    def __init__(self, family: str, projection: Callable[[Tensor], Tensor] = sparsemax) -> None:
        super().__init__()
        self.family, self.projection = family, projection
        self.width = K if "bit" not in family and family != "gate" else 6
        self.encoder = nn.Sequential(nn.Linear(X, 32), nn.Tanh(), nn.Linear(32, 2 * self.width))
        self.embed = nn.Linear(self.width, 16)
        self.decoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, X))
        self.prior = nn.Parameter(0.1 * torch.arange(float(self.width)))
        with torch.no_grad():
            self.encoder[2].weight.mul_(3.0)
            self.decoder[2].weight.mul_(4.0)

    def latent(self, a: Tensor, b: Tensor) -> Any:
        match self.family:
            case "sparse":
                return sdist.SparseCategorical(a, self.projection)
            case "sparse one-hot":
                return sdist.SparseOneHotCategorical(a, self.projection)
            case "masked sparse":
                return sdist.SparseCategorical(a, self.projection).mask(torch.arange(B) > 3)
            case "dense":
                return dist.Categorical(logits=a)
            case "one-hot":
                return dist.OneHotCategorical(logits=a)
            case "bits":
                return dist.Bernoulli(logits=a).to_event(1)
            case "gate":
                return sdist.HardConcrete(logits=a, temperature=0.5).to_event(1)
            case "faces":
                return sdist.GibbsFaces(a)
            case "simplex":
                return sdist.MixedDirichlet(a, nn.functional.softplus(b) + 0.5)
        return sdist.GaussianSparsemax(a, nn.functional.softplus(b) + 0.1)

    def model(self, x: Tensor) -> None:
        pyro.module("program", self)
        stands_for = {"sparse": "dense", "masked sparse": "dense", "sparse one-hot": "one-hot"}
        prior = Program.latent(self._as(stands_for.get(self.family, self.family)), self.prior, 0 * self.prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            z = z if z.is_floating_point() else nn.functional.one_hot(z, K).to(x.dtype)
            out = self.decoder(self.embed(z))
            pyro.sample("x", dist.Bernoulli(logits=out).to_event(1), obs=(x > 0).float())
            pyro.factor("offset", -OFFSET + torch.zeros(len(x)))

    def _as(self, family: str) -> Any:
        twin = object.__new__(Program)
        twin.__dict__.update({**self.__dict__, "family": family})
        return twin

    def guide(self, x: Tensor) -> None:
        pyro.module("program", self)
        a, b = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.latent(a, b))


def autocast(enabled: bool = True) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def loss_and_gradient(program: Any, elbo: Any, bfloat16: bool) -> tuple[Tensor, Tensor]:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    made, x = program(), torch.randn(B, X)
    pyro.set_rng_seed(2)
    with autocast(bfloat16):
        loss = elbo().differentiable_loss(made.model, made.guide, x)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])


def compared(program: Any, elbo: Any) -> tuple[float, float]:
    """The relative difference of losses, and the cosine of gradients."""
    (loss, gradient), (other, rounded) = (loss_and_gradient(program, elbo, half) for half in (False, True))
    assert other.dtype == torch.float32 and rounded.isfinite().all()
    return float((other - loss).abs() / loss.abs()), float(torch.cosine_similarity(gradient, rounded, 0))


def agrees(program: Any, elbo: Any) -> None:
    difference, cosine = compared(program, elbo)
    assert difference < 1e-2 and cosine > 0.99
    assert difference < 1e-5 or program().family in ("simplex", "gauss")


def enumerated(mode: str, **kwargs: Any) -> Any:
    return lambda: SparseEnumELBO(mode, max_plate_nesting=1, strict_enumeration_warning=False, **kwargs)


def estimated(estimator: Any, **kwargs: Any) -> Any:
    return lambda: EstimatorELBO(estimator(), max_plate_nesting=1, **kwargs)


MODES = {
    **{mode: enumerated(mode) for mode in ("padded", "union", "packed", "auto")},
    "chunks": enumerated("packed", chunk_rows=7),
    "Exact": estimated(Exact),
    "Exact packed": estimated(lambda: Exact("packed")),
}
PROJECTIONS: dict[str, Any] = {
    "sparsemax": sparsemax,
    "entmax15": entmax15,
    "entmax": partial(entmax, alpha=1.3),
    "topk": partial(topk_sparsemax, k=4),
}
DRAWN: dict[str, Any] = {
    "ScoreFunction": ScoreFunction,
    "LeaveOneOut": lambda: LeaveOneOut(4),
    "MovingAverage": MovingAverage,
    "NeuralBaseline": lambda: NeuralBaseline(nn.Linear(X, 1)),
    "SelfCritic": SelfCritic,
    "SampleBaseline": SampleBaseline,
    "VIMCO": lambda: VIMCO(3),
}
SUMMED: dict[str, Any] = {
    "RaoBlackwell": lambda: RaoBlackwell(2),
    "UnorderedSet": lambda: UnorderedSet(3),
    "Exact": Exact,
}
RELAXED: dict[str, Any] = {
    "REBAR": REBAR,
    "MuProp": MuProp,
    "DoubleControlVariate": lambda: DoubleControlVariate(2),
    "StraightThrough": StraightThrough,
    "LocalExpectation": LocalExpectation,
}


def grid() -> Iterator[Any]:
    for family in ("sparse", "sparse one-hot", "masked sparse"):
        for name, projection in PROJECTIONS.items():
            for mode, elbo in MODES.items():
                fast = family == "sparse" and (name == "sparsemax" or mode == "padded")
                yield f"{family}, {name}, {mode}", partial(Program, family, projection), elbo, fast
    for family in ("sparse", "dense", "one-hot", "bits"):
        own: dict[str, Any] = {} if family == "bits" else SUMMED
        own = {"DisARM": DisARM, "ARMS": lambda: ARMS(3)} if family == "bits" else own
        width = 6 if family == "bits" else K
        smooth = {**RELAXED, "RELAX": lambda n=width: RELAX(nn.Linear(n, 1))} if family in ("one-hot", "bits") else {}
        for name, estimator in {**DRAWN, **own, **smooth}.items():
            fast = (family, name) in {("one-hot", "REBAR"), ("bits", "DisARM"), ("dense", "Exact"), ("dense", "VIMCO")}
            yield f"{family}, {name}", partial(Program, family), estimated(estimator), fast
        baseline = lambda: BaselineELBO(MovingAverage(), max_plate_nesting=1)  # noqa: E731
        yield f"{family}, BaselineELBO", partial(Program, family), baseline, family == "dense"
    for family in ("gate", "simplex", "gauss"):
        yield family, partial(Program, family), estimated(dict), family == "gate"
        yield f"{family}, analytic", partial(Program, family), estimated(dict, analytic_kl=family != "gauss"), False
        yield f"{family}, enumerated", partial(Program, family), enumerated("padded"), False
    yield "faces, LeaveOneOut", partial(Program, "faces"), estimated(lambda: LeaveOneOut(4)), False
    for mode in ("padded", "union"):
        yield f"faces, {mode}", partial(Program, "faces"), enumerated(mode), False


CASES = [
    pytest.param(program, elbo, marks=() if fast else pytest.mark.slow, id=name) for name, program, elbo, fast in grid()
]


@pytest.mark.parametrize(("program", "elbo"), CASES)
def test_loss_and_gradient(program: Any, elbo: Any) -> None:
    """With the comparisons that validation makes at the first run."""
    agrees(program, elbo)


@pytest.mark.parametrize("options", [{"vectorize_particles": True}, {}], ids=["vectorised", "one by one"])
def test_particles(options: dict[str, bool]) -> None:
    elbo = lambda: SparseEnumELBO(num_particles=2, max_plate_nesting=1, **options)  # noqa: E731
    agrees(partial(Program, "sparse"), elbo)


def test_costs_by_graph() -> None:
    agrees(partial(Program, "sparse"), estimated(lambda: LeaveOneOut(4), costs="graph"))


class TwoLatents(Program):
    """The model alone has another site, which is summed out in the ELBO."""

    def __init__(self) -> None:
        super().__init__("sparse")

    def model(self, x: Tensor) -> None:
        pyro.module("program", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=self.prior))
            h = self.embed(nn.functional.one_hot(z, K).to(x.dtype))
            m = pyro.sample("m", dist.Categorical(logits=self.decoder(h)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(m.float(), 1.0 + h[..., 0].square()), obs=x[:, 0])
            pyro.factor("offset", -OFFSET + torch.zeros(len(x)))


@pytest.mark.parametrize("elbo", [enumerated("padded"), estimated(Exact)])
def test_sites_that_are_summed_out_in_the_model(elbo: Any) -> None:
    agrees(TwoLatents, elbo)


def test_a_chain_with_sparse_transitions() -> None:
    network, x = nn.Linear(3, K * K), torch.randn(3)
    seen = torch.randint(5, (20,))

    def log_prob() -> Tensor:
        scores = network(x).reshape(K, K)
        emission = dist.Categorical(logits=torch.zeros(K, 5))
        return sdist.SparseHMM(scores[0], sdist.SparseCategorical(3 * scores), emission).log_prob(seen)

    with autocast():
        rounded = log_prob()
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, log_prob(), rtol=1e-2, atol=0.0)


def test_probabilities_are_in_float32() -> None:
    scores = torch.randn(5, K).bfloat16()
    for projection in PROJECTIONS.values():
        assert projection(scores).dtype == torch.bfloat16
        with autocast():
            torch.testing.assert_close(projection(scores), projection(scores.float()), rtol=0.0, atol=0.0)
    with autocast():
        p, q = (sdist.SparseCategorical(x) for x in (scores, scores.flip(0)))
        assert p.probs.dtype == p.log_prob(p.sample()).dtype == p.entropy().dtype == torch.float32
        assert torch.distributions.kl_divergence(p, q).dtype == torch.float32
        # what is given as rounded is taken as such
        assert sdist.SparseCategorical(probs=torch.tensor([0.3, 0.7]).bfloat16()).probs.dtype == torch.bfloat16


def test_negative_control_rounded_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """By probabilities in bfloat16 the gradient is lost, be they ours or stock ones."""
    monkeypatch.setattr(estimator_messenger, "with_unrounded_logits", lambda fn: fn)
    assert compared(partial(Program, "dense"), estimated(LocalExpectation))[1] < 0.9
    rounding = partial(Program, "sparse", lambda scores: sparsemax(scores).bfloat16().float())
    with pyro.validation_enabled(False):
        _, expected = loss_and_gradient(partial(Program, "sparse"), enumerated("padded"), False)
        _, lost = loss_and_gradient(rounding, enumerated("padded"), True)
    assert torch.cosine_similarity(expected, lost, 0) < 0.9


class Rough(Program):
    """Its decoder rounds by the number of rows, as kernels on a GPU may."""

    def __init__(self) -> None:
        super().__init__("sparse")
        self.decoder.register_forward_hook(self._round)

    @staticmethod
    def _round(module: Any, args: Any, out: Tensor) -> Tensor:
        return out * (1 + 2**-4 * (out[..., 0].numel() > B)) if out.dtype == torch.bfloat16 else out


@pytest.mark.parametrize("elbo", [enumerated("padded"), enumerated("packed"), estimated(lambda: LeaveOneOut(2))])
def test_comparisons_do_not_take_rounding_for_a_fault(elbo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = Rough(), torch.randn(B, X)
    with autocast():
        elbo().differentiable_loss(program.model, program.guide, x)
    for module in ("together", "on_rows"):  # the control: under autocast
        monkeypatch.setattr(f"pyro_sparse.infer.runs.{module}.no_autocast", contextlib.nullcontext)
    with autocast(), pytest.raises(ValueError, match=r"expected a (program|model) that is the same"):
        elbo().differentiable_loss(program.model, program.guide, x)


@pytest.mark.slow
@pytest.mark.parametrize("elbo", [enumerated("padded"), enumerated("packed", chunk_rows=7), estimated(Exact)])
def test_training_goes_as_in_float32(elbo: Any) -> None:
    losses: list[list[float]] = []
    for bfloat16 in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        program, x = Program("sparse"), torch.randn(B, X)
        svi = SVI(program.model, program.guide, Adam({"lr": 1e-2}), elbo())
        losses.append([])
        for _ in range(50):
            with autocast(bfloat16):
                losses[-1].append(svi.step(x) - B * OFFSET)
    wide, rounded = (each[0] - sum(each[-5:]) / 5 for each in losses)
    assert wide > 100 and rounded > 0.85 * wide  # weights moved by 2**-9, in float32, do as much: supports change
