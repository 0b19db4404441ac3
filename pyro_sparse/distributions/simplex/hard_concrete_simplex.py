r"""A relaxed one-hot vector, stretched beyond the simplex and projected back onto it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from torch import Size, Tensor
from torch.distributions.utils import broadcast_all

from pyro_sparse._autograd import is_true
from pyro_sparse._numerics import as_like
from pyro_sparse._relaxation import exponential
from pyro_sparse.distributions.checks import aligned, check_finite, check_positive, checked
from pyro_sparse.distributions.simplex.projected_simplex import ProjectedSimplex
from pyro_sparse.distributions.univariate.hard_concrete import HardConcrete


class HardConcreteSimplex(ProjectedSimplex):
    r"""
    .. math:: Y = \operatorname{sparsemax}(\lambda C), \qquad
       C = \operatorname{softmax}\!\left(\frac{\eta + G}{\beta}\right), \quad G_k \sim \mathrm{Gumbel},

    :math:`\beta` the temperature, :math:`\eta` the logits, :math:`\lambda > 1` the stretch. For K = 2,
    :math:`Y_1` *is* ``HardConcrete`` with logits :math:`\eta_1 - \eta_2`, low :math:`(1 - \lambda) / 2` and high
    :math:`(1 + \lambda) / 2`. Where all coordinates are positive, :math:`Y = \lambda C - (\lambda - 1) / K`, so that

    .. math:: \log p(y) = \log p_C\!\left(\frac{y + (\lambda - 1) / K}{\lambda}\right) - (K - 1) \log \lambda .

    On the other faces for K > 2 there is **no** ``log_prob``: it is an integral over a region of the simplex. It raises
    ``NotImplementedError``; for that, and for K > 2 only, it looks at the values, which waits for a GPU.

    **Base measure:** for each face of n vertices, Lebesgue in n - 1 of its coordinates (as of torch's Dirichlet);
    counting at the vertices; **rsample:** by request; **enumerable:** no.

    =============== ================== ===============
    shape           parameter          a value
    =============== ================== ===============
    ``logits``      ``(*batch, K)``    ``(*batch, K)``
    ``temperature`` ``batch``          event: ``(K,)``
    ``stretch``     ``batch``
    =============== ================== ===============

    A site has the plain score-function gradient, which is right wherever ``log_prob`` exists.
    ``has_rsample_(True)`` makes draws purely pathwise, through sparsemax: unbiased for :math:`E[h(Y)]`, h continuous;
    **biased** for the jumps of :math:`\log p` between faces, and so under any ELBO that draws the KL. Entropy, moments
    and KL divergences are not known.

    >>> d = HardConcreteSimplex(temperature=0.5, logits=torch.tensor([1.0, 0.0]), stretch=1.2)
    >>> [round(p, 3) for p in d.log_prob(torch.tensor([[1.0, 0.0], [0.6, 0.4], [0.0, 1.0]])).exp().tolist()]
    [0.45, 0.362, 0.1]

    Args:
        temperature: :math:`\beta > 0`, a number or a tensor; near 0 a categorical variable.
        logits: :math:`\eta`, real; adding one number to all of a row changes nothing.
        stretch: :math:`\lambda > 1`, a number or a tensor; the larger, the more zeros.
        validate_args: as in torch.

    Raises:
        TypeError: integer tensors.
        ValueError: one vertex; ``temperature <= 0``, ``stretch <= 1``, NaN, infinity.

    Reference: A. Farinhas et al., *Sparse communication via mixed distributions*, ICLR 2022, §4 (the extrinsic
    view); for K = 2 C. Louizos, M. Welling and D. Kingma, *Learning sparse neural networks through L0 regularization*,
    ICLR 2018.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "temperature": constraints.positive,
        "logits": constraints.real_vector,
        "stretch": constraints.greater_than(1),
    }
    _tensors = ("temperature", "logits", "stretch")

    def __init__(
        self,
        temperature: float | Tensor,
        logits: Tensor,
        stretch: float | Tensor,
        *,
        validate_args: bool | None = None,
    ) -> None:
        name = type(self).__name__
        logits, temperature, stretch = aligned(name, logits=logits, temperature=temperature, stretch=stretch)
        event = logits.shape[-1:]
        first = logits[..., 0] if event else logits
        self.temperature, self.stretch, first = broadcast_all(
            *(as_like(x, logits) for x in (temperature, stretch, first))
        )
        self.logits = logits.expand(first.shape + event)
        super().__init__(self.logits.shape if event else event, validate_args)
        if self._validate_args:
            check_positive(name, "temperature", self.temperature, "Use e.g. 2 / 3.")
            check_finite(name, "logits", self.logits)
            ok = (self.stretch > 1) & self.stretch.isfinite()
            checked(name, "stretch", self.stretch, ok, "a number above 1", "Use e.g. 1.2.")

    def _event_of(self, name: str) -> Size:
        return self._event_shape if name == "logits" else Size()

    def _dense(self, shape: Size) -> Tensor:
        gumbel = -exponential(shape, self.logits).log()
        soft = ((self.logits + gumbel) / self.temperature.unsqueeze(-1)).softmax(-1)
        return self.stretch.unsqueeze(-1) * soft

    def _log_density(self, y: Tensor) -> Tensor:
        if y.shape[-1] == 2:
            return self._log_density_of_two(y)
        if not is_true(y != 0):
            raise NotImplementedError(
                f"{type(self).__name__}.log_prob: expected all coordinates to be positive, or K = 2, got a zero and "
                f"K = {y.shape[-1]}. The density of a smaller face is an integral over a region of the simplex, "
                "without a closed form. Use GaussianSparsemax or MixedDirichlet."
            )
        n = y.shape[-1]
        beta, stretch = self.temperature, self.stretch.unsqueeze(-1)
        log_c = ((y + (stretch - 1) / n) / stretch).log()
        weight = self.logits - beta.unsqueeze(-1) * log_c
        concrete = math.lgamma(n) + (n - 1) * beta.log() + (weight - log_c).sum(-1) - n * weight.logsumexp(-1)
        return concrete - (n - 1) * self.stretch.log()

    def _log_density_of_two(self, y: Tensor) -> Tensor:
        # Of the smaller coordinate: next to one the larger has no digits left, and may look like an atom.
        flip = y[..., 1] < y[..., 0]
        difference = self.logits[..., 0] - self.logits[..., 1]
        logits = torch.where(flip, -difference, difference)
        low, high = (1 - self.stretch) / 2, (1 + self.stretch) / 2
        gate = HardConcrete(self.temperature, logits, low, high, validate_args=False)
        return gate.log_prob(torch.where(flip, y[..., 1], y[..., 0]))

    def __repr__(self) -> str:
        batch = tuple(self._batch_shape)
        return f"{type(self).__name__}(temperature: {batch}, logits: {(*batch, *self._event_shape)}, stretch: {batch})"
