r"""
KL divergences of mixed variables under wrappers, as registered with torch; and the answer for pairs without one.

A pair that nobody has worked out raises ``TypeError``. Never ``NotImplementedError``: Pyro's ``TraceMeanField_ELBO``
would take it for leave to use a draw of :math:`\log p - \log q`, whose pathwise gradient is biased for these families.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from pyro.distributions import Delta
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution, kl_divergence
from torch.distributions.kl import register_kl

from pyro_sparse.distributions.checks import first_tensor
from pyro_sparse.distributions.mixed.base import MixedBase, UnknownDivergence
from pyro_sparse.distributions.mixed.wrappers import IndependentMixed, MaskedMixed


def unknown(p: Any, q: Any) -> NoReturn:
    """Raises for a pair without a divergence, in the way that keeps Pyro from drawing it pathwise."""
    if isinstance(p, MixedBase) and isinstance(q, MixedBase):
        raise UnknownDivergence(
            f"kl_divergence({p}, {q}): expected a pair with a known divergence, got {type(p).__name__} and "
            f"{type(q).__name__}. Use an ELBO that draws it, such as Trace_ELBO or EstimatorELBO."
        )
    raise TypeError(
        f"kl_divergence({p}, {q}): expected a pair with a known divergence, got {type(p).__name__} and "
        f"{type(q).__name__}. It is infinite where one has atoms and the other has none; else use a prior of the same "
        "family, or an ELBO that draws the KL, such as Trace_ELBO."
    )


def _kl_delta(p: Any, q: Any) -> Tensor:
    return -q.log_prob(p.v)  # as Pyro's own for a point mass


def register_wrappers(*wrappers: type[Distribution]) -> None:
    """The answers for pairs of one of these, which the pairs that have a divergence go before."""
    for wrapper in wrappers:
        for other in (Distribution, MixedBase, TransformedDistribution, *_WRAPPERS):
            register_kl(wrapper, other)(unknown)
            register_kl(other, wrapper)(unknown)
        register_kl(Delta, wrapper)(_kl_delta)
        _WRAPPERS.append(wrapper)


for _pair in [(MixedBase, MixedBase), (MixedBase, Distribution), (Distribution, MixedBase)]:
    register_kl(*_pair)(unknown)
register_kl(Delta, MixedBase)(_kl_delta)
_WRAPPERS: list[type[Distribution]] = []
register_wrappers(MaskedMixed, IndependentMixed)


@register_kl(MaskedMixed, MaskedMixed)
@register_kl(MaskedMixed, MaskedDistribution)
@register_kl(MaskedDistribution, MaskedMixed)
def _kl_masked(p: MaskedDistribution, q: MaskedDistribution) -> Tensor:
    # As Pyro's: the divergence of the bases where neither is masked.
    if p._mask is False or q._mask is False:
        zeros = torch.zeros(torch.broadcast_shapes(p.batch_shape, q.batch_shape))
        return zeros if (like := first_tensor(p)) is None else zeros.to(like)
    mask = p._mask if q._mask is True else q._mask if p._mask is True else p._mask & q._mask
    return scale_and_mask(kl_divergence(p.base_dist, q.base_dist), mask=None if mask is True else mask)


@register_kl(IndependentMixed, IndependentMixed)
@register_kl(IndependentMixed, Independent)
@register_kl(Independent, IndependentMixed)
def _kl_independent(p: Independent, q: Independent) -> Tensor:
    shared = min(p.reinterpreted_batch_ndims, q.reinterpreted_batch_ndims)
    return sum_rightmost(kl_divergence(p.to_event(-shared), q.to_event(-shared)), shared)
