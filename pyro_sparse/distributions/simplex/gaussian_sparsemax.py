r"""The sparsemax of a normal vector, and its density by a one-dimensional integral."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from torch import Size, Tensor

from pyro_sparse._autograd import is_tracing
from pyro_sparse._numerics import log_ndtr, panels
from pyro_sparse.distributions.checks import broadcast, check_finite, check_positive
from pyro_sparse.distributions.simplex.projected_simplex import ProjectedSimplex

_LOG_2PI = math.log(2 * math.pi)


class GaussianSparsemax(ProjectedSimplex):
    r"""
    .. math:: Y = \operatorname{sparsemax}(X), \qquad X \sim \mathcal{N}(\mu, \operatorname{diag} \sigma^2)

    With S the support of y,

    .. math:: p(y) = |S| \int \prod_{i \in S} \mathcal{N}(y_i + \tau; \mu_i, \sigma_i^2)
       \prod_{j \notin S} \Phi\!\left(\frac{\tau - \mu_j}{\sigma_j}\right) d\tau :

    X is :math:`y_i + \tau` on the support and at most :math:`\tau` off it. The density is in closed form where all
    coordinates are positive; elsewhere it is computed by quadrature, to 1e-9 in log p (relative above one) for
    scales from 1e-3 to 1e3 side by side, and in float64 whatever the dtype. The row with the most sharp steps decides
    how many panels there are, which waits for a GPU.

    **Base measure:** for each face of n vertices, Lebesgue in n - 1 of its coordinates (as of torch's Dirichlet);
    counting at the vertices; **rsample:** by request; **enumerable:** no.

    ========== =========================== ===============
    shape      ``loc``, ``scale``          a value
    ========== =========================== ===============
    batch      ``(*batch, K)``, broadcast  ``(*batch, K)``
    event                                  ``(K,)``
    ========== =========================== ===============

    A site has the plain score-function gradient, which is right everywhere. ``has_rsample_(True)`` makes draws purely
    pathwise, through sparsemax: unbiased for :math:`E[h(Y)]`, h continuous; **biased** for the jumps of
    :math:`\log p` between faces, and so under any ELBO that draws the KL. Entropy, moments and KL divergences are not
    known; nor is the density for a full covariance, which is an orthant probability: use a diagonal one.

    >>> d = GaussianSparsemax(torch.tensor([1.0, 0.5, -1.0]), 0.5)
    >>> y = torch.tensor([[1.0, 0.0, 0.0], [0.7, 0.3, 0.0], [0.5, 0.3, 0.2]])
    >>> [round(p, 3) for p in d.log_prob(y).exp().tolist()]
    [0.237, 1.094, 0.041]

    Args:
        loc: :math:`\mu`, real; adding one number to all of a row changes nothing.
        scale: :math:`\sigma > 0`, a number or a tensor.
        validate_args: as in torch.

    Raises:
        TypeError: integer tensors.
        ValueError: one vertex; ``scale <= 0``, NaN, infinity.

    Reference: A. Farinhas et al., *Sparse communication via mixed distributions*, ICLR 2022, §4 (the extrinsic
    view).
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    _tensors = ("loc", "scale")

    def __init__(self, loc: float | Tensor, scale: float | Tensor, *, validate_args: bool | None = None) -> None:
        self.loc, self.scale = broadcast(type(self).__name__, loc=loc, scale=scale)
        super().__init__(self.loc.shape, validate_args)
        if self._validate_args:
            check_finite(type(self).__name__, "loc", self.loc)
            check_positive(type(self).__name__, "scale", self.scale)

    def _dense(self, shape: Size) -> Tensor:
        return self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)

    def _log_density(self, y: Tensor) -> Tensor:
        # In units of a small scale, the difference of two locs has no digits left in float32.
        loc, scale, value = self.loc.double(), self.scale.double(), y.double()
        inside = value > 0
        size = inside.sum(-1, dtype=value.dtype)
        # On the support, the product of normal densities is one in tau, of precision W and mean m, and a constant.
        weight = torch.where(inside, scale, math.inf).pow(-2)
        precision = weight.sum(-1, keepdim=True)
        centre = torch.where(inside, loc - value, 0.0)
        m = (weight * centre).sum(-1, keepdim=True) / precision
        distance = (weight * (centre - m).square()).sum(-1) + precision.squeeze(-1).log()
        log_scales = torch.where(inside, scale, 1.0).log().sum(-1)
        closed = size.log() - distance / 2 - log_scales - (size - 1) * (_LOG_2PI / 2)
        # Off it, Phi(intercept + slope t), t = (tau - m) W^(1/2); on it such a factor of one.
        intercept = torch.where(inside, _SURE, (m - loc) / scale)
        slope = torch.where(inside, 0.0, precision.rsqrt() / scale)
        integral = torch.where(inside.all(-1), 0.0, _log_expectation(intercept, slope))
        return (closed + integral).to(torch.result_type(self.loc, y))

    def __repr__(self) -> str:
        shape = (*self._batch_shape, *self._event_shape)
        return f"{type(self).__name__}(loc: {shape}, scale: {shape})"


#: log Phi and its derivative are zero here
_SURE = 40.0
#: where log f is lower than at the mode by this, the integral ends
_DROP = 40.0
#: half the width of a step of Phi, outside of which it is one or smooth
_STEP = 6.0
#: a step gets panels of its own where so many of its widths fit into the bracket
_SHARP = 30.0
#: on each panel
_NODES = 24


def _log_expectation(intercept: Tensor, slope: Tensor) -> Tensor:
    r"""
    :math:`\log E \prod_k \Phi(a_k + b_k T)`, T standard normal, :math:`b_k \ge 0`; ``(*batch, K)`` to ``batch``.

    The rule of Gauss and Legendre, on panels that end where a factor steps up. Its nodes have no gradient: they do not
    move the integral.
    """
    t, weights = panels(_breaks(intercept.detach(), slope.detach()), _NODES)
    terms = weights.log() + _log_integrand(t, intercept, slope)
    top = terms.detach().amax(0)  # else the rounding of a large result would scale its gradient
    return (terms - top).logsumexp(0) + top - _LOG_2PI / 2


def _log_integrand(t: Tensor, intercept: Tensor, slope: Tensor) -> Tensor:
    """Concave in t, its second derivative between -1 and -1 - sum b^2."""
    return log_ndtr(torch.addcmul(intercept, slope, t.unsqueeze(-1))).sum(-1) - t.square() / 2


def _breaks(intercept: Tensor, slope: Tensor) -> Tensor:
    """Where the panels end, ``(panels + 1, *batch)``: in the bracket of the mode, and on both sides of each step."""
    mode = _mode(intercept, slope)
    low, high = _bracket(mode, intercept, slope)
    even = torch.stack([low, low + 0.6 * (mode - low), mode, mode + 0.4 * (high - mode), high], -1)
    first, last = low.unsqueeze(-1), high.unsqueeze(-1)
    sharp = slope * (last - first) > _SHARP
    safe = torch.where(sharp, slope, 1.0)
    steps = torch.cat([(-_STEP - intercept) / safe, (_STEP - intercept) / safe], -1)
    used = torch.cat([sharp, sharp], -1) & (steps > first) & (steps < last)
    breaks = torch.cat([even, torch.where(used, steps, first)], -1).sort(-1).values
    if not is_tracing():  # where the number of panels must not depend on values
        # What is not used comes first, as panels of no width: leave out those that no row has.
        unused = (breaks == first).sum(-1)
        breaks = breaks[..., int(unused.min()) - 1 if unused.numel() else 0 :]
    return breaks.movedim(-1, 0)


def _mode(intercept: Tensor, slope: Tensor) -> Tensor:
    """
    By Newton's method. The derivative of the log-integrand is convex and falls, so that steps from zero, which is left
    of the mode, never pass it. The hardest of 10^5 rows took 25, to full precision.
    """
    t = torch.zeros_like(intercept[..., 0])
    for _ in range(32):
        z = torch.addcmul(intercept, slope, t.unsqueeze(-1))
        ratio = math.sqrt(2 / math.pi) / torch.special.erfcx(-math.sqrt(0.5) * z)  # the density over Phi
        bend = (ratio * (ratio + z)).clamp(0.0, 1.0)  # where it is, but for rounding
        t = t + ((slope * ratio).sum(-1) - t) / (1 + (slope.square() * bend).sum(-1))
    return t


def _bracket(mode: Tensor, intercept: Tensor, slope: Tensor) -> Tensor:
    """
    Points on both sides of the mode, beyond which the integrand is negligible, ``(2, *batch)``: at most 1.3 times as
    far from it as they need be (a factor of 10^8, halved six times in the logarithm).
    """
    side = torch.linspace(-1, 1, 2, dtype=mode.dtype, device=mode.device).reshape(2, *(1,) * mode.dim())
    level = _log_integrand(mode, intercept, slope) - _DROP
    # Between these by the bounds of the second derivative.
    far = torch.full_like(mode, math.log(2 * _DROP) / 2).expand(2, *mode.shape)
    near = far - torch.log1p(slope.square().sum(-1)) / 2
    for _ in range(6):
        middle = (near + far) / 2
        low = _log_integrand(mode + side * middle.exp(), intercept, slope) < level
        near, far = torch.where(low, near, middle), torch.where(low, middle, far)
    return mode + side * far.exp()
