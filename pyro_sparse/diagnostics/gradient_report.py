"""Which gradient estimator suits a model and guide? Measures them there, on bias, variance and time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from pyro_sparse.diagnostics.gradient_moments import THRESHOLD, Moments, bias_along, direction
from pyro_sparse.diagnostics.gradient_samples import Program, Sampler, Untouched
from pyro_sparse.infer import SparseEnumELBO
from pyro_sparse.infer.estimator_elbo import BaselineELBO, EstimatorELBO
from pyro_sparse.infer.exact import MAX_OUTCOMES, EnumeratedELBO, exact_gradient, why_one_by_one

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE_SHARE = 0.1  # of the time of all estimators, for a reference that must be drawn too
# Unbiased by construction. Exact types: a subclass may be anything.
_UNBIASED = (
    Trace_ELBO,
    TraceMeanField_ELBO,
    TraceGraph_ELBO,
    TraceEnum_ELBO,
    SparseEnumELBO,
    EstimatorELBO,
    BaselineELBO,
)


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
        unbiased: whether ``bias`` is below three standard errors (by chance alone, one in 740 is not). None where
            nothing was compared.
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
        num_parameters, num_entries: how many tensors the guide depends on, and how many numbers they hold.
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
    num_entries: int
    num_samples: int
    warmup: int
    recommended: str | None
    reason: str

    def __str__(self) -> str:
        norm = "not above its noise" if self.gradient_norm is None else f"{self.gradient_norm:.3g}"
        unit = "" if self.gradient_norm is None else ", in % of the norm"
        width = max(len("estimator"), *map(len, self.estimators)) + 2
        lines = [
            f"Gradient by the guide's {self.num_parameters} parameters ({self.num_entries} numbers), "
            f"{self.num_samples} draws of each estimator after {self.warmup} steps to settle",
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
        if r.bias is None or r.bias_error is None or r.detectable is None:
            bias, detectable = "reference" if r.unbiased else f"{r.objective}: other" if r.objective != "elbo" else "?", ""
        elif self.gradient_norm is None:
            bias, detectable = f"{r.bias:.1e} ± {r.bias_error:.1e}", f"{r.detectable:.1e}"
        else:
            scale = 100 / self.gradient_norm
            bias, detectable = f"{scale * r.bias:.2g} ± {scale * r.bias_error:.1g}", f"{scale * r.detectable:.2g}"
        biased = " biased" if r.unbiased is False else ""
        marked = f"{name} *" if name == self.recommended else name
        error = f"{r.variance:.2e} ± {r.variance_error:.0e}"
        return (
            f"{marked:<{width}}{bias:>19}{detectable:>12}{error:>18}{r.evaluations:>13.3g}{r.milliseconds:>9.3g}"
            f"{r.cost:>15.2e}{biased}"
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
    would have seen.

    **State.** Each estimator runs on a deep copy of its ELBO, in a parameter store of its own that begins as yours. A
    running mean begins where yours is and moves as in training, first for ``num_samples / 20`` steps (at least 5) that
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
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_sparse.infer import SparseEnumELBO
        >>> def model():
        ...     z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        ...     pyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=torch.tensor(2.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Categorical(logits=pyro.param("logits", torch.zeros(3))))
        >>> report = gradient_report(model, guide, estimators={"score": Trace_ELBO()}, num_samples=10)
        >>> report.reference, report.recommended
        ('exact enumeration', 'score')
    """
    _check(estimators, num_samples, reference, guide)
    program = Program(model, guide, args, dict(kwargs or {}))
    warmup = max(5, num_samples // 20)
    with Untouched() as untouched:
        program.look()
        untouched.keep(program.leaves)
        samplers = {name: Sampler(name, elbo, program) for name, elbo in estimators.items()}
        for sampler in samplers.values():
            sampler.warm_up(warmup)
        chosen = _choose_reference(program, samplers, reference, num_samples, warmup)
        drawn = list(samplers.values())
        if chosen.sampler is not None and chosen.sampler not in drawn:
            drawn.append(chosen.sampler)
        counts = [chosen.count if s is chosen.sampler else num_samples for s in drawn]
        with tqdm(total=sum(counts), desc="gradient_report", disable=None, leave=False) as progress:
            for _ in _in_turn(drawn, [count // 2 for count in counts]):
                progress.update()
            targets = _begin_second_half(samplers, chosen)
            for _ in _in_turn(drawn, [count - count // 2 for count in counts]):
                progress.update()
    return _summarize(program, samplers, chosen, targets, num_samples, warmup)
