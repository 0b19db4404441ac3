r"""
Discrete variables with a pretended derivative: one-hot or 0/1 forward, the Jacobian of something smooth backward.

.. math:: z = h + (s - \mathrm{sg}(s)),

h the draw, s a smooth stand-in for it, sg the stop-gradient: the value of z is h, exactly, its derivative that of s.
Distribution, entropy and KL divergence are those of the discrete variable; no density of a relaxed one appears
anywhere. The gradient of :math:`E f(z)` is **biased** for all but the simplest f; what it costs on your model,
:func:`~pyro_sparse.diagnostics.gradient_report` measures.

``log_prob`` is linear in the value, :math:`\sum_k z_k \log p_k`, so that a KL divergence that is drawn has a gradient
at all. That of the stock one-hot distributions is not (it looks for the largest entry): with one of those as the prior,
the KL divergence has **no gradient** under ``Trace_ELBO``. Take it in closed form, by ``TraceMeanField_ELBO`` or
``BaselineELBO(None, analytic_kl=True)``, or use a prior of this file.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Size, Tensor

from pyro_sparse._precision import widened
from pyro_sparse._relaxation import Jacobian, check_stand_in, draw_with_stand_in, exact_logits, straight_through
from pyro_sparse._relaxation import linear_log_prob as _linear
from pyro_sparse.distributions.checks import check_floating, checked
from pyro_sparse.distributions.half_precision import HalfPrecision
from pyro_sparse.distributions.unwrapped import unwrapped


class _StraightThrough(HalfPrecision):
    """All of the families but their values, of which they say how to read them off a one-hot vector."""

    has_rsample = True

    def __init__(
        self,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        *,
        jacobian: Jacobian = "softmax",
        temperature: float | Tensor = 1.0,
        num_draws: int = 10,
        validate_args: bool | None = None,
    ) -> None:
        name = type(self).__name__
        check_stand_in(name, jacobian, num_draws)
        for parameter, value in (("probs", probs), ("logits", logits), ("temperature", temperature)):
            check_floating(name, parameter, value)
        self.jacobian, self.temperature, self.num_draws = jacobian, temperature, num_draws
        super().__init__(probs, logits, validate_args=validate_args)  # type: ignore[call-arg]
        self._check_temperature()

    def expand(self: Any, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        """A view with a larger batch shape."""
        new = super().expand(batch_shape, self._get_checked_instance(_StraightThrough, _instance))  # type: ignore[misc]
        temperature = self.temperature
        new.temperature = temperature.expand(batch_shape) if isinstance(temperature, Tensor) else temperature
        new.jacobian, new.num_draws = self.jacobian, self.num_draws
        return new

    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """What :meth:`rsample` gives, without its gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape).detach()  # torch.jit.trace does not record no_grad

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draws, exactly discrete, with the gradient of their stand-ins."""
        logits = exact_logits(self)
        logits = logits.expand(*sample_shape, *logits.shape)
        drawn = draw_with_stand_in(logits, self.jacobian, self.temperature, self.num_draws)
        return straight_through(*map(self._value, drawn))

    def _value(self, one_hot: Tensor) -> Tensor:
        return one_hot

    @property
    def dtype(self: Any) -> torch.dtype:
        dtype: torch.dtype = self._param.dtype
        return dtype

    def widened(self: Any) -> Any:
        new = owner = copy.copy(self)
        if hasattr(self, "_categorical"):
            new._categorical = owner = copy.copy(self._categorical)
        given = "probs" if owner._param is owner.__dict__.get("probs") else "logits"
        for name in ("probs", "logits"):  # the other was made from it, in half precision
            owner.__dict__.pop(name, None)
        owner._param = widened(owner._param)
        setattr(owner, given, owner._param)
        return new

    def _check_temperature(self: Any) -> None:
        if self._validate_args:
            ok = self.temperature > 0 if isinstance(self.temperature, Tensor) else bool(self.temperature > 0)
            name = type(self).__name__
            checked(name, "temperature", self.temperature, ok, "a positive number", "Use, say, 0.5.")
            shape = self.temperature.shape if isinstance(self.temperature, Tensor) else Size()
            sizes = zip(reversed(shape), reversed(self.batch_shape), strict=False)
            if len(shape) > len(self.batch_shape) or any(own not in (1, size) for own, size in sizes):
                raise ValueError(
                    f"{name}.temperature: expected a shape that broadcasts to the batch shape "
                    f"{tuple(self.batch_shape)}, got {tuple(shape)}. Use one number, or one for each batch element."
                )

    def score_parts(self: Any, value: Tensor) -> ScoreParts:
        """
        Those of a reparameterised site; where the value has no derivative, because it was enumerated, those of a plain
        one: ``TraceEnum_ELBO`` weights an outcome by its score.
        """
        log_prob = self.log_prob(value)
        if log_prob.requires_grad and not value.requires_grad:
            return ScoreParts(log_prob, log_prob, 0)  # type: ignore[arg-type]
        return ScoreParts(log_prob, 0, log_prob)  # type: ignore[arg-type]


def is_straight_through(d: Any) -> bool:
    """Whether a distribution, or what it wraps, is of this file."""
    return isinstance(unwrapped(d), _StraightThrough)


class OneHotCategoricalST(_StraightThrough, dist.OneHotCategorical):
    r"""
    .. math:: h \sim \mathrm{OneHotCategorical}(p), \qquad p = \mathrm{softmax}(\theta),

    with a Jacobian :math:`\partial z / \partial \theta` of your choice, :math:`J(p) = \mathrm{diag}(p) - p p^\top`:

    ==================== ============================================================ ===============================
    ``jacobian``         the Jacobian                                                 source
    ==================== ============================================================ ===============================
    ``"identity"``       :math:`I`                                                    Bengio et al. 2013, §4
    ``"softmax"``        :math:`J(p)`; exact where f is affine                        as torch's own straight-through
    ``"reinmax"``        :math:`2 J(\tfrac12(p_\tau + h)) - \tfrac12 J(p)`; exact     Liu et al. 2023, Algorithm 2
                         where f is quadratic and :math:`\tau = 1`
    ``"gumbel-softmax"`` that of :math:`\mathrm{softmax}((\theta + g) / \tau)`, g     Jang et al. 2017, §2.2
                         the noise that gave h
    ``"gumbel-rao"``     its mean over ``num_draws`` other noises that give h: the    Paulus et al. 2021, §3
                         same bias, less variance
    ==================== ============================================================ ===============================

    **Base measure:** counting on the K unit vectors; **rsample:** straight-through, biased; **enumerable:** yes.

    ========== ======================== ===============
    shape      ``logits`` or ``probs``  a value
    ========== ======================== ===============
    batch      ``(*batch, K)``          ``(*batch, K)``
    event                               ``(K,)``
    ========== ======================== ===============

    >>> d = OneHotCategoricalST(logits=torch.zeros(3, requires_grad=True), jacobian="reinmax")
    >>> z = d.rsample()
    >>> sorted(z.tolist()), z.requires_grad
    ([0.0, 0.0, 1.0], True)

    Args:
        probs: probabilities, or
        logits: unnormalised log-probabilities. The Jacobian is with respect to the normalised ones, ``d.logits``.
        jacobian: see above.
        temperature: :math:`\tau > 0`, a number or a tensor that broadcasts to the batch shape, of ``"reinmax"`` and the
            Gumbel Jacobians: low ones have more variance; high ones more bias, which does not vanish with low ones.
        num_draws: of ``"gumbel-rao"``.
        validate_args: as in torch.

    Raises:
        ValueError: ``temperature <= 0``, an unknown ``jacobian``; an index given to ``log_prob`` for a unit vector.

    Reference: Y. Bengio, N. Léonard and A. Courville, *Estimating or propagating gradients through stochastic
    neurons for conditional computation*, 2013; L. Liu et al., *Bridging discrete and backpropagation: straight-through
    and beyond*, NeurIPS 2023; M. Paulus, C. Maddison and A. Krause, *Rao-Blackwellizing the straight-through
    Gumbel-softmax gradient estimator*, ICLR 2021.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        r""":math:`\sum_k z_k \log p_k`, which has a gradient with respect to the value."""
        if self._validate_args:
            if isinstance(value, Tensor) and not value.is_floating_point():
                raise ValueError(
                    f"{type(self).__name__}.log_prob: expected unit vectors, floating-point, got {value.dtype}. A "
                    "straight-through variable is never an index: use torch.nn.functional.one_hot(...).float()."
                )
            self._validate_sample(value)
        return _linear(exact_logits(self), value)


class GumbelSoftmaxST(OneHotCategoricalST):
    r"""
    .. math:: h = \mathrm{onehot}\bigl(\arg\max_k \theta_k + g_k\bigr), \qquad
        s = \mathrm{softmax}\bigl((\theta + g) / \tau\bigr), \qquad g_k \sim \mathrm{Gumbel}(0, 1).

    :class:`OneHotCategoricalST` with ``jacobian="gumbel-softmax"``: a unit vector forward at every temperature, in
    ``sample`` and ``rsample`` alike, the relaxed Jacobian backward.

    **Base measure:** counting on the K unit vectors; **rsample:** straight-through, biased; **enumerable:** yes.

    ========== ======================== ===============
    shape      ``logits`` or ``probs``  a value
    ========== ======================== ===============
    batch      ``(*batch, K)``          ``(*batch, K)``
    event                               ``(K,)``
    ========== ======================== ===============

    >>> d = GumbelSoftmaxST(0.5, logits=torch.zeros(3, requires_grad=True))
    >>> sorted(d.rsample().tolist()), sorted(d.sample().tolist())
    ([0.0, 0.0, 1.0], [0.0, 0.0, 1.0])

    Args:
        temperature: :math:`\tau > 0`, a number or a tensor that broadcasts to the batch shape; low ones have more
            variance, high ones more bias, which does not vanish with low ones.
        probs: probabilities, or
        logits: unnormalised log-probabilities.
        validate_args: as in torch.

    Raises:
        ValueError: ``temperature <= 0``; an index given to ``log_prob`` for a unit vector.

    Reference: E. Jang, S. Gu and B. Poole, *Categorical reparameterization with Gumbel-softmax*, ICLR 2017, §2.2.
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(probs, logits, jacobian="gumbel-softmax", temperature=temperature, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        """A view with a larger batch shape."""
        return super().expand(batch_shape, self._get_checked_instance(GumbelSoftmaxST, _instance))


class BernoulliST(_StraightThrough, dist.Bernoulli):
    r"""
    .. math:: h \sim \mathrm{Bernoulli}(p), \qquad p = \sigma(\ell),

    with the derivative of :class:`OneHotCategoricalST` for the first of two outcomes with logits :math:`(\ell, 0)`:
    1 for ``"identity"``, :math:`p (1 - p)` for ``"softmax"``, and so on.

    **Base measure:** counting on {0, 1}; **rsample:** straight-through, biased; **enumerable:** yes.

    ========== ======================== ===========
    shape      ``logits`` or ``probs``  a value
    ========== ======================== ===========
    batch      ``(*batch,)``            ``(*batch,)``
    event                               ``()``
    ========== ======================== ===========

    >>> logits = torch.tensor(0.0, requires_grad=True)
    >>> BernoulliST(logits=logits).rsample().backward()
    >>> logits.grad
    tensor(0.2500)

    Args:
        probs: of one, or
        logits: :math:`\ell`.
        jacobian: as for :class:`OneHotCategoricalST`.
        temperature: :math:`\tau > 0`, a number or a tensor that broadcasts to the batch shape.
        num_draws: of ``"gumbel-rao"``.
        validate_args: as in torch.

    Raises:
        ValueError: ``temperature <= 0``, an unknown ``jacobian``.

    Reference: Y. Bengio, N. Léonard and A. Courville, *Estimating or propagating gradients through stochastic
    neurons for conditional computation*, 2013, §4; and those of :class:`OneHotCategoricalST`.
    """

    def _value(self, one_hot: Tensor) -> Tensor:
        return one_hot[..., 0]
