"""Whether a program that runs on one value of its sites runs on several at once, and is the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

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
) -> Comparison:
    """
    Runs guide and model on a few draws one by one and on all together, in a dim to the left of the plates, and compares
    the log-probabilities. A program may run on all together without an error and be wrong: where it branches on
    ``z.sum()``, takes a softmax over a dim counted from the left, or has a batch normalisation.

    Args:
        model, guide, args, kwargs: the program. What it raises on a single draw is raised.
        draws: how many.
        as_evaluated: whether batch normalisation and dropout are as in evaluation mode, and what depends on other noise
            is not compared.
    """
    with undisturbed(), poutine.block(), _evaluated() if as_evaluated else nullcontext():
        fixed = poutine.Trace()  # all runs see the same subsample
        runs = []
        for _ in range(draws):
            runs.append(run_once(model, guide, args, kwargs, fixed))
            for name, site in sites_of(runs[-1]).items():
                if name not in fixed and site_is_subsample(site):
                    fixed.add_node(name, **site)
        nesting = nesting_of(runs[0])
        each = [_log_probs(pair) for pair in runs]
        try:
            together = run_once(model, guide, args, kwargs, _stack(runs, fixed, nesting))
            differing = {
                key
                for key, value in _log_probs(together).items()
                if not _agree(value, [log_probs[key] for log_probs in each], nesting)
            }
        except Exception as error:  # whatever it is: the same program has just run on one value
            return Comparison(error, [])
        if differing and as_evaluated:
            differing -= _noisy(model, guide, args, kwargs, _values(sites_of(runs[0]), fixed))
    return Comparison(None, sorted({name for _, name in differing}))


def _noisy(model: Any, guide: Any, args: Any, kwargs: Any, given: poutine.Trace) -> set[tuple[int, str]]:
    """The log-probabilities that depend on random numbers of the program's own, though all sites take given values."""
    provenance = Provenance(own_draws=True, noise=True)
    before = random_state_of_python()
    with provenance.watching(), LabelDraws(provenance, own_draws=True):
        log_probs = _log_probs(run_once(model, guide, args, kwargs, given))
        unseen = random_state_of_python() != before  # where such a draw went is not known
        return {key for key, value in log_probs.items() if unseen or OWN in provenance.of(value)}


@contextmanager
def _evaluated() -> Iterator[None]:
    found: list[nn.Module] = []

    def before_forward(module: nn.Module, args: Any) -> None:
        for part in module.modules():
            if isinstance(part, TRAINING_ONLY) and part.training:
                part.training = False
                found.append(part)

    try:
        with before_every_forward(before_forward):
            yield
    finally:
        for module in found:
            module.training = True


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


def _stack(runs: Any, fixed: poutine.Trace, nesting: int) -> poutine.Trace:
    """The values of all runs, in a dim to the left of all plates."""
    sites = [sites_of(pair) for pair in runs]
    stacked = _values(sites[0], fixed)
    for name in [name for name in stacked.nodes if name not in fixed]:
        site: Any = stacked.nodes[name]
        values = [each[name]["value"] for each in sites]
        missing = (1,) * (nesting + site["fn"].event_dim - values[0].dim())
        site["value"] = torch.stack([value.reshape(missing + value.shape) for value in values])
    return stacked


def _agree(together: Tensor, each: list[Tensor], nesting: int) -> bool:
    tolerance = 3 * torch.finfo(together.dtype).eps ** 0.5
    rows = together.expand(torch.broadcast_shapes(together.shape, (len(each),) + (1,) * nesting))
    return all(
        torch.allclose(row, x.expand(row.shape), rtol=tolerance, atol=tolerance, equal_nan=True)
        for row, x in zip(rows, each, strict=True)
    )
