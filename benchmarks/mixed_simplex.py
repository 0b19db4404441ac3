"""What does a mixed Dirichlet variable cost, beside a sum over all faces of the simplex?

    python benchmarks/mixed_simplex.py

Eager mode, one thread, a batch of 256: a draw, its log-density and the KL divergence to a prior, forward and backward,
in turn, round after round: the median ratio over the rounds, with its quartiles, so that a busy machine slows both
sides of it. "enumerated": the KL divergence as the sum over all 2^K - 1 faces of P(f) KL(p(. | f) || q(. | f)), and the
face drawn from the list of them, without Python loops (published code has them). "enumerated, by totals": as clever as
it can be, with one matrix product for the totals of the concentrations and the special functions of those only.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable

import torch
from mixed import median_ratio
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from pyro_sparse.distributions import MixedDirichlet

BATCH = 256
Cost = Callable[[MixedDirichlet, MixedDirichlet], Tensor]


def ours(d: MixedDirichlet, prior: MixedDirichlet) -> Tensor:
    y = d()
    return y[..., 0] + d.log_prob(y) + kl_divergence(d, prior)


def drawn_from(d: MixedDirichlet, faces: Tensor, log_p: Tensor) -> Tensor:
    face = faces[Categorical(logits=log_p.detach().T, validate_args=False).sample()]
    y = d.within.at(face).rsample()
    return y[..., 0] + d.log_prob(y)


def enumerated(d: MixedDirichlet, prior: MixedDirichlet) -> Tensor:
    faces = d.faces.enumerate_support(expand=False)
    log_p, log_q = d.faces.log_prob(faces), prior.faces.log_prob(faces)
    a, b = (torch.where(faces > 0, m.within.concentration, 0.0) for m in (d, prior))
    total, own = a.sum(-1, keepdim=True), torch.where(faces > 0, a, 1.0)
    within = torch.lgamma(torch.where(faces > 0, b, 1.0)) - torch.lgamma(own)
    within = within + (a - b) * (torch.digamma(own) - torch.digamma(total))
    within = within.sum(-1) + torch.lgamma(total.squeeze(-1)) - torch.lgamma(b.sum(-1))
    return drawn_from(d, faces.squeeze(1), log_p) + (log_p.exp() * (log_p - log_q + within)).sum(0)


def by_totals(d: MixedDirichlet, prior: MixedDirichlet) -> Tensor:
    faces = d.faces.enumerate_support(expand=False).squeeze(1)
    log_p, log_q = d.faces.log_prob(faces.unsqueeze(1)), prior.faces.log_prob(faces).unsqueeze(-1)
    a, b = d.within.concentration, prior.within.concentration
    own = torch.lgamma(b) - torch.lgamma(a) + (a - b) * torch.digamma(a)
    total = faces @ a.T
    within = torch.lgamma(total) - torch.lgamma(faces @ b).unsqueeze(-1) + faces @ own.T
    within = within - (faces @ (a - b).T) * torch.digamma(total)
    return drawn_from(d, faces, log_p) + (log_p.exp() * (log_p - log_q + within)).sum(0)


def task(cost: Cost, K: int, dtype: torch.dtype) -> Callable[[], object]:
    scores = torch.randn(BATCH, K, dtype=dtype).requires_grad_()
    concentration = (torch.rand(BATCH, K, dtype=dtype) * 3 + 0.1).requires_grad_()
    prior = MixedDirichlet(torch.zeros(K, dtype=dtype), torch.ones(K, dtype=dtype))

    def run() -> object:
        d = MixedDirichlet(scores, concentration, validate_args=False)
        return torch.autograd.grad(cost(d, prior).sum(), (scores, concentration))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread, batch {BATCH}\n")
    print(f"{'':52s} {'ms':>8s} {'ours, ms':>9s}   over ours")
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        here = task(ours, 10, dtype)
        cases = {
            f"K = 10, {name}, enumerated": task(enumerated, 10, dtype),
            f"K = 10, {name}, enumerated, by totals": task(by_totals, 10, dtype),
            f"K = 200, {name}, ours, over ours at K = 10": task(ours, 200, dtype),
        }
        for case, other in cases.items():
            ms, own, text = median_ratio(other, here, rounds)
            print(f"{case:52s} {ms:8.1f} {own:9.1f}   {text}")


if __name__ == "__main__":
    main()
