"""
Distributions with parameters in half precision: they compute in float32, and what they give is cast; under
``torch.autocast`` their draws alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions import Distribution

from pyro_sparse._precision import HALF, narrowed, widened

_DRAWS = ("__call__", "sample", "rsample", "icdf")
_OTHERS = (
    *("log_prob", "score_parts", "cdf", "entropy", "mean", "variance", "mode", "point_estimate"),
    *("prob_zero", "prob_one", "prob_interior", "prob_nonzero", "expected_l0"),
    *("marginals", "size_log_probs", "expected_size"),
)


class HalfPrecision:
    """
    Lets a family know nothing of half precision: each of its public methods (``_DRAWS``, ``_OTHERS``), its own and
    those that it inherits, is run on its twin in float32. Values in half precision are widened for any parameters.

    A family says which :attr:`dtype` its parameters have, and what its twin is.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in (*_DRAWS, *_OTHERS):
            method = inspect.getattr_static(cls, name, None)
            # torch's own only say that there is none.
            if method is None or method is inspect.getattr_static(Distribution, name, None):
                continue
            function = method.fget if isinstance(method, property) else method
            if callable(function) and not hasattr(function, "in_float32"):
                wrapped = _in_float32(function, name in _DRAWS)
                setattr(cls, name, property(wrapped) if isinstance(method, property) else wrapped)

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameters."""
        raise NotImplementedError

    def widened(self) -> Any:
        """The same distribution, with parameters in float32. Called only where they are in half precision."""
        raise NotImplementedError

    def _widened_value(self, value: Tensor) -> Tensor:
        return widened(value)

    def _rounded(self, draw: Tensor, dtype: torch.dtype) -> Tensor:
        """A draw in half precision, which stays where it is in the support: on an atom or a face, or inside."""
        return draw.to(dtype)


def in_float32(d: Any) -> Any:
    """A distribution, or its twin if its parameters are in half precision."""
    return d.widened() if isinstance(d, HalfPrecision) and d.dtype in HALF else d


def pair_in_float32(divergence: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """A KL divergence that is computed between twins, where both are in half precision cast."""

    @functools.wraps(divergence)
    def widened_pair(p: Any, q: Any) -> Tensor:
        result = divergence(in_float32(p), in_float32(q))
        dtypes = [d.dtype for d in (p, q) if isinstance(d, HalfPrecision)]
        return narrowed(result, dtypes[0]) if len(set(dtypes)) == 1 and dtypes[0] in HALF else result

    return widened_pair


def _in_float32(method: Callable[..., Any], draws: bool) -> Callable[..., Any]:
    @functools.wraps(method)
    def in_float32(self: HalfPrecision, *args: Any, **kwargs: Any) -> Any:
        if self.dtype not in HALF and not any(isinstance(x, Tensor) and x.dtype in HALF for x in args):
            return method(self, *args, **kwargs)
        dtype, values = self.dtype, [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
        args = tuple(self._widened_value(x) if isinstance(x, Tensor) and x.dtype in HALF else x for x in args)
        if dtype not in HALF:
            return method(self, *args, **kwargs)
        result = method(self.widened(), *args, **kwargs)
        for value in values:
            dtype = torch.promote_types(dtype, value.dtype)
        return self._rounded(result, dtype) if draws else _cast(result, dtype)

    in_float32.in_float32 = True  # type: ignore[attr-defined]
    return in_float32


def _cast(result: Any, dtype: torch.dtype) -> Any:
    if isinstance(result, ScoreParts):
        return ScoreParts(*(_cast(part, dtype) for part in result))
    return narrowed(result, dtype) if isinstance(result, Tensor) and result.is_floating_point() else result
