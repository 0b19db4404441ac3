r"""Discrete and sparse latent variables in Pyro, with exact or low-variance gradients.

If Pyro has it at ``pyro.X``, ours is at ``pyro_sparse.X``. Import the room that you need::

    import pyro_sparse.distributions as sdist
    from pyro_sparse.infer import SparseEnumELBO
    from pyro_sparse.projections import sparsemax

One function stands at the top, as ``pyro.sample`` does: :func:`pyro_sparse.sample_mixed`.

The rooms, from the bottom up (each imports only from those before it):

* :mod:`pyro_sparse.projections` maps scores to sparse points of the simplex; needs torch only.
* :mod:`pyro_sparse.estimators` has the estimators of gradients of discrete variables; needs torch only.
* :mod:`pyro_sparse.distributions` has the Pyro distributions: discrete, mixed on a line, mixed on the simplex.
* :mod:`pyro_sparse.nn` has layers with :math:`L_0` gates, and their constraints.
* :mod:`pyro_sparse.infer` has the ELBOs: exact over a sparse support, or by any estimator.
* :mod:`pyro_sparse.diagnostics` measures memory and draws plots.
* :mod:`pyro_sparse.testing` has the checks that our own tests call, for your own classes.

:mod:`pyro_sparse.datasets` stands beside them: it loads what the tutorials and benchmarks use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_sparse.distributions.simplex.sample_mixed import sample_mixed

__all__ = ["sample_mixed"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Late, so that a room that needs torch only does not bring Pyro.
    if name in __all__:
        from pyro_sparse.distributions.simplex import sample_mixed as module

        return getattr(module, name)
    raise AttributeError(f"module 'pyro_sparse' has no attribute '{name}'")
