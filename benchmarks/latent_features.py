"""
Which latent feature switches on with which morphological tag? The VAE of tutorials/inflection_vae.py, read off.

    python benchmarks/latent_features.py                                                   # on nouns that we made
    python benchmarks/latent_features.py --path FOLDER/turkish-train-high.tsv --test FOLDER/turkish-test.tsv \\
        --tag N --kl-weight 0.1 --warm-up 20

float32, one thread, Adam 3e-3, minibatches of 128, the last epoch's weights. Nats per test word by one draw and the
exact KL, unweighted; training multiplies the KL by --kl-weight. "bits" is the mutual information between a feature's
switch and a group of tags, of which the group's entropy is the most that there could be; a test word without a tag of
the group counts as another tag of it. Seconds are of processor time and of training alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pyro
import torch
from torch import Tensor

from pyro_sparse.datasets import Inflection, load_morphology

sys.path.append(str(Path(__file__).parents[1] / "tutorials"))
from inflection_vae import InflectionVAE, Words, evaluate, has_tag, information, prob_on, train

GROUPS = {
    "part of speech": "N V ADJ",
    "number": "SG PL",
    "possessor": "PSS1S PSS2S PSS3S PSS1P PSS2P PSS3P",
    "case": "NOM ACC GEN DAT LOC ABL",
    "person": "1 2 3",
    "tense": "PST PRS FUT",
    "aspect": "PROG",
    "polarity": "POS NEG",
    "question": "DECL INTR",
}


def read(args: argparse.Namespace) -> tuple[list[Inflection], list[Inflection]]:
    """Words to train and to test."""
    words = load_morphology(args.path)
    if args.test is not None:
        return words, load_morphology(args.test)
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
    tenth = len(words) // 10
    return [words[i] for i in order[tenth:]], [words[i] for i in order[:tenth]]


def entropy(words: Words, tags: list[str]) -> float:
    """Of which of the tags a word has, in bits."""
    members = torch.stack([has_tag(words, tag) for tag in tags]).double().mean(1)
    shares = torch.cat([members, (1 - members.sum()).clamp(min=0).reshape(1)])
    return float(torch.special.entr(shares).sum() / torch.tensor(2.0).log())


def print_groups(on: Tensor, test: Words) -> None:
    print("\ngroup            entropy   bits of the best three features")
    for group, tags in GROUPS.items():
        possible = entropy(test, tags.split())
        if possible > 0:
            values, features = information(on, test, tags.split()).topk(3)
            best = "   ".join(f"{v:.2f} (feature {k:2d})" for v, k in zip(values, features.tolist(), strict=True))
            print(f"{group:15s} {possible:8.2f}   {best}")


def print_tags(on: Tensor, test: Words) -> None:
    print("\ntag        words   most telling feature, P(on | tag), P(on | no such tag)")
    for tag in " ".join(GROUPS.values()).split():
        members = has_tag(test, tag)
        if 10 <= members.sum() <= len(members) - 10:
            k = int(information(on, test, [tag]).argmax())
            with_tag, without = on[members, k].mean(), on[~members, k].mean()
            print(f"{tag:9s} {int(members.sum()):6d}   feature {k:2d}   {with_tag:.2f}   {without:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="words to train, in the format of CoNLL–SIGMORPHON 2018; ours if left out")
    parser.add_argument("--test", help="words to test, likewise; a tenth of the others if left out")
    parser.add_argument("--tag", help="only words that have this tag, such as N, and whose lemma has no space")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=10, help="epochs in which the weight of the KL rises")
    parser.add_argument("--kl-weight", type=float, default=0.25, help="of the KL in the training loss, above 0")
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(args.seed)
    training, testing = read(args)
    if args.tag is not None:
        training, testing = ([w for w in x if args.tag in w.tags and " " not in w.lemma] for x in (training, testing))
    alphabet = "".join(sorted(set("".join(word.lemma + word.form for word in training))))
    test = Words(testing, alphabet)
    vae = InflectionVAE(4 + len(alphabet), args.features, kl_weight=args.kl_weight)
    print(f"{len(training)} words to train, {len(testing)} to test, {args.epochs} epochs, KL times {args.kl_weight:g}")
    start = time.process_time()

    def report(epoch: int) -> None:
        if epoch % 5 == 0:
            figures = ", ".join(f"{name} {value:.3f}" for name, value in evaluate(vae, test).items())
            print(f"epoch {epoch:2d}, {time.process_time() - start:4.0f} s: {figures}", flush=True)

    train(vae, Words(training, alphabet), args.epochs, args.seed, args.warm_up, report)
    on = prob_on(vae, test)
    print_groups(on, test)
    print_tags(on, test)


if __name__ == "__main__":
    main()
