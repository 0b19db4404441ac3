"""What a site draws from, whatever mask lies on its log-probability: a mask is for costs, not for draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyro.distributions import (
    Bernoulli,
    Categorical,
    Delta,
    ExpandedDistribution,
    MaskedDistribution,
    OneHotCategorical,
)
from pyro.distributions.score_parts import ScoreParts
from torch import Size, Tensor
from torch.distributions import Independent

from pyro_sparse._precision import unrounded
from pyro_sparse.distributions.mixed.base import MixedBase
from pyro_sparse.distributions.unwrapped import unwrapped


def law(fn: Any) -> Any:
    """``fn`` without its masks, also those under ``to_event`` and ``expand``; ``fn`` itself where there are none."""
    if isinstance(fn, MaskedDistribution):
        return law(fn.base_dist)
    if isinstance(fn, Independent | ExpandedDistribution) and (base := law(fn.base_dist)) is not fn.base_dist:
        return _wrapped(base, fn)
    return fn


def _wrapped(base: Any, fn: Any) -> Any:
    """Another base in the wrapper that ``fn`` is."""
    if isinstance(fn, MaskedDistribution):
        return base.mask(fn._mask)
    return base.to_event(fn.reinterpreted_batch_ndims) if isinstance(fn, Independent) else base.expand(fn.batch_shape)


def with_unrounded_logits(fn: Any) -> Any:
    """
    ``fn`` with logits in float32, if it is a stock distribution whose parameters ``torch.autocast`` has left in half
    precision: of such, the probabilities of all outcomes would not add up to one. (Ours see to it themselves.)
    """
    if isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution):
        return fn if (base := with_unrounded_logits(fn.base_dist)) is fn.base_dist else _wrapped(base, fn)
    if type(fn) not in (Bernoulli, Categorical, OneHotCategorical):
        return fn
    given = getattr(fn, "_categorical", fn)
    name = "probs" if given._param is given.__dict__.get("probs") else "logits"
    parameter = getattr(given, name)
    wide = unrounded(parameter)
    return fn if wide is parameter else type(fn)(**{name: wide}, validate_args=fn._validate_args)


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
