"""
Errors that a user's program raises on values that our estimators gave it: is it the program, or are it the values?

The program is run again, without them. Only what then runs is explained; else the error is the user's, and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_sparse.estimators import Estimator
from pyro_sparse.estimators.base import element
from pyro_sparse.infer.expansion.law import law
from pyro_sparse.infer.refusals import not_relaxed
from pyro_sparse.infer.runs.ordinary import run_once
from pyro_sparse.infer.runs.together import compare, to_broadcast
from pyro_sparse.infer.runs.undisturbed import before_every_forward, undisturbed

_OURS = ("pyro_sparse.infer.", "pyro_sparse.estimators.")
_DRAWS = (5, 2)  # two numbers, since either may happen to be the size of a plate
_FIX = (
    "Use torch.where in place of a Python branch, count dims from the right and broadcast before torch.cat or "
    "torch.stack; or "
)
_ONE_BY_ONE = {
    "EstimatorELBO": "ScoreFunction, LeaveOneOut(n, vectorized=False), or Exact with infer={'enumerate': 'sequential'}",
    "SparseEnumELBO": "EstimatorELBO with ScoreFunction or LeaveOneOut(n, vectorized=False)",
}


class Several(NamedTuple):
    """What had several values at once: sites, each in a dim of its own (``slots``), or in a plate of particles, all."""

    sites: Mapping[str, str]  # to be named, with their estimators
    slots: Collection[str]
    particles: bool = False

    @property
    def stacked(self) -> Collection[str] | None:
        """As :func:`~pyro_sparse.infer.runs.together.compare` takes them."""
        return None if self.particles else self.slots

    def __str__(self) -> str:
        return "site " + " or ".join(map(self.name, self.sites)) if self.sites else "vectorised particles"

    def name(self, site: str) -> str:
        return f"'{site}'" + (f" ({self.sites[site]})" if self.sites.get(site) else "")

    @classmethod
    def of(cls, estimators: Mapping[str, Estimator | None], particles: bool) -> Several:
        given = {name: e for name, e in estimators.items() if e is not None}
        sites = {name: type(e).__name__ for name, e in given.items() if e.draws_slots or e.num_particles > 1}
        return cls(sites, [name for name, e in given.items() if e.draws_slots], particles)


@dataclass
class Alone:
    """A guide and a model as the user wrote them, with no plate of particles around."""

    model: Any
    guide: Any
    args: Any
    kwargs: Any
    owner: str = "EstimatorELBO"

    @property
    def _program(self) -> tuple[Any, Any, Any, Any]:
        return self.model, self.guide, self.args, self.kwargs

    def runs(self) -> bool:
        """Whether it runs on single values."""
        try:
            with undisturbed(), poutine.block():
                run_once(*self._program)
        except Exception:  # whatever it is: it is the user's
            return False
        return True

    def failure_together(self, several: Several) -> Exception | None:
        """What it raises on several values in one dim, if it runs on single ones."""
        try:
            runs = (compare(*self._program, draws=n, several=several.stacked) for n in _DRAWS)
            return next((run.error for run in runs if run.error is not None), None)
        except Exception:  # on a single value, too
            return None

    def one_batch_dim(self, failure: Exception) -> tuple[str, int] | None:
        """
        The outermost module that it came from and that runs once all leading dims of its input are made one, as there
        are on single values; and how many dims lie to the right of that.
        """
        single: dict[nn.Module, int] = {}

        def before_forward(module: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor):
                single[module] = args[0].dim()

        with undisturbed(), poutine.block():
            try:
                with before_every_forward(before_forward):
                    run_once(*self._program)
            except Exception:  # on other draws
                return None
            for module, args in _calls(failure):
                right = single.get(module, 0) - 1
                if right > 0 and args and isinstance(args[0], Tensor) and args[0].dim() > right + 1:
                    try:
                        module(args[0].flatten(0, -right - 1), *args[1:])
                    except Exception:  # it is not the leading dims
                        continue
                    return type(module).__name__, right
        return None

    def to_broadcast(self, several: Several) -> list[str]:
        """The sites whose values it combines without broadcasting them, if it runs once they are."""
        try:
            return to_broadcast(*self._program, several.slots)
        except Exception:  # on a single value, too
            return []

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
    alone: Alone, several: Callable[[], Several | None], smooth: Callable[[], Mapping[str, Any]] = dict
) -> Iterator[None]:
    """
    Raises in place of an error of the program what our values have to do with it, with that error as the cause.

    Args:
        alone: the program, to run it again.
        several: what had several values at once; None if nothing had.
        smooth: the sites that had values with a derivative that is not theirs, or values between their outcomes.
    """
    try:
        yield
    except Exception as error:  # whatever it is: it is explained, or raised
        if _is_ours(error):
            raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        if (found := several()) is not None:
            if apart := alone.to_broadcast(found):
                raise _not_broadcast(alone.owner, found, apart, first_line) from error
            if (failure := alone.failure_together(found)) is not None:
                raise _one_at_a_time(alone, found, failure, first_line) from error
        if (sites := smooth()) and (
            (_between(sites) and alone.runs_on_outcomes(sites, False)) or alone.runs_on_outcomes(sites, True)
        ):
            raise not_relaxed(sites, f"that raises: {first_line}") from error
        raise


@contextmanager
def explained_on_rows(
    alone: Alone, plate: str, runs_on_one: Callable[[], bool], placed: Callable[[], str]
) -> Iterator[None]:
    """
    Raises in place of an error of a model on packed rows what they have to do with it, if it runs without them, or if
    it runs on one of them, as ``runs_on_one`` finds out; with what was given a row for each, in the words of
    ``placed``.
    """
    try:
        yield
    except Exception as error:  # whatever it is: it is explained, or raised
        if _is_ours(error):
            raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        if not alone.runs():
            if not runs_on_one():
                raise
            raise ValueError(
                f"{alone.owner}, plate '{plate}': expected a model that runs on several rows at once, got one that "
                f"runs on a single one only ({first_line}). Use chunk_rows=1, where it may branch in Python on a "
                "value; or torch.where in place of the branch."
            ) from error
        raise ValueError(
            f"{alone.owner}, plate '{plate}': expected a model that runs on packed rows, got one that raises on them "
            f"({first_line}). {placed()}. {ON_ROWS}"
        ) from error


ON_ROWS = (
    "Pass all data as arguments with a row for each element of the plate, and take its size from them (len(x)) and "
    "nothing else; or give the plate a constant size, and take them by its indices (which number rows where its size "
    "does); place other arguments by gather=; or use mode='padded'."
)


def _between(sites: Mapping[str, Any]) -> bool:
    return any(getattr(what, "relaxes", False) for what in sites.values())


def _is_ours(error: Exception) -> bool:
    """Whether it comes from this package's own lines: one of its refusals."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and str(traceback.tb_frame.f_globals.get("__name__", "")).startswith(_OURS)


def _not_broadcast(owner: str, several: Several, sites: Sequence[str], first_line: str) -> ValueError:
    with_dim = [site for site in sites if site in several.slots] or sites
    carries = "each of which carries a dim of its own" if len(with_dim) > 1 else f"since '{with_dim[0]}' carries a dim"
    return ValueError(
        f"{owner}, site {' and '.join(map(several.name, sites))}: expected values that are broadcast against each "
        f"other before they are combined, {carries} on the left, got them combined as they are ({first_line}). "
        f"Broadcast first (torch.broadcast_tensors({', '.join(sites)}))."
    )


def _calls(error: Exception) -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    """The modules that were being called when it was raised, with their arguments, outermost first."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code is nn.Module._call_impl.__code__:
            yield traceback.tb_frame.f_locals["self"], traceback.tb_frame.f_locals["args"]
        traceback = traceback.tb_next


def _one_at_a_time(alone: Alone, several: Several, failure: Exception, first_line: str) -> ValueError:
    fix = _FIX
    if (found := alone.one_batch_dim(failure)) is not None:
        name, event_dim = found
        fix = (
            f"Call {name}, which takes one batch dim, as over_leading_dims(network, h, event_dim={event_dim}) does: "
            "three lines, in the README under 'Shapes'; or "
        )
    return ValueError(
        f"{alone.owner}, {several}: expected a program that runs on several values at once, got one that "
        f"runs on a single one at a time only ({first_line}). {fix}{_ONE_BY_ONE[alone.owner]}."
    )


def require_row_by_row(alone: Alone, several: Several) -> None:
    """Raises if on several values at once the log-probabilities are others than on each, where no noise reaches."""
    try:
        program = alone.model, alone.guide, alone.args, alone.kwargs
        differing = compare(*program, as_evaluated=True, several=several.stacked).differing
    except Exception:  # it ran: what it raises on other draws, it raises when it comes to them
        return
    if differing:
        raise ValueError(
            f"{alone.owner}, {several}: expected a program that is the same on several values at once as on "
            f"each alone, got other log-probabilities at {differing}. {_FIX}{_ONE_BY_ONE[alone.owner]}. (This is "
            "checked once, under validation.)"
        )
