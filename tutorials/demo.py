r"""
A clustering VAE on handwritten digits, trained four ways: ``python tutorials/demo.py`` (about two minutes; it says how
long it will take on your machine).

Each 8 by 8 image x of binary pixels has a code z, one of K, which picks a prototype, and a continuous style s, which
deforms it:

.. math:: z \sim \mathrm{Uniform}\{1..K\}, \quad s \sim N(0, I), \quad x_i \sim \mathrm{Bernoulli}(f_i(z, s)),

with the amortised guide :math:`q(z | x)\, q(s | x, z)`. The four runs differ only in the guide's distribution of z and
in the ELBO; weights, data, optimiser and seed are the same:

- ``dense``: softmax, and Pyro's TraceEnum_ELBO, which sums over all K codes by running the decoder on each;
- ``sparsemax``, ``entmax15``: the same sum over the few codes with positive probability, by SparseEnumELBO;
- ``tracegraph``: softmax, and Pyro's TraceGraph_ELBO, which samples one code and reduces the variance of the gradient
  by a decaying average of the cost as baseline.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from demo_figures import draw_figures
from pyro.infer import ELBO, SVI, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from torch import Tensor, nn
from tqdm import tqdm

from pyro_sparse.datasets import Digits, load_digits
from pyro_sparse.diagnostics import peak_memory
from pyro_sparse.distributions import SparseCategorical
from pyro_sparse.infer import SparseEnumELBO
from pyro_sparse.projections import entmax15, sparsemax

PIXELS, STYLE, HIDDEN = 64, 4, 128
BATCH = 128  # divides the 1536 training images: Pyro's decaying baseline raises at a smaller last minibatch
LEARNING_RATE = 3e-3
TEST_DRAWS = 20  # of the style, per test image and code


class Decoder(nn.Module):
    """The logits of the pixels: the prototype of the code, changed by code and style."""

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.prototype = nn.Embedding(num_codes, PIXELS)
        self.code = nn.Embedding(num_codes, HIDDEN)
        self.style = nn.Linear(STYLE, HIDDEN)
        self.change = nn.Linear(HIDDEN, PIXELS)

    def forward(self, code: Tensor, style: Tensor) -> Tensor:
        return self.prototype(code) + self.change(torch.relu(self.code(code) + self.style(style)))


class Encoder(nn.Module):
    """The scores of the codes given an image, and the style given image and code."""

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.scores = nn.Linear(PIXELS, num_codes)
        self.features = nn.Sequential(nn.Linear(PIXELS, 2 * HIDDEN), nn.ReLU(), nn.Linear(2 * HIDDEN, HIDDEN))
        self.code = nn.Embedding(num_codes, HIDDEN)
        self.style = nn.Linear(HIDDEN, 2 * STYLE)

    def forward(self, x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.style(torch.relu(self.features(x) + self.code(code))).chunk(2, dim=-1)
        return loc, log_scale.exp()


class Estimator(NamedTuple):
    """What one run has of its own."""

    code_given: Callable[[Tensor], dist.TorchDistribution]  # scores -> q(z | x)
    elbo: Callable[[], ELBO]
    infer: dict[str, object]  # how the ELBO is to treat the guide's code


def softmax(scores: Tensor) -> dist.Categorical:
    return dist.Categorical(logits=scores)


ESTIMATORS = {
    "dense": Estimator(softmax, partial(TraceEnum_ELBO, max_plate_nesting=1), {"enumerate": "parallel"}),
    "sparsemax": Estimator(
        partial(SparseCategorical, projection=sparsemax), partial(SparseEnumELBO, max_plate_nesting=1), {}
    ),
    "entmax15": Estimator(
        partial(SparseCategorical, projection=entmax15), partial(SparseEnumELBO, max_plate_nesting=1), {}
    ),
    # The baseline is one average per slot of the minibatch, whichever image is there, and a parameter that Pyro makes
    # anew at each step: the optimiser's list of states grows by one per step.
    "tracegraph": Estimator(
        softmax,
        partial(TraceGraph_ELBO, max_plate_nesting=1),
        {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}},
    ),
}


class ClusteringVAE:
    """Model and guide, in plain Pyro."""

    def __init__(self, num_codes: int, estimator: Estimator) -> None:
        self.num_codes = num_codes
        self.estimator = estimator
        self.decoder = Decoder(num_codes)
        self.encoder = Encoder(num_codes)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            code = pyro.sample("code", dist.Categorical(logits=x.new_zeros(self.num_codes)))
            style = pyro.sample("style", dist.Normal(x.new_zeros(STYLE), 1.0).to_event(1))
            pyro.sample("pixels", dist.Bernoulli(logits=self.decoder(code, style)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("images", len(x)):
            code = pyro.sample("code", self.code_given(x), infer=self.estimator.infer)
            loc, scale = self.encoder(x, code)
            pyro.sample("style", dist.Normal(loc, scale).to_event(1))

    def code_given(self, x: Tensor) -> dist.TorchDistribution:
        return self.estimator.code_given(self.encoder.scores(x))

    @torch.no_grad()
    def start_at(self, images: Tensor) -> None:
        """
        Starts each code at one image, as k-means does; from prototypes that are all alike, most codes would die.

        With pixel logits l of +1 where the image has ink and -1 elsewhere, log p(x | z) is l · (x - 1/2) up to a
        constant: linear in x, and the scores start there.
        """
        logits = 2 * images - 1
        self.decoder.prototype.weight.copy_(logits)
        self.encoder.scores.weight.copy_(logits)
        self.encoder.scores.bias.copy_(-logits.sum(-1) / 2)


@dataclass
class Run:
    """One trained VAE and what was seen of it; the lists hold one number per epoch."""

    name: str
    vae: ClusteringVAE
    seconds: list[float] = field(default_factory=list)  # of training, for that epoch alone
    elbo: list[float] = field(default_factory=list)  # nats per training image, while the weights move
    decoder_rows: list[float] = field(default_factory=list)  # per image
    support_mean: list[float] = field(default_factory=list)  # codes with positive probability; sparse guides only
    support_max: list[int] = field(default_factory=list)
    code_counts: Tensor = field(default_factory=torch.Tensor)  # (K, 10): training images by likeliest code and digit
    purity: float = 0.0
    test_elbo: float = 0.0
    peak_bytes: int = 0


class Progress:
    """
    How far all runs are together: a bar in a terminal, else a line every ten epochs. The forecast weighs what is left
    by the time that one minibatch and one draw take, timed first, and by how the time so far compares with that.
    """

    def __init__(self, names: Iterable[str], digits: Digits, num_codes: int, epochs: int) -> None:
        self.epochs = epochs
        self.expected = {name: expected_seconds(name, digits, num_codes) for name in names}
        self.total = sum(epochs * epoch + test for epoch, test in self.expected.values())
        self.done, self.started = 0.0, time.perf_counter()
        print(f"{epochs} epochs by {', '.join(self.expected)}: about {self.total:.0f} seconds", flush=True)
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
        self.bar = tqdm(total=self.total, bar_format=form, disable=None)  # None: in a terminal only

    def trained(self, run: Run) -> None:
        """One more epoch."""
        support = f"{run.support_mean[-1]:.1f}" if run.support_mean else f"{run.vae.num_codes}"
        epoch = len(run.elbo)
        said = f"epoch {epoch} of {self.epochs}, ELBO {run.elbo[-1]:.2f}, support {support}"
        self._advance(run.name, self.expected[run.name][0], said)
        if self.bar.disable and (epoch == self.epochs or epoch % 10 == 0):
            print(f"{run.name:>10}: {said}, {self._forecast()}", flush=True)

    def tested(self, run: Run) -> None:
        self._advance(run.name, self.expected[run.name][1], "tested")

    def _advance(self, name: str, work: float, said: str) -> None:
        self.done += work
        self.bar.set_description_str(f"{name:>10}", refresh=False)
        self.bar.set_postfix_str(f"{self._forecast()}; {said}", refresh=False)
        self.bar.update(min(work, self.total - self.bar.n))  # rounding must not lead beyond the end

    def _forecast(self) -> str:
        left = (self.total - self.done) * (time.perf_counter() - self.started) / self.done
        return f"about {max(left, 0.0):.0f} s left"


def expected_seconds(name: str, digits: Digits, num_codes: int) -> tuple[float, float]:
    """Of an epoch and of the test: from a minibatch and a draw, after others, since torch is slow at its first ones."""
    vae, images = ClusteringVAE(num_codes, ESTIMATORS[name]), digits.train_images
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss=ESTIMATORS[name].elbo())
    pyro.clear_param_store()

    def second_time(call: Callable[[], object]) -> float:
        call()
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    step = second_time(lambda: svi.step(images[:BATCH]))
    draw = second_time(lambda: elbo_per_image(vae, digits.test_images, seed=0, draws=1))
    return step * len(images) / BATCH, draw * TEST_DRAWS


def train(name: str, digits: Digits, num_codes: int, epochs: int, seed: int, progress: Progress | None = None) -> Run:
    """Trains with one estimator. Runs of one seed start from the same weights and see the same minibatches."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    run = Run(name, ClusteringVAE(num_codes, ESTIMATORS[name]))
    images, shuffle = digits.train_images, torch.Generator().manual_seed(seed)
    run.vae.start_at(images[torch.randperm(len(images), generator=shuffle)[:num_codes]])
    elbo = ESTIMATORS[name].elbo()
    svi = SVI(run.vae.model, run.vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss=elbo)

    for _ in range(epochs):
        order = torch.randperm(len(images), generator=shuffle)
        train_epoch(run, svi, elbo, [images[indices] for indices in order.split(BATCH)])
        if progress is not None:
            progress.trained(run)

    count_codes(run, digits)
    run.test_elbo = elbo_per_image(run.vae, digits.test_images, seed, TEST_DRAWS)
    if progress is not None:
        progress.tested(run)
    with peak_memory() as memory:
        svi.step(images[:BATCH])
    run.peak_bytes = memory.peak
    return run


def train_epoch(run: Run, svi: SVI, elbo: ELBO, batches: Sequence[Tensor]) -> None:
    """One step per minibatch; appends what it saw to the lists of the run."""
    rows: list[int] = []

    def count(_module: nn.Module, _args: object, image: Tensor) -> None:
        if torch.is_grad_enabled():  # the first run is compared with others on the side
            rows.append(image.numel() // PIXELS)

    hook = run.vae.decoder.register_forward_hook(count)
    loss, stats, started = 0.0, [], time.perf_counter()
    for x in batches:
        loss += svi.step(x)
        if isinstance(elbo, SparseEnumELBO):
            stats.append(elbo.last_stats)
    run.seconds.append(time.perf_counter() - started)
    hook.remove()
    num_images = sum(map(len, batches))
    run.elbo.append(-loss / num_images)
    run.decoder_rows.append(sum(rows) / num_images)
    if stats:
        run.support_mean.append(statistics.fmean(step.mean for step in stats))
        run.support_max.append(max(step.max for step in stats))


@torch.no_grad()
def count_codes(run: Run, digits: Digits) -> None:
    """Labels each code by the commonest digit among the training images of which it is the likeliest code."""
    codes = run.vae.code_given(digits.train_images).probs.argmax(-1)
    run.code_counts = torch.zeros(run.vae.num_codes, 10, dtype=torch.long)
    run.code_counts.index_put_((codes, digits.train_labels), torch.tensor(1), accumulate=True)
    test = run.code_counts[run.vae.code_given(digits.test_images).probs.argmax(-1)]
    right = (test.argmax(-1) == digits.test_labels) & (test.sum(-1) > 0)  # a code without training images has no label
    run.purity = right.double().mean().item()


@torch.no_grad()
def elbo_per_image(vae: ClusteringVAE, images: Tensor, seed: int, draws: int) -> float:
    """
    The ELBO in nats per image, by one rule for all runs: stock TraceEnum_ELBO over all K codes (a code of probability
    zero adds nothing) with the same draws of noise for the style.
    """
    pyro.set_rng_seed(seed)
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=draws)
    return -elbo.loss(vae.model, config_enumerate(vae.guide), images) / len(images)


def table(runs: Sequence[Run]) -> str:
    """The figures of all runs, one line each."""
    rows = [
        ("", "train ELBO", "test ELBO", "purity", "decoder rows", "seconds", "peak"),
        ("", "nats/image", "nats/image", "test", "per image", "per epoch", "MB"),
    ]
    for run in runs:
        rows.append(
            (
                run.name,
                f"{run.elbo[-1]:.2f}",
                f"{run.test_elbo:.2f}",
                f"{run.purity:.1%}",
                f"{statistics.fmean(run.decoder_rows):.1f}",
                f"{statistics.median(run.seconds):.3f}",
                f"{run.peak_bytes / 1e6:.1f}",
            )
        )
    return "\n".join("  ".join(cell.rjust(12) for cell in row) for row in rows)


NOTES = f"""\
train ELBO: of the last epoch, by the estimator itself, while the weights move. Higher is better.
test ELBO: every row sums over all codes, with the same {TEST_DRAWS} draws of noise for the style. Higher is better.
purity: the share of test images whose digit is the commonest among the training images of their likeliest code.
decoder rows: how often the decoder ran per image and step, mean over training; seconds: median over epochs.
peak: live tensor bytes that one more training step made, 128 images (pyro_sparse.diagnostics.peak_memory)."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a clustering VAE on scikit-learn's handwritten digits by four estimators of the ELBO's "
        "gradient, prints a table that compares them and draws four figures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    whole = {"type": int, "metavar": "N"}
    parser.add_argument(
        "--estimator", nargs="+", choices=["all", *ESTIMATORS], default="all", metavar="NAME",
        help=f"one or more of: all, {', '.join(ESTIMATORS)}",
    )  # fmt: skip
    parser.add_argument("--num-codes", default=256, help="K, the number of codes, 2 to 1536", **whole)
    parser.add_argument("--epochs", default=30, help="passes over the 1536 training images", **whole)
    parser.add_argument("--seed", default=0, help="of weights, minibatches and noise", **whole)
    parser.add_argument("--out", default=Path("demo_output"), type=Path, metavar="DIR", help="where the figures go")
    args = parser.parse_args(argv)
    if not 2 <= args.num_codes <= 1536:
        parser.error(f"--num-codes: expected 2 to 1536 (each starts at a training image), got {args.num_codes}")
    if args.epochs < 1:
        parser.error(f"--epochs: expected at least 1, got {args.epochs}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed: expected 0 to 2**32 - 1, got {args.seed}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: expected a folder that can be made, got {args.out} ({error.strerror})")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    names = ESTIMATORS if "all" in args.estimator else dict.fromkeys(args.estimator)
    torch.set_num_threads(
        1
    )  # these tensors are small: threads would wait for each other, on a busy machine for minutes
    digits = load_digits()
    print(f"{len(digits.train_images)} digits to train, {len(digits.test_images)} to test, K = {args.num_codes} codes")
    progress = Progress(names, digits, args.num_codes, args.epochs)
    runs = [train(name, digits, args.num_codes, args.epochs, args.seed, progress) for name in names]
    progress.bar.close()
    print(f"\n{table(runs)}\n\n{NOTES}\n")
    draw_figures(runs, digits, args.out)
    print(f"Pictures: {args.out.resolve()}")


if __name__ == "__main__":
    main()
