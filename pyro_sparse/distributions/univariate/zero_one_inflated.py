r"""A density on [0, 1] with extra probability at both ends."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from torch import Size, Tensor

from pyro_sparse._autograd import is_true
from pyro_sparse._numerics import as_like, safe_log
from pyro_sparse.distributions.checks import checked, given
from pyro_sparse.distributions.univariate.inflated import InflatedDistribution


class ZeroOneInflated(InflatedDistribution):
    r"""
    .. math:: \Pr(Z = 0) = p_0, \quad \Pr(Z = 1) = p_1, \quad Z \sim \text{slab with probability } p_2,
       \qquad p = \mathrm{softmax}(\text{logits}).

    With a Beta slab, the zero-one-inflated beta distribution of proportions.

    **Base measure:** :math:`\delta_0 + \delta_1` + Lebesgue; **rsample:** in part (see :class:`MixedDistribution`);
    **enumerable:** no.

    ========== ==================== ============================ ============
    shape      ``slab``             ``logits`` or ``probs``      a value
    ========== ==================== ============================ ============
    batch      broadcast            ``(*batch, 3)``              ``(*batch,)``
    event      ``()``                                            ``()``
    ========== ==================== ============================ ============

    A draw of the slab that rounds to 0 or 1 is moved to the next number inside, since it is no atom.

    >>> import pyro.distributions as dist
    >>> d = ZeroOneInflated(dist.Beta(2.0, 2.0), probs=torch.tensor([0.2, 0.1, 0.7]))
    >>> round(d.mean.item(), 3), round(d.prob_nonzero.item(), 3)
    (0.45, 0.8)

    Args:
        slab: a continuous univariate Pyro distribution on [0, 1], e.g. Beta, Uniform or Kumaraswamy.
        logits: unnormalised log-probabilities of 0, of 1 and of the inside, in the last dim.
        probs: instead of logits: their probabilities, which sum to one.
        validate_args: as in torch.

    Raises:
        ValueError: for both or neither of logits and probs, a last dim that is not 3, NaN, probabilities that do not
            sum to one, a slab that reaches beyond [0, 1], or is discrete, multivariate or mixed.
        TypeError: for a slab that is no Pyro distribution.

    Reference: R. Ospina and S. Ferrari, *Inflated beta distributions*, Statistical Papers 2010, §2.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"logits": constraints.real_vector, "probs": constraints.simplex}
    _tensors = ("_given",)

    def __init__(
        self,
        slab: Any,
        logits: Tensor | None = None,
        *,
        probs: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        name = type(self).__name__
        value, self._from_logits = given(name, logits, probs)
        if value.shape[-1:] != (3,):
            raise ValueError(
                f"{name}: expected 3 in the last dim, got shape {tuple(value.shape)}. They are of being 0, of being 1, "
                "and of being inside."
            )
        super().__init__(slab, value.shape[:-1], value, validate_args)
        if self._validate_args:
            self._check(name, value.dtype)

    def _check(self, name: str, dtype: torch.dtype) -> None:
        p = self._given
        if self._from_logits:
            checked(name, "logits", p, ~p.isnan() & (p < torch.inf), "numbers or -inf", "Check the network.")
            some = (p > -torch.inf).any(-1, keepdim=True)
            checked(name, "logits", p, some.expand(p.shape), "a finite logit in every row", "Keep one possibility.")
        else:
            ok = (p >= 0) & (
                (p.sum(-1, keepdim=True) - 1).abs() <= 24 * max(torch.finfo(x).eps for x in (p.dtype, dtype))
            )
            checked(name, "probs", p, ok, "non-negative rows that sum to one", "Normalise them, or use logits.")
        eps = torch.finfo(p.dtype).eps
        outside = self.slab.support.check(as_like(-eps, p)) | self.slab.support.check(as_like(1 + eps, p))
        if not is_true(~outside):
            raise ValueError(
                f"{name}.slab: expected a distribution on [0, 1], got support {self.slab.support}. "
                "Use e.g. Beta; SpikeAndSlab takes any slab."
            )

    def _event_of(self, name: str) -> Size:
        return Size((3,))

    @property
    def logits(self) -> Tensor:
        """Log-probabilities of 0, of 1 and of the inside, shape ``batch_shape + (3,)``."""
        rows = self._given.log_softmax(-1) if self._from_logits else safe_log(self._given)
        return rows.expand(*self._batch_shape, 3)

    @property
    def probs(self) -> Tensor:
        """The probabilities of 0, of 1 and of the inside, shape ``batch_shape + (3,)``."""
        rows = self._given.softmax(-1) if self._from_logits else self._given
        return rows.expand(*self._batch_shape, 3)

    def _log_weights(self) -> tuple[Tensor, ...]:
        return self.logits.unbind(-1)

    def _is_below(self, z: Tensor) -> Tensor:
        return z < 0.5

    def _log_tail(self, z: Tensor, below: Tensor) -> Tensor:
        zero, one, inside = (p for p in self.probs.unbind(-1))
        cdf = self._slab_cdf(z)
        return safe_log(torch.where(below, zero + inside * cdf, one + inside * (1 - cdf)))

    def __repr__(self) -> str:
        name = "logits" if self._from_logits else "probs"
        return f"{type(self).__name__}({self.slab}, {name}: {tuple(self._given.shape)})"
