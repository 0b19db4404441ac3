"""
KL divergences of the sparse and straight-through families, to and from stock ones and each other, as registered with
torch.

.. math:: \\mathrm{KL}(p \\| q) = \\sum_{k: p_k > 0} p_k (\\log p_k - \\log q_k),

which is inf where some :math:`p_k > 0 = q_k`. Gradients are finite wherever the value is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical
from torch.distributions.kl import register_kl
from torch.nn.functional import logsigmoid

from pyro_sparse._numerics import safe_log
from pyro_sparse._precision import HALF, narrowed, widened
from pyro_sparse._relaxation import exact_logits
from pyro_sparse.distributions.discrete.projected import ProjectedDistribution
from pyro_sparse.distributions.discrete.sparse_categorical import SparseCategorical
from pyro_sparse.distributions.discrete.sparse_one_hot import SparseOneHotCategorical
from pyro_sparse.distributions.discrete.straight_through import BernoulliST, OneHotCategoricalST

Finite = Categorical | OneHotCategorical | ProjectedDistribution


def _probabilities(d: Finite) -> tuple[Tensor, Tensor]:
    """And their logarithms; those of half precision in float32, where they sum to one."""
    half = d.probs.dtype in HALF
    if not isinstance(d, ProjectedDistribution):
        logits = exact_logits(d)
        return (d.probs, logits) if not half else (logits.softmax(-1), logits.log_softmax(-1))
    if not half:
        return d.probs, d.logits
    probs = widened(d.probs)
    probs = probs / probs.sum(-1, keepdim=True)
    return probs, safe_log(probs)


@register_kl(SparseCategorical, SparseCategorical)
@register_kl(SparseCategorical, Categorical)
@register_kl(Categorical, SparseCategorical)
@register_kl(SparseOneHotCategorical, SparseOneHotCategorical)
@register_kl(SparseOneHotCategorical, OneHotCategorical)
@register_kl(OneHotCategorical, SparseOneHotCategorical)
@register_kl(OneHotCategoricalST, OneHotCategoricalST)
@register_kl(OneHotCategoricalST, OneHotCategorical)
@register_kl(OneHotCategorical, OneHotCategoricalST)
@register_kl(OneHotCategoricalST, SparseOneHotCategorical)
@register_kl(SparseOneHotCategorical, OneHotCategoricalST)
def kl_categorical(p: Finite, q: Finite) -> Tensor:
    """
    Of two distributions of K outcomes, stock ones, too. torch's own has NaN gradients at logits of -inf, and is inf
    where the probabilities of q underflow.
    """
    if p.probs.shape[-1] != q.probs.shape[-1]:
        raise ValueError(
            f"kl_divergence({p}, {q}): expected as many outcomes in both, got {p.probs.shape[-1]} and "
            f"{q.probs.shape[-1]}. Compare distributions over the same outcomes."
        )
    kl = _kl(*_probabilities(p), _probabilities(q)[1])
    return narrowed(kl, torch.promote_types(p.probs.dtype, q.probs.dtype))


@register_kl(BernoulliST, BernoulliST)
@register_kl(BernoulliST, Bernoulli)
@register_kl(Bernoulli, BernoulliST)
def kl_bits(p: Bernoulli, q: Bernoulli) -> Tensor:
    """Of two Bernoulli distributions. torch's own is inf where the probabilities of q are rounded to 0 or 1."""
    if "probs" in p.__dict__ or "probs" in q.__dict__:  # there may be exact zeros
        log_p, log_q = (exact_logits(d).log_softmax(-1) for d in (p, q))
        return _kl(log_p.exp(), log_p, log_q)
    a, b = widened(p.logits), widened(q.logits)
    return a.sigmoid() * (a - b) + logsigmoid(-a) - logsigmoid(-b)


def _kl(p_probs: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    p_probs, log_p, log_q = torch.broadcast_tensors(p_probs, log_p, log_q)
    off = p_probs == 0
    missing = ~off & (log_q == -math.inf)
    # What is inf is set apart before the product: 0 * inf would be NaN in value, and in the gradient of finite rows.
    log_p, log_q = log_p.masked_fill(off, 0.0), log_q.masked_fill(off | missing, 0.0)
    kl = (p_probs * (log_p - log_q)).sum(-1)
    return kl.masked_fill(missing.any(-1), math.inf)
