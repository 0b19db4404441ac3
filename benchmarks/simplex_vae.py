"""
What does a latent variable on the simplex cost? The VAEs of tutorials/simplex_vae.py on the 8 by 8 digits, or on MNIST.

    python benchmarks/simplex_vae.py                      # all, by one draw of z for each image and by eight; 3 seeds
    python benchmarks/simplex_vae.py --estimators --seeds 1              # of the face of Mixed-Dirichlet, side by side
    python benchmarks/simplex_vae.py --data FOLDER/t10k-images-idx3-ubyte.gz --epochs 30 --draws 8 --seeds 1

The third reads an IDX file of images, as MNIST's, and tests on its last tenth; of the digits, a fifth are for testing.

float32, one thread, Adam 3e-3, minibatches of 64, one hidden layer of 128, ten coordinates, the last epoch's weights.
Test NLL by importance sampling with the guide, 1000 draws, and test ELBO by the same draws; both exact for the vertices
(Categorical, GS-ST). Nats per image, means over the seeds with the least and the largest. Seconds are of processor
time, of one run's training alone. Categorical sums its ten vertices whatever the number of draws; by one draw,
the baseline of the face is a moving average.

Published: A. Farinhas et al., ICLR 2022. Their code, at a like size on these digits, gave NLLs of 18.03 (Gaussian),
20.17 (Categorical), 20.89 (GS-ST) and 20.99 (Mixed-Dirichlet, in 351 s).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_sparse.datasets import load_digits
from pyro_sparse.estimators import Estimator, LeaveOneOut, MovingAverage, RaoBlackwell, ScoreFunction
from pyro_sparse.infer import EstimatorELBO

sys.path.insert(0, str(Path(__file__).parents[1] / "tutorials"))  # first: this script has the same name
from simplex_vae import VAE, Categorical, Dirichlet, Gaussian, GumbelSoftmaxST, MixedDirichlet, nll_and_elbo, read_idx
from simplex_vae import train as train_vae

VAES: dict[str, type[VAE]] = {
    "Gaussian": Gaussian,
    "Dirichlet": Dirichlet,
    "Categorical": Categorical,
    "GS-ST": GumbelSoftmaxST,
    "Mixed-Dirichlet": MixedDirichlet,
}
ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "average": lambda: ScoreFunction(MovingAverage()),
    "leave-one-out 2": lambda: LeaveOneOut(2),
    "leave-one-out 4": lambda: LeaveOneOut(4),
    "leave-one-out 8": lambda: LeaveOneOut(8),
    "leave-one-out 16": lambda: LeaveOneOut(16),
    "1 + 8 faces": lambda: RaoBlackwell(k=1, tail_samples=8),
    "8 + 1 faces": lambda: RaoBlackwell(k=8),
}
Runs = Mapping[str, tuple[type[VAE], Callable[[VAE], ELBO]]]


def all_vaes(draws: int) -> Runs:
    return {f"{name}, {draws}": (kind, lambda vae: vae.elbo(draws)) for name, kind in VAES.items()}


def all_estimators() -> Runs:
    def elbo(make: Callable[[], Estimator]) -> Callable[[VAE], ELBO]:
        return lambda vae: EstimatorELBO({"z_face": make()}, analytic_kl=True, max_plate_nesting=1)

    return {name: (MixedDirichlet, elbo(make)) for name, make in ESTIMATORS.items()}


def run(
    kind: type[VAE], elbo: Callable[[VAE], ELBO], training: Tensor, test: Tensor, epochs: int, seed: int
) -> tuple[float, float, float]:
    """Test NLL, test ELBO, and the seconds of training."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae = kind(training)
    start = time.process_time()
    train_vae(vae, elbo(vae), training, epochs, seed)
    seconds = time.process_time() - start
    return *nll_and_elbo(vae, test), seconds


def table(runs: Runs, training: Tensor, test: Tensor, epochs: int, seeds: int) -> None:
    print(f"{'':18s}{'test NLL':>24s}{'test ELBO':>26s}   seconds")
    for name, (kind, elbo) in runs.items():
        columns = torch.tensor([run(kind, elbo, training, test, epochs, seed) for seed in range(seeds)]).T
        spread = [f" ({c.min():.2f} to {c.max():.2f})" if seeds > 1 else "" for c in columns[:2]]
        nll, elbo = (f"{c.mean():.2f}{rest}" for c, rest in zip(columns[:2], spread, strict=True))
        print(f"{name:18s}{nll:>24s}{elbo:>26s}{columns[2].mean():10.1f}", flush=True)


def read(path: str | None) -> tuple[Tensor, Tensor]:
    """Images to train and to test."""
    if path is None:
        digits = load_digits(test_size=360)
        return digits.train_images, digits.test_images
    images = read_idx(path)
    return images[: -(len(images) // 10)], images[-(len(images) // 10) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="an IDX file of images, gzip; scikit-learn's digits if left out")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 8], help="of z for each image and step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--estimators", action="store_true", help="compares estimators of the face instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    training, test = read(args.data)
    print(f"{len(training)} images to train, {len(test)} to test, {args.epochs} epochs, {args.seeds} seeds")
    for runs in [all_estimators()] if args.estimators else map(all_vaes, args.draws):
        table(runs, training, test, args.epochs, args.seeds)


if __name__ == "__main__":
    main()
