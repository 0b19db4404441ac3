"""Which gradient estimator suits a model and guide? Measures them there, on bias, variance and time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from tqdm import tqdm  # type: ignore[import-untyped]

from pyro_sparse.diagnostics.gradient_reference import Reference, choose_reference
from pyro_sparse.diagnostics.gradient_samples import Program, Sampler, Untouched

if TYPE_CHECKING:
    from pyro_sparse.diagnostics.plots import Figure


@dataclass(frozen=True)
class EstimatorReport:
    """
    One estimator's gradient of the guide's parameters.

    Attributes:
        bias: the mean error along the direction in which the first half of the draws erred, measured on the second
            half. Its expectation is zero without bias and at most the norm of the bias with it. None where nothing
            was compared.
        bias_error: its standard error.
        detectable: the norm of bias that as many draws would have shown; a smaller one may go unnoticed.
        unbiased: whether ``bias`` is below three standard errors (with few draws a little more, by Student's t: by
            chance alone, one unbiased estimator in 740 is not). None where nothing was compared.
        variance: the trace of the covariance matrix of one estimate.
        variance_error: its standard error.
        evaluations: rows at the model's observed sites, relative to an ordinary run.
        milliseconds: the median time of one estimate.
        objective: what it is the gradient of: ``"elbo"``, or the estimator's own bound.
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
        num_parameters: how many numbers the guide's parameters hold.
        num_samples: draws of each estimator.
        warmup: steps before them, in which running means settle.
        recommended: the name of the unbiased estimator with the least variance times milliseconds; None if there is
            none.
        reason: why.
    """

    estimators: Mapping[str, EstimatorReport]
    reference: str
    gradient_norm: float | None
    num_parameters: int
    num_samples: int
    warmup: int
    recommended: str | None
    reason: str

    def __str__(self) -> str:
        norm = "not above its noise" if self.gradient_norm is None else f"{self.gradient_norm:.3g}"
        unit = "" if self.gradient_norm is None else ", in % of the norm"
        width = max(len("estimator"), *map(len, self.estimators)) + 2
        lines = [
            f"Gradient by the guide's {self.num_parameters} parameters: {self.num_samples} draws of each estimator, "
            f"after {self.warmup} steps to settle",
            f"Reference: {self.reference}; its norm: {norm}",
            f"{'estimator':<{width}}{'bias ± s.e.':>19}{'detectable':>12}{'variance ± s.e.':>18}{'evaluations':>13}"
            f"{'ms':>9}{'variance x ms':>15}",
            *(self._row(name, width) for name in self.estimators),
            f"bias: the mean error along one direction{unit}; a bias below 'detectable' can go unnoticed.",
            f"Recommended: {self.recommended}. {self.reason}" if self.recommended else self.reason,
        ]
        return "\n".join(lines)

    def _row(self, name: str, width: int) -> str:
        r = self.estimators[name]
        scale = 100 / self.gradient_norm if self.gradient_norm else 1.0
        bias = detectable = ""
        if r.bias is not None and r.bias_error is not None and r.detectable is not None:
            bias, detectable = _with_error(scale * r.bias, scale * r.bias_error), f"{scale * r.detectable:.2g}"
        elif r.objective != "elbo":
            bias = f"its own {r.objective}"
        else:
            bias = "the reference" if r.unbiased else "not known"
        error = f"{r.variance:.2e} ± {r.variance_error / r.variance if r.variance else 0.0:3.0%}"
        return (
            f"{name:<{width}}{bias:>19}{detectable:>12}{error:>18}{r.evaluations:>13.3g}{r.milliseconds:>9.3g}"
            f"{r.cost:>15.2e}{'  biased' if r.unbiased is False else '  <-' if name == self.recommended else ''}"
        )

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
) -> GradientReport:
    r"""
    Measures gradient estimators on your own model and guide, at the present values of their parameters.

    For an estimate g of the gradient of the loss by all parameters of the guide: the bias :math:`E[g] - \nabla`, the
    variance :math:`\mathrm{tr}\,\mathrm{Cov}[g]`, model evaluations and milliseconds. An equally precise gradient costs
    variance times milliseconds; recommended is the estimator where that is least, among those that show no bias.

    **Reference.** If every guide site has a finite support and nothing else is random, the gradient by enumeration,
    which has no noise. If other noise is left (a reparameterised site, a plate that subsamples, dropout), the mean of
    enumerated gradients, drawn for a tenth of the time of all estimators. If the sites cannot be enumerated, the mean
    of the estimator with the least variance among those that are unbiased by construction. The report says which.
    Noise of that kind is part of every estimator's variance, that of a subsampled plate too.

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

    Raises:
        ValueError: if there is no estimator, fewer than 4 samples, a guide without parameters, or an estimator that
            raises, leaves no gradient, or an infinite one: it is named.

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
    program = Program(model, guide, args, dict(kwargs or {}))
    warmup = max(5, num_samples // 25)
    with Untouched() as untouched:
        program.look()
        untouched.keep(program.leaves)
        samplers = {name: Sampler(name, elbo, program) for name, elbo in estimators.items()}
        for sampler in samplers.values():
            sampler.warm_up(warmup)
        chosen = choose_reference(program, samplers, reference, num_samples, warmup)
        drawn = {**samplers, **chosen.extra}
        counts = {name: num_samples if name in samplers else chosen.count for name in drawn}
        with tqdm(total=sum(counts.values()), desc="gradient_report", disable=None, leave=False) as progress:
            for _ in _in_turn(drawn, {name: count // 2 for name, count in counts.items()}):
                progress.update()
            chosen.begin_second_half(samplers)
            for _ in _in_turn(drawn, {name: count - count // 2 for name, count in counts.items()}):
                progress.update()
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
    if isinstance(poutine.unwrap(guide), Messenger):
        raise NotImplementedError("gradient_report: expected a guide function or module, got a GuideMessenger.")


def _with_error(value: float, error: float) -> str:
    """To two digits of the error, where that is readable."""
    if not 1e-4 < error < 1e4:
        return f"{value:.1e} ± {error:.1e}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _in_turn(samplers: Mapping[str, Sampler], counts: Mapping[str, int], turns: int = 5) -> Iterator[None]:
    """Draws from each in turn, so that whatever else the machine does hits all of them."""
    for turn in range(turns):
        for name, sampler in samplers.items():
            yield from sampler.draw(counts[name] * (turn + 1) // turns - counts[name] * turn // turns)


def _row(sampler: Sampler, reference: Reference, eps: float) -> EstimatorReport:
    bias = reference.bias(sampler, eps)
    unbiased = True if sampler is reference.sampler else None
    if bias is not None:
        unbiased = not bias.shows
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
    )


def _recommend(
    rows: Mapping[str, EstimatorReport], samplers: Mapping[str, Sampler], eps: float
) -> tuple[str | None, str]:
    fit = {name: row for name, row in rows.items() if row.objective == "elbo" and row.unbiased is not False}
    if not fit:
        return None, "No estimator is recommended: none is an unbiased estimator of the ELBO's gradient."
    known = "the unbiased" if all(row.unbiased for row in fit.values()) else "those not known to be biased"

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
