"""The loss as a torch module."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_sparse.infer.assignment import without_weak_references
from pyro_sparse.infer.processes import require_every_parameter


class LossModule(ELBOModule):
    """What ``elbo(model, guide)`` is: a module whose forward pass is the loss."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().forward(*args, **kwargs)
        require_every_parameter(type(self.elbo).__name__, self, loss)
        return loss


class EstimatorELBOModule(LossModule):
    """
    That of an ELBO with estimators. Its first run warns of parameters that it does not hold; a step without some of the
    estimators' parameters, which no optimiser holds, is an error, once, in the run after it.
    """

    def __init__(self, model: Any, guide: Any, elbo: Any) -> None:
        super().__init__(model, guide, elbo)
        self._checked = False
        self._untrained = _UntrainedParameters()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self._untrained.check()
        estimators: Any = self.elbo
        known = {id(parameter) for parameter in estimators.parameters()}
        with poutine.trace(param_only=True) as captured:
            loss = super().forward(*args, **kwargs)
        self._untrained.watch(dict(estimators.named_parameters()), known, list(self.parameters()))
        if not self._checked:
            self._checked = True
            held = {id(parameter) for parameter in self.parameters()}
            nodes = captured.trace.nodes.items()
            if missing := [name for name, node in nodes if id(_parameter(node["value"])) not in held]:
                warnings.warn(
                    "EstimatorELBO: expected model and guide to be modules that hold their parameters, got functions "
                    f"with {missing} in Pyro's param store. Give those to your optimiser too.",
                    stacklevel=3,
                )
        return loss

    def __getstate__(self) -> dict[str, Any]:
        without_weak_references(self)
        return {**self.__dict__, "_untrained": _UntrainedParameters()}


class _Watched(NamedTuple):
    parameter: nn.Parameter
    version: int  # an optimiser's step is a write
    made_in_a_run: bool
    hook: Any


class _UntrainedParameters:
    """Those of the estimators, until the first step after a gradient has reached them."""

    def __init__(self) -> None:
        self._watched: dict[str, _Watched] = {}
        self._seen: set[int] = set()
        self._reached: set[int] = set()
        self._others: list[tuple[Tensor, int]] = []

    def watch(self, estimators: Mapping[str, nn.Parameter], known: Collection[int], every: Iterable[Tensor]) -> None:
        """
        Args:
            estimators: their parameters by name.
            known: those that were there before the run.
            every: with those of model and guide.
        """
        new = {n: p for n, p in estimators.items() if p.requires_grad and not is_lazy(p) and id(p) not in self._seen}
        for name, parameter in new.items():
            self._seen.add(id(parameter))
            hook = parameter.register_post_accumulate_grad_hook(self._reach)
            self._watched[name] = _Watched(parameter, parameter._version, id(parameter) not in known, hook)
        if new:
            self._remember(every)

    def _reach(self, parameter: Tensor) -> None:
        self._reached.add(id(parameter))

    def _remember(self, parameters: Iterable[Any]) -> None:
        watched = {id(entry.parameter) for entry in self._watched.values()}
        self._others = [(p, p._version) for p in parameters if id(p) not in watched and not is_lazy(p)]

    def check(self) -> None:
        if not self._watched or all(parameter._version == version for parameter, version in self._others):
            return
        reached = {name: entry for name, entry in self._watched.items() if id(entry.parameter) in self._reached}
        left_out = {name: entry for name, entry in reached.items() if _is_as_it_was(entry)}
        if left_out:
            held = _held_by_optimisers()
            left_out = {name: entry for name, entry in left_out.items() if id(entry.parameter) not in held}
        for name, entry in reached.items():
            if name in left_out or entry.parameter._version != entry.version:
                entry.hook.remove()
                del self._watched[name]
        self._remember([parameter for parameter, _ in self._others])
        if left_out:
            raise ValueError(
                "EstimatorELBO: expected an optimiser with all parameters of the estimators, got a step without "
                f"{[*left_out]}. {_fix(left_out.values())}"
            )


def _is_as_it_was(entry: _Watched) -> bool:
    """Though it has a gradient, or had one until that was taken away."""
    gradient = entry.parameter.grad
    return entry.parameter._version == entry.version and (gradient is None or bool(gradient.any()))


def _held_by_optimisers() -> set[int]:
    """The parameters of all torch optimisers there are: some may take a step later than others."""
    optimisers: list[Any] = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]
    return {id(p) for optimiser in optimisers for group in optimiser.param_groups for p in group["params"]}


def _fix(left_out: Iterable[_Watched]) -> str:
    if any(entry.made_in_a_run for entry in left_out):
        return (
            "A run has made them, for sites that no name was given for. Call elbo(model, guide) once before you make "
            "the optimiser (and DistributedDataParallel), or name the sites: {'z': ..., 'y': ...}."
        )
    return "Make it of elbo(model, guide).parameters(), which holds them too; or freeze them: requires_grad_(False)."


def _parameter(value: Any) -> Any:
    """The parameter behind the value of a ``pyro.param``, which may be constrained, subsampled or a module's own."""
    value = getattr(value, "_pyro_unconstrained_param", value)
    return value.unconstrained() if hasattr(value, "unconstrained") else value
