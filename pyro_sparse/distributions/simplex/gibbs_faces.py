"""Faces of the simplex whose vertices are independent but for not all being absent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property
from torch.nn.functional import logsigmoid

from pyro_sparse._autograd import is_true
from pyro_sparse._numerics import log1mexpexp
from pyro_sparse._precision import categorical
from pyro_sparse._relaxation import one_hot_at_max
from pyro_sparse.distributions.checks import check_floating, checked, num_vertices
from pyro_sparse.distributions.simplex.faces import FaceDistribution


class GibbsFaces(FaceDistribution):
    r"""
    .. math:: P(f) \propto \exp \sum_k s_k (2 f_k - 1), \qquad f \in \{0, 1\}^K \setminus \{0\}

    With :math:`\ell = 2 s`, the bits are independent Bernoulli variables of logit :math:`\ell_k`, given that they are
    not all zero: :math:`P(\text{not all zero}) = 1 - e^{-A}, A = \sum_k \mathrm{softplus}(\ell_k)`, which serves at
    any scores, also where it underflows.

    **Base measure:** counting on the non-empty subsets of K vertices; **rsample:** no; **enumerable:** for K <= 12,
    where ``infer={"enumerate": "parallel"}`` says so.

    ========== ================= ===============
    shape      ``scores``        a value
    ========== ================= ===============
    batch      ``(*batch, K)``   ``(*batch, K)``
    event                        ``(K,)``
    ========== ================= ===============

    >>> d = GibbsFaces(torch.tensor([0.0, 0.0]))
    >>> d.log_prob(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])).exp()
    tensor([0.3333, 0.3333, 0.3333])
    >>> d.marginals
    tensor([0.6667, 0.6667])

    Args:
        scores: s, real; -inf keeps a vertex out of every face.
        validate_args: as in torch.

    Raises:
        ValueError: one vertex, NaN, +inf, or -inf at all vertices of a row.

    Reference: A. Farinhas et al., *Sparse communication via mixed distributions*, ICLR 2022, §4.2.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"scores": constraints.real_vector}

    def __init__(self, scores: Tensor, *, validate_args: bool | None = None) -> None:
        check_floating("GibbsFaces", "scores", scores)
        self.scores = scores
        self.num_classes = num_vertices("GibbsFaces", scores.shape)
        super().__init__(scores.shape[:-1], scores.shape[-1:], validate_args=validate_args)
        if self._validate_args:
            ok = scores < math.inf
            checked("GibbsFaces", "scores", scores, ok, "real numbers or -inf", "Look at the network that makes them.")
            some = (scores > -math.inf).any(-1)
            checked("GibbsFaces", "scores", -math.inf, is_true(some), "a vertex with a score above -inf", "Allow one.")

    def _remade(self, parameter: Tensor) -> GibbsFaces:
        return GibbsFaces(parameter, validate_args=False)

    @property
    def like(self) -> Tensor:
        return self.scores

    @lazy_property
    def _logits(self) -> Tensor:
        return 2 * self.scores

    @lazy_property
    def _log_not_empty(self) -> Tensor:
        r""":math:`\log(1 - e^{-A})`, from :math:`\log A`."""
        ell = self._logits
        tiny = ell < (-18.0 if ell.dtype == torch.float64 else -8.0)
        # log softplus(x) = x - e^x / 2 + O(e^2x)
        log_softplus = torch.where(
            tiny, ell - ell.clamp(max=0.0).exp() / 2, softplus(torch.where(tiny, 0.0, ell)).log()
        )
        return log1mexpexp(log_softplus.logsumexp(-1))

    def log_mass(self, value: Tensor) -> Tensor:
        r""":math:`\sum_k f_k \ell_k - A - \log(1 - e^{-A})`."""
        return torch.where(value > 0, self._logits, 0.0).sum(-1) - softplus(self._logits).sum(-1) - self._log_not_empty

    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """The first vertex of the face, then the bits after it, which are independent."""
        logits = self._logits.detach()
        off = -softplus(logits)
        before = off.cumsum(-1) - off
        first = categorical((logsigmoid(logits) + before).softmax(-1), Size(sample_shape)).unsqueeze(-1)
        bits = torch.bernoulli(logits.sigmoid().expand(*first.shape[:-1], self.num_classes))
        vertices = torch.arange(self.num_classes, device=bits.device)
        return torch.where(vertices < first, 0.0, torch.where(vertices == first, 1.0, bits))

    @property
    def marginals(self) -> Tensor:
        r""":math:`\sigma(\ell_k) / (1 - e^{-A})`, ``(*batch, K)``."""
        return (logsigmoid(self._logits) - self._log_not_empty.unsqueeze(-1)).exp()

    @property
    def mode(self) -> Tensor:
        """All vertices with positive scores, or the one with the largest."""
        positive = self.scores > 0
        best = one_hot_at_max(self.scores)
        return torch.where(positive.any(-1, keepdim=True), positive, best > 0).to(self.scores.dtype)

    def entropy(self) -> Tensor:
        r""":math:`A + \log(1 - e^{-A}) - \sum_k m_k \ell_k`, m the marginals."""
        precise = self.double()  # it cancels
        return -precise.expected_log_prob(precise.marginals).to(self.scores.dtype)

    def expected_log_prob(self, marginals: Tensor) -> Tensor:
        r""":math:`E \log P(f)` under any distribution with these marginals: it is linear in the bits."""
        off = self._logits == -math.inf
        linear = (marginals * self._logits.masked_fill(off, 0.0)).sum(-1)
        linear = linear.masked_fill((off & (marginals > 0)).any(-1), -math.inf)
        return linear - softplus(self._logits).sum(-1) - self._log_not_empty

    @property
    def size_log_probs(self) -> Tensor:
        """Those of a Poisson-binomial variable, given that it is not zero; O(K^2)."""
        return log_poisson_binomial(self._logits)[..., 1:] - self._log_not_empty.unsqueeze(-1)

    # Expectations of products over the face.

    @lazy_property
    def _tilt(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""
        :math:`\sigma(\ell)`, its logarithm, :math:`\sigma(-\ell)`, and the log-probability of not being empty, to tilt:
        all ``(*batch, 1, K)`` or ``(*batch, 1)``.

        Where all are so small that two vertices never come together, to rounding, only their ratios matter: P(f) is
        :math:`p_k / \sum_j p_j` at the vertices. So all are multiplied by a number, and what they are divided by as
        well: none underflows.
        """
        least = math.log(torch.finfo(self.scores.dtype).eps) - 3
        log_norm = self._log_not_empty.unsqueeze(-1)
        ell = (self._logits + (least - log_norm).clamp(min=0.0)).unsqueeze(-2)
        return ell.sigmoid(), logsigmoid(ell), (-ell).sigmoid(), log_norm.clamp(min=least)

    def _log_factors(self, log_x: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\log(1 - p_k + p_k x_k)`, precise near zero, and :math:`p_k x_k`."""
        p, _, q, _ = self._tilt
        off, on = p * -torch.expm1(log_x), p * log_x.exp()
        little = off < 0.5
        rest = torch.where(little, 1.0, q + on).clamp(min=torch.finfo(p.dtype).tiny)  # it is where that underflows
        return torch.where(little, torch.log1p(-torch.where(little, off, 0.0)), rest.log()), on

    def tilted(self, log_x: Tensor) -> tuple[Tensor, Tensor]:
        _, log_p, _, log_norm = self._tilt
        factors, _ = self._log_factors(log_x)
        product = factors.sum(-1)
        others = (log_p + (product - log_norm).unsqueeze(-1) - factors).exp()
        return torch.expm1(product) * (-log_norm).exp(), others

    def tilted_square(self, log_x: Tensor, a: Tensor) -> Tensor:
        a = a.unsqueeze(-2)
        factors, on = self._log_factors(log_x)
        share = on * (-factors).exp()  # the bits are independent under the tilted distribution too
        square = (a * share).sum(-1).square() + (a.square() * share * (1 - share)).sum(-1)
        return square * (factors.sum(-1) - self._tilt[-1]).exp()


def softplus(x: Tensor) -> Tensor:
    """To rounding everywhere; torch's own drops what it calls small in float64, too, where it is 2e-9."""
    return -logsigmoid(-x)


def log_poisson_binomial(logits: Tensor) -> Tensor:
    r"""
    :math:`\log P(n)`, n = 0, ..., K, of how many of K independent bits are one, ``(*batch, K)`` to ``(*batch, K + 1)``:
    the coefficients of :math:`\prod_k (1 - p_k + p_k t)`, multiplied out in pairs. All are sums of positive terms:
    nothing cancels.
    """
    lowest = torch.finfo(logits.dtype).min / (4 * logits.shape[-1])  # for log 0: a sum of K of them is still finite
    polynomials = torch.stack([logsigmoid(-logits), logsigmoid(logits)], -1).clamp(min=lowest)
    while (count := polynomials.shape[-2]) > 1:
        if count % 2:
            one = polynomials.new_full(polynomials.shape[-1:], lowest)
            one[0] = 0.0
            polynomials = torch.cat([polynomials, one.expand(*polynomials.shape[:-2], 1, -1)], -2)
        polynomials = _multiplied(polynomials[..., 0::2, :], polynomials[..., 1::2, :], lowest)
    result = polynomials[..., 0, : logits.shape[-1] + 1]
    return result.masked_fill(result < lowest / 2, -math.inf)


def _multiplied(a: Tensor, b: Tensor, lowest: float) -> Tensor:
    """The product of polynomials of the same length, by their log-coefficients."""
    length = a.shape[-1]
    windows = torch.nn.functional.pad(b, (length - 1, length - 1), value=lowest).unfold(-1, length, 1)
    return (windows + a.flip(-1).unsqueeze(-2)).logsumexp(-1)
