"""
What `check_distribution` checks of derivatives: that a trace has those of an eager run, and that a second derivative is
right where it is given.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.utils import lazy_property

from pyro_sparse.distributions import MixedDistribution
from pyro_sparse.distributions.univariate.affine import AffineMixed
from pyro_sparse.distributions.unwrapped import unwrapped
from pyro_sparse.testing.mixed_distributions import followed, mass_and_density
from pyro_sparse.testing.properties import leaves, offered, require

#: of tensors: a distribution, and what it says
Maker = Callable[..., Any]
Function = Callable[..., Tensor]


def traced(d: Any) -> None:
    """Under torch.jit.trace, and under no_grad and inference_mode, a method gives what it gives in an eager run."""
    tensors, made_of = _taken_apart(d)
    check_traced(made_of, tensors)


def check_traced(made_of: Maker, tensors: list[Tensor]) -> None:
    """As :func:`traced`, for a distribution as a function of its parameters."""
    for name, function in _functions(made_of, tensors).items():
        eager = offered(partial(_value_and_gradient, function, tensors))
        if eager is None:  # torch may lack a derivative
            continue
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.manual_seed(0)
                _close(f"{name} under {mode.__name__}", function(*tensors), eager[0])
        if not eager[0].requires_grad or name in ("mean", "variance"):  # made as the entropy is
            continue
        with warnings.catch_warnings(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            warnings.simplefilter("ignore")  # torch.jit is deprecated, and warns of every value that is looked at
            elsewhere = [(t.detach() * 1.001).requires_grad_() for t in tensors]
            of_trace = _value_and_gradient(torch.jit.trace(function, elsewhere, check_trace=False), tensors)
        _close(f"{name} under torch.jit.trace", of_trace[0], eager[0])
        for got, expected in zip(of_trace[1:], eager[1:], strict=True):
            _close(f"gradient of {name} under torch.jit.trace", got, expected)


def second_derivatives(d: Any) -> None:
    """A derivative of the gradient, at fixed noise, is that of finite differences; or torch refuses to take it."""
    tensors, made_of = _taken_apart(d)
    if tensors and all(t.dtype == torch.float64 for t in tensors) and not _overlap(d):
        check_second_derivatives(made_of, tensors)


def check_second_derivatives(made_of: Maker, tensors: list[Tensor]) -> None:
    """As :func:`second_derivatives`, for a distribution as a function of its parameters, in float64."""
    step = [1e-5 * torch.empty_like(t).uniform_(0.5, 1.0) for t in tensors]
    for name, function in _functions(made_of, tensors).items():
        try:
            value, *gradient = _value_and_gradient(function, tensors, create_graph=True)
            along = sum((g * v).sum() for g, v in zip(gradient, step, strict=True))
            got = _gradient(torch.as_tensor(along), tensors)
        except (RuntimeError, NotImplementedError):
            continue  # an error is as good as what is right
        if not value.requires_grad:  # nor need it exist beside these parameters: a draw where a probability is zero
            continue
        again, family = function, unwrapped(made_of(*tensors))
        if name in ("d()", "rsample") and isinstance(family, AffineMixed):
            continue  # the draw of its base, which is checked by itself, through a map of plain operations
        if name in ("d()", "rsample") and isinstance(family, MixedDistribution):
            again = offered(partial(_following, made_of, value.detach(), tensors, step, name)) or function
        near, far = _difference(again, tensors, step, 1.0), _difference(again, tensors, step, 2.0)
        largest = 1 + max(float(x.detach().abs().max()) for x in gradient)
        for one, expected, coarser in zip(got, near, far, strict=True):
            wrong = (one - expected).abs() > 1e-9 * largest
            wrong &= (expected - coarser).abs() < 1e-9 * largest  # elsewhere there is none: at a probability of zero
            prop = f"derivative of the gradient of {name}"
            require(not wrong.any(), prop, expected[wrong] / 1e-5, one[wrong] / 1e-5)


def _difference(function: Function, tensors: list[Tensor], step: list[Tensor], times: float) -> list[Tensor]:
    """Of the gradient, along a step."""
    ends = (
        [(t.detach() + s * times * v).requires_grad_() for t, v in zip(tensors, step, strict=True)] for s in (1, -1)
    )
    up, down = (_value_and_gradient(function, end)[1:] for end in ends)
    return [(a - b) / (2 * times) for a, b in zip(up, down, strict=True)]


def _following(made_of: Maker, z: Tensor, tensors: list[Tensor], step: list[Tensor], name: str) -> Function:
    """A draw that stays at its quantile where the parameters move by a step: what a mixed draw's gradient is of."""
    here = [t.detach() for t in tensors]
    d = unwrapped(made_of(*here))
    pathwise = name == "rsample" or d.has_rsample
    with torch.no_grad():
        up, down = (
            mass_and_density(unwrapped(made_of(*(t + s * v for t, v in zip(here, step, strict=True)))), z, pathwise)[0]
            for s in (1, -1)
        )
        moved = (down - up) / (2 * mass_and_density(d, z, pathwise)[1])
        for atom in d.support.atoms:
            moved = moved.masked_fill(z == atom, 0.0)

    def function(*others: Tensor) -> Tensor:
        times = (others[0].detach() - here[0]).sum() / step[0].sum()
        at = z + times * moved
        there = followed(unwrapped(made_of(*others)), at, pathwise)
        return at + (there - there.detach())

    return function


def _taken_apart(d: Any) -> tuple[list[Tensor], Maker]:
    """The tensors in a distribution that have a gradient, as leaves, and what makes it of others in their place."""
    tensors: list[Tensor] = []
    known: dict[int, Tensor | int] = {}  # a number is that of a tensor with a gradient

    class _Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            if not isinstance(obj, Tensor):
                return None
            if id(obj) not in known:
                known[id(obj)] = len(tensors) if obj.requires_grad else obj
                tensors.extend([obj] if obj.requires_grad else [])
            return id(obj)

        def reducer_override(self, obj: Any) -> Any:
            if not isinstance(obj, Distribution) or type(obj).__reduce_ex__ is not object.__reduce_ex__:
                return NotImplemented
            make, arguments, state, *rest = cast(tuple[Any, ...], obj.__reduce_ex__(2))
            return make, arguments, _without_caches(obj, state), *rest

    class _Unpickler(pickle.Unpickler):
        def __init__(self, others: tuple[Tensor, ...]) -> None:
            super().__init__(io.BytesIO(buffer.getvalue()))
            self.others = others

        def persistent_load(self, key: int) -> Tensor:
            at = known[key]
            return self.others[at] if isinstance(at, int) else at

    buffer = io.BytesIO()
    _Pickler(buffer).dump(d)

    def made_of(*others: Tensor) -> Any:
        return _Unpickler(others).load()

    return [t.detach().clone().requires_grad_() for t in tensors], made_of


def _without_caches(d: Distribution, state: dict[str, Any]) -> dict[str, Any]:
    """What was computed from the parameters, and kept, is no parameter."""
    given = state.get("_param")  # of logits and probs, which are both kept
    return {
        name: value
        for name, value in state.items()
        if not isinstance(getattr(type(d), name, None), lazy_property) or (given is not None and value is given)
    }


def _overlap(d: Any) -> bool:
    """Whether tensors that are kept come from one another, so that they cannot be moved one by one."""
    kept: list[Tensor] = []

    class _Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            if not isinstance(obj, Tensor):
                return None
            if obj.requires_grad and all(obj is not t for t in kept):
                kept.append(obj)
            return id(obj)

    _Pickler(io.BytesIO()).dump(d)
    below = [id(leaf) for t in kept for leaf in leaves(t)]
    return len(below) > len(set(below))


def _functions(made_of: Maker, tensors: list[Tensor]) -> dict[str, Function]:
    """The methods that a distribution has, as functions of its tensors."""
    d = made_of(*tensors)
    value = d.sample()
    methods: dict[str, Callable[[Any], Tensor]] = {
        "log_prob": lambda d: d.log_prob(value),
        "entropy": lambda d: d.entropy(),
        "mean": lambda d: d.mean,
        "variance": lambda d: d.variance,
    }
    if value.is_floating_point():
        middle = torch.full(d.batch_shape, 0.6, dtype=value.dtype, device=value.device)
        methods |= {"d()": lambda d: d(), "rsample": lambda d: d.rsample(), "icdf": lambda d: d.icdf(middle)}
    return {name: _of_tensors(method, made_of) for name, method in methods.items() if _has(d, method)}


def _has(d: Any, method: Callable[[Any], Tensor]) -> bool:
    try:
        return offered(lambda: method(d)) is not None
    except ValueError:  # e.g. a slab that cannot be drawn pathwise
        return False


def _of_tensors(method: Callable[[Any], Tensor], made_of: Maker) -> Function:
    return lambda *tensors: method(made_of(*tensors))


def _value_and_gradient(function: Function, tensors: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    value = function(*tensors)
    # Bent, so that a derivative of the gradient has all its terms.
    return [value, *_gradient(value.where(value.isfinite(), 0.0).sin().sum(), tensors, create_graph)]


def _gradient(value: Tensor, tensors: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(t) for t in tensors]
    gradient = torch.autograd.grad(value, tensors, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(gradient, tensors, strict=True)]


def _close(prop: str, got: Tensor, expected: Tensor) -> None:
    tol = torch.finfo(expected.dtype).eps ** 0.5 / 10
    require(torch.allclose(got, expected, rtol=tol, atol=tol, equal_nan=True), prop, expected, got)
