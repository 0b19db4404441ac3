"""
The one place that decides which site has its KL divergence in closed form, and computes it.

A closed form stands for the guide's and the model's log-probability at once, so it is taken only where the same scale
and the same masks lie on both. Elsewhere the two are drawn, where that is unbiased.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Independent,
    OneHotCategorical,
    Transform,
    Uniform,
    kl_divergence,
)

from pyro_sparse.distributions.discrete.kl import kl_bits, kl_categorical
from pyro_sparse.distributions.mixed.base import UnknownDivergence
from pyro_sparse.infer.expansion.law import is_point_mass, jumps, law
from pyro_sparse.infer.pyro_internals import is_that_of_the_bases

_ON_AN_INTERVAL = (ContinuousBernoulli, Uniform)


class NoClosedFormError(Exception):
    """Says why two distributions have no divergence that could stand for the log-probabilities of a site."""


def closed_form_divergences(
    model_trace: Any,
    guide_trace: Any,
    names: Collection[str],
    required: Collection[str],
    circular: Collection[str] = (),
) -> dict[str, Tensor]:
    """
    The KL divergence, scaled and masked, of each of these sites that has a closed form.

    Args:
        model_trace, guide_trace: with the sites.
        names: the sites to look at.
        required: those of them that must have one, because their log-probabilities cannot be drawn.
        circular: sites whose prior depends on what the guide draws from them: they have none.

    Raises:
        ValueError: naming the site, where a required one has none, or one that is reparameterised is a mixed variable,
            whose log-probabilities jump.
    """
    kls: dict[str, Tensor] = {}
    if not names:
        return kls
    for name in latent_sites(guide_trace, model_trace):
        if name not in names:
            continue
        guide_site, model_site = guide_trace.nodes[name], model_trace.nodes[name]
        try:
            if name in circular:
                raise NoClosedFormError("a prior that depends on what the guide draws after this site, from its value")
            kl = _of_sites(guide_site, model_site)
        except UnknownDivergence:
            if guide_site["fn"].has_rsample:
                raise  # sampled pathwise it would be biased
        except (NoClosedFormError, NotImplementedError) as why:
            if name in required or jumps(guide_site["fn"]):
                raise _no_divergence(name, guide_site, model_site, why) from why
        else:
            kls[name] = scale_and_mask(kl, scale=guide_site["scale"], mask=guide_site["mask"])
    if missing := [name for name in required if name not in kls]:
        raise _no_divergence(missing[0], guide_trace.nodes[missing[0]], model_trace.nodes.get(missing[0]), None)
    return kls


def latent_sites(trace: Any, other: Any) -> list[str]:
    """The latent sites of a trace that another has, too, in its order."""
    return [name for name in trace.stochastic_nodes if name in other.nodes]


def same_order(model_trace: Any, guide_trace: Any) -> bool:
    """Whether guide and model draw their sites in one order: a prior then depends on no draw after its site's own."""
    return latent_sites(guide_trace, model_trace) == latent_sites(model_trace, guide_trace)


def _of_sites(guide_site: Any, model_site: Any) -> Tensor:
    for what in ("scale", "mask"):
        if not _equal(guide_site[what], model_site[what]):
            raise NoClosedFormError(f"another {what} in the model than in the guide")
    return divergence(guide_site["fn"], model_site["fn"])


def divergence(p: Any, q: Any) -> Tensor:
    r"""
    :math:`\mathrm{KL}(p \| q)`, zero where both are masked: torch's own, but for point masses, which have none, and
    where torch's is not finite though the divergence is.

    Raises:
        NoClosedFormError, NotImplementedError: if there is none; the former says why.
    """
    if isinstance(p, MaskedDistribution) or isinstance(q, MaskedDistribution):
        (p, mask), (q, other) = _split_mask(p), _split_mask(q)
        if not _equal(mask, other):
            raise NoClosedFormError("another mask in the model than in the guide")
        return scale_and_mask(divergence(p, q), mask=None if mask is True else torch.as_tensor(mask))
    if isinstance(p, Independent) and isinstance(q, Independent):
        dims = min(p.reinterpreted_batch_ndims, q.reinterpreted_batch_ndims)
        if dims:
            return sum_rightmost(divergence(_without(p, dims), _without(q, dims)), dims)
    if law(p) is not p or law(q) is not q:
        raise NoClosedFormError("a mask at other dims in the model than in the guide")
    if is_point_mass(p):
        raise NoClosedFormError("a point mass, whose log_density would be left out")
    if isinstance(p, Bernoulli) and isinstance(q, Bernoulli):
        return kl_bits(p, q)
    for family in (Categorical, OneHotCategorical):
        if isinstance(p, family) and isinstance(q, family):
            return kl_categorical(p, q)
    _refuse_wrong_ones(p, q)
    return kl_divergence(p, q)


def _refuse_wrong_ones(p: Any, q: Any) -> None:
    """Pairs of which torch's divergence is not, or not always, that of the distributions."""
    if {ContinuousBernoulli, Uniform} == {kind for d in (p, q) for kind in _ON_AN_INTERVAL if isinstance(d, kind)}:
        raise NoClosedFormError("torch's divergence between these is infinite")
    if is_that_of_the_bases(p, q):  # that of what they transform
        for transform in [*p.transforms, *q.transforms]:
            if not transform.bijective:
                raise NoClosedFormError("a transform that is not one to one")
            if any(x.requires_grad for x in _tensors(transform)):
                raise NoClosedFormError("a transform that learns, of which the divergence would lack the derivative")


def _tensors(transform: Any) -> Iterator[Tensor]:
    """Its parameters, and those of what it is made of."""
    if isinstance(transform, torch.nn.Module):
        yield from transform.parameters()
    for value in vars(transform).values():
        if isinstance(value, Tensor):
            yield value
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, Transform):
                yield from _tensors(part)


def _split_mask(fn: Any) -> tuple[Any, Any]:
    return (fn.base_dist, fn._mask) if isinstance(fn, MaskedDistribution) else (fn, True)


def _without(fn: Any, dims: int) -> Any:
    """With so many event dims as batch dims again."""
    left = fn.reinterpreted_batch_ndims - dims
    return fn.base_dist.to_event(left) if left else fn.base_dist


def _equal(a: Any, b: Any) -> bool:
    """Of two scales or masks, each a number, a tensor or (no mask) None. Two tensors are compared on the host."""
    if a is b:
        return True
    same = (True if a is None else a) == (True if b is None else b)
    return bool(same.all()) if isinstance(same, Tensor) else bool(same)


def _no_divergence(name: str, guide_site: Any, model_site: Any, why: Exception | None) -> ValueError:
    got = guide_site["fn"] if model_site is None else f"{guide_site['fn']} and {model_site['fn']}"
    reason = f" ({why})" if str(why or "") else ""
    return ValueError(
        f"EstimatorELBO, site '{name}': expected a prior to which the guide's distribution has a closed-form KL "
        f"divergence, under the same scale and mask, got {got}{reason}. Use the same family, scale and mask in model "
        "and guide, or LeaveOneOut."
    )
