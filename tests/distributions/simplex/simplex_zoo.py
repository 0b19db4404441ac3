"""The simplex face by face, and mixed variables on it, for tests."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from pyro_sparse.distributions import (
    FaceDirichlet,
    FaceLogisticNormal,
    MaxEntropyFaces,
    MixedDirichlet,
    MixedLogisticNormal,
    MixedSimplex,
)


def all_faces(K: int) -> Tensor:
    return torch.tensor([f for f in itertools.product([0.0, 1.0], repeat=K) if any(f)], dtype=torch.float64)


def points_on(face: Tensor, step: float = 0.6, reach: float = 30.0) -> tuple[Tensor, Tensor]:
    """
    Points on a face and weights for integrals over it: the trapezoid rule in the logarithms of the ratios to the last
    coordinate, which converges exponentially for what vanishes at the ends of a face.
    """
    inside = face.nonzero().squeeze(-1)
    n = len(inside)
    line = torch.arange(-reach, reach + step / 2, step, dtype=torch.float64)
    logits = torch.cartesian_prod(*[line] * (n - 1)).reshape(-1, n - 1) if n > 1 else torch.zeros(1, 0).double()
    log_y = torch.nn.functional.pad(logits, (0, 1)).log_softmax(-1)
    y = torch.zeros(len(log_y), len(face), dtype=torch.float64)
    y[:, inside] = log_y.exp()
    return y, step ** (n - 1) * log_y.sum(-1).exp()


def points(K: int, **kwargs: float) -> tuple[Tensor, Tensor]:
    """On all faces."""
    parts = [points_on(face, **kwargs) for face in all_faces(K)]
    return torch.cat([y for y, _ in parts]), torch.cat([w for _, w in parts])


def random_parameters(K: int, seed: int = 0) -> dict[str, Tensor]:
    """For a batch of three."""
    g = torch.Generator().manual_seed(seed)
    scores, loc = (2 * torch.randn(3, K, generator=g, dtype=torch.float64) for _ in range(2))
    uniform = torch.rand(3, 2, K, generator=g, dtype=torch.float64)
    return {
        "scores": scores,
        "concentration": 0.05 + 4 * uniform[:, 0],
        "loc": loc,
        "scale": 0.2 + 2 * uniform[:, 1],
        "bits": torch.tensor([0.0, 1.5, -2.0], dtype=torch.float64),
    }


KINDS = ("MixedDirichlet", "MixedLogisticNormal", "MaxEntropyFaces, Dirichlet", "MaxEntropyFaces, LogisticNormal")


def make(kind: str, p: dict[str, Tensor]) -> Any:
    """A mixed variable of these parameters."""
    if kind == "MixedDirichlet":
        return MixedDirichlet(p["scores"], p["concentration"])
    if kind == "MixedLogisticNormal":
        return MixedLogisticNormal(p["scores"], p["loc"], p["scale"])
    faces = MaxEntropyFaces(p["loc"].shape[-1], p["bits"])
    if kind == "MaxEntropyFaces, Dirichlet":
        return MixedSimplex(faces, FaceDirichlet(p["concentration"]))
    return MixedSimplex(faces, FaceLogisticNormal(p["loc"], p["scale"]))


def log_faces(K: int, bits: float) -> float:
    """The largest entropy of a mixed variable on the simplex, N bits for each continuous coordinate included."""
    n = torch.arange(1, K + 1, dtype=torch.float64)
    log_counts = math.lgamma(K + 1) - torch.lgamma(n + 1) - torch.lgamma(K - n + 1)
    return float((log_counts + bits * math.log(2) * (n - 1) - torch.lgamma(n)).logsumexp(0))


def close(a: Tensor, b: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tol, atol=tol)


def attached(p: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone().requires_grad_() for name, x in p.items()}


def every_face(d: Any) -> tuple[Tensor, Tensor]:
    faces = d.faces.enumerate_support()
    return faces, d.faces.log_prob(faces).exp()
