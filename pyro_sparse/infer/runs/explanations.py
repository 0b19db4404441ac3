"""
Errors that a user's program raises on values that our estimators gave it: is it the program, or are it the values?

The program is run again, without them. Only what then runs is explained; else the error is the user's, and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger

from pyro_sparse.estimators import Estimator
from pyro_sparse.estimators.base import element
from pyro_sparse.infer.expansion.law import law
from pyro_sparse.infer.refusals import not_relaxed
from pyro_sparse.infer.runs.together import compare
from pyro_sparse.infer.runs.undisturbed import undisturbed

_OURS = ("pyro_sparse.infer.", "pyro_sparse.estimators.")
_DRAWS = (5, 2)  # two numbers, since either may happen to be the size of a plate
_FIX = (
    "Use torch.where in place of a Python branch and count dims from the right; or ScoreFunction, LeaveOneOut(n, "
    "vectorized=False), or Exact with infer={'enumerate': 'sequential'}"
)


@dataclass
class Alone:
    """A guide and a model as the user wrote them, with no plate of particles around."""

    model: Any
    guide: Any
    args: Any
    kwargs: Any

    def fails_together(self) -> bool:
        """Whether it runs on single values, and not on several at once."""
        try:
            return any(compare(self.model, self.guide, self.args, self.kwargs, n).error is not None for n in _DRAWS)
        except Exception:  # on a single value, too
            return False

    def runs_on_outcomes(self, sites: Collection[str], as_indices: bool) -> bool:
        """Whether it runs if these sites are at their outcomes, as they are or as the indices that those stand for."""
        try:
            with undisturbed(), poutine.block(), _AtOutcomes(sites, as_indices):
                guide_trace = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
                model = poutine.replay(self.model, trace=guide_trace)
                model_trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
                for trace in (guide_trace, model_trace):
                    trace.compute_log_prob(lambda name, site: name not in sites)
        except Exception:  # whatever it is: the error that is to be explained stays
            return False
        return True


class _AtOutcomes(Messenger):
    def __init__(self, sites: Collection[str], as_indices: bool) -> None:
        super().__init__()
        self.sites, self.as_indices = sites, as_indices

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites and not msg["is_observed"] and msg["value"] is None:
            fn = law(msg["fn"])
            value = fn.sample()
            if self.as_indices:  # a one-hot vector as its category, a bit as a whole number
                value = value.argmax(-1) if element(fn).event_shape else value.long()
            msg["value"] = value


@contextmanager
def explained(
    alone: Alone,
    several: Callable[[], Mapping[str, Estimator | None] | None],
    smooth: Callable[[], Mapping[str, Any]],
) -> Iterator[None]:
    """
    Raises in place of an error of the program what our values have to do with it, with that error as the cause.

    Args:
        alone: the program, to run it again.
        several: the estimators of the sites so far, if some had several values at once; else None.
        smooth: the sites that had values with a derivative that is not theirs, or values between their outcomes.
    """
    try:
        yield
    except Exception as error:  # whatever it is: it is explained, or raised
        if _is_ours(error):
            raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        if (estimators := several()) is not None and alone.fails_together():
            raise _one_at_a_time(estimators, first_line) from error
        if (sites := smooth()) and (
            (_between(sites) and alone.runs_on_outcomes(sites, False)) or alone.runs_on_outcomes(sites, True)
        ):
            raise not_relaxed(sites, f"that raises: {first_line}") from error
        raise


def _between(sites: Mapping[str, Any]) -> bool:
    return any(getattr(what, "relaxes", False) for what in sites.values())


def _is_ours(error: Exception) -> bool:
    """Whether it comes from this package's own lines: one of its refusals."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and str(traceback.tb_frame.f_globals.get("__name__", "")).startswith(_OURS)


def _where(estimators: Mapping[str, Estimator | None]) -> str:
    several = [
        f"'{name}' ({type(e).__name__})"
        for name, e in estimators.items()
        if e is not None and (e.draws_slots or e.num_particles > 1)
    ]
    return "site " + " or ".join(several) if several else "vectorised particles"


def _one_at_a_time(estimators: Mapping[str, Estimator | None], first_line: str) -> ValueError:
    return ValueError(
        f"EstimatorELBO, {_where(estimators)}: expected a program that runs on several values at once, got one that "
        f"runs on a single one at a time only ({first_line}). {_FIX}."
    )


def require_row_by_row(alone: Alone, estimators: Mapping[str, Estimator | None]) -> None:
    """Raises if on several values at once the log-probabilities are others than on each, where no noise reaches."""
    try:
        differing = compare(alone.model, alone.guide, alone.args, alone.kwargs, as_evaluated=True).differing
    except Exception:  # it ran: what it raises on other draws, it raises when it comes to them
        return
    if differing:
        raise ValueError(
            f"EstimatorELBO, {_where(estimators)}: expected a program that is the same on several values at once as on "
            f"each alone, got other log-probabilities at {differing}. {_FIX}. (This is checked once, under validation.)"
        )
