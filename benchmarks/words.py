"""
How much does a better gradient estimator buy? The VAE of tutorials/word_vae.py, words as 16 bits, trained by each.

    python benchmarks/words.py                                  # on our own short word list
    python benchmarks/words.py --path FOLDER/spanish2016        # reads FOLDER/spanish2016-{train,dev,test}.tsv
    python benchmarks/words.py --path FOLDER/spanish2016 --kl-weight 1e-9 --estimators "score function"

float32, one thread, Adam 1e-3, minibatches of 64, 20 epochs, the last epoch's weights. All runs start from the same
weights and see the same minibatches; all use the KL in closed form. ELBO: one draw for each word. NLL: by importance
sampling. Perplexity counts the end symbol. Seconds are of processor time and of training alone. "bits ignored" has the
prior as its guide: it is the decoder alone.

The exercise whose architecture this is prints for its score function: test ELBO -25.34 (KL 5.46), perplexity 9.56, NLL
24.05, validation ELBO -23.60, perplexity 8.11. The loss that it minimises leaves out the KL, as the last command above
does. Its NLL takes 3 draws, and for its test it loads the decoder of the epoch with the best validation perplexity, but
keeps the inference network of the last; the columns "as the exercise" do the same.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_sparse.datasets import load_words
from pyro_sparse.estimators import DisARM, LeaveOneOut, MovingAverage, NeuralBaseline, Sum
from pyro_sparse.infer import BaselineELBO, EstimatorELBO

sys.path.append(str(Path(__file__).parents[1] / "tutorials"))
from word_vae import WordVAE, elbo_and_kl, encode, nll_and_perplexity, symbol_counts, train


def neural_baseline(num_symbols: int) -> ELBO:
    """A network that sees how often each symbol is in the word; the average first, so that it learns the rest."""
    net = nn.Sequential(nn.Linear(num_symbols, 256), nn.ReLU(), nn.Linear(256, 1))
    baseline = Sum(MovingAverage(), NeuralBaseline(net, inputs=lambda x: symbol_counts(x, num_symbols)))
    return BaselineELBO(baseline, analytic_kl=True, max_plate_nesting=1)


ELBOS: dict[str, Callable[[int], ELBO]] = {
    "bits ignored": lambda num_symbols: BaselineELBO(analytic_kl=True, max_plate_nesting=1),
    "score function": lambda num_symbols: BaselineELBO(analytic_kl=True, max_plate_nesting=1),
    "moving average": lambda num_symbols: BaselineELBO(MovingAverage(), analytic_kl=True, max_plate_nesting=1),
    "neural baseline": neural_baseline,
    "leave-one-out 4": lambda num_symbols: EstimatorELBO(LeaveOneOut(4), analytic_kl=True, max_plate_nesting=1),
    "DisARM": lambda num_symbols: EstimatorELBO(DisARM(), analytic_kl=True, max_plate_nesting=1),
}


class BitsIgnored(WordVAE):
    """Its guide is the prior, so that the bits tell nothing: the character LSTM alone, as a yardstick."""

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        return self.prior().expand((len(x),))


class Run:
    """One training: what was seen after each epoch, and the decoder of the best one."""

    def __init__(self, name: str, data: dict[str, Tensor], num_symbols: int, args: argparse.Namespace) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        self.vae = (BitsIgnored if name == "bits ignored" else WordVAE)(num_symbols, kl_weight=args.kl_weight)
        self.name, self.dev, self.best = name, data["dev"], math.inf
        self.seconds, self.clock = 0.0, time.process_time()
        train(self.vae, ELBOS[name](num_symbols), data["train"], args.epochs, args.seed, after_epoch=self.after_epoch)

    def after_epoch(self, epoch: int, train_elbo: float) -> None:
        self.seconds += time.process_time() - self.clock
        with torch.random.fork_rng():  # what is measured leaves the training as it is
            torch.manual_seed(epoch)
            self.dev_elbo, self.dev_kl = elbo_and_kl(self.vae, self.dev)
            self.dev_nll, self.dev_perplexity = nll_and_perplexity(self.vae, self.dev, draws=3)
        if self.dev_perplexity < self.best:
            self.best, self.best_epoch = self.dev_perplexity, epoch
            self.best_decoder = copy.deepcopy(self.vae.decoder.state_dict())
        print(
            f"{self.name}, epoch {epoch:2d}: train ELBO {train_elbo:7.2f}, dev ELBO {self.dev_elbo:7.2f} "
            f"(KL {self.dev_kl:5.2f}), NLL {self.dev_nll:6.2f}, perplexity {self.dev_perplexity:5.2f} by 3 draws, "
            f"{self.seconds:6.0f} s",
            file=sys.stderr,
        )
        self.clock = time.process_time()

    def evaluate(self, x: Tensor, draws: int) -> tuple[float, float, float, float]:
        """ELBO, KL, NLL, perplexity; the same random numbers for every run."""
        torch.manual_seed(0)
        return *elbo_and_kl(self.vae, x), *nll_and_perplexity(self.vae, x, draws)

    def row(self, test: Tensor, draws: int) -> str:
        elbo, kl, nll, perplexity = self.evaluate(test, draws)
        _, _, dev_nll, dev_perplexity = self.evaluate(self.dev, draws)
        self.vae.decoder.load_state_dict(self.best_decoder)
        as_exercise = self.evaluate(test, 3)
        return (
            f"{self.name:<15} {elbo:9.2f} {kl:5.2f} {nll:6.2f} {perplexity:6.2f}   "
            f"{self.dev_elbo:8.2f} {self.dev_kl:5.2f} {dev_nll:6.2f} {dev_perplexity:6.2f}   {self.seconds:7.0f}   "
            f"{as_exercise[0]:8.2f} {as_exercise[2]:6.2f} {as_exercise[3]:6.2f} (decoder of epoch {self.best_epoch})"
        )


HEAD = (
    "\n                ---- test ------------------   ---- dev --------------------   seconds   test as the exercise\n"
    "                     ELBO    KL    NLL   ppl.      ELBO    KL    NLL   ppl.                 ELBO    NLL   ppl."
)


def read(args: argparse.Namespace) -> tuple[dict[str, Tensor], int]:
    """The three parts, encoded with the alphabet of the first, and the number of symbols."""
    if args.path is None:
        words = load_words()
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
        eighth = len(words) // 8
        parts = {"test": order[:eighth], "dev": order[eighth : 2 * eighth], "train": order[2 * eighth :]}
        texts = {part: [words[i] for i in indices] for part, indices in parts.items()}
    else:
        texts = {part: load_words(f"{args.path}-{part}.tsv") for part in ("train", "dev", "test")}
    if args.words is not None:  # spread evenly over the file
        texts["test"] = texts["test"][:: math.ceil(len(texts["test"]) / args.words)]
    alphabet = "".join(sorted(set("".join(texts["train"]))))
    print(", ".join(f"{len(texts[part])} words to {part}" for part in ("train", "dev", "test")))
    return {part: encode(words, alphabet) for part, words in texts.items()}, 4 + len(alphabet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="what the three files' names begin with; our own list if left out")
    parser.add_argument("--estimators", nargs="+", choices=ELBOS, default=[*ELBOS], metavar="NAME", help=str([*ELBOS]))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--kl-weight", type=float, default=1.0, help="of the KL in the training loss, above 0")
    parser.add_argument("--draws", type=int, default=100, help="of the bits, for the NLL")
    parser.add_argument("--words", type=int, help="at most so many words to test; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="where the trained weights go, if anywhere")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.epochs} epochs, KL times {args.kl_weight:g}, NLL by {args.draws} draws, seed {args.seed}")
    data, num_symbols = read(args)
    print(HEAD, flush=True)
    for name in args.estimators:
        run = Run(name, data, num_symbols, args)
        if args.save is not None:
            args.save.mkdir(parents=True, exist_ok=True)
            torch.save({"vae": run.vae.state_dict(), "best decoder": run.best_decoder}, args.save / f"{name}.pt")
        print(run.row(data["test"], args.draws), flush=True)


if __name__ == "__main__":
    main()
