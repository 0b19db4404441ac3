"""Whether a program that runs on one value of its sites runs on several at once, and is the same."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_sparse._precision import no_autocast
from pyro_sparse.infer.pyro_internals import TRAINING_ONLY
from pyro_sparse.infer.runs.ordinary import nesting_of, run_once, sites_of
from pyro_sparse.infer.runs.provenance import OWN, LabelDraws, Provenance
from pyro_sparse.infer.runs.undisturbed import before_every_forward, random_state_of_python, undisturbed

DRAWS = 3


@dataclass(frozen=True)
class Comparison:
    """The error of the run on several values, or the sites whose log-probabilities are others than in runs on each."""

    error: Exception | None
    differing: list[str]

    @property
    def why(self) -> str:
        """In words; empty if the program may run on several values."""
        if self.error is not None:
            return f"{type(self.error).__name__}: {self.error}".splitlines()[0]
        return f"other log-probabilities at {self.differing}" if self.differing else ""


def why_one_by_one(model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """
    Why guide and model cannot run on several values of their sites at once, as parallel enumeration asks of them;
    empty if they can.
    """
    return compare(model, guide, args, kwargs).why


def compare(
    model: Any,
    guide: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws: int = DRAWS,
    as_evaluated: bool = False,
    several: Collection[str] | None = None,
) -> Comparison:
    """
    Runs guide and model on a few draws one by one and on all together, in a dim to the left of the plates, and compares
    the log-probabilities, in float32 at least: what ``torch.autocast`` rounds depends on the shape. A program may run
    on all together without an error and be wrong: where it branches on ``z.sum()``, takes a softmax over a dim counted
    from the left, or has a batch normalisation.

    Args:
        model, guide, args, kwargs: the program. What it raises on a single draw is raised.
        draws: how many.
        as_evaluated: whether batch normalisation and dropout are as in evaluation mode, and what depends on other noise
            is not compared.
        several: the sites that take all draws at once, beside those that ask for parallel enumeration; the others are
            drawn as the program does it. None for all latent sites.
    """
    with undisturbed(), no_autocast(), poutine.block(), evaluated() if as_evaluated else nullcontext():
        singles = _Singles(model, guide, args, kwargs, draws)
        each = [_log_probs(pair) for pair in singles.runs]
        try:
            together = singles.run(singles.stacked(singles.of(several)))
            log_probs = _log_probs(together)
        except Exception as error:  # whatever it is: the same program has just run on one value
            return Comparison(error, [])
        if set(singles.of(several)) != set(singles.of(None)):  # the others were drawn anew
            each = [_log_probs(singles.run(singles.row(together, i))) for i in range(draws)]
        differing = {
            key for key, value in log_probs.items() if not _agree(value, [x[key] for x in each], singles.nesting)
        }
        if differing and as_evaluated:
            differing -= singles.noisy()
    return Comparison(None, sorted({name for _, name in differing}))


def to_broadcast(
    model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], several: Collection[str]
) -> list[str]:
    """
    The latent sites, as few as will do, whose values are to be broadcast against each other for the program to run
    where each site of ``several`` (and each that asks for parallel enumeration) has its values in a dim of its own.
    Empty if it runs as it is, or fails all the same.
    """
    with undisturbed(), poutine.block():
        singles = _Singles(model, guide, args, kwargs, 2)
        apart, found = singles.of(several), singles.of(None)

        def runs(shared: list[str]) -> bool:
            try:
                singles.run(singles.stacked(list(dict.fromkeys([*shared, *apart])), shared))
            except Exception:  # whatever it is: the same program has just run on one value
                return False
            return True

        if runs([]) or not runs(found):
            return []
        for name in list(found):
            if runs(fewer := [other for other in found if other != name]):
                found = fewer
    return found


class _Singles:
    """Runs of guide and model on single values; all see the same subsample and outcomes of sequential enumeration."""

    def __init__(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], draws: int) -> None:
        self.program = model, guide, args, kwargs
        self.fixed = poutine.Trace()
        self.runs: list[tuple[poutine.Trace, poutine.Trace]] = []
        for _ in range(draws):
            self.runs.append(self.run(self.fixed))
            for name, site in sites_of(self.runs[-1]).items():
                sequential = not site["is_observed"] and site["infer"].get("enumerate") == "sequential"
                if name not in self.fixed and (site_is_subsample(site) or sequential):
                    self.fixed.add_node(name, **site)
        self.nesting = nesting_of(self.runs[0])

    def run(self, given: poutine.Trace) -> tuple[poutine.Trace, poutine.Trace]:
        return run_once(*self.program, given)

    def of(self, several: Collection[str] | None) -> list[str]:
        """The latent sites of these names, and those that ask for parallel enumeration; of None all."""
        latent = {name: site for name, site in sites_of(self.runs[0]).items() if not site["is_observed"]}
        return [
            name
            for name, site in latent.items()
            if name not in self.fixed
            and (several is None or name in several or site["infer"].get("enumerate") == "parallel")
        ]

    def stacked(self, names: list[str], shared: Collection[str] | None = None) -> poutine.Trace:
        """The values of all runs, in a dim to the left of all plates; of sites not in ``shared`` in their own."""
        sites = [sites_of(pair) for pair in self.runs]
        given, own = self.fixed.copy(), 0
        for name in names:
            own += shared is not None and name not in shared
            site: Any = {**sites[0][name], "infer": {}}
            values = [each[name]["value"] for each in sites]
            right = self.nesting + site["fn"].event_dim + (own if shared is None or name not in shared else 0)
            missing = (1,) * (right - values[0].dim())
            site["value"] = torch.stack([value.reshape(missing + value.shape) for value in values])
            given.add_node(name, **site)
        return given

    def noisy(self) -> set[tuple[int, str]]:
        """
        The log-probabilities that depend on random numbers of the program's own, though all sites take given values;
        or on what its runs change.
        """
        provenance = Provenance(own_draws=True, noise=True)
        state, before = random_state_of_python(), _log_probs(self.runs[0])
        with provenance.watching(), LabelDraws(provenance, own_draws=True):
            again = _log_probs(self.run(_values(sites_of(self.runs[0]), self.fixed)))
            unseen = random_state_of_python() != state  # where such a draw went is not known
            return {
                key
                for key, value in again.items()
                if unseen or OWN in provenance.of(value) or not _agree(value, [before.get(key, value)], self.nesting)
            }

    def row(self, together: tuple[poutine.Trace, poutine.Trace], i: int) -> poutine.Trace:
        """What the latent sites of a run on several values had in one of the rows."""
        given, single = _values(sites_of(together), self.fixed), sites_of(self.runs[0])
        for name in [name for name in given.nodes if name not in self.fixed and name in single]:
            site: Any = given.nodes[name]
            value, before = site["value"], single[name]["value"].dim()
            if value.dim() > max(before, self.nesting + site["fn"].event_dim):
                site["value"] = value[i if len(value) > 1 else 0]
        return given


@contextmanager
def evaluated(kinds: tuple[type[nn.Module], ...] = TRAINING_ONLY) -> Iterator[None]:
    """Modules of these kinds, batch normalisation and dropout by default, are as in evaluation mode."""
    found: list[nn.Module] = []

    def before_forward(module: nn.Module, args: Any) -> None:
        for part in module.modules():
            if isinstance(part, kinds) and part.training:
                part.training = False
                found.append(part)

    try:
        with before_every_forward(before_forward):
            yield
    finally:
        for module in found:
            module.training = True


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, but for rounding in another order of operations."""
    tolerance = 3 * torch.finfo(a.dtype).eps ** 0.5
    a, b = torch.broadcast_tensors(a, b)
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _log_probs(traces: Iterable[poutine.Trace]) -> dict[tuple[int, str], Tensor]:
    return {
        (role, name): site["log_prob"]
        for role, trace in enumerate(traces)
        for name, site in sites_of([trace]).items()
        if not site_is_subsample(site)
    }


def _values(sites: Mapping[str, Any], fixed: poutine.Trace) -> poutine.Trace:
    """What a run is to take from another one."""
    given = fixed.copy()
    for name, site in sites.items():
        if not site["is_observed"] and name not in fixed:
            given.add_node(name, **{**site, "infer": {}})
    return given


def _agree(together: Tensor, each: list[Tensor], nesting: int) -> bool:
    rows = together.expand(torch.broadcast_shapes(together.shape, (len(each),) + (1,) * nesting))
    return all(close(row, x.expand(row.shape)) for row, x in zip(rows, each, strict=True))
