"""The loss as a torch module."""

from __future__ import annotations

import warnings
from typing import Any

from pyro import poutine
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_sparse.infer.assignment import without_weak_references


class EstimatorELBOModule(ELBOModule):
    """
    What ``elbo(model, guide)`` is. Its first run warns of parameters that it does not hold; a step of an optimiser that
    lacks parameters which the estimators got in a run is an error, once, in the run after it.
    """

    def __init__(self, model: Any, guide: Any, elbo: Any) -> None:
        super().__init__(model, guide, elbo)
        self._checked = False
        self._late = _LateParameters()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self._late.check()
        estimators: Any = self.elbo
        known = {id(parameter) for parameter in estimators.parameters()}
        with poutine.trace(param_only=True) as captured:
            loss = super().forward(*args, **kwargs)
        if late := {name: p for name, p in estimators.named_parameters() if id(p) not in known and p.requires_grad}:
            self._late.watch(late, list(self.parameters()))
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
        return {**self.__dict__, "_late": _LateParameters()}


class _LateParameters:
    """Parameters made in a run, until the first step after a gradient has reached them."""

    def __init__(self) -> None:
        self._late: dict[
            str, tuple[Tensor, int]
        ] = {}  # with the versions that they had: an optimiser's step is a write
        self._others: list[tuple[Tensor, int]] = []
        self._reached: set[int] = set()

    def watch(self, late: dict[str, nn.Parameter], parameters: list[nn.Parameter]) -> None:
        for name, parameter in late.items():
            if not is_lazy(parameter):
                self._late[name] = parameter, parameter._version
                parameter.register_post_accumulate_grad_hook(self._reach)
        self._remember(parameters)

    def _reach(self, parameter: Tensor) -> None:
        if self._late:
            self._reached.add(id(parameter))

    def _remember(self, parameters: list[Any]) -> None:
        late = {id(parameter) for parameter, _ in self._late.values()}
        self._others = [(p, p._version) for p in parameters if id(p) not in late and not is_lazy(p)]

    def check(self) -> None:
        if not self._late or all(parameter._version == version for parameter, version in self._others):
            return
        reached = {name: entry for name, entry in self._late.items() if id(entry[0]) in self._reached}
        left_out = [name for name, (parameter, version) in reached.items() if parameter._version == version]
        self._late = {name: entry for name, entry in self._late.items() if name not in reached}
        self._remember([parameter for parameter, _ in self._others])
        if left_out:
            raise ValueError(
                f"EstimatorELBO: expected an optimiser with all parameters of the estimators, got a step without "
                f"{left_out}, which a run has made for sites that no name was given for. Call elbo(model, guide) once "
                "before you make the optimiser (and DistributedDataParallel), or name the sites: {'z': ..., 'y': ...}."
            )


def _parameter(value: Any) -> Any:
    """The parameter behind the value of a ``pyro.param``, which may be constrained, subsampled or a module's own."""
    value = getattr(value, "_pyro_unconstrained_param", value)
    return value.unconstrained() if hasattr(value, "unconstrained") else value
