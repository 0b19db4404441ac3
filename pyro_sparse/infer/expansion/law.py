"""What a site draws from, whatever mask lies on its log-probability: a mask is for costs, not for draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyro.distributions import Delta, ExpandedDistribution, MaskedDistribution
from pyro.distributions.score_parts import ScoreParts
from torch import Size, Tensor
from torch.distributions import Independent

from pyro_sparse.distributions.mixed.base import MixedBase
from pyro_sparse.distributions.unwrapped import unwrapped


def law(fn: Any) -> Any:
    """``fn`` without its masks, also those under ``to_event`` and ``expand``; ``fn`` itself where there are none."""
    if isinstance(fn, MaskedDistribution):
        return law(fn.base_dist)
    if isinstance(fn, Independent | ExpandedDistribution) and (base := law(fn.base_dist)) is not fn.base_dist:
        return (
            base.to_event(fn.reinterpreted_batch_ndims) if isinstance(fn, Independent) else base.expand(fn.batch_shape)
        )
    return fn


def masks(fn: Any) -> Iterator[Any]:
    """The masks on its log-probability, outermost first, those under ``to_event`` for its whole event; None is none."""
    rightmost = 0  # how many dims of the mask are summed over
    while fn is not None:
        mask = getattr(fn, "_mask", None)
        yield _over_event(mask, rightmost) if isinstance(mask, Tensor) else mask
        rightmost += getattr(fn, "reinterpreted_batch_ndims", 0)
        fn = getattr(fn, "base_dist", None)


def _over_event(mask: Tensor, dims: int) -> Tensor:
    """Whether some part of the event is open."""
    dims = min(dims, mask.dim())
    return mask.flatten(-dims).any(-1) if dims else mask


def padded_law(fn: Any, dims: int) -> Any:
    """The law with a batch shape of ``dims`` dims, those that it lacks of size one: slots come to the left of them."""
    drawn = law(fn)
    missing = dims - len(drawn.batch_shape)
    return drawn.expand(Size((1,) * missing + drawn.batch_shape)) if missing > 0 else drawn


def is_point_mass(fn: Any) -> bool:
    """Whether it draws nothing: a value of the program's own, with its ``log_density``."""
    return isinstance(unwrapped(fn), Delta)


def jumps(fn: Any) -> bool:
    """Whether it has atoms and is drawn purely pathwise: log-probabilities, which see the draw's derivative, jump."""
    return isinstance(unwrapped(fn), MixedBase) and bool(fn.has_rsample)


def full_score_parts(fn: Any, value: Tensor) -> ScoreParts:
    """As Pyro's without a pathwise part, whatever the family's are: the whole log-probability is the score function."""
    log_prob, drawn = fn.log_prob(value), law(fn)
    score = log_prob if drawn is fn else drawn.log_prob(value)
    return ScoreParts(log_prob, score, 0)  # type: ignore[arg-type]
