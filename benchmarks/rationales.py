"""
How much of a sentence does a classifier need to read? The rationales of tutorials/rationale.py, by the share of words.

    python benchmarks/rationales.py                                 # on sentences that we made, a tenth of the words
    python benchmarks/rationales.py --path FOLDER --share 0.3 --epochs 6 --narrowing 3 --seeds 5

The second reads FOLDER/{train,dev,test}.txt, in the format of the Stanford Sentiment Treebank.

float32, one thread, Adam 4e-3, minibatches of 64. The four classifiers are the same but for what they read. Of each
run, the epoch with the best accuracy on dev counts, among those that read within 3 points of the share there (full text
and random words: among all that come after the share has narrowed). Means over the seeds, with standard errors. All in
percent; "changes": of pairs of neighbours one of which is read; precision and recall: of words that have a sentiment by
themselves. Seconds are of processor time, for one run's training and evaluation.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import torch

from pyro_sparse.datasets import load_treebank

sys.path.append(str(Path(__file__).parents[1] / "tutorials"))
from rationale import FullText, RandomWords, Rationale, Scores, Texts, encode, evaluate, train, vocabulary


def read(path: str | None) -> tuple[dict[str, Texts], int]:
    """The three parts, encoded with the vocabulary of the first, and the number of its words."""
    if path is None:
        made = load_treebank()
        parts = {"train": made[:1600], "dev": made[1600:2000], "test": made[2000:]}
    else:
        parts = {part: load_treebank(Path(path) / f"{part}.txt") for part in ("train", "dev", "test")}
    numbers = vocabulary(parts["train"])
    print(", ".join(f"{len(sentences)} sentences to {part}" for part, sentences in parts.items()), end=", ")
    print(f"{len(numbers)} words in the vocabulary")
    return {part: encode(sentences, numbers) for part, sentences in parts.items()}, 2 + len(numbers)


def run(rationale: Rationale, data: dict[str, Texts], seed: int, args: argparse.Namespace) -> tuple[Scores, int]:
    """The scores on test of the best epoch on dev, and its number."""
    best, found = -1.0, None

    def after_epoch(epoch: int) -> None:
        nonlocal best, found
        with torch.random.fork_rng():  # what is measured leaves the training as it is
            torch.manual_seed(seed)
            dev = evaluate(rationale, data["dev"])
            test = evaluate(rationale, data["test"])
        if args.verbose:
            print(f"seed {seed}, epoch {epoch:2d}: dev {row(dev)}   test {row(test)}", file=sys.stderr, flush=True)
        fits = isinstance(rationale, FullText) or abs(dev.words - 100 * args.share) <= 3
        if epoch > args.narrowing and fits and dev.accuracy > best:
            best, found = dev.accuracy, (test, epoch)

    train(rationale, data["train"], args.epochs, args.narrowing, seed, after_epoch=after_epoch)
    if found is None:
        raise RuntimeError(f"no epoch read within 3 points of {100 * args.share:g} % of the words: try more --epochs")
    return found


def row(scores: Scores) -> str:
    return " ".join(f"{score:5.1f}" for score in scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="the folder of train.txt, dev.txt and test.txt; our own sentences if left out")
    parser.add_argument("--share", type=float, default=0.1, help="of the words to be read")
    parser.add_argument(
        "--transitions", type=float, help="at most, of pairs of neighbours; 5/6 of the share if left out"
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--narrowing", type=int, default=6, help="in so many epochs the share comes down from 100 %%")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--verbose", action="store_true", help="prints every epoch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"share {args.share:g}, {args.epochs} epochs, narrowing in {args.narrowing}, {args.seeds} seeds")
    data, num_words = read(args.path)
    transitions = args.share * 5 / 6 if args.transitions is None else args.transitions
    classifiers: dict[str, Callable[[], Rationale]] = {
        "full text": lambda: FullText(num_words),
        "random words": lambda: RandomWords(num_words, args.share),
        "rationale": lambda: Rationale(num_words, args.share),
        "contiguous": lambda: Rationale(num_words, args.share, transitions),
    }
    print(f"{'':14s}" + "".join(f"{name:>14s}" for name in Scores._fields) + "   seconds  epochs")
    for name, make in classifiers.items():
        clock, rows, epochs = time.process_time(), [], []
        for seed in range(args.seeds):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            scores, epoch = run(make(), data, seed, args)
            rows.append(scores)
            epochs.append(epoch)
        cells = []
        for column in zip(*rows, strict=True):
            error = statistics.stdev(column) / len(column) ** 0.5 if len(column) > 1 else float("nan")
            cells.append(f"{statistics.mean(column):7.1f} ± {error:4.1f}")
        seconds = (time.process_time() - clock) / args.seeds
        print(f"{name:14s}{''.join(cells)}   {seconds:7.0f}  {epochs}", flush=True)


if __name__ == "__main__":
    main()
