"""The loss as a torch module."""

from __future__ import annotations

import warnings
from typing import Any

from pyro import poutine
from pyro.infer.elbo import ELBOModule
from torch import Tensor


class EstimatorELBOModule(ELBOModule):
    """What ``elbo(model, guide)`` is; its first run warns of parameters that it does not hold."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with poutine.trace(param_only=True) as captured:
            loss = super().forward(*args, **kwargs)
        if not getattr(self, "_checked", False):
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


def _parameter(value: Any) -> Any:
    """The parameter behind the value of a ``pyro.param``, which may be constrained, subsampled or a module's own."""
    value = getattr(value, "_pyro_unconstrained_param", value)
    return value.unconstrained() if hasattr(value, "unconstrained") else value
