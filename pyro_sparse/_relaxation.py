r"""
Smooth stand-ins for one-hot draws, which straight-through variables and control variates share; torch only.

Everywhere ``logits`` has shape ``(*batch, K)``; they need not be normalised, and -inf rules an outcome out. A Bernoulli
variable with logit :math:`\ell` is the first of two outcomes with logits :math:`(\ell, 0)`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Size, Tensor
from torch.distributions import Bernoulli
from torch.distributions.utils import probs_to_logits

from pyro_sparse._autograd import differentiable_once, is_transformed
from pyro_sparse._precision import HALF, widened

Jacobian = Literal["identity", "softmax", "reinmax", "gumbel-softmax", "gumbel-rao"]
_ONCE = (
    "straight-through draw: expected to be differentiated once, got a derivative of its derivative with respect to "
    "what it was drawn from, which means nothing: the first one is pretended. Use an exact estimator, or a variable "
    "with a density."
)
JACOBIANS: tuple[Jacobian, ...] = get_args(Jacobian)


def exact_logits(d: Any) -> Tensor:
    """
    The logits of a Bernoulli, Categorical or OneHotCategorical, ``(*batch, K)``, with -inf where it was made from a
    probability of zero: torch makes that a finite one. (A probability that merely underflows keeps its logit; a mask
    by the lowest number of the dtype, which arithmetic cannot be done with, is -inf.)

    In float32 if ``d`` is in half precision, where torch's own have no probability below an ``eps`` of 0.008.
    """
    bit, given = isinstance(d, Bernoulli), getattr(d, "_categorical", d).__dict__
    own = widened(d.logits)
    if d.logits.dtype in HALF and d._param is given.get("probs"):
        own = probs_to_logits(widened(d.probs), is_binary=bit)
    logits = torch.stack([own, torch.zeros_like(own)], -1) if bit else own
    zero = logits < logits.amax(-1, keepdim=True) - math.sqrt(torch.finfo(logits.dtype).max)
    if "probs" in given:  # else it was made from logits, and nobody has asked for them
        if bit:
            by_logit = d.logits.sigmoid()
            zero |= torch.stack([(d.probs == 0) & (by_logit > 0), (d.probs == 1) & (by_logit < 1)], -1)
        else:
            zero |= (d.probs == 0) & (d.logits.exp() > 0)
    return logits.masked_fill(zero, -math.inf)


def exponential(shape: Size, like: Tensor) -> Tensor:
    """Standard exponential noise, with the dtype and device of a tensor."""
    # vmap with randomness="different" fills no tensor in place but one that differs already.
    new = torch.rand if is_transformed() else torch.empty
    return new(shape, dtype=like.dtype, device=like.device).exponential_()


def gumbel_like(x: Tensor) -> Tensor:
    """
    Standard Gumbel noise in the shape of x; in float32 at least, where torch's exponential draws are never zero.
    """
    return -exponential(x.shape, widened(x)).log()


def conditional_gumbels(log_probs: Tensor, hard: Tensor) -> Tensor:
    r"""
    Perturbed log-probabilities :math:`z_k = \log p_k + g_k`, given which of them is the largest.

    The largest is a Gumbel draw T, whatever p is, the others are :math:`-\log(e^{-T} + e^{-(\log p_k + g_k)})`. Other
    forms of it overflow for peaked p.

    Args:
        log_probs: normalised, -inf where p is zero.
        hard: one-hot, of the same shape up to broadcasting: where the largest is.
    """
    noise = gumbel_like(torch.broadcast_tensors(log_probs, hard)[0])
    top = gumbel_like(noise[..., :1])
    return torch.where(hard > 0, top, -torch.logaddexp(-top, -(log_probs + noise)))


def tempered_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    r"""
    :math:`\mathrm{softmax}(\theta / \tau)`. A logit of -inf has no part in any derivative: that with respect to
    :math:`\tau` would be 0 * inf.
    """
    off = logits == -math.inf
    return (logits.masked_fill(off, 0.0) / temperature).masked_fill(off, -math.inf).softmax(-1)


def one_hot_at_max(perturbed: Tensor) -> Tensor:
    """The unit vector at the largest entry."""
    return torch.zeros_like(perturbed).scatter(-1, perturbed.argmax(-1, keepdim=True), 1.0)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard``, exactly, with the gradient of ``soft``, which has no derivative of its own."""
    return hard + (differentiable_once(soft, _ONCE) - soft.detach())


def check_stand_in(owner: str, jacobian: Jacobian, num_draws: int) -> None:
    """Raises unless these are options of :func:`draw_with_stand_in`."""
    if jacobian not in JACOBIANS:
        raise ValueError(f"{owner}: expected a jacobian in {JACOBIANS}, got {jacobian!r}. Use one of them.")
    if not isinstance(num_draws, int) or num_draws < 1:
        raise ValueError(f"{owner}: expected num_draws of at least 1, got {num_draws!r}. Use, say, 10.")


def draw_with_stand_in(
    logits: Tensor, jacobian: Jacobian, temperature: float | Tensor, num_draws: int
) -> tuple[Tensor, Tensor]:
    r"""
    A one-hot draw h, by the Gumbel-max trick, and a stand-in. Its derivative with respect to the logits :math:`\theta`:

    ================== ================================================================================
    ``identity``       :math:`I`
    ``softmax``        :math:`J(p) = \mathrm{diag}(p) - p p^\top`, at :math:`p = \mathrm{softmax}(\theta)`
    ``reinmax``        :math:`2 J\bigl(\tfrac12(p_\tau + h)\bigr) - \tfrac12 J(p)`
    ``gumbel-softmax`` that of :math:`\mathrm{softmax}((\theta + g) / \tau)`, g the noise that gave h
    ``gumbel-rao``     its mean over ``num_draws`` other noises that give h
    ================== ================================================================================

    with :math:`p_\tau = \mathrm{softmax}(\theta / \tau)`. A temperature that is a tensor broadcasts to the batch shape.
    Both are in float32 if the logits are in half precision: the caller casts them.
    """
    logits = widened(logits)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.device, logits.dtype).unsqueeze(-1)
    noise = gumbel_like(logits.detach())
    hard = one_hot_at_max(logits.detach() + noise)
    if jacobian == "softmax":
        return hard, logits.softmax(-1)
    if jacobian == "gumbel-softmax":
        return hard, tempered_softmax(logits + noise, temperature)
    finite = logits.clamp(min=torch.finfo(logits.dtype).min)
    if jacobian == "identity":
        return hard, finite
    # What is held fixed moves the point at which the softmax is differentiated.
    fixed, moved = logits.detach(), finite - finite.detach()
    if jacobian == "reinmax":  # a temperature may be trained, but not by this
        middle = ((tempered_softmax(fixed, temperature) + hard) / 2).log().detach()
        return hard, 2 * (middle + moved).softmax(-1) - logits.softmax(-1) / 2
    others = conditional_gumbels(fixed.log_softmax(-1).expand(num_draws, *fixed.shape), hard)
    return hard, tempered_softmax(others + moved, temperature).mean(0)


def linear_log_prob(logits: Tensor, value: Tensor) -> Tensor:
    r""":math:`\sum_k v_k \log p_k` for normalised logits: linear in v, -inf where v has what p lacks."""
    off = logits == -math.inf
    log_prob = (value * logits.masked_fill(off, 0.0)).sum(-1)
    return log_prob.masked_fill((off & (value > 0)).any(-1), -math.inf)
