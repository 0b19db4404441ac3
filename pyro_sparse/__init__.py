r"""Discrete and sparse latent variables in Pyro, with exact or low-variance gradients.

If Pyro has it at ``pyro.X``, ours is at ``pyro_sparse.X``. Import the room that you need::

    import pyro_sparse.distributions as sdist
    from pyro_sparse.infer import SparseEnumELBO
    from pyro_sparse.projections import sparsemax

The rooms, from the bottom up (each imports only from those before it):

* :mod:`pyro_sparse.projections` maps scores to sparse points of the simplex; needs torch only.
* :mod:`pyro_sparse.distributions` has the Pyro distributions that are built on them.
* :mod:`pyro_sparse.infer` has the ELBOs that make use of an exact zero.
* :mod:`pyro_sparse.diagnostics` measures memory and draws plots.
* :mod:`pyro_sparse.testing` has the checks that our own tests call, for your own classes.

:mod:`pyro_sparse.datasets` stands beside them: it loads what the tutorials and benchmarks use.
"""

__version__ = "0.1.0"
