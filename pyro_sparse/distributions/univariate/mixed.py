r"""
The base of the mixed families: probability on atoms, a density between them, and a gradient that sees both.

.. math:: p(z) = \begin{cases} P_a & z = a \text{ an atom} \\ f(z) & \text{elsewhere} \end{cases}
   \qquad\text{w.r.t. } \sum_a \delta_a + \text{Lebesgue}, \qquad \sum_a P_a + \int f = 1.

:math:`\log p` jumps between an atom and its neighbourhood. So the pathwise derivative of :math:`E[\log p(Z)]` misses
a term: the boundary moves, and with it the probability of either side. The default draw is therefore *stratified*.
Which stratum a draw falls into (an atom, or between them) is discrete and has a score function; where it lies inside is
pathwise. Both parts go to Pyro's ELBOs through ``score_parts``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Size, Tensor
from torch.distributions import Distribution

from pyro_sparse._numerics import as_like, entropy_terms
from pyro_sparse._precision import HALF, widened
from pyro_sparse.distributions.checks import checked, first_tensor
from pyro_sparse.distributions.constraints import has_atoms, interior_point, mixed_unit_interval, nan_where
from pyro_sparse.distributions.half_precision import HalfPrecision
from pyro_sparse.distributions.mixed.base import MixedBase
from pyro_sparse.distributions.univariate.quadrature import Stretch


class MixedDistribution(MixedBase):
    r"""
    A univariate distribution with atoms and a density between them.

    A family implements :meth:`_log_weights`, :meth:`_log_density`, :meth:`_draw`, :meth:`_pathwise`,
    :meth:`_stratified`, moments, entropy, ``cdf`` and ``icdf``.

    Three ways to draw:

    ========================== ======================================================= ==============================
    ``sample()``               no gradient
    ``d()``, ``pyro.sample``   pathwise inside its stratum; ``score_parts`` has the     unbiased under ``Trace_ELBO``,
                               score of the stratum (``has_rsample`` is False)          ``TraceGraph_ELBO`` and ours
    ``rsample()``, and ``d()`` pathwise through the whole quantile function:            with an analytic KL only;
    after                      unbiased for :math:`E[h(Z)]`, h continuous; **biased**   needed by
    ``has_rsample_(True)``     for the jumps of :math:`\log p`                          ``TraceMeanField_ELBO``
    ========================== ======================================================= ==============================

    ``TraceMeanField_ELBO`` refuses the default form while Pyro's validation is on, and loses its score part with
    validation off.

    Pyro's ``TransformedDistribution`` by an ``AffineTransform``, such as a percentage, moves the atoms and scales the
    density; it refuses all other maps, whose Jacobian would be taken of the atoms too.
    """

    support = mixed_unit_interval
    #: where the atoms are
    _atoms: ClassVar[tuple[float, ...]] = (0.0, 1.0)
    #: a scalar zero of the parameters' dtype, on their device
    _zero: Tensor

    def __init__(self, batch_shape: Size, like: Tensor, validate_args: bool | None) -> None:
        self._zero = like.detach().new_zeros(())
        super().__init__(batch_shape, Size(), validate_args)

    @property
    def dtype(self) -> torch.dtype:
        return self._zero.dtype

    def widened(self) -> Any:
        new = super().widened()
        new._zero = widened(self._zero)
        return new

    def _rounded(self, draw: Tensor, dtype: torch.dtype) -> Tensor:
        return self._off_atoms(draw.to(dtype), self._is_inside(draw))

    @property
    def _stretch(self) -> Stretch:
        """Beyond which points outside of [0, 1] the density is singular; None if nowhere near."""
        return None

    def _log_weights(self) -> tuple[Tensor, ...]:
        """The log-probability of each atom, and of what lies between them, last."""
        raise NotImplementedError

    def _log_density(self, z: Tensor) -> Tensor:
        """log f, normalised to the probability of the inside; z is inside."""
        raise NotImplementedError

    def _harmless(self) -> float | Tensor:
        """A point inside, put in place of an atom before a density is evaluated."""
        return 0.5

    def _stratified(self, shape: Size) -> Tensor:
        """A draw with the gradient of the quantile function given its stratum."""
        raise NotImplementedError

    def _inside_score(self, z: Tensor, log_inside: Tensor) -> Tensor:
        """What of the inside :meth:`_stratified` leaves to the score function: its probability, by default."""
        return log_inside

    def _off_atoms(self, z: Tensor, inside: Tensor | None = None) -> Tensor:
        """Moves what is known to be inside (all, by default) and was rounded to an atom to the next number inside."""
        info = torch.finfo(z.dtype)
        for atom in self._atoms:
            if atom:
                moved, near = z == atom, z.new_full((), 1 - info.eps / 2)
            else:  # from subnormal numbers, too, which may overflow in a density
                moved, tiny = z.abs() < info.tiny, z.new_full((), info.tiny)
                near = torch.where((z < 0) | ~self.support.check(tiny), -tiny, tiny)
            moved = moved if inside is None else moved & inside
            z = torch.where(moved, z + (near - z).detach(), z)  # it keeps its gradient
        return z

    # Densities.

    def _is_inside(self, z: Tensor) -> Tensor:
        """Whether z is in the support, and no atom."""
        inside: Tensor = self.support.check(z)
        for atom in self._atoms:
            inside = inside & (z != atom)
        return inside

    def _inside(self, z: Tensor) -> Tensor:
        """z with a harmless point where it is an atom or outside the support."""
        return torch.where(self._is_inside(z), z, self._harmless())

    def _by_stratum(self, z: Tensor, at_atoms: tuple[Tensor, ...], inside: Tensor) -> Tensor:
        for atom, at_atom in zip(self._atoms, at_atoms, strict=True):
            inside = torch.where(z == atom, at_atom, inside)
        return inside

    def _log_inside(self, z: Tensor) -> Tensor:
        """log f at points between 0 and 1, -inf where there is no density."""
        return torch.where(self.support.check(z), self._log_density(self._inside(z)), -math.inf)

    def _check_value(self, value: Any) -> None:
        if isinstance(value, Tensor) and not value.is_floating_point():
            raise ValueError(
                f"{type(self).__name__}.log_prob: expected a floating-point value, got {value.dtype}. "
                "Convert it, e.g. by .float()."
            )
        self._validate_sample(value)

    def log_prob(self, value: Tensor) -> Tensor:
        r"""
        The log-probability of an atom, the log-density elsewhere, -inf outside the support (with validation: an error).

        Args:
            value: floating-point, broadcastable with ``batch_shape``.
        """
        if self._validate_args:
            self._check_value(value)
        log_prob = self._by_stratum(value, self._log_weights()[:-1], self._log_density(self._inside(value)))
        if not self._validate_args:
            log_prob = nan_where(value.isnan(), torch.where(self.support.check(value), log_prob, -math.inf))
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self._batch_shape))

    def score_parts(self, value: Tensor) -> ScoreParts:
        """The log-probability, which is also the entropy term, and that of the stratum as the score function."""
        log_prob = self.log_prob(value)
        if self.has_rsample:
            return ScoreParts(log_prob, 0, log_prob)  # type: ignore[arg-type]  # as Pyro's own
        *atoms, log_inside = self._log_weights()
        stratum = self._by_stratum(value, tuple(atoms), self._inside_score(self._inside(value), log_inside))
        return ScoreParts(log_prob, stratum.expand(log_prob.shape), log_prob)

    # Probabilities of the strata.

    def _stacked_weights(self) -> Tensor:
        return torch.stack([w.expand(self._batch_shape) for w in self._log_weights()])

    def _probability(self, value: Any) -> Tensor:
        """The argument of icdf, as a tensor that has the batch dims."""
        u = as_like(value, self._zero)
        if self._validate_args:
            ok = (u >= 0) & (u <= 1)
            checked(type(self).__name__, "icdf", u, ok, "a probability in [0, 1]", "Use e.g. torch.rand.")
        return u.expand(torch.broadcast_shapes(u.shape, self._batch_shape))

    def _weight(self, index: int) -> Tensor:
        return self._log_weights()[index].exp().expand(self._batch_shape)

    @property
    def prob_zero(self) -> Tensor:
        r""":math:`\Pr(Z = 0)`, shape ``batch_shape``."""
        return self._weight(0)

    @property
    def prob_one(self) -> Tensor:
        r""":math:`\Pr(Z = 1)` as an atom, shape ``batch_shape``."""
        return self._weight(1) if len(self._atoms) > 1 else torch.zeros_like(self.prob_zero)

    @property
    def prob_interior(self) -> Tensor:
        """The probability of being no atom, shape ``batch_shape``."""
        return self._weight(-1)

    @property
    def prob_nonzero(self) -> Tensor:
        r""":math:`\Pr(Z \ne 0)`, the expected :math:`L_0` norm, shape ``batch_shape``; exact where it is tiny."""
        return self._stacked_weights()[1:].logsumexp(0).exp()

    def _atoms_entropy(self) -> Tensor:
        terms = [entropy_terms(w) for w in self._log_weights()[:-1]]
        return sum(terms[1:], terms[0])

    def point_estimate(self, kind: str = "mean") -> Tensor:
        r"""
        One value to use in place of a draw, e.g. at test time.

        Args:
            kind: ``"mean"``; ``"median"`` (``icdf(0.5)``); ``"mode"``: the most probable of the atoms and the inside,
                the inside standing for its conditional mean; ``"l0"``, only of a HardConcrete: the rule of
                Louizos et al. (2018), eq. 13, which is none of the three.

        Returns:
            Shape ``batch_shape``.
        """
        if kind == "mean":
            return self.mean
        if kind == "median":
            return self.icdf(self._zero + 0.5)
        if kind == "mode":
            return self.mode
        raise ValueError(
            f"{type(self).__name__}.point_estimate: expected 'mean', 'median' or 'mode' (or 'l0' of a HardConcrete), "
            f"got {kind!r}. Name one of them."
        )

    @property
    def mode(self) -> Tensor:
        """The most probable stratum: an atom, or the mean given that it is none."""
        prob = self.prob_interior
        inside = (self.mean - self.prob_one) / torch.where(prob > 0, prob, 1.0)
        return self._placed(self._stacked_weights().argmax(0), inside)

    def _placed(self, stratum: Tensor, z: Tensor) -> Tensor:
        """z, or the atom of this number."""
        for i, atom in enumerate(self._atoms):
            z = torch.where(stratum == i, atom, z)
        return z


def has_cdf(d: Any) -> bool:
    """Whether a distribution, and what it is made of, has a cdf."""
    if type(d).cdf is Distribution.cdf:
        return False
    inner = getattr(d, "base_dist", None) or getattr(d, "component_distribution", None)
    return inner is None or has_cdf(inner)


def cdf_anywhere(d: Any, x: Tensor) -> Tensor:
    """The cdf of a univariate distribution on the whole line: outside of its support it may refuse or return NaN."""
    ok, middle = d.support.check(x), interior_point(d.support, x)
    return nan_where(x.isnan(), torch.where(ok, d.cdf(torch.where(ok, x, middle)), (x > middle).to(x.dtype)))


def check_univariate(owner: str, name: str, d: Any) -> None:
    """A continuous univariate distribution without atoms."""
    if not isinstance(d, TorchDistributionMixin):
        raise TypeError(
            f"{owner}.{name}: expected a Pyro distribution, got {type(d).__name__}. Build one of pyro.distributions."
        )
    if len(d.event_shape):
        raise ValueError(
            f"{owner}.{name}: expected a univariate distribution, got {type(d).__name__} with event shape "
            f"{tuple(d.event_shape)}. Apply to_event after mixing, not before."
        )
    if has_atoms(d.support) or d.support.is_discrete:
        raise ValueError(
            f"{owner}.{name}: expected a continuous distribution, got {type(d).__name__}, which has atoms. "
            "Use one with a density, e.g. Normal or Beta."
        )
    like = first_tensor(d)
    if like is not None and like.dtype in HALF and not isinstance(d, HalfPrecision):
        raise TypeError(
            f"{owner}.{name}: expected parameters in float32 or float64, got {type(d).__name__} in {like.dtype}, in "
            "which its draws and densities are not right. Give it parameters with .float()."
        )
