"""One code for all devices: on torch's meta device, which any machine has, and by where constants are made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.overrides import TorchFunctionMode

import pyro_sparse
import pyro_sparse.distributions as sdist
from pyro_sparse.distributions.mixed.base import UnknownDivergence
from pyro_sparse.estimators import (
    ARMS,
    REBAR,
    VIMCO,
    Exact,
    LeaveOneOut,
    MovingAverage,
    MuProp,
    RaoBlackwell,
    SelfCritic,
    StraightThrough,
    UnorderedSet,
)
from pyro_sparse.infer import EstimatorELBO, SparseEnumELBO
from pyro_sparse.projections import entmax, entmax15, sparsemax, sparsemax_loss, topk_sparsemax

PACKAGE = str(pyro_sparse.__path__[0])


@contextmanager
def gpu() -> Iterator[None]:
    """Another device than the CPU, where tensors have shapes alone: what looks at a value raises."""
    with pyro.validation_enabled(False):
        yield


def looks(error: Exception) -> bool:
    """Whether it says that a value was looked at, or that an operation is not known there."""
    return "meta tensors" in str(error).lower()


def on_gpu(*shape: int) -> Tensor:
    return torch.randn(shape, device="meta")


FAMILIES: dict[str, Callable[[], Any]] = {
    "SparseCategorical": lambda: sdist.SparseCategorical(on_gpu(4, 5)),
    "SparseOneHotCategorical": lambda: sdist.SparseOneHotCategorical(on_gpu(4, 5)),
    "masked": lambda: sdist.SparseCategorical(on_gpu(4, 5)).mask(on_gpu(4) > 0),
    "HardConcrete": lambda: sdist.HardConcrete(0.5, on_gpu(4, 5)),
    "masked HardConcrete": lambda: sdist.HardConcrete(0.5, on_gpu(4, 5)).mask(False),
    "HardKumaraswamy": lambda: sdist.HardKumaraswamy(on_gpu(4, 5).exp(), 1.0),
    "RectifiedNormal": lambda: sdist.RectifiedNormal(on_gpu(4, 5), 1.0),
    "Rectified": lambda: sdist.Rectified(dist.Normal(on_gpu(4, 5), on_gpu(4, 5).exp())),
    "StretchedRectified": lambda: sdist.StretchedRectified(dist.Normal(on_gpu(4, 5), on_gpu(4, 5).exp()), -0.1, 1.1),
    "SpikeAndSlab": lambda: sdist.SpikeAndSlab(dist.Normal(on_gpu(4, 5), on_gpu(4, 5).exp()), logits=0.5),
    "SpikeAndExponential": lambda: sdist.SpikeAndExponential(2.0, logits=on_gpu(4, 5)),
    "ZeroOneInflated": lambda: sdist.ZeroOneInflated(  # torch's Beta does not draw there
        dist.Uniform(0 * on_gpu(4, 5), 0 * on_gpu(4, 5) + 1), logits=on_gpu(4, 5, 3)
    ),
    "GibbsFaces": lambda: sdist.GibbsFaces(on_gpu(4, 5)),
    "MaxEntropyFaces": lambda: sdist.MaxEntropyFaces(5, on_gpu(4).sigmoid() + 1),
    "FaceDirichlet": lambda: sdist.FaceDirichlet(on_gpu(4, 5).exp()),
    "MixedDirichlet": lambda: sdist.MixedDirichlet(on_gpu(4, 5), on_gpu(4, 5).exp()),
    "MixedLogisticNormal": lambda: sdist.MixedLogisticNormal(on_gpu(4, 5), on_gpu(4, 5), on_gpu(4, 5).exp()),
    "GaussianSparsemax": lambda: sdist.GaussianSparsemax(on_gpu(4, 5), on_gpu(4, 5).exp()),
    "HardConcreteSimplex": lambda: sdist.HardConcreteSimplex(0.5, on_gpu(4, 5), 0.1),
    "GumbelSoftmaxST": lambda: sdist.GumbelSoftmaxST(on_gpu().exp(), logits=on_gpu(4, 5)),
    "OneHotCategoricalST": lambda: sdist.OneHotCategoricalST(on_gpu(4, 5)),
    "BernoulliST": lambda: sdist.BernoulliST(on_gpu(4, 5)),
}
READS = {"GaussianSparsemax": {"log_prob"}}
READS |= {name: {"rsample"} for name in ("SpikeAndSlab", "SpikeAndExponential")}
READS |= {"HardConcreteSimplex": {"log_prob"}}


@pytest.mark.slow  # torch's shapes without values are slow to load
@pytest.mark.parametrize("name", FAMILIES)
def test_distributions(name: str) -> None:
    """What they give is where their parameters are; what waits for a value, as documented, is left out."""
    read = set()
    with gpu():
        d = FAMILIES[name]()
        value = d.sample((3,))
        calls: dict[str, Callable[[], Tensor]] = {
            "sample": lambda: value,
            "rsample": lambda: d.rsample((3,)),
            "log_prob": lambda: d.log_prob(value),
            "entropy": lambda: d.entropy(),
            "mean": lambda: d.mean,
            "expanded": lambda: d.expand((2, *d.batch_shape)).log_prob(value[:2]),
            "kl": lambda: kl_divergence(d, d),
        }
        for what, call in calls.items():
            try:
                assert call().device.type == "meta", what
            except (RuntimeError, UnknownDivergence) as error:  # of which NotImplementedError is one
                if looks(error):
                    read.add(what.replace("expanded", "log_prob"))
                elif not isinstance(error, NotImplementedError | UnknownDivergence):
                    raise
    assert read == READS.get(name, set())


@pytest.mark.slow
@pytest.mark.parametrize(
    "project",
    [
        sparsemax,
        entmax15,
        lambda x: entmax(x, 1.3),
        lambda x: topk_sparsemax(x, 2),
        lambda x: sparsemax_loss(x, x.argmax(-1)),
    ],
)
def test_projections(project: Callable[[Tensor], Tensor]) -> None:
    with gpu():
        assert project(on_gpu(4, 5)).device.type == "meta"


def test_an_entropy_under_a_mask_of_false() -> None:
    with gpu():
        d = sdist.SparseCategorical(on_gpu(4, 5)).mask(False)
        assert d.entropy().device.type == "meta" and d.entropy().shape == (4,)


def test_a_constant_on_the_cpu_is_found() -> None:
    """The negative control."""
    with gpu(), pytest.raises(RuntimeError, match="device"):
        on_gpu(3) + torch.ones(3)


class Program:
    def __init__(self, family: Callable[[Tensor], Any], device: str) -> None:
        self.family = family
        with torch.device(device):
            self.encoder, self.decoder, self.x = nn.Linear(3, 5), nn.Linear(5, 3), torch.randn(4, 3)
            self.prior = torch.zeros(5)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), device=str(x.device)):
            z = pyro.sample("z", self.family(self.prior))
            z = z if z.is_floating_point() else nn.functional.one_hot(z, 5).to(x)
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x), device=str(x.device)):
            pyro.sample("z", self.family(self.encoder(x)))


def categorical(logits: Tensor) -> Any:
    return sdist.SparseCategorical(logits=logits)


def one_hot(logits: Tensor) -> Any:
    return sdist.SparseOneHotCategorical(logits=logits)


def bits(logits: Tensor) -> Any:
    return dist.Bernoulli(logits=logits).to_event(1)


def gates(logits: Tensor) -> Any:
    return sdist.HardConcrete(0.5, logits).to_event(1)


ESTIMATORS: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Any]]] = {
    "LeaveOneOut": (lambda: LeaveOneOut(3), categorical),
    "RaoBlackwell": (lambda: RaoBlackwell(2), categorical),
    "UnorderedSet": (lambda: UnorderedSet(2), one_hot),
    "VIMCO": (lambda: VIMCO(3), one_hot),
    "MovingAverage": (MovingAverage, bits),
    "SelfCritic": (SelfCritic, categorical),
    "ARMS": (lambda: ARMS(3), bits),
    "REBAR": (REBAR, bits),
    "MuProp": (MuProp, bits),
    "StraightThrough": (StraightThrough, bits),
    "pathwise": (dict, gates),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a program on another device."""
    monkeypatch.setattr("pyro_sparse.infer.estimator_elbo.warn_if_nan", lambda *args: None)  # it reads the loss
    make, family = ESTIMATORS[name]
    with gpu():
        program = Program(family, "meta")
        elbo = EstimatorELBO(make(), max_plate_nesting=1).to("meta")
        loss = elbo.differentiable_loss(program.model, program.guide, program.x)
        loss.backward()
    assert loss.device.type == program.encoder.weight.grad.device.type == "meta"  # type: ignore[union-attr]


_FACTORIES = (torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.linspace, torch.eye, torch.rand)
_FACTORIES += (torch.randn, torch.randint, torch.randperm, torch.tensor, torch.tril_indices, torch.triu_indices)


class Constants(TorchFunctionMode):
    """Notes where our lines make a tensor and do not say where. (One number alone goes with any device.)"""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _FACTORIES and (kwargs or {}).get("device") is None and out.dim():
            frame = sys._getframe(1)
            if frame.f_code.co_filename.startswith(PACKAGE):
                self.found.add(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return out


ELBOS: dict[str, Callable[[], Any]] = {
    **{mode: (lambda mode=mode: SparseEnumELBO(mode)) for mode in ("padded", "union", "packed", "auto")},
    "chunks": lambda: SparseEnumELBO("packed", chunk_rows=3),
    "Exact": lambda: EstimatorELBO(Exact()),
    "Exact packed": lambda: EstimatorELBO(Exact("packed")),
    "LeaveOneOut": lambda: EstimatorELBO(LeaveOneOut(2)),
    "one by one": lambda: EstimatorELBO(LeaveOneOut(2, vectorized=False)),
}


@pytest.mark.parametrize("name", ELBOS)
def test_steps_make_no_constants_elsewhere(name: str) -> None:
    program, elbo = Program(sdist.SparseCategorical, "cpu"), ELBOS[name]()
    with Constants() as constants:
        for _ in range(2):
            elbo.loss_and_grads(program.model, program.guide, program.x)
        wide = torch.randn(3, 4000)
        sparsemax(wide), entmax15(wide)  # of few candidates
    assert not constants.found
