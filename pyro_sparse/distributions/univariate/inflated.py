r"""A density and atoms that are chosen apart from it: the base of spike-and-slab and zero-one-inflated variables."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from pyro.distributions import Beta
from torch import Size, Tensor
from torch.distributions import Distribution, Uniform, constraints

from pyro_sparse._autograd import differentiable_once
from pyro_sparse._numerics import entropy_terms
from pyro_sparse._precision import multinomial, widened
from pyro_sparse.distributions.checks import aligned, first_tensor
from pyro_sparse.distributions.constraints import MixedConstraint, interior_point
from pyro_sparse.distributions.half_precision import HalfPrecision, in_float32
from pyro_sparse.distributions.univariate.implicit import implicit
from pyro_sparse.distributions.univariate.kumaraswamy import Kumaraswamy
from pyro_sparse.distributions.univariate.mixed import MixedDistribution, cdf_anywhere, check_univariate, has_cdf
from pyro_sparse.distributions.univariate.quadrature import Stretch, nearly_none

_ONCE = (
    "Beta slab: expected a draw to be differentiated once, got a derivative of its derivative, which torch does not "
    "have. Use dist.Kumaraswamy."
)


def _beta_draw(slab: Any, size: Size) -> Tensor:
    """As torch's, with its gradient, whose own derivative torch takes for zero where it does not raise."""
    x = slab._dirichlet.sample(size).detach()
    parameters = torch.stack([slab.concentration1, slab.concentration0], -1)
    given = parameters.detach().expand(x.shape)
    by_own = torch._dirichlet_grad(x, given, given.sum(-1, keepdim=True).expand_as(x))
    slope = by_own * torch.stack([x[..., 1], -x[..., 0]], -1)
    return x[..., 0] + (slope * (differentiable_once(parameters, _ONCE) - parameters.detach())).sum(-1)


class InflatedDistribution(MixedDistribution):
    r"""
    .. math:: Z = a \text{ with probability } P_a, \qquad Z \sim \text{slab with probability } 1 - \sum_a P_a.

    Args:
        slab: continuous and univariate; its own gradient (pathwise or score function) is kept.
    """

    slab: Any
    #: logits or probabilities of the strata
    _given: Tensor

    @property
    def _stretch(self) -> Stretch:
        return None if isinstance(self.slab, Uniform) else nearly_none(self._zero)

    def __init__(self, slab: Any, batch_shape: Size, given: Tensor, validate_args: bool | None) -> None:
        check_univariate(type(self).__name__, "slab", slab)
        self.slab = Kumaraswamy.of(slab)
        given = given if isinstance(slab, HalfPrecision) else widened(given)  # in float32 at least, as such a slab is
        (self._given,) = aligned(type(self).__name__, first_tensor(slab), given=given)  # draws are the slab's
        super().__init__(torch.broadcast_shapes(slab.batch_shape, batch_shape), self._given, validate_args)

    def widened(self) -> Any:
        new = super().widened()
        new.slab = in_float32(self.slab)
        return new

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return MixedConstraint(self.slab.support, self._atoms)

    def _harmless(self) -> Tensor:
        return interior_point(self.slab.support, self._zero)

    def _log_density(self, z: Tensor) -> Tensor:
        return self._log_weights()[-1] + self.slab.log_prob(z)

    def _inside_score(self, z: Tensor, log_inside: Tensor) -> Tensor:
        # A slab that is drawn without a gradient brings a score of its own.
        return log_inside + self.slab.score_parts(z).score_function

    def has_rsample_(self, value: bool) -> MixedDistribution:
        if value is True:
            self._require_pathwise()
        return super().has_rsample_(value)

    def _require_pathwise(self) -> None:
        self._require_cdf("rsample")

    def _require_cdf(self, method: str) -> None:
        if not has_cdf(self.slab):
            raise NotImplementedError(
                f"{type(self).__name__}.{method}: expected a slab with a cdf, got {type(self.slab).__name__}. Use "
                "another slab; for gradients the default has_rsample=False needs no cdf."
            )

    # Draws.

    def _slab_draw(self, shape: Size, *, attached: bool) -> Tensor:
        slab = copy.copy(self.slab).expand(self._batch_shape)
        if slab.has_rsample != self.slab.has_rsample:
            slab.has_rsample_(self.slab.has_rsample)  # expand forgets what was chosen for an instance
        size = shape[: len(shape) - len(self._batch_shape)]
        if not attached:
            return self._off_atoms(slab.sample(size).detach())  # torch.jit.trace does not record no_grad
        return self._off_atoms(_beta_draw(slab, size) if type(slab) is Beta and slab.has_rsample else slab(size))

    def _strata(self, shape: Size) -> Tensor:
        """Numbers of the strata, the inside last."""
        probs = self._stacked_weights().detach().exp().reshape(len(self._atoms) + 1, -1).T
        size = shape[: len(shape) - len(self._batch_shape)]
        draws = multinomial(probs, size.numel(), replacement=True)
        return draws.T.reshape(shape)

    def _draw(self, shape: Size) -> Tensor:
        return self._placed(self._strata(shape), self._slab_draw(shape, attached=False))

    def _stratified(self, shape: Size) -> Tensor:
        return self._placed(self._strata(shape), self._slab_draw(shape, attached=True))

    def _pathwise(self, z: Tensor) -> Tensor:
        self._require_pathwise()
        inner = self._inside(z)
        below = self._is_below(inner)
        return implicit(
            z, inner, self._is_inside(z), below, lambda z: self._log_tail(z, below), self._log_density(inner)
        )

    def _is_below(self, z: Tensor) -> Tensor:
        """On which side of a point inside its mass is counted."""
        raise NotImplementedError

    def _log_tail(self, z: Tensor, below: Tensor) -> Tensor:
        """The log-mass on one side of a point inside."""
        raise NotImplementedError

    # Moments.

    def _atoms_and_probs(self) -> list[tuple[float, Tensor]]:
        return [(a, w.exp()) for a, w in zip(self._atoms, self._log_weights()[:-1], strict=True)]

    @property
    def mean(self) -> Tensor:
        inside = self.prob_interior * self.slab.mean
        return sum((a * p for a, p in self._atoms_and_probs()), inside).expand(self._batch_shape)

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        inside = self.prob_interior * (self.slab.variance + (self.slab.mean - mean).square())
        return sum((p * (a - mean).square() for a, p in self._atoms_and_probs()), inside)

    def entropy(self) -> Tensor:
        r""":math:`-\sum_a P_a \log P_a - P \log P + P\, H(\text{slab})`, in nats w.r.t. the base measure."""
        strata = self._atoms_entropy() + entropy_terms(self._log_weights()[-1])
        return (strata + self.prob_interior * self.slab.entropy()).expand(self._batch_shape)

    @property
    def mode(self) -> Tensor:
        """The most probable stratum: an atom, or the mean of the slab."""
        return self._placed(self._stacked_weights().argmax(0), self.slab.mean.expand(self._batch_shape))

    def _slab_cdf(self, z: Tensor) -> Tensor:
        self._require_cdf("cdf")
        return cdf_anywhere(self.slab, z)

    def cdf(self, value: Tensor) -> Tensor:
        r""":math:`\Pr(Z \le z)`, right-continuous, with a jump at each atom."""
        if self._validate_args:
            self._validate_sample(value)
        result = self.prob_interior * self._slab_cdf(value)
        for atom, prob in self._atoms_and_probs():
            result = result + prob * (value >= atom)
        return result.expand(torch.broadcast_shapes(result.shape, self._batch_shape))

    def icdf(self, value: Tensor) -> Tensor:
        r"""The smallest z with ``cdf(z) >= value``; differentiable in the parameters where the slab's is."""
        if type(self.slab).icdf is Distribution.icdf:
            raise NotImplementedError(
                f"{type(self).__name__}.icdf: expected a slab with an icdf, got {type(self.slab).__name__}. "
                "Use another slab, or invert cdf numerically."
            )
        u = self._probability(value)
        # Probability of the atoms so far, and of those that u is past.
        before, taken = self._zero, torch.zeros_like(u)
        stratum = torch.full_like(u, len(self._atoms), dtype=torch.long)
        least, most = torch.full_like(u, -math.inf), torch.full_like(u, math.inf)
        for i, (atom, prob) in enumerate(self._atoms_and_probs()):
            below = self.prob_interior * self._slab_cdf(self._zero + atom) + before
            at, past = (u <= below + prob) & ((u > below) | (below <= 0)), u > below + prob
            before = before + prob
            stratum, taken = torch.where(at, i, stratum), torch.where(past, before, taken)
            least, most = torch.where(past, atom, least), torch.where(past | (most < atom), most, atom)
        v = torch.where(stratum < len(self._atoms), 0.5, (u - taken) / self.prob_interior)
        # The slab's own quantile may be on the other side of an atom only by rounding.
        z = self.slab.icdf(v.clamp(0.0, 1.0)).maximum(least).minimum(most)
        return self._placed(stratum, z)
