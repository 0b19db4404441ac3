"""
What does a better gradient estimator cost, and what does it buy? Every estimator and baseline beside stock Pyro, on two
VAEs of scikit-learn's digits: one categorical code of 10 outcomes, and 10 Bernoulli bits.

    python benchmarks/estimators.py                    # variances and times, both models: 5 minutes
    python benchmarks/estimators.py --analytic-kl      # ours with the KL in closed form
    python benchmarks/estimators.py --train            # 2000 steps of the bits with each of six estimators: 3 minutes

8x8 images, a pixel is 1 where its count of 0 to 16 is 8 or more; minibatches of 32, reshuffled at each epoch. Encoder
Linear(64, 200)-ReLU-Linear(200, 10); decoder linear: a prototype per code, a sum over bits (--decoder relu puts a
hidden layer of 200 in it); uniform prior; Adam 1e-2. The table is of one moment in mid-training, after --steps with
leave-one-out 4. There the VAE is frozen, and what learns or remembers in a baseline gets --learn steps of its own. The
moment matters: from 200 to 400 steps the ratios of the bits double.

variance: E ||g - g_exact||^2 of the encoder's gradient g, over that of Trace_ELBO (the plain score function), and two
standard errors of its own (which leave out those of Trace_ELBO); g_exact enumerates all 10 or 1024 codes. float64.
evaluations: of the decoder, for each image. ms: processor time of one loss_and_grads (with the gradients of a baseline,
no optimiser), float32, one thread, median. ratio: to Trace_ELBO in the same round of interleaved runs, whose order is
drawn anew for each round; median and quartiles. step: the same ratio for svi.step, Adam included.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor, nn

from pyro_sparse.datasets import Digits, load_digits
from pyro_sparse.estimators import (
    ARMS,
    Baseline,
    DisARM,
    Estimator,
    Exact,
    LeaveOneOut,
    MovingAverage,
    NeuralBaseline,
    RaoBlackwell,
    SampleBaseline,
    Scaled,
    SelfCritic,
    Sum,
    TrainableConstant,
)
from pyro_sparse.infer import BaselineELBO, EstimatorELBO
from pyro_sparse.infer.exact import EnumeratedELBO

PIXELS, CODES, HIDDEN, BATCH = 64, 10, 200, 32
LEARNING_RATE = 1e-2
CALLS = 3  # in one measurement of time
BETA = 0.9
REFERENCE = "enumeration by Pyro"  # what all are compared with
DECAYING_AVERAGE = {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": BETA}}


class VAE(nn.Module):
    """Model and guide, in plain Pyro."""

    def __init__(self, kind: str, decoder: str) -> None:
        super().__init__()
        self.kind = kind
        width = PIXELS if decoder == "linear" else HIDDEN
        first = nn.Embedding(CODES, width) if kind == "categorical" else nn.Linear(CODES, width)
        rest = [] if decoder == "linear" else [nn.ReLU(), nn.Linear(HIDDEN, PIXELS)]
        self.decoder = nn.Sequential(first, *rest)
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CODES))

    def code(self, logits: Tensor) -> dist.TorchDistribution:
        if self.kind == "categorical":
            return dist.Categorical(logits=logits)
        return dist.Bernoulli(logits=logits).to_event(1)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", self.code(x.new_zeros(CODES)))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor, infer: dict[str, Any] | None = None) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("images", len(x)):
            pyro.sample("z", self.code(self.encoder(x)), infer=infer)


class Case:
    """One ELBO on a frozen VAE that other ELBOs share. Its own are a baseline's state and the parameter store."""

    def __init__(self, vae: VAE, elbo: ELBO, infer: dict[str, Any] | None = None) -> None:
        self.vae, self.elbo = vae, elbo
        self.guide = vae.guide if infer is None else functools.partial(vae.guide, infer=infer)
        self.store: Any = {"params": {}, "constraints": {}}
        self.svi = SVI(vae.model, self.guide, pyro.optim.Adam({"lr": 0.0}), loss=elbo)

    def run(self, x: Tensor) -> float:
        """Leaves the gradients of one minibatch; returns the processor time that they took."""
        self.vae.zero_grad()
        if isinstance(self.elbo, nn.Module):
            self.elbo.zero_grad()
        with pyro.get_param_store().scope(self.store):
            start = time.process_time()
            self.elbo.loss_and_grads(self.vae.model, self.guide, x)
            return time.process_time() - start

    def step(self, x: Tensor) -> float:
        """The processor time of a whole ``svi.step``, at a learning rate of zero."""
        with pyro.get_param_store().scope(self.store):
            start = time.process_time()
            self.svi.step(x)
            return time.process_time() - start

    def encoder_gradient(self, x: Tensor) -> Tensor:
        self.run(x)
        return torch.cat([p.grad.flatten() for p in self.vae.encoder.parameters()])

    def learn(self, batches: Iterator[Tensor], steps: int) -> None:
        """Running means move, a baseline's parameters are trained."""
        self.run(next(batches))
        parameters = [*self.elbo.parameters()] if isinstance(self.elbo, nn.Module) else []
        optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE) if parameters else None
        for _ in range(steps):
            self.run(next(batches))
            if optimiser is not None:
                optimiser.step()

    def evaluations(self, x: Tensor) -> int:
        counts: list[int] = []
        hook = self.vae.decoder.register_forward_hook(lambda *call: counts.append(math.prod(call[-1].shape[:-2])))
        self.run(x)
        hook.remove()
        return sum(counts)


def network() -> Baseline:
    return NeuralBaseline(nn.Sequential(nn.Linear(PIXELS, 100), nn.ReLU(), nn.Linear(100, 1)))


BASELINES: dict[str, Callable[[], Baseline | None]] = {
    "BaselineELBO(None)": lambda: None,
    "MovingAverage": lambda: MovingAverage(BETA),
    "TrainableConstant": TrainableConstant,
    "NeuralBaseline": network,
    "Sum(average, network)": lambda: Sum(MovingAverage(BETA), network()),
    "SelfCritic": SelfCritic,
    "SampleBaseline": SampleBaseline,
    "Scaled(SelfCritic)": lambda: Scaled(SelfCritic()),
}
ESTIMATORS: dict[str, dict[str, Callable[[], Estimator]]] = {
    "categorical": {
        **{f"LeaveOneOut({n})": functools.partial(LeaveOneOut, n) for n in (2, 4, 8)},
        **{f"RaoBlackwell({k})": functools.partial(RaoBlackwell, k) for k in (1, 2, 4)},
        "Exact": Exact,
    },
    "bits": {
        **{f"LeaveOneOut({n})": functools.partial(LeaveOneOut, n) for n in (2, 4, 8)},
        "DisARM": DisARM,
        "ARMS(4)": functools.partial(ARMS, 4),
        "ARMS(8)": functools.partial(ARMS, 8),
    },
}
TRAINED: dict[str, Callable[[], Estimator | Baseline | None]] = {
    "score function": lambda: None,
    **{name: BASELINES[name] for name in ("MovingAverage", "Sum(average, network)")},
    **{name: ESTIMATORS["bits"][name] for name in ("LeaveOneOut(4)", "DisARM", "ARMS(4)")},
}


def elbo_for(given: Estimator | Baseline | None, **kwargs: Any) -> ELBO:
    """``max_plate_nesting`` is said everywhere, so that no ELBO has to find it."""
    if isinstance(given, Estimator):
        return EstimatorELBO(given, max_plate_nesting=1, **kwargs)
    return BaselineELBO(given, max_plate_nesting=1, **kwargs)


def cases(vae: VAE, analytic_kl: bool) -> dict[str, Case]:
    """Every row of the table. Stock Pyro has no closed-form KL for sites that are not reparameterised."""
    rows = {
        "Trace_ELBO": Case(vae, Trace_ELBO(max_plate_nesting=1)),
        "TraceGraph_ELBO": Case(vae, TraceGraph_ELBO(max_plate_nesting=1)),
        "TraceGraph_ELBO, average": Case(vae, TraceGraph_ELBO(max_plate_nesting=1), DECAYING_AVERAGE),
    }
    for name, make in {**BASELINES, **ESTIMATORS[vae.kind]}.items():
        rows[name] = Case(vae, elbo_for(make(), analytic_kl=analytic_kl))
    return {**rows, REFERENCE: exactly(vae)}


def exactly(vae: VAE) -> Case:
    """TraceEnum_ELBO, which here enumerates the 1024 patterns of a vector of bits, too."""
    return Case(vae, EnumeratedELBO(max_plate_nesting=1))


def minibatches(images: Tensor, seed: int) -> Iterator[Tensor]:
    """Minibatches without end."""
    shuffle = torch.Generator().manual_seed(seed)
    while True:
        yield from images[torch.randperm(len(images), generator=shuffle)].split(BATCH)


def trained(kind: str, decoder: str, elbo: ELBO, images: Tensor, steps: int, seed: int) -> VAE:
    """The weights start alike whatever the ELBO, whose own network may have drawn random numbers."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae = VAE(kind, decoder)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss=elbo)
    batches = minibatches(images, seed)
    for _ in range(steps):
        svi.step(next(batches))
    return vae


@torch.no_grad()
def exact_elbo(vae: VAE, images: Tensor) -> float:
    """Nats per image, by enumeration."""
    elbo = EnumeratedELBO(max_plate_nesting=1)
    return -sum(elbo.loss(vae.model, vae.guide, x) for x in images.split(BATCH)) / len(images)


def variances(vae: VAE, images: Tensor, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """The mean squared distance to the exact gradient, and its standard error."""
    torch.set_default_dtype(torch.float64)
    vae, images = copy.deepcopy(vae).double(), images.double()
    fixed = [*itertools.islice(minibatches(images, args.seed), len(images) // BATCH)]
    targets = [exactly(vae).encoder_gradient(x) for x in fixed]
    table = {}
    for name, case in cases(vae, args.analytic_kl).items():
        if name == REFERENCE:
            continue
        pyro.set_rng_seed(args.seed)
        case.learn(minibatches(images, args.seed + 1), args.learn)
        distances = []
        for i in range(args.draws):
            gradient = case.encoder_gradient(fixed[i % len(fixed)])
            distances.append((gradient - targets[i % len(fixed)]).square().sum().item())
        table[name] = statistics.fmean(distances), statistics.stdev(distances) / args.draws**0.5
    torch.set_default_dtype(torch.float32)
    return table


def times(
    rows: dict[str, Case], batches: Iterator[Tensor], args: argparse.Namespace, run: Callable[[Case, Tensor], float]
) -> dict[str, list[float]]:
    """Seconds of each row in each round."""
    for case in rows.values():
        case.learn(batches, 2)
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    order, shuffle = [*rows], random.Random(args.seed)
    for _ in range(args.repeats):
        x = next(batches)
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(sum(run(rows[name], x) for _ in range(CALLS)) / CALLS)
    return seconds


def table(kind: str, digits: Digits, args: argparse.Namespace) -> None:
    images = digits.train_images
    vae = trained(kind, args.decoder, elbo_for(LeaveOneOut(4)), images, args.steps, args.seed)
    with torch.no_grad():
        entropy = vae.code(vae.encoder(images)).entropy().mean().item()
    print(
        f"\n{kind}, {args.decoder} decoder, {'closed-form' if args.analytic_kl else 'sampled'} KL: after {args.steps} "
        f"steps ELBO {exact_elbo(vae, images):.2f} nats per image, entropy of q {entropy:.2f}\n"
        f"{'':<24} evaluations   variance (+- 2 s.e.)        ms   ratio (quartiles)   step"
    )
    measured = variances(vae, images, args)
    rows, batches = cases(vae, args.analytic_kl), minibatches(images, args.seed)
    seconds, whole = times(rows, batches, args, Case.run), times(rows, batches, args, Case.step)
    plain, _ = measured["Trace_ELBO"]
    for name, case in rows.items():
        variance, error = (value / plain for value in measured.get(name, (0.0, 0.0)))
        spread = "(the reference)" if name == REFERENCE else f"(+- {2 * error:7.1e})"
        ratios = [a / b for a, b in zip(seconds[name], seconds["Trace_ELBO"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        step = statistics.median(a / b for a, b in zip(whole[name], whole["Trace_ELBO"], strict=True))
        print(
            f"{name:<24} {case.evaluations(next(batches)):>11}   {variance:9.1e} {spread:<15}  "
            f"{1e3 * statistics.median(seconds[name]):7.2f}   {middle:6.2f} ({low:.2f}-{high:.2f})   {step:5.2f}",
            flush=True,
        )


def table_training(digits: Digits, args: argparse.Namespace) -> None:
    print(
        f"\n10 bits, {args.decoder} decoder: {args.train_steps} steps from the same weights, on the same minibatches; "
        f"ELBO by enumeration, nats per image, mean (least, greatest) of {args.seeds} seeds\n"
        f"{'':<24} {'train':^24} {'test':^24}   seconds per run"
    )
    for name, make in TRAINED.items():
        elbos: list[tuple[float, float]] = []
        seconds = []
        for seed in range(args.seed, args.seed + args.seeds):
            elbo = elbo_for(make(), analytic_kl=args.analytic_kl)
            start = time.process_time()
            vae = trained("bits", args.decoder, elbo, digits.train_images, args.train_steps, seed)
            seconds.append(time.process_time() - start)
            elbos.append((exact_elbo(vae, digits.train_images), exact_elbo(vae, digits.test_images)))
        columns = (f"{statistics.fmean(c):7.2f} ({min(c):.2f}, {max(c):.2f})" for c in zip(*elbos, strict=True))
        print(f"{name:<24} {'  '.join(columns)}   {statistics.fmean(seconds):7.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=ESTIMATORS, default=[*ESTIMATORS])
    parser.add_argument("--decoder", choices=("linear", "relu"), default="linear")
    parser.add_argument("--analytic-kl", action="store_true", help="the KL in closed form, in all ELBOs but Pyro's")
    parser.add_argument("--steps", type=int, default=200, help="of training before the table")
    parser.add_argument("--learn", type=int, default=300, help="steps for baselines to learn while the VAE is frozen")
    parser.add_argument("--draws", type=int, default=960, help="gradients for each variance, over 48 minibatches")
    parser.add_argument("--repeats", type=int, default=51, help="interleaved rounds for the times")
    parser.add_argument("--train", action="store_true", help="train with six estimators; no table of variances")
    parser.add_argument("--train-steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    digits = load_digits()
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, 1 thread of {os.cpu_count()} cores, load {load}")
    if args.train:
        table_training(digits, args)
        return
    for kind in args.models:
        table(kind, digits, args)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
