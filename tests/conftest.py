"""What every test starts from: float64, an empty parameter store, fixed seeds, Pyro's validation switched on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pyro
import pytest
import torch
from pyro.util import get_rng_state, set_rng_state

hypothesis.settings.register_profile(
    "pyro_sparse",
    deadline=None,  # the first call of a torch function is slow, and CI's two cores are shared
    derandomize=True,  # a run that is repeated tests the same examples
    database=None,
)
hypothesis.settings.load_profile("pyro_sparse")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the parallelism; threads on top of them only wait for each other

pyro.set_rng_seed(0)
SEEDED = get_rng_state()  # put back in microseconds; torch.manual_seed formats the stack for devices that are not there


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Gives each test the same start and puts back what it may have changed."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    set_rng_state(SEEDED)
    with pyro.validation_enabled():
        yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
