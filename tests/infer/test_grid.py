"""SparseEnumELBO equals TraceEnum_ELBO on the dense support, case by case and mode by mode."""

from __future__ import annotations

from functools import partial

import pytest

from pyro_sparse.infer import SparseEnumELBO
from pyro_sparse.testing.elbo import check_elbo
from pyro_sparse.testing.models import Case, grid


@pytest.mark.parametrize("case", grid(), ids=lambda case: case.name)
@pytest.mark.parametrize("mode", ["padded", "union", "auto"])
def test_equals_dense_enumeration(mode: str, case: Case) -> None:
    check_elbo(partial(SparseEnumELBO, mode=mode), cases=[case])
