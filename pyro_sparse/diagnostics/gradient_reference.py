"""What the bias of a gradient estimator is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_sparse.diagnostics.gradient_moments import Bias, bias_along, direction
from pyro_sparse.diagnostics.gradient_samples import Program, Sampler
from pyro_sparse.infer.baseline_elbo import BaselineELBO
from pyro_sparse.infer.estimator_elbo import EstimatorELBO
from pyro_sparse.infer.exact import MAX_OUTCOMES, EnumeratedELBO, NoiseLeftError, exact_gradient
from pyro_sparse.infer.runs.together import why_one_by_one
from pyro_sparse.infer.score_function import ScoreFunctionELBO
from pyro_sparse.infer.sparse_enum import SparseEnumELBO

SHARE = 0.1  # of the time of all estimators, for enumerated gradients that must be averaged
AT_LEAST = 20  # of gradients that are averaged
RUNS = 4  # of each plain gradient: every run has the mean of the others as its baseline
# Unbiased by construction. Exact types: a subclass may be anything.
_UNBIASED = (
    Trace_ELBO,
    TraceMeanField_ELBO,
    TraceGraph_ELBO,
    TraceEnum_ELBO,
    SparseEnumELBO,
    EstimatorELBO,
    BaselineELBO,
    EnumeratedELBO,
    ScoreFunctionELBO,
)


@dataclass
class Reference:
    """
    The exact gradient, or a sampler of gradients to average, or neither.

    Attributes:
        text: what it is, for the user.
        exact: the gradient, without noise.
        sampler: one of the estimators, or one of its own.
        own: that sampler, if it is none of the estimators.
        count: how many gradients that one draws.
    """

    text: str
    exact: Tensor | None = None
    sampler: Sampler | None = None
    own: Sampler | None = None
    count: int = 0
    _order: list[Sampler] = field(default_factory=list)  # whose direction is which row of the sampler's directions

    def begin_second_half(self, samplers: Mapping[str, Sampler]) -> None:
        """Gives each estimator its direction."""
        samplers = {name: sampler for name, sampler in samplers.items() if not sampler.failure}
        self.drop_if_failed()
        for sampler in (*samplers.values(), *([self.own] if self.own else [])):
            sampler.moments.begin_second_half()
        target = self.exact if self.sampler is None else self.sampler.moments.first
        if target is None:
            return
        self._order = [s for s in samplers.values() if s is not self.sampler and s.objective == "elbo"]
        for sampler in self._order:
            sampler.moments.directions = direction(sampler.moments, target)[None]
        if self.sampler is not None and self._order:
            rows = [s.moments.directions for s in self._order if s.moments.directions is not None]
            self.sampler.moments.directions = torch.cat(rows)

    def drop_if_failed(self) -> None:
        """Goes on without a reference if its sampler could not be measured."""
        if self.sampler is not None and (failure := self.sampler.failure):
            self.text = f"none, and so no bias ({self.text} failed: {failure.reason})"
            self.sampler, self.own, self._order = None, None, []

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
    """The reference asked for; else exact enumeration, a mean of enumerations, or a mean of plain gradients."""
    if isinstance(given, str):
        return Reference(f"the mean of '{given}'", sampler=samplers[given])
    if given is not None:
        text = f"the mean of {num_samples} gradients of the {type(given).__name__} given"
        return _average("reference", given, program, num_samples, warmup, text)
    if program.jumps:
        where = ", ".join(repr(name) for name in sorted(program.jumps))
        why = f"has_rsample_(True) at {where}, right with analytic KL divergences only"
        return _plain(program, num_samples, why)
    run = (program.model, program.guide, program.args, program.kwargs)
    one_by_one = why_one_by_one(*run)
    strategy, max_outcomes, how = "parallel", MAX_OUTCOMES, ""
    if one_by_one:  # as many runs as outcomes
        strategy, max_outcomes = "sequential", max(32, num_samples // 10)
        how = f", outcome by outcome (on several at once: {one_by_one})"
    try:
        gradients = exact_gradient(*run, parameters=program.parameters, strategy=strategy, max_outcomes=max_outcomes)
        exact = torch.cat([g.reshape(-1) for g in gradients]).double()
        if bool(exact.isfinite().all()):
            return Reference("exact enumeration" + how, exact=exact)
        return _plain(program, num_samples, f"enumeration{how} is not finite")
    except NoiseLeftError:
        sampler = Sampler("enumeration", EnumeratedELBO(strategy, max_outcomes=max_outcomes), program)
    except Exception as error:  # whatever it is, the report says it
        text = f"enumeration failed{how}: {type(error).__name__}: {error}".splitlines()[0]
        return _plain(program, num_samples, text)
    sampler.warm_up(3)
    if sampler.failure:
        return _plain(program, num_samples, f"enumeration failed{how}: {sampler.failure.reason}")
    drawn = ", ".join(repr(name) for name in sorted(sampler.elbo.sampled)) or "outside of the guide's sites"
    if not sampler.elbo.enumerated:
        return _plain(program, num_samples, f"nothing to enumerate, noise at {drawn}")
    working = [s for s in samplers.values() if not s.failure]
    affordable = SHARE * num_samples * sum(s.settled for s in working) / sampler.settled
    count = min(num_samples, max(AT_LEAST, int(affordable)))
    text = f"the mean of {count} enumerated gradients{how}, with the noise left at {drawn}"
    return Reference(text, sampler=sampler, own=sampler, count=count)


def _plain(program: Program, num_samples: int, why: str) -> Reference:
    count = max(AT_LEAST, num_samples // 2)
    text = f"the mean of {count} plain gradients of {RUNS} runs each ({why})"
    return _average("plain", ScoreFunctionELBO(RUNS), program, count, 2, text)


def _average(name: str, elbo: ELBO, program: Program, count: int, warmup: int, text: str) -> Reference:
    sampler = Sampler(name, elbo, program)
    sampler.warm_up(warmup)
    return Reference(text, sampler=sampler, own=sampler, count=count)


def by_construction(sampler: Sampler) -> bool | None:
    """
    What an estimator's kind promises: True for a gradient that is the ELBO's in expectation, False for one that is not,
    None where nothing is known. It is for words only: the report checks what is promised.
    """
    elbo, program = sampler.elbo, sampler.program
    if not all(part.unbiased for part in sampler.parts):
        return False
    if program.straight_through and type(elbo) not in (EnumeratedELBO, ScoreFunctionELBO):
        return False  # its draws have a derivative of their own, whatever the ELBO
    if program.jumps and type(elbo) is not ScoreFunctionELBO:
        analytic = type(elbo) is TraceMeanField_ELBO or getattr(elbo, "analytic_kl", False)
        if not analytic:
            return False
    promised: bool | None = getattr(elbo, "unbiased", True if type(elbo) in _UNBIASED else None)
    return promised
