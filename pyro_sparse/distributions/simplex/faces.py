r"""
Distributions over the non-empty faces of the simplex, as vectors of K bits: which coordinates of a composition are not
zero. The base of these families.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_sparse._autograd import is_transformed
from pyro_sparse.distributions.checks import check_expand, on_simplex_only, refuse_logits
from pyro_sparse.distributions.constraints import face
from pyro_sparse.distributions.half_precision import HalfPrecision

MAX_ENUMERABLE = 12  # vertices: 4095 faces


class FaceDistribution(HalfPrecision, TorchDistribution):
    """
    The base of these families. One has ``num_classes`` vertices and one parameter, :attr:`like`; :meth:`log_mass`,
    :meth:`sample`, :meth:`entropy`, :attr:`marginals`, :attr:`mode` and :attr:`size_log_probs`.
    """

    support = face
    num_classes: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        refuse_logits(cls.__name__, kwargs)
        return super().__new__(cls)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether there are few enough faces: at most 12 vertices."""
        return self.num_classes <= MAX_ENUMERABLE

    @property
    def marginals(self) -> Tensor:
        """The probability that each vertex is in the face, ``(*batch, K)``."""
        raise NotImplementedError

    @property
    def size_log_probs(self) -> Tensor:
        r""":math:`\log P(|F| = n)` for n = 1, ..., K, ``(*batch, K)``."""
        raise NotImplementedError

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of faces, as bits, ``(*batch, K)``."""
        if self._validate_args:
            self._validate_sample(value)
            return self.log_mass(value)
        ok = self.support.check(value)
        return on_simplex_only(self.log_mass(torch.where(ok.unsqueeze(-1), value, 1.0)), value, ok)

    def log_mass(self, value: Tensor) -> Tensor:
        """As :meth:`log_prob`, of what is known to be a face."""
        raise NotImplementedError

    def _remade(self, parameter: Tensor) -> FaceDistribution:
        """The same family with another parameter, which needs no check."""
        raise NotImplementedError

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        """A view with a larger batch shape."""
        batch_shape = check_expand(type(self).__name__, self.batch_shape, batch_shape)
        new = self._remade(self.like.expand(batch_shape + self.like.shape[len(self.batch_shape) :]))
        new._validate_args = self._validate_args
        return new

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def widened(self) -> FaceDistribution:
        new = self._remade(self.like.float())
        new._validate_args = self._validate_args
        return new

    def double(self) -> FaceDistribution:
        """The same distribution in float64."""
        return self if self.like.dtype == torch.float64 else self._remade(self.like.double())

    def to(self, like: Tensor) -> FaceDistribution:
        """The same distribution with the dtype and device of a tensor."""
        if (self.like.dtype, self.like.device) == (like.dtype, like.device):
            return self
        new = self._remade(self.like.to(like))
        new._validate_args = self._validate_args
        return new

    def product_minus_one(self, x_minus_one: Tensor) -> Tensor:
        r""":math:`E \prod_k x_k^{f_k} - 1` for :math:`x_k - 1` in (-1, 0], ``(*batch, nodes, K)``: nothing cancels."""
        raise NotImplementedError

    def tilted(self, log_x: Tensor) -> tuple[Tensor, Tensor]:
        r"""
        :math:`E \prod_j x_j^{f_j} - 1` and :math:`E f_k \prod_{j \ne k} x_j^{f_j}`. With :math:`x_k = e^{-t a_k}`, one
        integral over t gives expectations of functions of :math:`\sum_k a_k f_k`.

        Args:
            log_x: at most zero, ``(*batch, nodes, K)``.

        Returns:
            ``(*batch, nodes)`` and ``(*batch, nodes, K)``.
        """
        return self._differentiated(log_x)[1:]

    def tilted_square(self, log_x: Tensor, a: Tensor) -> Tensor:
        r""":math:`E (\sum_k a_k f_k)^2 \prod_k x_k^{f_k}`, ``(*batch, nodes)``, for a with shape ``(*batch, K)``."""
        if torch.is_inference_mode_enabled():  # in which nothing can be differentiated
            with torch.inference_mode(False):
                return self._remade(self.like.clone()).tilted_square(log_x.clone(), a.clone()).detach()
        with torch.enable_grad():
            a = a.unsqueeze(-2)
            ax = a * log_x.exp()
            if is_transformed():
                others, pull = _with_pullback(lambda x_less: self._slope(x_less)[1], self._x_less(log_x))
                (pairs,) = pull(ax.expand(others.shape))
            else:
                x_less, _, others = self._differentiated(log_x, again=True)
                (pairs,) = torch.autograd.grad((others * ax).sum(), x_less, create_graph=True)  # of different vertices
            square = (ax * (a * others + pairs)).sum(-1)
        return square if torch.is_grad_enabled() else square.detach()

    def _differentiated(self, log_x: Tensor, again: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """x - 1, :meth:`product_minus_one` of it, and its derivatives."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self._remade(self.like.clone())._differentiated(log_x.clone(), again)
        if is_transformed():
            x_less = self._x_less(log_x)
            return x_less, *self._slope(x_less)
        graph = again or (torch.is_grad_enabled() and (log_x.requires_grad or self.like.requires_grad))
        with torch.enable_grad():
            x_less = self._x_less(log_x)
            x_less = x_less if x_less.requires_grad else x_less.clone().requires_grad_()
            less = self.product_minus_one(x_less)
            (others,) = torch.autograd.grad(less.sum(), x_less, create_graph=graph)
        return (x_less, less, others) if graph else (x_less.detach(), less.detach(), others)

    def _x_less(self, log_x: Tensor) -> Tensor:
        """x - 1, one for each of the faces' batch: its derivative is summed over what it is shared by."""
        shape = torch.broadcast_shapes(log_x.shape[:-2], self.batch_shape) + log_x.shape[-2:]
        return torch.expm1(log_x).expand(shape)

    def _slope(self, x_less: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`product_minus_one` and its derivatives, where ``torch.func`` is what differentiates."""
        less, pull = _with_pullback(self.product_minus_one, x_less)
        return less, pull(torch.ones_like(less))[0]

    @property
    def mean(self) -> Tensor:
        """The marginals."""
        return self.marginals

    @property
    def variance(self) -> Tensor:
        """Of each bit."""
        return self.marginals * (1 - self.marginals)

    @property
    def expected_size(self) -> Tensor:
        """The expected number of vertices, ``batch_shape``."""
        return self.marginals.sum(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        r"""All :math:`2^K - 1` faces, ``(2**K - 1, *batch, K)``; size one for the batch if not ``expand``."""
        K = self.num_classes
        if not self.has_enumerate_support:
            raise NotImplementedError(
                f"{type(self).__name__}.enumerate_support: expected at most {MAX_ENUMERABLE} vertices, got {K}, of "
                f"which there are {2**K - 1} faces. Use an estimator that draws, such as LeaveOneOut."
            )
        numbers = torch.arange(1, 2**K, device=self.like.device)
        faces = (numbers.unsqueeze(-1) >> torch.arange(K, device=self.like.device) & 1).to(self.like.dtype)
        faces = faces.reshape(-1, *(1,) * len(self.batch_shape), K)
        return faces.expand(-1, *self.batch_shape, K) if expand else faces

    @property
    def like(self) -> Tensor:
        """The parameter, which has the dtype and device of values."""
        raise NotImplementedError


def _with_pullback(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]:
    value, pull = torch.func.vjp(f, x)  # type: ignore[misc]  # it has a third part on demand
    return value, pull
