"""For the checks of ELBOs: a clean room to run in, when two numbers agree, what a trace has drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.util import site_is_subsample
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from pyro_sparse.infer.expansion.law import law


@contextmanager
def clean_room() -> Iterator[None]:
    """Validation, float64 and an empty parameter store; on leaving, everything is as before."""
    rng, dtype = get_rng_state(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with pyro.validation_enabled(), pyro.get_param_store().scope():
            yield
    finally:
        torch.set_default_dtype(dtype)
        set_rng_state(rng)


def wrong_quantities(expected: dict[str, Tensor], got: dict[str, Tensor], tol: float) -> str:
    """How many differ, and by how much the first one does; empty if none does."""
    wrong = [name for name in expected if not bool((_excess(expected[name], got[name]) <= tol).all())]
    if not wrong:
        return ""
    first, value = expected[wrong[0]], got[wrong[0]]
    worst = _excess(first, value).argmax()
    numbers = f"expected {first.flatten()[worst]:.12g}, got {value.flatten()[worst]:.12g}"
    return f"{len(wrong)} quantities differ, first the {wrong[0]}: {numbers}"


def sampled(trace: Any) -> list[Any]:
    """The sample sites of a trace."""
    return [site for site in trace.nodes.values() if site["type"] == "sample" and not site_is_subsample(site)]


def drawn_log_prob(site: Any) -> Tensor:
    """The log-probability with which a site's value was drawn: masks and scales are for costs."""
    log_prob: Tensor = law(site["fn"]).log_prob(site["value"])
    return log_prob


def _excess(expected: Tensor, got: Tensor) -> Tensor:
    """The difference, absolute up to one and relative above; infinite for NaN."""
    return ((got - expected).abs() / expected.abs().clamp(min=1)).nan_to_num(nan=torch.inf)
