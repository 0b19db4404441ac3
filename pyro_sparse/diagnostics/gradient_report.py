"""Which gradient estimator suits a model and guide? Measures them there, on bias, variance and time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyro.infer import ELBO
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from pyro_sparse.diagnostics.gradient_reference import Reference, by_construction, choose_reference
from pyro_sparse.diagnostics.gradient_samples import Program, Sampler, Untouched
from pyro_sparse.infer.refusals import refuse_guide_messenger

if TYPE_CHECKING:
    from pyro_sparse.diagnostics.plots import Figure


@dataclass(frozen=True)
class EstimatorReport:
    """
    One estimator's gradient of the parameters.

    Attributes:
        bias: the mean error along the direction in which the first half of the draws erred, measured on the second
            half. Its expectation is zero without bias and at most the norm of the bias with it. None where nothing
            was compared.
        bias_error: its standard error.
        detectable: the norm of bias that as many draws would have shown; a smaller one may go unnoticed.
        unbiased: False if ``bias`` is above three standard errors (with few draws a little more, by Student's t: by
            chance alone, one unbiased estimator in 740 is). True if it is not and the estimator is unbiased by
            construction. None if no bias was detected in one that is not, or nothing was compared: it may have one.
        variance: the trace of the covariance matrix of one estimate; NaN, as all numbers, where it failed.
        variance_error: its standard error.
        evaluations: rows at the model's observed sites, relative to an ordinary run.
        milliseconds: the median time of one estimate: of the processor, all threads together, or of a GPU.
        objective: what it is the gradient of: ``"elbo"``, or the estimator's own bound.
        by_construction: whether its kind is unbiased, as far as is known (None: it is not); a promise, not a finding.
        error: why it could not be measured; empty if it was.
    """

    bias: float | None
    bias_error: float | None
    detectable: float | None
    unbiased: bool | None
    variance: float
    variance_error: float
    evaluations: float
    milliseconds: float
    objective: str = "elbo"
    by_construction: bool | None = None
    error: str = ""

    @property
    def cost(self) -> float:
        """Variance times milliseconds: what an equally precise gradient costs."""
        return self.variance * self.milliseconds


@dataclass(frozen=True)
class GradientReport:
    """
    What :func:`gradient_report` found. ``print`` it, ``.plot()`` it.

    Attributes:
        estimators: an :class:`EstimatorReport` for each name.
        reference: what the bias is measured against.
        gradient_norm: the norm of the reference; None where it is not above its noise.
        num_parameters: how many numbers the parameters hold.
        num_samples: draws of each estimator.
        warmup: steps before them, in which running means settle.
        recommended: the name of the estimator with the least variance times milliseconds among those that are unbiased
            by construction and show no bias; None if there is none.
        reason: why.
        chosen: whether the parameters were chosen by ``parameters=``.
    """

    estimators: Mapping[str, EstimatorReport]
    reference: str
    gradient_norm: float | None
    num_parameters: int
    num_samples: int
    warmup: int
    recommended: str | None
    reason: str
    chosen: bool = False

    def __str__(self) -> str:
        norm = "not above its noise" if self.gradient_norm is None else f"{self.gradient_norm:.3g}"
        unit = "" if self.gradient_norm is None else ", in % of the norm"
        width = max(len("estimator"), *map(len, self.estimators)) + 2
        whose = f"{self.num_parameters} chosen" if self.chosen else f"the guide's {self.num_parameters}"
        lines = [
            f"Gradient with respect to {whose} parameters: {self.num_samples} draws of each estimator, "
            f"after {self.warmup} steps to settle",
            f"Reference: {self.reference}; its norm: {norm}",
            f"{'estimator':<{width}}{'bias ± s.e.':>19}{'detectable':>12}{'variance ± s.e.':>18}{'evaluations':>13}"
            f"{'ms':>9}{'variance x ms':>15}",
            *(self._row(name, width) for name in self.estimators),
            f"bias: the mean error along one direction{unit}; a bias below 'detectable' can go unnoticed. "
            "unbiased: by construction, and none was detected.",
        ]
        if any(_undetected(r) for r in self.estimators.values()):
            lines.append(
                "no bias detected: that is not unbiased. A bias up to the number given would not have shown; it stays "
                "however long one trains, where noise averages out. More draws (num_samples) show a smaller one."
            )
        if any(r.unbiased is False and r.by_construction for r in self.estimators.values()):
            lines.append(
                "biased, against its construction: a fault of the estimator, or the program is not what it asks for."
            )
        lines.append(f"Recommended: {self.recommended}. {self.reason}" if self.recommended else self.reason)
        return "\n".join(lines)

    def _row(self, name: str, width: int) -> str:
        r = self.estimators[name]
        if r.error:
            return f"{name:<{width}}  failed: {r.error}"
        scale = 100 / self.gradient_norm if self.gradient_norm else 1.0
        bias = detectable = ""
        if r.bias is not None and r.bias_error is not None and r.detectable is not None:
            bias, detectable = _with_error(scale * r.bias, scale * r.bias_error), f"{scale * r.detectable:.2g}"
        elif r.objective != "elbo":
            bias = f"its own {r.objective}"
        else:
            bias = "the reference" if self.reference == f"the mean of '{name}'" else "not known"
        error = f"{r.variance:.2e} ± {r.variance_error / r.variance if r.variance else 0.0:3.0%}"
        return (
            f"{name:<{width}}{bias:>19}{detectable:>12}{error:>18}{r.evaluations:>13.3g}{r.milliseconds:>9.3g}"
            f"{r.cost:>15.2e}{self._verdict(r)}{'  <-' if name == self.recommended else ''}"
        )

    def _verdict(self, r: EstimatorReport) -> str:
        if r.unbiased is not None:
            return "  unbiased" if r.unbiased else f"  biased{', against its construction' * bool(r.by_construction)}"
        kind = " (a biased estimator)" if r.by_construction is False else ""
        if r.detectable is None:
            return kind and "  a biased estimator"
        size = 100 * r.detectable / self.gradient_norm if self.gradient_norm else r.detectable
        limit = (f"{size:.2g}" if size < 100 else f"{size:.0f}") + (" %" if self.gradient_norm else "")
        return f"  no bias detected within {limit}{kind}"

    def plot(self) -> Figure:
        """A matplotlib figure: variance against time, and the biases. Needs ``pyro_sparse[plots]``."""
        from pyro_sparse.diagnostics.plots import plot_gradient_report

        return plot_gradient_report(self)


def gradient_report(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    estimators: Mapping[str, ELBO],
    num_samples: int = 1000,
    reference: ELBO | str | None = None,
    parameters: Iterable[Tensor | str] | None = None,
) -> GradientReport:
    r"""
    Measures gradient estimators on your own model and guide, at the present values of their parameters.

    For an estimate g of the gradient of the loss with respect to the parameters of the guide: the bias
    :math:`E[g] - \nabla`, the variance :math:`\mathrm{tr}\,\mathrm{Cov}[g]`, model evaluations and milliseconds. An
    equally precise gradient costs variance times milliseconds; recommended is the estimator where that is least, among
    those that are unbiased by construction and show no bias. A bias that was not detected, in an estimator that is
    biased, is called that.

    **Reference.** If every guide site has a finite support and nothing else is random, the gradient by enumeration, by
    Pyro's :class:`~pyro.infer.TraceEnum_ELBO`, which has no noise. If other noise is left (a reparameterised site, a
    plate that subsamples, dropout), the mean of enumerated gradients, drawn for a tenth of the time of all estimators.
    If the sites cannot be enumerated, the mean of plain gradients, score functions with the mean of other runs as a
    baseline (:class:`~pyro_sparse.infer.score_function.ScoreFunctionELBO`), in twice as many runs as draws were asked
    for. The report says which. Every estimator is checked against it, whatever its class promises: a class decides a
    word only, whether what shows no bias is called unbiased (an ELBO of your own says so by an attribute ``unbiased``).
    Noise of that kind is part of every estimator's variance, that of a subsampled plate too.

    **Parameters.** Counted are those of the guide on which the ELBO depends, as its log-densities show in a few
    ordinary runs; the parameters of a learned baseline, whose gradient is that of the baseline's own loss, are not. A
    parameter in a branch that is seldom taken may be missed: name it in ``parameters``.

    **Test of bias.** The first half of the draws gives a direction, the second half the mean error along it, with a
    standard error; see :func:`~pyro_sparse.diagnostics.gradient_moments.bias_along`. ``detectable`` says what the test
    would have seen. What happens less than once in ``num_samples`` draws no test sees: with a guide so peaked that its
    other outcomes are rarer than that, an unbiased estimator may look precise and biased. Ask for more draws then.

    **State.** Each estimator runs on a deep copy of its ELBO, in a parameter store of its own that begins as yours. A
    running mean begins where yours is and moves as in training, first for ``num_samples / 25`` steps (at least 5) that
    are not measured; a network is as you have trained it, and is not trained. Afterwards the random number generators,
    the param store, the values and ``.grad`` of parameters, and buffers such as those of a batch normalisation are as
    before. A guide that makes its parameters at its first run, such as an AutoGuide, has made them.

    Args:
        model, guide, args, kwargs: as for :class:`pyro.infer.SVI`.
        estimators: the ELBOs to compare, by name: Pyro's or ours. ``loss_and_grads`` is called as ``svi.step`` does or,
            where no parameter is in the param store, ``differentiable_loss`` as in ``elbo(model, guide)``.
        num_samples: gradients of each, at least 4.
        reference: another ELBO to measure the bias against, of which ``num_samples`` gradients are drawn; or one of the
            names in ``estimators``.
        parameters: what to differentiate with respect to, of guide or model: tensors, or names in the param store or in
            a guide or model that is a module, ``"encoder"`` standing for all that begin so.

    Raises:
        ValueError: if there is no estimator, fewer than 4 samples, a guide without parameters, or no estimator that can
            be measured. One that raises, leaves no gradient, or an infinite one, is marked in its row.
        NotImplementedError: for a ``GuideMessenger``.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> def model():
        ...     z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        ...     pyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=torch.tensor(2.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Categorical(logits=pyro.param("logits", torch.zeros(3))))
        >>> report = gradient_report(model, guide, estimators={"score": Trace_ELBO()}, num_samples=10)
        >>> report.reference, list(report.estimators)
        ('exact enumeration', ['score'])
    """
    _check(estimators, num_samples, reference, guide)
    program = Program(model, guide, args, dict(kwargs or {}), None if parameters is None else list(parameters))
    warmup = max(5, num_samples // 25)
    with Untouched() as untouched:
        program.look()
        untouched.keep(program.leaves)
        samplers = {name: Sampler(name, elbo, program) for name, elbo in estimators.items()}
        for sampler in samplers.values():
            sampler.warm_up(warmup)
        _raise_if_all_failed(samplers)
        chosen = choose_reference(program, samplers, reference, num_samples, warmup)
        counts = [(sampler, num_samples) for sampler in samplers.values()]
        if chosen.own is not None:
            counts.append((chosen.own, chosen.count))
        with tqdm(total=sum(n for _, n in counts), desc="gradient_report", disable=None, leave=False) as progress:
            for _ in _in_turn([(sampler, count // 2) for sampler, count in counts]):
                progress.update()
            chosen.begin_second_half(samplers)
            for _ in _in_turn([(sampler, count - count // 2) for sampler, count in counts]):
                progress.update()
        _raise_if_all_failed(samplers)
        chosen.drop_if_failed()
    rows = {name: _row(sampler, chosen, program.eps) for name, sampler in samplers.items()}
    recommended, reason = _recommend(rows, samplers, program.eps)
    return GradientReport(
        estimators=rows,
        reference=chosen.text,
        gradient_norm=chosen.norm(),
        num_parameters=sum(p.numel() for p in program.parameters),
        num_samples=num_samples,
        warmup=warmup,
        recommended=recommended,
        reason=reason,
        chosen=parameters is not None,
    )


def _check(estimators: Mapping[str, ELBO], num_samples: int, reference: ELBO | str | None, guide: Any) -> None:
    if not estimators:
        raise ValueError("gradient_report: expected at least one estimator, got none. Pass {'name': elbo, ...}.")
    for name, elbo in estimators.items():
        if not isinstance(elbo, ELBO):
            raise TypeError(
                f"gradient_report, estimator '{name}': expected a pyro.infer.ELBO, got {elbo!r}. Wrap an Estimator in "
                "EstimatorELBO(...), a Baseline in BaselineELBO(...)."
            )
    if num_samples < 4:
        raise ValueError(
            f"gradient_report: expected num_samples of at least 4, got {num_samples}. Each half of the draws must have "
            "a variance."
        )
    if isinstance(reference, str) and reference not in estimators:
        raise ValueError(
            f"gradient_report: expected reference among {list(estimators)}, got {reference!r}. Correct the name, or "
            "pass an ELBO."
        )
    refuse_guide_messenger("gradient_report", guide)


def _with_error(value: float, error: float) -> str:
    """To two digits of the error, where that is readable."""
    if not 1e-4 < error < 1e4:
        return f"{value:.1e} ± {error:.1e}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _in_turn(counts: Sequence[tuple[Sampler, int]], turns: int = 5) -> Iterator[None]:
    """Draws from each in turn, so that whatever else the machine does hits all of them."""
    for turn in range(turns):
        for sampler, count in counts:
            yield from sampler.draw(count * (turn + 1) // turns - count * turn // turns)


def _raise_if_all_failed(samplers: Mapping[str, Sampler]) -> None:
    failures = {name: sampler.failure for name, sampler in samplers.items() if sampler.failure}
    if len(failures) < len(samplers):
        return
    first = next(iter(failures.values()))
    if len(failures) == 1:
        raise first
    reasons = "; ".join(f"'{name}': {failure.reason}" for name, failure in failures.items())
    raise ValueError(
        f"gradient_report: expected an estimator that can be measured on this model and guide, got none: {reasons}. "
        "Begin with the first, whose error is the cause of this one."
    ) from first


def _row(sampler: Sampler, reference: Reference, eps: float) -> EstimatorReport:
    promised = by_construction(sampler)
    if sampler.failure:
        nan, error = float("nan"), sampler.failure.reason
        return EstimatorReport(None, None, None, None, nan, nan, nan, nan, sampler.objective, promised, error)
    bias = reference.bias(sampler, eps)
    unbiased: bool | None = promised or None
    if bias is None:
        unbiased = unbiased if sampler is reference.sampler else None
    elif bias.shows:
        unbiased = False
    return EstimatorReport(
        bias=None if bias is None else bias.estimate,
        bias_error=None if bias is None else bias.error,
        detectable=None if bias is None else bias.detectable,
        unbiased=unbiased,
        variance=sampler.moments.variance(),
        variance_error=sampler.moments.variance_error(),
        evaluations=sampler.evaluations,
        milliseconds=statistics.median(sampler.milliseconds),
        objective=sampler.objective,
        by_construction=promised,
    )


def _undetected(row: EstimatorReport) -> bool:
    return row.unbiased is None and row.bias is not None


def _recommend(
    rows: Mapping[str, EstimatorReport], samplers: Mapping[str, Sampler], eps: float
) -> tuple[str | None, str]:
    measured = {name: row for name, row in rows.items() if row.objective == "elbo" and not row.error}
    fit = {name: row for name, row in measured.items() if row.by_construction and row.unbiased is not False}
    if fit:
        checked = all(row.unbiased for row in fit.values())
        return _best(
            fit, samplers, eps, "the unbiased" if checked else "those unbiased by construction, which was not checked"
        )
    none = "No estimator is recommended: none is known for an unbiased estimator of the ELBO's gradient."
    if silent := {name: row for name, row in measured.items() if _undetected(row)}:
        cheapest = min(silent, key=lambda name: silent[name].cost)
        none += f" In '{cheapest}', the cheapest of the others, a bias was not detected, and may be there."
    return None, none


def _best(
    fit: Mapping[str, EstimatorReport], samplers: Mapping[str, Sampler], eps: float, known: str
) -> tuple[str, str]:
    """The cheapest, and why."""

    def noise_free(name: str) -> bool:
        return fit[name].variance <= (100 * eps) ** 2 * float(samplers[name].moments.mean().square().sum())

    if exact := [name for name in fit if noise_free(name)]:
        best = min(exact, key=lambda name: fit[name].milliseconds)
        return best, "It has no noise" + (", in the least time." if len(exact) > 1 else ".")
    best, *others = sorted(fit, key=lambda name: fit[name].cost)
    reason = f"The least variance x milliseconds of {known}"
    if not others:
        return best, reason + ": there is no other."
    second, row = fit[others[0]], fit[best]
    ratio = second.cost / row.cost
    error = ((row.variance_error / row.variance) ** 2 + (second.variance_error / second.variance) ** 2) ** 0.5
    if ratio < 1 + 2 * error:
        return best, f"{reason}, but '{others[0]}' is within the error."
    return best, f"{reason}: {ratio:.3g} times less than '{others[0]}'."
