r"""A gate that is exactly closed, exactly open, or in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from torch import Size, Tensor
from torch.nn.functional import logsigmoid

from pyro_sparse._numerics import log1mexp
from pyro_sparse.distributions.checks import broadcast, check_finite, check_positive
from pyro_sparse.distributions.univariate.stretched import Stretched


class HardConcrete(Stretched):
    r"""
    .. math:: Z = \min(1, \max(0, l + (h - l) K)), \qquad K = \sigma\!\left(\frac{L + \log\alpha}{\beta}\right),
       \quad L \sim \mathrm{Logistic}(0, 1),

    :math:`\beta` the temperature, :math:`\log\alpha` the logits, :math:`l < 0 < 1 < h` the stretch.

    **Base measure:** :math:`\delta_0 + \delta_1` + Lebesgue; **rsample:** in part (see :class:`MixedDistribution`);
    **enumerable:** no.

    ========== ============================ ============
    shape      all parameters, broadcast    a value
    ========== ============================ ============
    batch      ``(*batch,)``                ``(*batch,)``
    event                                   ``()``
    ========== ============================ ============

    >>> d = HardConcrete(temperature=2 / 3, logits=torch.tensor([-4.0, 0.0, 4.0]))
    >>> [round(p, 3) for p in d.prob_zero.tolist()]
    [0.917, 0.168, 0.004]
    >>> [round(p, 3) for p in d.log_prob(torch.tensor([0.0, 0.5, 1.0])).exp().tolist()]
    [0.917, 0.556, 0.917]

    Args:
        temperature: :math:`\beta > 0`; near 0 a Bernoulli variable.
        logits: :math:`\log\alpha`, real.
        low: below 0, a number or a tensor.
        high: above 1, a number or a tensor.
        nodes: how many nodes each of three panels of the quadrature has; by default as many as give 1e-10.
        validate_args: as in torch.

    Raises:
        ValueError: ``temperature <= 0``, ``low >= 0``, ``high <= 1``, NaN.

    Reference: C. Louizos, M. Welling and D. Kingma, *Learning sparse neural networks through L0 regularization*,
    ICLR 2018, §2.2 and appendix.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"temperature": constraints.positive, "logits": constraints.real}
    _tensors = ("temperature", "logits", "low", "high")

    def __init__(
        self,
        temperature: float | Tensor,
        logits: float | Tensor,
        low: float | Tensor = -0.1,
        high: float | Tensor = 1.1,
        *,
        nodes: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.logits, self.temperature = broadcast(type(self).__name__, logits=logits, temperature=temperature)
        super().__init__(self.logits, low, high, nodes, validate_args)
        if self._validate_args:
            name = type(self).__name__
            check_positive(name, "temperature", self.temperature, "Use e.g. 2 / 3.")
            check_finite(name, "logits", self.logits)

    def _logistic(self, z: Tensor) -> Tensor:
        """The value of L that is at z."""
        return self.temperature * self._logit(z) - self.logits

    def _log_cdf(self, z: Tensor) -> Tensor:
        return logsigmoid(self._logistic(z))

    def _log_sf(self, z: Tensor) -> Tensor:
        return logsigmoid(-self._logistic(z))

    def _log_mass(self, a: Tensor, b: Tensor) -> Tensor:
        # sigma(s) - sigma(r) = sigma(s) sigma(-r) (1 - exp(r - s)), and r - s does not depend on the logits.
        logit_a, logit_b = self._logit(a), self._logit(b)
        r, s = self.temperature * logit_a - self.logits, self.temperature * logit_b - self.logits
        return logsigmoid(s) + logsigmoid(-r) + log1mexp(self.temperature * (logit_a - logit_b))

    def _log_density_of(self, log_k: Tensor, log_rest: Tensor) -> Tensor:
        # In few passes over the nodes; - log sigma(x) - log sigma(-x) takes one of the two.
        x = torch.addcmul(-self.logits, self.temperature, log_k - log_rest)
        bend = torch.sub(x, logsigmoid(x), alpha=2)
        return self.temperature.log() - (log_k + log_rest + self._log_width) - bend

    def _ends(self) -> tuple[Tensor, Tensor]:
        # L is farther out with probability e^-33.
        first, last = (self.logits - 33) / self.temperature, (self.logits + 33) / self.temperature
        return self._unstretched(first), self._unstretched(last)

    def _peaks(self) -> list[Tensor]:
        return [self._unstretched(self.logits / self.temperature)]

    def _kinks(self) -> list[Tensor]:
        return self._peaks()

    def _quantile(self, u: Tensor) -> Tensor:
        return self._unstretched((torch.logit(u) + self.logits) / self.temperature)

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """As of every mixed distribution; here the quantile function is elementary, and so is its derivative."""
        return self._draw(self._extended_shape(Size(sample_shape)))

    def point_estimate(self, kind: str = "mean") -> Tensor:
        if kind == "l0":
            return self._unstretched(self.logits).clamp(0.0, 1.0)
        return super().point_estimate(kind)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(temperature: {tuple(self._batch_shape)}, logits: {tuple(self._batch_shape)}, "
            f"{self._repr_stretch})"
        )
