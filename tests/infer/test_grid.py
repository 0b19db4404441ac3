"""SparseEnumELBO equals TraceEnum_ELBO on the dense support, case by case and mode by mode."""

from __future__ import annotations

from functools import partial

import pytest

from pyro_sparse.infer import SparseEnumELBO
from pyro_sparse.testing.elbo import check_elbo
from pyro_sparse.testing.models import Case, grid

MODES = ("padded", "union", "auto")


@pytest.mark.parametrize(
    ("mode", "case"),
    [  # each case in one mode in the fast suite, in the other two in the slow one
        pytest.param(mode, case, id=f"{mode}-{case.name}", marks=[pytest.mark.slow] if (i + j) % 3 else [])
        for i, case in enumerate(grid())
        for j, mode in enumerate(MODES)
    ],
)
def test_equals_dense_enumeration(mode: str, case: Case) -> None:
    check_elbo(partial(SparseEnumELBO, mode=mode), cases=[case])
