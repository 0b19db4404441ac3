"""The faces of the mixed variable with the largest entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from pyro_sparse._precision import categorical
from pyro_sparse.distributions.checks import check_floating, num_vertices
from pyro_sparse.distributions.simplex.faces import FaceDistribution


class MaxEntropyFaces(FaceDistribution):
    r"""
    .. math:: P(f) \propto \frac{2^{N (|f| - 1)}}{(|f| - 1)!}

    The faces of the mixed variable with the largest entropy, face and point together, where each continuous coordinate
    counts with N bits of precision; the point is then uniform on its face, whose volume is :math:`1 / (|f| - 1)!`.

    **Base measure:** counting on the non-empty subsets of K vertices; **rsample:** no; **enumerable:** for K <= 12,
    where ``infer={"enumerate": "parallel"}`` says so.

    ========== ================= ===============
    shape      ``bits``          a value
    ========== ================= ===============
    batch      ``(*batch,)``     ``(*batch, K)``
    event                        ``(K,)``
    ========== ================= ===============

    >>> d = MaxEntropyFaces(10, torch.tensor(0.0))
    >>> sizes = torch.arange(1.0, 11.0)
    >>> (d.entropy() - (d.size_log_probs.exp() * torch.lgamma(sizes)).sum()).item()  # of face and point together
    5.090...

    Args:
        num_classes: K, at least 2.
        bits: N, real.
        validate_args: as in torch.

    Raises:
        ValueError: fewer than two vertices; NaN or infinite bits.

    Reference: A. Farinhas et al., *Sparse communication via mixed distributions*, ICLR 2022, §4.3; the number of
    faces of each size, which the published code leaves out, is counted here.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"bits": constraints.real}

    def __init__(self, num_classes: int, bits: Tensor | float, *, validate_args: bool | None = None) -> None:
        self.num_classes = num_vertices("MaxEntropyFaces", (num_classes,))
        check_floating("MaxEntropyFaces", "bits", bits)
        self.bits = torch.as_tensor(bits, dtype=None if isinstance(bits, Tensor) else torch.get_default_dtype())
        super().__init__(self.bits.shape, Size([num_classes]), validate_args=validate_args)

    def _remade(self, parameter: Tensor) -> MaxEntropyFaces:
        return MaxEntropyFaces(self.num_classes, parameter, validate_args=False)

    @property
    def like(self) -> Tensor:
        return self.bits

    @lazy_property
    def face_log_probs(self) -> Tensor:
        r""":math:`\log P(f)` of one face of each size, ``(*batch, K)``."""
        return self._weights - (self._weights + self._log_counts).logsumexp(-1, keepdim=True)

    @property
    def _sizes(self) -> Tensor:
        return torch.arange(1, self.num_classes + 1, dtype=self.bits.dtype, device=self.bits.device)

    @property
    def _weights(self) -> Tensor:
        n = self._sizes
        return (n - 1) * math.log(2) * self.bits.unsqueeze(-1) - torch.lgamma(n)

    @property
    def _log_counts(self) -> Tensor:
        """How many faces there are of each size."""
        K, n = self.num_classes, self._sizes
        return math.lgamma(K + 1) - torch.lgamma(n + 1) - torch.lgamma(K - n + 1)

    @property
    def size_log_probs(self) -> Tensor:
        return self.face_log_probs + self._log_counts

    def log_mass(self, value: Tensor) -> Tensor:
        size = value.sum(-1).long()
        shape = torch.broadcast_shapes(size.shape, self.batch_shape)
        index = (size - 1).expand(shape).unsqueeze(-1)
        return self.face_log_probs.expand(*shape, self.num_classes).gather(-1, index).squeeze(-1)

    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """A size, then the vertices that come first in a random order."""
        sizes = categorical(self.size_log_probs.detach().softmax(-1), Size(sample_shape)) + 1
        keys = torch.rand(*sizes.shape, self.num_classes, dtype=self.bits.dtype, device=self.bits.device)
        ranks = keys.argsort(-1).argsort(-1)
        return (ranks < sizes.unsqueeze(-1)).to(self.bits.dtype)

    @property
    def marginals(self) -> Tensor:
        """The same for all vertices, ``(*batch, K)``."""
        n = self._sizes
        size = (self.size_log_probs.exp() * n).sum(-1, keepdim=True)
        return (size / self.num_classes).expand(*self.batch_shape, self.num_classes)

    @property
    def mode(self) -> Tensor:
        """One of the most probable faces, that of the first vertices."""
        vertices = torch.arange(self.num_classes, device=self.bits.device)
        return (vertices <= self.face_log_probs.argmax(-1, keepdim=True)).to(self.bits.dtype)

    def entropy(self) -> Tensor:
        return -(self.size_log_probs.exp() * self.face_log_probs).sum(-1)

    def product_minus_one(self, x_minus_one: Tensor) -> Tensor:
        """By the mean over the faces of each size among the first vertices, one vertex more at a time; O(K^2)."""
        n = torch.arange(self.num_classes + 1, dtype=x_minus_one.dtype, device=x_minus_one.device)
        mean = torch.zeros_like(x_minus_one[..., :1]).expand(*x_minus_one.shape[:-1], self.num_classes + 1)
        for k, one in enumerate(x_minus_one.split(1, -1), start=1):
            with_it = torch.nn.functional.pad(mean[..., :-1], (1, 0))
            share = (n / k).clamp(max=1.0)  # of the faces of size n, those that have the vertex
            mean = (1 - share) * mean + share * (with_it + one + one * with_it)
        return (self.size_log_probs.exp().unsqueeze(-2) * mean[..., 1:]).sum(-1)
