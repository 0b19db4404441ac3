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
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_sparse._autograd import graph_leaves
from pyro_sparse.diagnostics.gradient_moments import Moments
from pyro_sparse.distributions.mixed_base import MixedBase
from pyro_sparse.distributions.mixed_wrappers import IndependentMixed, MaskedMixed
from pyro_sparse.distributions.straight_through import is_straight_through
from pyro_sparse.estimators import Estimator
from pyro_sparse.infer.assignment import PARAM_PREFIX
from pyro_sparse.infer.estimator_elbo import EstimatorELBO
from pyro_sparse.infer.exact import run_once
from pyro_sparse.infer.undisturbed import undisturbed

PLAIN_RUNS = 10  # in which the guide's parameters are found


@dataclass
class Program:
    """
    A model and a guide with their arguments, as found by a few ordinary runs.

    Attributes:
        parameters: the tensors that the guide depends on, which the report is about.
        leaves: those and the model's.
        registered: whether Pyro's param store holds any of them: ``loss_and_grads`` differentiates only then.
        rows: of log-probabilities at the model's observed sites, in an ordinary run.
        jumps: guide sites with atoms that are drawn purely pathwise: a drawn KL divergence has a biased gradient.
        straight_through: guide sites of straight-through families: what is drawn has a biased gradient.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: list[Tensor] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    registered: bool = False
    rows: float = 0.0
    jumps: set[str] = field(default_factory=set)
    straight_through: set[str] = field(default_factory=set)

    def look(self) -> None:
        """Fills in the attributes."""
        guides, models = {}, {}
        counter = RowCounter()
        for _ in range(PLAIN_RUNS):
            guide_trace, model_trace = run_once(counter(self.model), self.guide, self.args, self.kwargs)
            guides.update(_leaves(guide_trace))
            models.update(_leaves(model_trace))
            fns = {name: guide_trace.nodes[name]["fn"] for name in guide_trace.stochastic_nodes}
            self.jumps.update(name for name, fn in fns.items() if _jumps(fn))
            self.straight_through.update(name for name, fn in fns.items() if is_straight_through(fn))
            self.registered |= bool(guide_trace.param_nodes or model_trace.param_nodes)
        for module, found in ((self.guide, guides), (self.model, models)):
            if isinstance(module, nn.Module):
                found.update({id(p): p for p in module.parameters() if p.requires_grad})
        self.parameters = list(guides.values())
        self.leaves = list({**guides, **models}.values())
        self.rows = counter.rows / PLAIN_RUNS
        if not self.parameters:
            raise ValueError(
                "gradient_report: expected a guide with parameters, got one whose sites depend on none that require "
                "gradients. Use pyro.param, pyro.module or a PyroModule."
            )

    @property
    def eps(self) -> float:
        """The rounding error of the least precise parameter."""
        return max(torch.finfo(p.dtype).eps for p in self.parameters)


def _jumps(fn: Any) -> bool:
    return isinstance(fn, (MixedBase, MaskedMixed, IndependentMixed)) and bool(fn.has_rsample)


def _leaves(trace: poutine.Trace) -> dict[int, Tensor]:
    """The tensors that require gradients and that the values and log-probabilities of a trace come from."""
    found = [site[key] for site in trace.nodes.values() for key in ("value", "log_prob") if key in site]
    tensors = [x for x in found if isinstance(x, Tensor) and x.requires_grad]
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
    """Draws one estimator's gradients of a program, on a copy of the ELBO, in a parameter store of its own."""

    def __init__(self, name: str, elbo: ELBO, program: Program) -> None:
        self.name = name
        self.elbo: Any = copy.deepcopy(elbo)
        self.program = program
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
        self._synchronize = torch.cuda.synchronize if any(p.is_cuda for p in program.leaves) else _nothing

    @property
    def objective(self) -> str:
        """What it is the gradient of."""
        if not isinstance(self.elbo, EstimatorELBO):
            return "elbo"
        parts = [*self.elbo.modules(), *self.elbo.assignment.entries.values()]
        others = {part.objective for part in parts if isinstance(part, Estimator)} - {"elbo"}
        return next(iter(others), "elbo")

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
            for _ in range(count):
                squared = self.moments.add(self._gradient(self.program.model))
                if not squared < float("inf"):
                    raise ValueError(
                        f"gradient_report, estimator '{self.name}': expected finite gradients, got {squared}. Look at "
                        "it with torch.autograd.set_detect_anomaly(True), or leave this estimator out."
                    )
                yield

    @contextmanager
    def _private(self) -> Iterator[None]:
        with pyro.get_param_store().scope(self._state):
            yield

    def _gradient(self, model: Any) -> Tensor:
        """One estimate of the gradient by the guide's parameters, in one vector that the next one overwrites."""
        program = self.program
        for leaf in program.leaves:
            leaf.grad = None
        if isinstance(self.elbo, nn.Module):
            self.elbo.zero_grad()
        self._synchronize()
        start = time.perf_counter()
        try:
            if program.registered:  # as svi.step does
                self.elbo.loss_and_grads(model, program.guide, *program.args, **program.kwargs)
            else:  # as elbo(model, guide)(...).backward() does
                self.elbo.differentiable_loss(model, program.guide, *program.args, **program.kwargs).backward()
        except Exception as error:  # whatever it is, say in which estimator
            own = self.name == "enumeration"  # the report's, where no other reference was asked for
            fix = "Pass reference=, the name of an estimator." if own else "Correct it, or leave this estimator out."
            raise ValueError(
                f"gradient_report, estimator '{self.name}': expected an ELBO that runs on this model and guide, got "
                f"{type(error).__name__}: {error} {fix}"
            ) from error
        self._synchronize()
        self.milliseconds.append(1e3 * (time.perf_counter() - start))
        if all(p.grad is None for p in program.parameters):
            raise ValueError(
                f"gradient_report, estimator '{self.name}': expected a gradient for the guide's parameters, got none. "
                "Register them by pyro.param, pyro.module or a PyroModule."
            )
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in program.parameters]
        self._vector = torch.cat([part.to_dense().reshape(-1) for part in parts], out=self._vector)
        return self._vector


def _nothing() -> None:
    pass


class Untouched:
    """
    On leaving, everything that a run of the program may have moved is as before: the random number generators, the
    param store, the tensors given to :meth:`keep` and the parameters and buffers of every module that was called, with
    their ``.grad``. Tensors keep their identity, and are written to only where their values changed.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._buffers: dict[nn.Module, dict[str, Tensor | None]] = {}

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
        for module, buffers in self._buffers.items():
            module._buffers.update(buffers)
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
        if module not in self._buffers:
            self._buffers[module] = dict(module._buffers)
            self.keep([x for x in module._buffers.values() if x is not None])
            self.keep(module.parameters(recurse=False))
