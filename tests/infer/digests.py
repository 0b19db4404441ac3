"""Prints a digest of the loss and the gradients of two steps of each ELBO: ``python -m tests.infer.digests``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_sparse.distributions as sdist
from pyro_sparse.estimators import (
    ARMS,
    REBAR,
    RELAX,
    DisARM,
    DoubleControlVariate,
    Exact,
    LeaveOneOut,
    LocalExpectation,
    MovingAverage,
    MuProp,
    RaoBlackwell,
    StraightThrough,
    UnorderedSet,
)
from pyro_sparse.infer import BaselineELBO, EstimatorELBO, SparseEnumELBO

ONE_HOT: dict[str, Callable[[], Any]] = {
    "leave-one-out": lambda: EstimatorELBO(LeaveOneOut(4)),
    "average": lambda: BaselineELBO(MovingAverage(), num_particles=3, vectorize_particles=True),
    "closed form": lambda: EstimatorELBO(LeaveOneOut(3), analytic_kl=True),
    "graph": lambda: EstimatorELBO(LeaveOneOut(3), costs="graph"),
    "exact and drawn": lambda: EstimatorELBO({"y": Exact(), "z": LeaveOneOut(2)}),
    "rao-blackwell": lambda: EstimatorELBO(RaoBlackwell(2)),
    "unordered set": lambda: EstimatorELBO(UnorderedSet(2)),
    "local expectation": lambda: EstimatorELBO(LocalExpectation()),
    "rebar": lambda: EstimatorELBO(REBAR()),
    "relax": lambda: EstimatorELBO(RELAX(nn.Linear(6, 1))),
    "double": lambda: EstimatorELBO(DoubleControlVariate(3)),
    "muprop": lambda: EstimatorELBO(MuProp()),
    "straight through": lambda: EstimatorELBO(StraightThrough("reinmax")),
}
BITS: dict[str, Callable[[], Any]] = {
    "disarm": lambda: EstimatorELBO(DisARM()),
    "arms": lambda: EstimatorELBO(ARMS(4)),
}
SPARSE: dict[str, Callable[[], Any]] = {
    "padded": partial(SparseEnumELBO, max_plate_nesting=2),
    "union": partial(SparseEnumELBO, "union", max_plate_nesting=2),
    "auto": partial(SparseEnumELBO, "auto", max_plate_nesting=2),
    "exact": lambda: EstimatorELBO(Exact(), max_plate_nesting=2),
}


def one_hot(scores: Tensor) -> Any:
    return dist.OneHotCategorical(logits=scores)


def bits(scores: Tensor) -> Any:
    return dist.Bernoulli(logits=scores).to_event(1)


def digest(elbo: Any, guide_family: Callable[[Tensor], Any], model_family: Callable[[Tensor], Any]) -> str:
    """Of two sites in two plates, one of them subsampled, float32."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    encoder, decoder, x = nn.Linear(4, 6), nn.Linear(6, 4), torch.rand(5, 3, 4)

    def plates() -> tuple[Any, Any]:
        return pyro.plate("rows", 10, subsample_size=5, dim=-2), pyro.plate("columns", 3, dim=-1)

    def model(x: Tensor) -> None:
        rows, columns = plates()
        with rows, columns:
            y = pyro.sample("y", model_family(torch.zeros(6)))
            z = pyro.sample("z", model_family(decoder(y)[..., [0, 1, 2, 3, 0, 1]]))
            pyro.sample("x", dist.Normal(decoder(z) + decoder(y), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        rows, columns = plates()
        with rows, columns:
            y = pyro.sample("y", guide_family(encoder(x)))
            pyro.sample("z", guide_family(encoder(x) + y))

    content = hashlib.sha256()
    for _ in range(2):
        encoder.zero_grad()
        decoder.zero_grad()
        loss = elbo.differentiable_loss(model, guide, x)
        loss.backward()
        for value in (loss.detach(), *(p.grad for part in (encoder, decoder) for p in part.parameters())):
            content.update(value.numpy().tobytes())
    return content.hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    kinds = ((ONE_HOT, one_hot, one_hot), (BITS, bits, bits), (SPARSE, sdist.SparseOneHotCategorical, one_hot))
    for elbos, guide_family, model_family in kinds:
        for name, make in elbos.items():
            torch.manual_seed(0)  # of the estimators' networks
            print(name, digest(make(), guide_family, model_family))


if __name__ == "__main__":
    main()
