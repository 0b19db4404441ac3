"""Draws gradient estimates of a user's own program and leaves everything of the user's as it was."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_sparse._autograd import graph_leaves
from pyro_sparse.diagnostics.gradient_moments import Moments
from pyro_sparse.distributions.discrete.straight_through import is_straight_through
from pyro_sparse.estimators import Estimator
from pyro_sparse.infer.assignment import PARAM_PREFIX
from pyro_sparse.infer.estimator_elbo import EstimatorELBO
from pyro_sparse.infer.expansion.law import jumps
from pyro_sparse.infer.runs.ordinary import run_once
from pyro_sparse.infer.runs.undisturbed import undisturbed

PLAIN_RUNS = 10  # in which the parameters are found


class EstimatorError(ValueError):
    """An estimator that cannot be measured on this program; ``reason`` says why, in one line."""

    def __init__(self, name: str, expected: str, reason: str, fix: str) -> None:
        super().__init__(f"gradient_report, estimator '{name}': expected {expected}, got {reason} {fix}")
        self.reason = reason.splitlines()[0]


@dataclass
class Program:
    """
    A model and a guide with their arguments, as found by a few ordinary runs.

    Attributes:
        given: the tensors or names of parameters that the report shall be about; None for those of the guide.
        parameters: the tensors that it is about. Those of the guide are what the guide's draws and densities depend on,
            and through them the ELBO: neither a baseline's, nor what is registered and not used.
        leaves: everything that a loss may give a ``.grad``.
        registered: whether Pyro's param store holds any of them: ``loss_and_grads`` differentiates only then.
        rows: of log-probabilities at the model's observed sites, in an ordinary run.
        jumps: guide sites with atoms that are drawn purely pathwise: a drawn KL divergence has a biased gradient.
        straight_through: guide sites of straight-through families: what is drawn has a biased gradient.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: list[Tensor | str] | None = None
    parameters: list[Tensor] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    registered: bool = False
    rows: float = 0.0
    jumps: set[str] = field(default_factory=set)
    straight_through: set[str] = field(default_factory=set)

    def look(self) -> None:
        """Fills in the attributes."""
        guide_leaves: dict[int, Tensor] = {}
        elbo_leaves: dict[int, Tensor] = {}
        leaves: dict[int, Tensor] = {}
        counter = RowCounter()
        for _ in range(PLAIN_RUNS):
            traces = run_once(counter(self.model), self.guide, self.args, self.kwargs)
            sites = [site for trace in traces for site in trace.nodes.values()]
            guide_leaves.update(_leaves(x for site in traces[0].nodes.values() for x in _drawn(site)))
            elbo_leaves.update(_leaves(site.get("log_prob") for site in sites))
            leaves.update(_leaves(x for site in sites for x in _anything(site)))
            fns = {name: traces[0].nodes[name]["fn"] for name in traces[0].stochastic_nodes}
            self.jumps.update(name for name, fn in fns.items() if jumps(fn))
            self.straight_through.update(name for name, fn in fns.items() if is_straight_through(fn))
            self.registered |= any(trace.param_nodes for trace in traces)
        for module in (self.guide, self.model):
            if isinstance(module, nn.Module):
                leaves.update({id(p): p for p in module.parameters() if p.requires_grad})
        self.rows = counter.rows / PLAIN_RUNS
        self.parameters = [p for key, p in guide_leaves.items() if key in elbo_leaves]
        if self.given is not None:
            self.parameters = list({id(p): p for entry in self.given for p in self._find(entry)}.values())
        if not self.parameters:
            raise ValueError(
                "gradient_report: expected a guide with parameters, got one whose sites depend on none that require "
                "gradients. Use pyro.param, pyro.module or a PyroModule."
                if self.given is None
                else "gradient_report: expected parameters, got an empty collection. Leave it out for the guide's."
            )
        self.leaves = list({**leaves, **{id(p): p for p in self.parameters}}.values())

    def _find(self, entry: Tensor | str) -> list[Tensor]:
        """The leaf tensors of one entry of ``given``."""
        if isinstance(entry, str):
            return self._named(entry)
        leaf = entry
        if not entry.is_leaf and (unconstrained := getattr(entry, "unconstrained", None)) is not None:
            leaf = unconstrained()  # what pyro.param returned for a constrained parameter
        if leaf is None or not leaf.is_leaf or not leaf.requires_grad:
            raise ValueError(
                f"gradient_report: expected parameters that are leaf tensors and require gradients, got one of shape "
                f"{tuple(entry.shape)} that is not. Pass what pyro.param returns, a module's parameters, or names."
            )
        return [leaf]

    def _named(self, name: str) -> list[Tensor]:
        named = dict(pyro.get_param_store()._params)
        for module in (self.model, self.guide):
            if isinstance(module, nn.Module):
                named.update({key: p for key, p in module.named_parameters() if p.requires_grad})
        found = [p for key, p in named.items() if key == name or key.startswith((name + "$$$", name + "."))]
        if not found:
            raise ValueError(
                f"gradient_report: expected parameters among {sorted(named)}, or the beginning of their names, got "
                f"{name!r}. Correct the name, or pass the tensor."
            )
        return found

    @property
    def eps(self) -> float:
        """The rounding error of the least precise parameter."""
        return max(torch.finfo(p.dtype).eps for p in self.parameters)


def _drawn(site: Any) -> Iterator[Any]:
    """What the ELBO sees of a guide's site."""
    if site["type"] == "sample":
        yield from (site[key] for key in ("value", "log_prob") if key in site)


def _anything(site: Any) -> Iterator[Any]:
    """What a loss may differentiate at a site: parameters that no draw depends on, and baselines, too."""
    yield from (site[key] for key in ("value", "log_prob") if key in site)
    yield from ((site.get("infer") or {}).get("baseline") or {}).values()


def _leaves(values: Iterable[Any]) -> dict[int, Tensor]:
    """The tensors that require gradients and that these come from."""
    tensors = [x for x in values if isinstance(x, Tensor) and x.requires_grad]
    leaves = [*(x for x in tensors if x.is_leaf), *graph_leaves(x.grad_fn for x in tensors)]
    return {id(x): x for x in leaves}


class RowCounter(Messenger):
    """Counts the rows of log-probabilities at observed sites; at all sites, if none is observed."""

    def __init__(self) -> None:
        super().__init__()
        self._observed = self._all = 0

    @property
    def rows(self) -> int:
        return self._observed or self._all

    def _pyro_post_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            rows = msg["fn"].batch_shape.numel()
            self._all += rows
            self._observed += rows if msg["is_observed"] else 0


class Sampler:
    """
    Draws one estimator's gradients of a program, on a copy of the ELBO, in a parameter store of its own. One that
    cannot be measured keeps the error as its ``failure``, and draws no more.
    """

    def __init__(self, name: str, elbo: ELBO, program: Program) -> None:
        self.name = name
        self.elbo: Any = copy.deepcopy(elbo)
        self.program = program
        self.failure: EstimatorError | None = None
        self.milliseconds: list[float] = []
        self.settled = 0.0  # milliseconds while warming up
        self.evaluations = 0.0
        self.moments = Moments(torch.zeros(0))
        self._vector: Tensor | None = None
        state: Any = pyro.get_param_store().get_state()
        # Estimators' parameters are the copy's, which it registers itself.
        self._state: Any = {
            key: {name: value for name, value in part.items() if not name.startswith(PARAM_PREFIX)}
            for key, part in state.items()
        }
        self._device = next((p.device for p in program.leaves if p.is_cuda), None)

    @property
    def parts(self) -> list[Estimator]:
        """The estimators of sites that it is made of."""
        if not isinstance(self.elbo, EstimatorELBO):
            return []
        found = [*self.elbo.modules(), *self.elbo.assignment.entries.values()]
        return [part for part in found if isinstance(part, Estimator)]

    @property
    def objective(self) -> str:
        """What it is the gradient of."""
        return next(iter({part.objective for part in self.parts} - {"elbo"}), "elbo")

    def warm_up(self, steps: int) -> None:
        """Lets running means settle, and counts the model's rows from the second step on: the first may probe."""
        rows, total = 0, torch.zeros(())
        with self._private():
            for step in range(steps):
                counter = RowCounter()
                total = total + self._gradient(counter(self.program.model))
                rows += counter.rows if step else 0
            self.settled = statistics.median(self.milliseconds)
            self.milliseconds.clear()
            self.evaluations = rows / (steps - 1) / self.program.rows
            self.moments = Moments(total / steps)

    def draw(self, count: int) -> Iterator[None]:
        """Draws some gradients into the moments."""
        with self._private():
            for _ in range(0 if self.failure else count):
                squared = self.moments.add(self._gradient(self.program.model))
                if not squared < float("inf"):
                    fix = "Look at it with torch.autograd.set_detect_anomaly(True), or leave this estimator out."
                    raise EstimatorError(self.name, "finite gradients", f"{squared}.", fix)
                yield

    @contextmanager
    def _private(self) -> Iterator[None]:
        with pyro.get_param_store().scope(self._state):
            try:
                yield
            except EstimatorError as error:
                self.failure = error

    def _gradient(self, model: Any) -> Tensor:
        """One estimate of the gradient with respect to the parameters, in one vector that the next one overwrites."""
        program = self.program
        for leaf in program.leaves:
            leaf.grad = None
        if isinstance(self.elbo, nn.Module):
            self.elbo.zero_grad()
        try:
            self.milliseconds.append(_milliseconds(lambda: self._run(model), self._device))
        except Exception as error:  # whatever it is, say in which estimator
            reason = f"{type(error).__name__}: {error}"
            fix = "Correct it, or leave this estimator out."
            raise EstimatorError(self.name, "an ELBO that runs on this model and guide", reason, fix) from error
        if all(p.grad is None for p in program.parameters):
            fix = "Register them by pyro.param, pyro.module or a PyroModule."
            raise EstimatorError(self.name, "a gradient for the parameters", "none.", fix)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in program.parameters]
        self._vector = torch.cat([part.to_dense().reshape(-1) for part in parts], out=self._vector)
        return self._vector

    def _run(self, model: Any) -> None:
        program = self.program
        if program.registered:  # as svi.step does
            self.elbo.loss_and_grads(model, program.guide, *program.args, **program.kwargs)
        else:  # as elbo(model, guide)(...).backward() does
            self.elbo.differentiable_loss(model, program.guide, *program.args, **program.kwargs).backward()


def _milliseconds(run: Callable[[], None], device: torch.device | None) -> float:
    """
    What a run takes: on a GPU the time between two events of its stream; else processor time, which does not count what
    other programs do in the meantime. That of the process and not of this thread: torch's other threads share the work.
    """
    if device is None:
        start = time.process_time()
        run()
        return 1e3 * (time.process_time() - start)
    stream = torch.cuda.current_stream(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end))


class Untouched:
    """
    On leaving, everything that a run of the program may have moved is as before: the random number generators, the
    param store, the tensors given to :meth:`keep` and the parameters and buffers of every module that was called, with
    their ``.grad``. Tensors keep their identity, and are written to only where their values changed.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def __enter__(self) -> Untouched:
        store = pyro.get_param_store()
        with ExitStack() as stack:
            stack.enter_context(undisturbed())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(store.scope(store.get_state()))
            self.keep(store._params.values())
            stack.callback(self._put_back)
            stack.callback(nn.modules.module.register_module_forward_pre_hook(self._before_forward).remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.__exit__(*error)

    def _put_back(self) -> None:
        with torch.no_grad():
            for tensor, value, grad in self._tensors.values():
                if tensor.is_leaf:
                    tensor.grad = grad
                if not torch.equal(tensor, value):
                    tensor.copy_(value)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        for x in tensors:
            if id(x) not in self._tensors:
                self._tensors[id(x)] = (x, x.detach().clone(), x.grad if x.is_leaf else None)

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        self.keep(module.parameters(recurse=False))  # its buffers are those that undisturbed() lends it
