"""A mixed variable on the simplex as sites of a Pyro program."""

from __future__ import annotations

import pyro
from torch import Tensor

from pyro_sparse.distributions.simplex.faces import FaceDistribution
from pyro_sparse.distributions.simplex.mixed_simplex import MixedSimplex, check_parts
from pyro_sparse.distributions.simplex.within_face import WithinFace


def sample_mixed(
    name: str, faces: FaceDistribution, within: WithinFace, obs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    Samples a face of the simplex and a point in it, in model and guide alike.

    A latent variable is two sites: ``name_face``, which is discrete, so that an ELBO scores, enumerates (up to a dozen
    vertices) or Rao-Blackwellises it, and ``name``, whose gradient is pathwise. An observed one is a single
    :class:`~pyro_sparse.distributions.MixedSimplex` site, ``name``. To condition a program on a value, pass ``obs``:
    :func:`pyro.condition` on ``name`` alone would leave the face free.

    ``EstimatorELBO(LeaveOneOut(4), analytic_kl=True)`` is a good start; with few vertices,
    ``EstimatorELBO({"y_face": Exact()}, analytic_kl=True)``, which has no noise from the face.

    >>> import torch
    >>> from pyro_sparse.distributions import FaceDirichlet, GibbsFaces
    >>> _ = pyro.set_rng_seed(0)
    >>> face, y = sample_mixed("y", GibbsFaces(torch.zeros(3)), FaceDirichlet(torch.ones(3)))
    >>> bool(((y > 0) == (face > 0)).all())
    True

    Args:
        name: of the site, or of the second of two.
        faces: ``GibbsFaces`` or ``MaxEntropyFaces``.
        within: ``FaceDirichlet`` or ``FaceLogisticNormal``, on the whole simplex.
        obs: observed compositions, ``(*batch, K)``.

    Returns:
        The face, as bits, and the point; both ``(*batch, K)``.

    Raises:
        TypeError, ValueError: as :class:`~pyro_sparse.distributions.MixedSimplex`.
    """
    if obs is not None:
        y = pyro.sample(name, MixedSimplex(faces, within), obs=obs)
        return (y > 0).to(y.dtype), y
    check_parts(f"sample_mixed, site '{name}'", faces, within)
    face = pyro.sample(f"{name}_face", faces)
    return face, pyro.sample(name, within.on(face))
