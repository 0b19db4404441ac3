"""What the bias of a gradient estimator is measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_sparse.diagnostics.gradient_moments import Bias, bias_along, direction
from pyro_sparse.diagnostics.gradient_samples import Program, Sampler
from pyro_sparse.estimators import Baseline, Estimator
from pyro_sparse.infer.estimator_elbo import BaselineELBO, EstimatorELBO
from pyro_sparse.infer.exact import MAX_OUTCOMES, EnumeratedELBO, NoiseLeftError, exact_gradient, why_one_by_one
from pyro_sparse.infer.sparse_enum import SparseEnumELBO

SHARE = 0.1  # of the time of all estimators, for enumerated gradients that must be averaged
AT_LEAST = 20  # of them
# Unbiased by construction. Exact types: a subclass may be anything.
_UNBIASED = (Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, SparseEnumELBO)


@dataclass
class Reference:
    """
    The exact gradient, or a sampler of gradients to average; until the best estimator is known it may be neither.

    Attributes:
        text: what it is, for the user.
        exact: the gradient, without noise.
        sampler: one of the estimators, or one of its own.
        extra: the sampler of its own, by a name, if there is one.
        count: how many gradients that one draws.
        trusts: which ELBOs are unbiased by construction on this program.
    """

    text: str
    exact: Tensor | None = None
    sampler: Sampler | None = None
    extra: dict[str, Sampler] = field(default_factory=dict)
    count: int = 0
    trusts: Callable[[ELBO], bool] = lambda elbo: False
    _order: list[Sampler] = field(default_factory=list)  # whose direction is which row of the sampler's directions

    def begin_second_half(self, samplers: Mapping[str, Sampler]) -> None:
        """Chooses the best estimator, if it must, and gives each its direction."""
        for sampler in {**samplers, **self.extra}.values():
            sampler.moments.begin_second_half()
        if self.exact is None and self.sampler is None:
            self._take_best(samplers)
        target = self.exact
        if self.sampler is not None:
            target = self.sampler.moments.first
        if target is None:
            return
        self._order = [s for s in samplers.values() if s is not self.sampler and s.objective == "elbo"]
        for sampler in self._order:
            sampler.moments.directions = direction(sampler.moments, target)[None]
        if self.sampler is not None and self._order:
            rows = [s.moments.directions for s in self._order if s.moments.directions is not None]
            self.sampler.moments.directions = torch.cat(rows)

    def _take_best(self, samplers: Mapping[str, Sampler]) -> None:
        trusted = {n: s for n, s in samplers.items() if s.objective == "elbo" and self.trusts(s.elbo)}
        if not trusted:
            self.text = f"none, and so no bias ({self.text}; no estimator is unbiased by construction)"
            return
        best = min(trusted, key=lambda name: trusted[name].moments.variance())
        self.sampler = trusted[best]
        self.text = f"the mean of '{best}', which is unbiased by construction ({self.text})"

    def bias(self, sampler: Sampler, eps: float) -> Bias | None:
        """The bias of one estimator; None where there is nothing to compare it with."""
        if sampler not in self._order:
            return None
        if self.exact is not None:
            return bias_along(sampler.moments, self.exact, 0, eps)
        assert self.sampler is not None
        return bias_along(sampler.moments, self.sampler.moments, self._order.index(sampler), eps)

    def norm(self) -> float | None:
        """The norm of the reference; None where the two halves of its draws do not agree that it is above zero."""
        if self.exact is not None:
            return float(self.exact.norm())
        if self.sampler is None:
            return None
        moments = self.sampler.moments
        assert moments.first is not None
        square = float(moments.first @ moments.second())  # independent halves: its expectation is the squared norm
        return square**0.5 if square > 0 else None


def choose_reference(
    program: Program, samplers: Mapping[str, Sampler], given: ELBO | str | None, num_samples: int, warmup: int
) -> Reference:
    """The reference asked for; else exact enumeration, a mean of enumerations, or the best of the estimators."""
    if isinstance(given, str):
        return Reference(f"the mean of '{given}'", sampler=samplers[given])
    if given is not None:
        sampler = Sampler("reference", given, program)
        sampler.warm_up(warmup)
        text = f"the mean of {num_samples} gradients of the {type(given).__name__} given"
        return Reference(text, sampler=sampler, extra={"reference": sampler}, count=num_samples)
    if program.jumps:
        where = ", ".join(repr(name) for name in sorted(program.jumps))
        text = f"has_rsample_(True) at {where}, right with analytic KL divergences only"
        return Reference(text, trusts=lambda elbo: is_unbiased(elbo, analytic=True))
    # Of a straight-through family the draws have a derivative of their own, whatever the ELBO.
    trusts = is_unbiased if not program.straight_through else lambda elbo: False
    run = (program.model, program.guide, program.args, program.kwargs)
    one_by_one = why_one_by_one(*run)
    strategy, max_outcomes, how = "parallel", MAX_OUTCOMES, ""
    if one_by_one:  # as many runs as outcomes
        strategy, max_outcomes = "sequential", max(32, num_samples // 10)
        how = f", outcome by outcome (on several at once: {one_by_one})"
    try:
        gradients = exact_gradient(*run, parameters=program.parameters, strategy=strategy, max_outcomes=max_outcomes)
        return Reference("exact enumeration" + how, exact=torch.cat([g.reshape(-1) for g in gradients]).double())
    except NoiseLeftError:
        elbo = EnumeratedELBO(strategy, max_outcomes=max_outcomes)
    except Exception as error:  # whatever it is, the report says it
        text = f"enumeration failed{how}: {type(error).__name__}: {error}".splitlines()[0]
        return Reference(text, trusts=trusts)
    sampler = Sampler("enumeration", elbo, program)
    sampler.warm_up(3)
    drawn = ", ".join(repr(name) for name in sorted(sampler.elbo.sampled)) or "outside of the guide's sites"
    if not sampler.elbo.enumerated:
        return Reference(f"nothing to enumerate, noise at {drawn}", trusts=trusts)
    affordable = SHARE * num_samples * sum(s.settled for s in samplers.values()) / sampler.settled
    count = min(num_samples, max(AT_LEAST, int(affordable)))
    text = f"the mean of {count} enumerated gradients{how}, with the noise left at {drawn}"
    return Reference(text, sampler=sampler, extra={"enumeration": sampler}, count=count)


def is_unbiased(elbo: ELBO, analytic: bool = False) -> bool:
    """Whether it is one of Pyro's or ours whose gradient is the ELBO's in expectation, or if it has analytic KLs."""
    if analytic and not (type(elbo) is TraceMeanField_ELBO or getattr(elbo, "analytic_kl", False)):
        return False
    if type(elbo) in (EstimatorELBO, BaselineELBO):
        assert isinstance(elbo, nn.Module)
        parts = [part for part in elbo.modules() if isinstance(part, (Estimator, Baseline))]
        ours = all(type(part).__module__.startswith("pyro_sparse.") for part in parts)
        return ours and all(part.unbiased for part in parts if isinstance(part, Estimator))
    return type(elbo) in _UNBIASED
