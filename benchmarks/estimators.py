"""
What does a better gradient estimator cost, and what does it buy? Every estimator and baseline beside stock Pyro, on two
VAEs of scikit-learn's digits: one categorical code of 10 outcomes, and 10 Bernoulli bits.

    python benchmarks/estimators.py                    # variances, biases and times, both models: 11 minutes
    python benchmarks/estimators.py --analytic-kl      # ours with the KL in closed form
    python benchmarks/estimators.py --only REBAR RELAX # the rows whose names begin so, beside Trace_ELBO
    python benchmarks/estimators.py --train            # 2000 steps of the bits with each of six estimators: 3 minutes

8x8 images, a pixel is 1 where its count of 0 to 16 is 8 or more; minibatches of 32, reshuffled at each epoch. Encoder
Linear(64, 200)-ReLU-Linear(200, 10); decoder linear: a prototype per code, a sum over bits (--decoder relu puts a
hidden layer of 200 in it); uniform prior; Adam 1e-2. The table is of one moment in mid-training, after --steps with
leave-one-out 4. There the VAE is frozen, and what learns or remembers in an estimator gets --learn steps of its own
(its own objective; Adam, from 1e-2 falling to 0). RELAX gets --learn-relax, 20 times as many: its network, of a hidden
layer of 200, has to learn what each code costs each image. The moment matters: from 200 to 400 steps the ratios of the
bits double.

variance: E ||g - E g||^2 of the encoder's gradient g, given the minibatch, over that of Trace_ELBO (the plain score
function), and two standard errors of its own (which leave out those of Trace_ELBO). For biased estimators this is the
variance about their own mean. bias: ||E g - g_exact|| over ||g_exact||, in per cent, both root mean squares over the
minibatches; g_exact enumerates all 10 or 1024 codes. ||E g - g_exact||^2 is the mean inner product of the errors of two
different draws for the same minibatch, which noise does not raise, and its standard error that of the minibatches'
mean. "< b" where it is within three standard errors of zero: b has those three added. float64.
evaluations: of the decoder, for each image. ms: processor time of one loss_and_grads (with the gradients of what
learns, no optimiser), float32, one thread, median. ratio: to Trace_ELBO in the same round of interleaved runs, whose
order is drawn anew for each round; median and quartiles. step: the same ratio for svi.step, Adam included.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

import pyro
import torch
from digits_vae import BATCH, CODES, HIDDEN, PIXELS, VAE, Case, exact_elbo, exactly, minibatches, trained
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor, nn

from pyro_sparse._relaxation import Jacobian
from pyro_sparse.datasets import Digits, load_digits
from pyro_sparse.estimators import (
    ARMS,
    REBAR,
    RELAX,
    Baseline,
    DisARM,
    DoubleControlVariate,
    Estimator,
    Exact,
    LeaveOneOut,
    LocalExpectation,
    MovingAverage,
    MuProp,
    NeuralBaseline,
    RaoBlackwell,
    SampleBaseline,
    Scaled,
    SelfCritic,
    StraightThrough,
    Sum,
    TrainableConstant,
    UnorderedSet,
)
from pyro_sparse.infer import BaselineELBO, EstimatorELBO

CALLS = 3  # in one measurement of time
BETA = 0.9
ROUNDING = 1e-20  # of a squared relative bias
REFERENCE = "enumeration by Pyro"  # what all are compared with
DECAYING_AVERAGE = {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": BETA}}


def network() -> Baseline:
    return NeuralBaseline(nn.Sequential(nn.Linear(PIXELS, 100), nn.ReLU(), nn.Linear(100, 1)))


class ControlVariate(nn.Module):
    """RELAX's: a cost for each category or bit, from the image, weighted by the relaxed value."""

    def __init__(self) -> None:
        super().__init__()
        self.of_image = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CODES + 1))

    def forward(self, relaxed: Tensor, x: Tensor) -> Tensor:
        costs = self.of_image(x)
        return (costs[..., :-1] * relaxed).sum(-1) + costs[..., -1]


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
BOTH: dict[str, Callable[[], Estimator]] = {
    "REBAR": REBAR,
    "RELAX": lambda: RELAX(ControlVariate(), inputs=lambda x: x),
    "MuProp": MuProp,
    "DoubleControlVariate(4)": functools.partial(DoubleControlVariate, 4),
    **{f"ST({jacobian})": functools.partial(StraightThrough, jacobian) for jacobian in get_args(Jacobian)},
}
ESTIMATORS: dict[str, dict[str, Callable[[], Estimator]]] = {
    "categorical": {
        **{f"LeaveOneOut({n})": functools.partial(LeaveOneOut, n) for n in (2, 4, 8)},
        **{f"RaoBlackwell({k})": functools.partial(RaoBlackwell, k) for k in (1, 2, 4)},
        **{f"UnorderedSet({k})": functools.partial(UnorderedSet, k) for k in (2, 4)},
        "Exact": Exact,
        **BOTH,
    },
    "bits": {
        **{f"LeaveOneOut({n})": functools.partial(LeaveOneOut, n) for n in (2, 4, 8)},
        "DisARM": DisARM,
        "ARMS(4)": functools.partial(ARMS, 4),
        "ARMS(8)": functools.partial(ARMS, 8),
        "LocalExpectation": LocalExpectation,
        **BOTH,
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


def cases(vae: VAE, args: argparse.Namespace) -> dict[str, Case]:
    """Every row of the table. Stock Pyro has no closed-form KL for sites that are not reparameterised."""
    rows = {
        "Trace_ELBO": Case(vae, Trace_ELBO(max_plate_nesting=1)),
        "TraceGraph_ELBO": Case(vae, TraceGraph_ELBO(max_plate_nesting=1)),
        "TraceGraph_ELBO, average": Case(vae, TraceGraph_ELBO(max_plate_nesting=1), DECAYING_AVERAGE),
    }
    for name, make in {**BASELINES, **ESTIMATORS[vae.kind]}.items():
        rows[name] = Case(vae, elbo_for(make(), analytic_kl=args.analytic_kl))
    rows[REFERENCE] = exactly(vae)
    return {name: case for name, case in rows.items() if name.startswith(("Trace_ELBO", *args.only))}


class Moments(NamedTuple):
    """Of an encoder's gradient: variance and squared relative bias, each with its standard error."""

    variance: float
    variance_error: float
    bias: float
    bias_error: float

    def bias_text(self) -> str:
        """The bias in per cent, plus or minus two standard errors, or what it is below."""
        if self.bias < max(3 * self.bias_error, ROUNDING):
            return f"< {100 * (max(self.bias, 0.0) + max(3 * self.bias_error, ROUNDING)) ** 0.5:.2g}"
        return f"{100 * self.bias**0.5:.3g} +- {100 * self.bias_error / self.bias**0.5:.2g}"


def moments(errors: Tensor, exact: Tensor) -> Moments:
    """
    Args:
        errors: of the gradients, (draws, minibatches, parameters).
        exact: their gradients, (minibatches, parameters).
    """
    draws, count, _ = errors.shape
    mean = errors.mean(0)
    distances = (errors - mean).square().sum(-1) * (draws / (draws - 1))
    squares = (mean.square().sum(-1) - distances.mean(0) / draws) / exact.square().sum(-1).mean()
    spread = distances.std() / distances.numel() ** 0.5
    return Moments(*(x.item() for x in (distances.mean(), spread, squares.mean(), squares.std() / count**0.5)))


def measured(vae: VAE, images: Tensor, args: argparse.Namespace) -> dict[str, Moments]:
    """The moments of every row but the reference."""
    torch.set_default_dtype(torch.float64)
    vae, images = copy.deepcopy(vae).double(), images.double()
    fixed = [*itertools.islice(minibatches(images, args.seed), len(images) // BATCH)]
    exact = torch.stack([exactly(vae).encoder_gradient(x) for x in fixed])
    found = {}
    for name, case in cases(vae, args).items():
        if name == REFERENCE:
            continue
        pyro.set_rng_seed(args.seed)
        case.learn(minibatches(images, args.seed + 1), args.learn_relax if name == "RELAX" else args.learn)
        errors = exact.new_empty(args.draws, *exact.shape)
        for draw in errors:  # in the order of training: some remember the minibatch before
            for i, x in enumerate(fixed):
                draw[i] = case.encoder_gradient(x) - exact[i]
        found[name] = moments(errors, exact)
    torch.set_default_dtype(torch.float32)
    return found


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
        f"steps ELBO {exact_elbo(vae, images):.2f} nats per image, entropy of q {entropy:.2f}\n{'':<24} evaluations   "
        f"variance (+- 2 s.e.)        bias, % of exact       ms   ratio (quartiles)   step"
    )
    found = measured(vae, images, args)
    rows, batches = cases(vae, args), minibatches(images, args.seed)
    seconds, whole = times(rows, batches, args, Case.run), times(rows, batches, args, Case.step)
    plain = found["Trace_ELBO"].variance
    for name, case in rows.items():
        if name == REFERENCE:
            quality = f"{0.0:9.1e} (the reference){'':>19}"
        else:
            own = found[name]
            spread = f"(+- {2 * own.variance_error / plain:7.1e})"
            quality = f"{own.variance / plain:9.1e} {spread:<15} {own.bias_text():>18}"
        ratios = [a / b for a, b in zip(seconds[name], seconds["Trace_ELBO"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        step = statistics.median(a / b for a, b in zip(whole[name], whole["Trace_ELBO"], strict=True))
        print(
            f"{name:<24} {case.evaluations(next(batches)):>11}   {quality}  "
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
    parser.add_argument("--learn", type=int, default=300, help="steps to learn while the VAE is frozen")
    parser.add_argument("--learn-relax", type=int, default=6000, help="the same for RELAX's network")
    parser.add_argument("--draws", type=int, default=20, help="gradients for each of 48 minibatches")
    parser.add_argument("--only", nargs="+", default=[""], help="the rows whose names begin with one of these")
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
