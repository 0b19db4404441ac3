"""
Pyro's wrappers around our families, built by their constructors: the same as by method, or an error.

``MaskedDistribution(d, mask)`` draws by ``d.sample()``, without the gradient that ``d.score_parts`` leaves to the draw,
and ``TransformedDistribution`` multiplies the probability of an atom by a Jacobian. Neither asks the distribution that
it wraps. So we are in Pyro's list of what may answer a call of a constructor in its place
(``pyro.distributions.distribution.COERCIONS``); to all that wraps no family of ours we answer nothing. The classes of
``torch.distributions`` ask nobody: they stay what they are, and ``pyro.sample`` takes none of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pyro.distributions as dist
from pyro.distributions.distribution import COERCIONS
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution, TorchDistributionMixin
from torch import Size, Tensor
from torch.distributions import AffineTransform, ComposeTransform, Distribution, Transform

from pyro_sparse.distributions.discrete.sparse_support import SparseDistribution
from pyro_sparse.distributions.discrete.straight_through import _StraightThrough
from pyro_sparse.distributions.mixed.base import MixedBase
from pyro_sparse.distributions.mixed.wrappers import Forwarding, IndependentMixed, MaskedMixed
from pyro_sparse.distributions.simplex.faces import FaceDistribution
from pyro_sparse.distributions.simplex.within_face import WithinFace
from pyro_sparse.distributions.univariate.affine import AffineMixed
from pyro_sparse.distributions.univariate.mixed import MixedDistribution

#: whose values have probabilities, or densities that are not w.r.t. Lebesgue measure
_OURS = (MixedBase, Forwarding, SparseDistribution, FaceDistribution, WithinFace, _StraightThrough)
#: where stock wrappers keep what they wrap
_INSIDE = ("base_dist", "component_distribution", "component0", "component1")


def _inside(d: Any) -> Iterator[Any]:
    """A distribution and all that it wraps."""
    yield d
    for name in _INSIDE:
        if isinstance(inner := getattr(d, name, None), Distribution):
            yield from _inside(inner)


def _ours(d: Any) -> bool:
    return any(isinstance(part, _OURS) for part in _inside(d))


def _by_method(method: str) -> Callable[..., Any]:
    """What the method of that name gives, where a family of ours, or what wraps it, has one of its own."""
    stock = getattr(TorchDistributionMixin, method)

    def answer(base: Any, *args: Any, **kwargs: Any) -> Any:
        own = _ours(base) and getattr(type(base), method) is not stock
        return getattr(base, method)(*args, **kwargs) if own else None

    return answer


def _masked(base_dist: Any, mask: bool | Tensor) -> Any:
    return _by_method("mask")(base_dist, mask)


def _expanded(base_dist: Any, batch_shape: Any = Size()) -> Any:
    return _by_method("expand")(base_dist, batch_shape)


def _independent(base_distribution: Any, reinterpreted_batch_ndims: int, validate_args: bool | None = None) -> Any:
    return _by_method("to_event")(base_distribution, reinterpreted_batch_ndims)


def _transformed(base_distribution: Any, transforms: Any, validate_args: bool | None = None) -> Any:
    if not _ours(base_distribution):
        return None
    steps = list(_steps(transforms if isinstance(transforms, list) else [transforms]))
    if not all(isinstance(t, AffineTransform) or isinstance(t.inv, AffineTransform) for t in steps):
        raise _refusal(base_distribution, transforms)
    d = base_distribution
    for t in steps:
        d = _mapped(d, t)
        d = d.to_event(max(t.domain.event_dim - len(d.event_shape), 0))
    return d


def _folded(base_dist: Any, validate_args: bool | None = None) -> Any:
    if _ours(base_dist):
        raise _refusal(base_dist, "its absolute value")


def _mixture(mixture_distribution: Any, component_distribution: Any, validate_args: bool | None = None) -> None:
    for d in _inside(component_distribution):
        if isinstance(d, AffineMixed) and any(x.dim() and x.shape[-1] != 1 for x in (d.loc, d.scale)):
            raise ValueError(
                f"MixtureSameFamily: expected components with the same atoms, got {d}. Where they differ, a density "
                "and a probability would be added: use one AffineTransform for all components."
            )


def _steps(transforms: list[Any]) -> Iterator[Transform]:
    for t in transforms:
        if isinstance(t, ComposeTransform):
            yield from _steps(t.parts)
        else:
            yield t


def _mapped(d: Any, t: Any) -> Any:
    """The distribution of an affine function of what a distribution draws; wrappers stay outside."""
    if isinstance(d, MaskedMixed):
        return _mapped(d.base_dist, t).mask(d._mask)
    if isinstance(d, IndependentMixed):
        return _mapped(d.base_dist, t).to_event(d.reinterpreted_batch_ndims)
    loc, scale = (t.loc, t.scale) if isinstance(t, AffineTransform) else (-t.inv.loc / t.inv.scale, 1 / t.inv.scale)
    if isinstance(d, AffineMixed):
        return AffineMixed.of(d.base_dist, loc + scale * d.loc, scale * d.scale)
    if isinstance(d, MixedDistribution):
        return AffineMixed.of(d, loc, scale)
    raise _refusal(d, t)


def _refusal(d: Any, transforms: Any) -> ValueError:
    return ValueError(
        f"TransformedDistribution: expected an affine map of a univariate mixed distribution, got {transforms} of {d}. "
        "A Jacobian is for densities w.r.t. Lebesgue measure: draw from this distribution, and transform the draw "
        "(pyro.deterministic); observed data, transform back."
    )


_ANSWERS: dict[type, Callable[..., Any]] = {
    MaskedDistribution: _masked,
    ExpandedDistribution: _expanded,
    Independent: _independent,
    dist.TransformedDistribution: _transformed,
    dist.FoldedDistribution: _folded,
    dist.MixtureSameFamily: _mixture,
}


_answering = threading.local()


def _answer(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call of a class of Pyro's returns in place of an instance; None where that is its own affair."""
    answer = _ANSWERS.get(cls)
    # A family's own method may call the constructor for what it is.
    if answer is None or getattr(_answering, "now", False):
        return None
    _answering.now = True
    try:
        return answer(*args, **kwargs)
    finally:
        _answering.now = False


COERCIONS.append(_answer)
