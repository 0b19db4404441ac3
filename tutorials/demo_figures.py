"""The figures of ``demo.py``: what the four runs did, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase, SubFigure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

from pyro_sparse.datasets import Digits

if TYPE_CHECKING:
    from demo import ClusteringVAE, Run

COLOURS = {"dense": "#444444", "sparsemax": "#d1495b", "entmax15": "#e69f00", "tracegraph": "#2a6f97"}
MEANING = {
    "dense": "dense: softmax, all K codes summed",
    "sparsemax": "sparsemax: only its support summed",
    "entmax15": "entmax15: only its support summed",
    "tracegraph": "tracegraph: softmax, one code sampled",
}
COLUMNS = 10  # prototypes and bars per run


def draw_figures(runs: Sequence[Run], digits: Digits, out: Path) -> None:
    """Writes four PNG files into the folder ``out``."""
    figures: dict[str, Callable[[Sequence[Run], Digits], Figure]] = {
        "elbo.png": elbo_against_seconds,
        "support.png": support_over_training,
        "prototypes.png": prototypes_of_most_used_codes,
        "posterior.png": posterior_of_one_image,
    }
    with torch.no_grad():
        for name, draw in figures.items():
            draw(runs, digits).savefig(out / name, dpi=150)


def elbo_against_seconds(runs: Sequence[Run], digits: Digits) -> Figure:
    fig, ax = one_axes("The same model, data and first weights: how fast does each estimator learn?")
    for run in runs:
        ax.plot(list(accumulate(run.seconds)), run.elbo, ".-", color=COLOURS[run.name], label=MEANING[run.name])
    ax.set(xscale="log", xlabel="seconds of training (logarithmic; a dot per epoch)")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.set_ylabel("training ELBO (nats per image; higher is better)")
    fig.legend(loc="outside lower center", ncols=2, frameon=False)
    return fig


def support_over_training(runs: Sequence[Run], digits: Digits) -> Figure:
    fig, ax = one_axes("How many codes does an image keep? Only these need the decoder")
    num_codes, epochs = runs[0].vae.num_codes, range(1, len(runs[0].elbo) + 1)
    ax.axhline(num_codes, color=COLOURS["dense"], label=f"softmax (dense, tracegraph): always all {num_codes}")
    for run in runs:
        if run.support_mean:
            ax.plot(epochs, run.support_mean, ".-", color=COLOURS[run.name], label=f"{run.name}: mean over images")
            ax.plot(
                epochs, run.support_max, color=COLOURS[run.name], ls=":", label=f"{run.name}: largest of all images"
            )
    ax.set(yscale="log", ylim=(0.9, 1.5 * num_codes), xlabel="epoch")
    ax.set_ylabel("codes with positive probability (logarithmic)")
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if t < 0.8 * num_codes] + [num_codes]
    ax.set_yticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    fig.legend(loc="outside lower center", ncols=2, frameon=False)
    return fig


def prototypes_of_most_used_codes(runs: Sequence[Run], digits: Digits) -> Figure:
    fig = Figure(figsize=(10, 0.5 + 1.7 * len(runs)), layout="constrained")
    fig.suptitle("Prototypes of the most used codes: what the decoder draws at the average style")
    for row, run in zip(rows_of(fig, runs), runs, strict=True):
        used = run.code_counts.sum(-1)
        row.suptitle(
            f"{MEANING[run.name]} · {int((used > 0).sum())} of {len(used)} codes are the likeliest of a training image",
            fontsize=10, x=0.01, ha="left", color=COLOURS[run.name],
        )  # fmt: skip
        codes = used.argsort(descending=True, stable=True)[:COLUMNS]
        for ax, code, image in zip(row.subplots(1, len(codes)), codes, prototypes(run.vae, codes), strict=True):
            show_image(ax, image)
            ax.set_anchor("N")
            digit = f"mostly {int(run.code_counts[code].argmax())}" if used[code] > 0 else "unused"
            ax.set_xlabel(f"{digit}\n{int(used[code])} images", fontsize=8)
    return fig


def posterior_of_one_image(runs: Sequence[Run], digits: Digits) -> Figure:
    """Of the test image whose code is least certain: the largest entropy, on average over the runs."""
    posteriors = [run.vae.code_given(digits.test_images).probs for run in runs]
    index = int(torch.stack([torch.special.entr(q).sum(-1) for q in posteriors]).mean(0).argmax())
    highest = max(float(q[index].max()) for q in posteriors)
    fig = Figure(figsize=(11, 0.6 + 2.3 * len(runs)), layout="constrained")
    fig.suptitle("Which code made this test image, the one whose code is least certain? Its posterior q(z | x)")
    left, right = fig.subfigures(1, 2, width_ratios=(1, 5))
    ax = left.subplots()
    show_image(ax, digits.test_images[index])
    ax.set_title(f"the image x, a {int(digits.test_labels[index])}", fontsize=10)
    for row, run, probs in zip(rows_of(right, runs), runs, posteriors, strict=True):
        draw_posterior(*row.subplots(2, 1, height_ratios=(3, 2)), run, probs[index], highest)
    return fig


def draw_posterior(bars: Axes, images: Axes, run: Run, probs: Tensor, highest: float) -> None:
    """A bar for each of the likeliest codes of positive probability, above the code's prototype."""
    values, codes = probs.sort(descending=True, stable=True)
    support = int((probs > 0).sum())
    codes, rest = codes[: min(support, COLUMNS)], float(values[COLUMNS:].sum())
    drawn = bars.bar(range(len(codes)), values[: len(codes)].tolist(), color=COLOURS[run.name], width=0.6)
    bars.bar_label(drawn, fmt="{:.3f}", fontsize=8)
    others = f", {rest:.2f} of it not shown" if support > COLUMNS else ""
    bars.set_title(
        f"{MEANING[run.name]} · {support} of {len(probs)} codes have positive probability{others}",
        fontsize=10, loc="left", color=COLOURS[run.name],
    )  # fmt: skip
    bars.set(xlim=(-0.6, COLUMNS - 0.4), ylim=(0, 1.2 * highest), xticks=[], ylabel="probability")
    bars.spines[["top", "right"]].set_visible(False)
    images.set(xlim=(-0.6, COLUMNS - 0.4), ylim=(0, 1))
    images.axis("off")
    for i, image in enumerate(prototypes(run.vae, codes)):
        show_image(images.inset_axes((i - 0.3, 0, 0.6, 1), transform=images.transData), image)


def rows_of(fig: FigureBase, runs: Sequence[Run]) -> list[SubFigure]:
    """One part of the figure per run, below each other."""
    return list(fig.subfigures(len(runs), 1, squeeze=False)[:, 0])


def prototypes(vae: ClusteringVAE, codes: Tensor) -> Tensor:
    """The pixels' probabilities at style zero, shape ``(len(codes), 64)``."""
    style = torch.zeros(len(codes), vae.decoder.style.in_features)
    return vae.decoder(codes, style).sigmoid()


def show_image(ax: Axes, pixels: Tensor) -> None:
    ax.imshow(pixels.reshape(8, 8).tolist(), cmap="Greys", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])


def one_axes(title: str) -> tuple[Figure, Axes]:
    fig = Figure(figsize=(8, 5.5), layout="constrained")
    ax = fig.subplots()
    ax.set_title(title)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    return fig, ax
