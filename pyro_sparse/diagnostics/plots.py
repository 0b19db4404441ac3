"""Figures of the reports. Matplotlib is imported when one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Figure

    from pyro_sparse.diagnostics.gradient_report import GradientReport

NOISE_FREE = 1e-12  # of the largest variance: points below are drawn just under the others


def plot_gradient_report(report: GradientReport) -> Figure:
    """
    Left, variance against time: on a grey line an equally precise gradient costs the same, and the recommended
    estimator lies on the lowest. Crosses are biased, rings have an objective of their own. Right, the bias of each with
    three standard errors.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, max(3.6, 1.6 + 0.3 * len(report.estimators))), layout="constrained")
    costs, biases = figure.subplots(1, 2)
    _plot_costs(costs, report)
    _plot_biases(biases, report)
    return figure


def _colour(report: GradientReport, name: str) -> str:
    if name == report.recommended:
        return "C0"
    return "C3" if report.estimators[name].unbiased is False else "0.35"


def _plot_costs(panel: Axes, report: GradientReport) -> None:
    rows = {name: row for name, row in report.estimators.items() if not row.error}
    largest = max(row.variance for row in rows.values())
    noisy = [row.variance for row in rows.values() if row.variance > NOISE_FREE * largest]
    floor = min(noisy, default=1.0) / 10
    right = 1.4 * max(row.milliseconds for row in rows.values())
    times = [right * (i + 1) / 200 for i in range(200)]
    for name, row in rows.items():
        variance = max(row.variance, floor)
        filled = "none" if row.objective != "elbo" else "full"
        marker = "x" if row.unbiased is False else "o"
        panel.plot(times, [variance * row.milliseconds / t for t in times], color="0.9", lw=0.8, zorder=0)
        panel.plot(row.milliseconds, variance, marker, color=_colour(report, name), fillstyle=filled)
        label = name if row.variance > floor else f"{name}: no noise"
        panel.annotate(label, (row.milliseconds, variance), (5, 4), textcoords="offset points", fontsize=8)
    panel.set(yscale="log", xlabel="milliseconds", ylabel="variance", title="What a gradient costs")
    panel.set(xlim=(0, right), ylim=(floor / 2, 5 * max(largest, floor)))


def _plot_biases(panel: Axes, report: GradientReport) -> None:
    scale = 100 / report.gradient_norm if report.gradient_norm else 1.0
    names = list(report.estimators)
    for y, name in enumerate(names):
        row = report.estimators[name]
        if row.bias is not None and row.bias_error is not None:
            panel.errorbar(
                scale * row.bias, y, xerr=3 * scale * row.bias_error, fmt="o", capsize=3, color=_colour(report, name)
            )
    panel.axvline(0, color="0.7", lw=1, zorder=0)
    unit = "in % of the gradient's norm" if report.gradient_norm else "absolute"
    panel.set(title="Bias ± 3 s.e.", xlabel=f"{unit}; reference: {report.reference.split(',')[0].split(' (')[0]}")
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
