"""A check that a distribution keeps the conventions of Pyro, and is consistent with itself."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Size, Tensor

from pyro_sparse.distributions import MixedDistribution
from pyro_sparse.estimators.base import lists_outcomes
from pyro_sparse.testing import derivatives
from pyro_sparse.testing import mixed_distributions as mixed
from pyro_sparse.testing import sparse_distributions as sparse
from pyro_sparse.testing import stock_forms as stock
from pyro_sparse.testing.own_draws import in_half, law_in_half, own_draws
from pyro_sparse.testing.properties import leaves, offered, require, same

Check = Callable[[TorchDistributionMixin], None]


def check_distribution(d: TorchDistributionMixin, *, draws: int = 10_000) -> None:
    r"""
    Checks one instance of a Pyro distribution, and its expansion by a batch dim of size two.

    ========================= =========================================================================================
    every distribution        shapes of samples, log_prob, entropy and moments; samples lie in the support; parameters
                              meet their constraints; log_prob broadcasts; expand; mask and to_event in either order,
                              by method and by constructor; pickle and deepcopy; repr; one dtype of parameters, draws
                              and results; finite gradients; log_prob and its gradient at many of its own draws; NaN in,
                              NaN out of log_prob and cdf; values and gradients under ``torch.jit.trace``, ``no_grad``
                              and ``inference_mode``; second derivatives, in float64, by finite differences of the
                              gradient, where torch does not refuse them
    in half precision         in place of all this: samples, log_prob and its gradient at many of its own draws, and
                              that these have the law of the same parameters in float32
    has_rsample               shape of rsample; it carries gradients
    has_enumerate_support     shapes of enumerate_support; :math:`\sum_z p(z) = 1`; entropy, mean, variance and mode
                              against sums over all :math:`z`
    MixedDistribution         probabilities of the atoms and of the inside; total mass, entropy, mean, variance and cdf
                              against quadrature of log_prob; icdf; :math:`\mathrm{KL}(p \| p) = 0`; gradients and
                              score parts of the draws, also through expand, mask and to_event, by method and by
                              constructor, with ``has_rsample_`` before and after; TransformedDistribution is right or
                              refused
    has_sparse_support        values are distinct and hold exactly the :math:`z` with :math:`p(z) > 0`, then padding
                              with log-probability -inf; unions; support_size; num_outcomes; to_dense; mask keeps it;
                              support_rows has one row for each, in the order of the elements
    ========================= =========================================================================================

    What a family does not have is skipped: an optional method that raises NotImplementedError, a mean or variance
    that is NaN throughout (outcomes that are labels), sums over outcomes under ``to_event``.

    To have gradients checked, build the distribution from tensors that require them; all leaves that log_prob and
    entropy depend on are found. To have zeros checked, build it with some. A masked distribution does not sum to one:
    pass the one inside, it is masked here. The state of torch's random number generators is put back.

    Args:
        d: an instance, best with a batch shape of two different sizes, one of which may be one.
        draws: how many of its own draws, over the batch. In half precision a right family fails once in 10^9 numbers.

    Raises:
        AssertionError: naming the first property that fails, with what was expected and what was got. Also where a
            method raises: that error is the cause.
        TypeError: if ``d`` is not a Pyro distribution.

    Example:
        >>> from pyro_sparse.distributions import SparseCategorical
        >>> check_distribution(SparseCategorical(torch.randn(3, 5, requires_grad=True)))

        A relaxed one-hot vector is not one of the K outcomes that it claims to have:

        >>> import pyro.distributions as dist
        >>> class Relaxed(dist.OneHotCategorical):
        ...     def sample(self, sample_shape=torch.Size()):
        ...         return super().sample(sample_shape) * 0.9
        >>> check_distribution(Relaxed(logits=torch.zeros(3)))
        Traceback (most recent call last):
        ...
        AssertionError: check_distribution(Relaxed): sample: expected values in the support OneHot(), got ...
    """
    if not isinstance(d, TorchDistributionMixin):
        raise TypeError(
            f"check_distribution: expected an instance of a Pyro distribution, got {type(d).__name__}. "
            "Build one, and use pyro.distributions in place of torch.distributions."
        )
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        who = f"check_distribution({type(d).__name__})"
        many = (functools.partial(own_draws, count=draws), functools.partial(law_in_half, count=draws))
        if in_half(d):
            for half_check in (_sample, *many):
                _run(half_check, d, who)
            return
        for instance, how in ((d, ""), (copy.copy(d).expand((2, *d.batch_shape)), " after expand")):
            for check in _checks_for(instance):
                _run(check, instance, f"check_distribution({type(d).__name__}{how})")
        _run(many[0], d, who)
        if isinstance(d, MixedDistribution):
            _run(mixed.draws, d, who)
        for check in (derivatives.traced, derivatives.second_derivatives):
            _run(check, d, who)


def _checks_for(d: TorchDistributionMixin) -> Iterator[Check]:
    yield from (_repr, _parameters, _sample, _log_prob, _batch_shapes, _expand, _wrappers, _copies, _dtypes, _gradients)
    yield from (stock.constructors, stock.nan)
    if d.has_rsample:
        yield _rsample
    if isinstance(d, MixedDistribution):
        yield from (mixed.strata, mixed.integrals, mixed.quantiles, mixed.divergence_from_itself, mixed.transformed)
    # Under to_event the outcomes are a cartesian product, which Pyro does not enumerate.
    if lists_outcomes(d):
        yield from (_enumerate_support, _sums_over_outcomes)
        if getattr(d, "has_sparse_support", False):
            yield from (sparse.sparse_support, sparse.unions, sparse.sparse_family)
    if getattr(d, "has_sparse_support", False):
        yield sparse.support_rows


def _run(check: Check, d: TorchDistributionMixin, who: str) -> None:
    torch.manual_seed(0)
    try:
        check(d)
    except AssertionError as failure:
        raise AssertionError(f"{who}: {failure}") from failure.__cause__
    except Exception as error:
        name = getattr(check, "func", check).__name__.strip("_")
        raise AssertionError(f"{who}: {name}: expected no error, got {error!r}") from error


def _facts(d: TorchDistributionMixin, value: Tensor) -> dict[str, Tensor]:
    """All that the distribution says of itself with the batch shape in front."""
    facts: dict[str, Callable[[], Tensor]] = {
        "log_prob": lambda: d.log_prob(value),
        "entropy": lambda: d.entropy(),
        "mean": lambda: d.mean,
        "variance": lambda: d.variance,
        "mode": lambda: d.mode,
    }
    if getattr(d, "has_sparse_support", False):
        facts["support_size"] = lambda: d.support_size
    return {name: fact for name, method in facts.items() if (fact := offered(method)) is not None}


def _repr(d: TorchDistributionMixin) -> None:
    require(type(d).__name__ in repr(d), "repr", f"one that names {type(d).__name__}", repr(d))


def _parameters(d: TorchDistributionMixin) -> None:
    for name, constraint in d.arg_constraints.items():
        parameter = getattr(d, name, None)
        if isinstance(parameter, Tensor) and not constraints.is_dependent(constraint):
            require(constraint.check(parameter).all(), f"parameter {name}", constraint, parameter)


def _sample(d: TorchDistributionMixin) -> None:
    for sample_shape in ((), (5,), (2, 3)):
        value = d.sample(Size(sample_shape))
        expected = (*sample_shape, *d.batch_shape, *d.event_shape)
        require(value.shape == expected, f"shape of sample({sample_shape})", expected, tuple(value.shape))
        require(not value.requires_grad, "sample", "no gradient", "a tensor that requires one")
        require(d.support.check(value).all(), "sample", f"values in the support {d.support}", value)
        log_prob = d.log_prob(value)
        require(log_prob.isfinite().all(), "log_prob of a sample", "finite values", log_prob)


def _rsample(d: TorchDistributionMixin) -> None:
    value = d.rsample(Size((5,)))
    expected = (5, *d.batch_shape, *d.event_shape)
    require(value.shape == expected, "shape of rsample((5,))", expected, tuple(value.shape))
    differentiable = d.log_prob(value.detach()).requires_grad
    require(value.requires_grad or not differentiable, "rsample", "a gradient", "a constant")


def _log_prob(d: TorchDistributionMixin) -> None:
    value, batch = d.sample(), d.batch_shape
    log_prob = d.log_prob(value)
    require(log_prob.shape == batch, "shape of log_prob", tuple(batch), tuple(log_prob.shape))
    more = d.sample(Size((3, 2)))
    rows = torch.stack([d.log_prob(v) for v in more.reshape(6, *value.shape)]).reshape(3, 2, *batch)
    same("log_prob of values with more dims on the left", d.log_prob(more), rows)
    for dim in range(len(batch)):
        thin = value.narrow(dim, 0, 1)
        same(f"log_prob of a value of size one at dim {dim}", d.log_prob(thin), d.log_prob(thin.expand(value.shape)))
    bare = value.reshape(-1, *d.event_shape)[0]
    same("log_prob of a value with no batch dims", d.log_prob(bare), d.log_prob(bare.expand(value.shape)))


def _batch_shapes(d: TorchDistributionMixin) -> None:
    for name, fact in _facts(d, d.sample()).items():
        of_event = name in ("mean", "variance", "mode")
        expected = d.batch_shape + d.event_shape if of_event else d.batch_shape
        require(fact.shape == expected, f"shape of {name}", tuple(expected), tuple(fact.shape))


def _expand(d: TorchDistributionMixin) -> None:
    value, batch = d.sample(), d.batch_shape
    # Expanding a wrapper may change it in place, so each expansion starts from a copy.
    once = copy.copy(d).expand((2, *batch))
    ways = {
        "expand": (once, (2, *batch)),
        "expand_by": (copy.copy(d).expand_by(Size((3,))), (3, *batch)),
        "expand of an expanded one": (copy.copy(once).expand((3, 2, *batch)), (3, 2, *batch)),
        "expand to the same shape": (copy.copy(d).expand(batch), tuple(batch)),
    }
    for how, (e, shape) in ways.items():
        require(e.batch_shape == shape, f"batch_shape after {how}", shape, tuple(e.batch_shape))
        require(e.event_shape == d.event_shape, f"event_shape after {how}", d.event_shape, e.event_shape)
        got = _facts(e, value)
        for name, fact in _facts(d, value).items():
            require(name in got, f"{name} after {how}", "to be kept", "NotImplementedError")
            same(f"{name} after {how}", got[name], fact.expand(Size(shape) + fact.shape[len(batch) :]))
    try:
        shrunk = once.expand((3, *batch)).batch_shape
    except (RuntimeError, ValueError):
        return
    raise AssertionError(f"expand of batch shape {(2, *batch)} to {(3, *batch)}: expected an error, got {shrunk}")


def _wrappers(d: TorchDistributionMixin) -> None:
    value, batch = d.sample(), d.batch_shape
    log_prob = d.log_prob(value)
    for shape in (batch, Size((2, *batch))):
        mask = (torch.arange(shape.numel(), device=value.device) % 2 == 0).reshape(shape)
        masked = d.mask(mask)
        require(masked.batch_shape == shape, "batch_shape after mask", tuple(shape), tuple(masked.batch_shape))
        same("log_prob after mask", masked.log_prob(value), torch.where(mask, log_prob, 0.0))
    if not batch:
        return
    event = d.to_event(1)
    shapes = tuple(map(tuple, (event.batch_shape, event.event_shape)))
    expected = (tuple(batch[:-1]), (*batch[-1:], *d.event_shape))
    require(shapes == expected, "batch and event shape after to_event(1)", expected, shapes)
    same("log_prob after to_event(1)", event.log_prob(value), log_prob.sum(-1))
    mask = (torch.arange(batch.numel(), device=value.device) % 2 == 0).reshape(batch)
    both = d.mask(mask).to_event(1)
    same("log_prob after mask, then to_event", both.log_prob(value), torch.where(mask, log_prob, 0.0).sum(-1))
    mask = mask[..., 0]
    both = event.mask(mask)
    same("log_prob after to_event, then mask", both.log_prob(value), torch.where(mask, log_prob.sum(-1), 0.0))


def _copies(d: TorchDistributionMixin) -> None:
    value = d.sample()
    facts = _facts(d, value)
    pickled = pickle.loads(pickle.dumps(d))
    # torch refuses to deepcopy a tensor that has a history; in the pickled copy none has.
    for how, twin in (("pickle", pickled), ("deepcopy", copy.deepcopy(pickled))):
        require(type(twin) is type(d), f"type after {how}", type(d).__name__, type(twin).__name__)
        got = _facts(twin, value)
        for name, fact in facts.items():
            same(f"{name} after {how}", got[name], fact)
            wanted = fact.requires_grad
            require(got[name].requires_grad == wanted, f"requires_grad of {name} after {how}", wanted, not wanted)


def _dtypes(d: TorchDistributionMixin) -> None:
    parameters = [p for name in d.arg_constraints if isinstance(p := getattr(d, name, None), Tensor)]
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    value, default = d.sample(), torch.get_default_dtype()
    facts = _facts(d, value)
    require(len(dtypes) <= 1, "dtype of the parameters", "one", dtypes)
    if dtypes:
        (dtype,) = dtypes
        for name, fact in {**facts, "sample": value, "d()": d()}.items():
            require(not fact.is_floating_point() or fact.dtype == dtype, f"dtype of {name}", dtype, fact.dtype)
    try:
        torch.set_default_dtype(torch.float32 if default == torch.float64 else torch.float64)
        for name, fact in _facts(pickle.loads(pickle.dumps(d)), value).items():
            same(f"{name} under another default dtype", fact, facts[name])
    finally:
        torch.set_default_dtype(default)


def _gradients(d: TorchDistributionMixin) -> None:
    if lists_outcomes(d):
        results = {"log_prob over all outcomes": sparse.log_probs_of(d)[1]}
    else:
        results = {"log_prob of samples": d.log_prob(d.sample(Size((5,))))}
    if (entropy := offered(lambda: d.entropy())) is not None:
        results["entropy"] = entropy
    for name, result in results.items():
        require(not result.isnan().any(), name, "no NaN", result)
        parameters = list(leaves(result))
        if not parameters:
            continue
        # A log-probability of -inf gets weight zero, as in the sum over p(z) log p(z).
        weights = result.isfinite().to(result.dtype)
        for gradient in torch.autograd.grad(result, parameters, weights, retain_graph=True):
            require(gradient.isfinite().all(), f"gradient of {name}", "finite values", gradient)


# Distributions that list their outcomes.


def _enumerate_support(d: TorchDistributionMixin) -> None:
    wide, narrow = d.enumerate_support(), d.enumerate_support(expand=False)
    n = len(narrow)
    expected = (n, *d.batch_shape, *d.event_shape)
    require(wide.shape == expected, "shape of enumerate_support()", expected, tuple(wide.shape))
    expected = (n, *(1,) * len(d.batch_shape), *d.event_shape)
    require(narrow.shape == expected, "shape of enumerate_support(expand=False)", expected, tuple(narrow.shape))
    same("enumerate_support(expand=False), expanded", narrow.expand(wide.shape), wide)
    require(d.support.check(wide).all(), "enumerate_support", f"values in the support {d.support}", wide)
    rows = torch.stack([d.log_prob(value) for value in wide])
    same("log_prob of enumerate_support(expand=False)", d.log_prob(narrow), rows)
    same("log_prob of enumerate_support()", d.log_prob(wide), rows)


def _sums_over_outcomes(d: TorchDistributionMixin) -> None:
    values, log_probs = sparse.log_probs_of(d)
    probs = log_probs.exp()
    same("sum of probabilities over enumerate_support()", probs.sum(0), torch.ones_like(probs[0]))
    facts = _facts(d, values[0])
    if "entropy" in facts:
        terms = torch.where(probs > 0, -probs * torch.where(probs > 0, log_probs, 0.0), 0.0)
        same("entropy", facts["entropy"], terms.sum(0))
    if "mode" in facts:
        same("log_prob of the mode", d.log_prob(facts["mode"]), log_probs.amax(0))
    weights = probs.reshape(probs.shape + (1,) * len(d.event_shape))
    mean = (weights * values).sum(0)
    moments = {"mean": mean, "variance": (weights * (values - mean).square()).sum(0)}
    for name, moment in moments.items():
        if name in facts and not facts[name].isnan().all():
            same(name, facts[name], moment)
