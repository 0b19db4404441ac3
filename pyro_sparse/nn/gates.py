r"""Gates with learnt parameters: random while a network trains, fixed and often exactly closed when it is used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pyro_sparse._autograd import is_true, underivable
from pyro_sparse._precision import widened
from pyro_sparse.distributions import HardConcrete, MixedDistribution

PointKind = Literal["l0", "mean", "median", "mode"]


class Gate(nn.Module):
    r"""
    Multiplies its input by gates z, which are random in training mode and have the values
    ``distribution.point_estimate(kind)`` in ``eval()`` mode. A family says which :attr:`distribution` they have.

    A module may be used, or given to layers as their ``gate``, in several places. Its parameters are the same there;
    draws are, too, under :meth:`one_draw`.
    """

    per_example: bool
    kind: str
    _drawn: dict[torch.Size, Tensor] | None = None

    def __init__(self, shape: int | Sequence[int], init_open: float, per_example: bool, kind: str) -> None:
        super().__init__()
        name = type(self).__name__
        self.shape = torch.Size([shape] if isinstance(shape, int) else shape)
        if min(self.shape, default=1) < 1:
            raise ValueError(f"{name}: expected sizes of at least 1, got {tuple(self.shape)}. Say how many gates.")
        if not 0 < init_open < 1:
            raise ValueError(f"{name}: expected init_open in (0, 1), got {init_open!r}. Use, say, 0.9.")
        self.per_example, self.kind = per_example, kind

    @property
    def distribution(self) -> MixedDistribution:
        """Of the gates; its batch shape is ``shape``."""
        raise NotImplementedError

    @property
    def expected_l0(self) -> Tensor:
        r""":math:`\sum_j P(z_j \ne 0)`, the expected number of open gates; a scalar, in float32 at least."""
        return widened(self.distribution.prob_nonzero).sum()

    def point_estimate(self) -> Tensor:
        """The gates' values in ``eval()`` mode, whatever the mode is; shape ``shape``."""
        return self.distribution.point_estimate(kind=self.kind)

    @contextmanager
    def one_draw(self) -> Iterator[None]:
        """All calls under it use the same gates, such as those of one pass through a network that shares them."""
        before, self._drawn = self._drawn, {}
        try:
            yield
        finally:
            self._drawn = before

    def _draw(self, size: torch.Size) -> Tensor:
        if self._drawn is None:
            return self.distribution.rsample(size)
        if size not in self._drawn:
            self._drawn[size] = self.distribution.rsample(size)
        return self._drawn[size]

    def forward(self, x: Tensor) -> Tensor:
        size, dims = self.shape, len(self.shape)
        if x.dim() < dims or any(n not in (1, m) for n, m in zip(size, x.shape[x.dim() - dims :], strict=True)):
            raise ValueError(
                f"{type(self).__name__}: expected an input of shape (*, {', '.join(map(str, size))}), got "
                f"{tuple(x.shape)}. Give the gates the shape of the input's last dimensions, or sizes 1 there."
            )
        if not self.training:
            return x * self.point_estimate()
        return x * self._draw(x.shape[: x.dim() - dims] if self.per_example else torch.Size())


class HardConcreteGate(Gate):
    r"""
    Multiplies its input by gates :math:`z \in [0, 1]` with a hard concrete distribution,

    .. math:: u \sim U(0, 1), \qquad k = \sigma\bigl((\operatorname{logit} u + \log\alpha) / \beta\bigr), \qquad
        z = \min(1, \max(0, \text{low} + (\text{high} - \text{low})\,k)),

    which are exactly 0, and exactly 1, with positive probability. In training mode every call draws, and gradients
    reach :math:`\log\alpha` (``logits``) through the draw; in ``eval()`` mode the gates have the fixed values
    ``distribution.point_estimate(kind)``. The price of an open gate is :math:`P(z \ne 0)`; ``expected_l0`` is the sum
    over the gates, in closed form. To be minimised: the mean loss plus a multiple of ``expected_l0``, or the loss under
    a :class:`ConstraintLagrangian` of it.

    **Saturation.** Far out the derivative of :math:`P(z \ne 0)` with respect to the logit vanishes: a gate that has run
    away cannot be called back, whatever it costs. So the logits that are used are bounded, :math:`|\log\alpha| \le`
    ``max_logit``. For a parameter beyond the bound the gradient is passed on as if it were at the bound where a descent
    step leads back, and is zero where it leads farther out: gradient descent projected onto the box.

    Args:
        shape: of the gates, a number or a tuple. Its dimensions are the input's last ones; sizes 1 broadcast, so
            ``(channels, 1, 1)`` gates feature maps.
        init_open: :math:`P(z \ne 0)` to begin with, by
            :math:`\log\alpha = \operatorname{logit}(\text{init\_open}) + \beta \log(-\text{low} / \text{high})`. Behind
            gates that are mostly closed a network learns slowly.
        temperature: :math:`\beta`.
        low: below 0.
        high: above 1.
        max_logit: the bound, by default that of the paper's code, :math:`\log 100`; None for none.
        per_example: whether each element of the input's leading dimensions has a draw of its own, or, as in the paper's
            code, all share one.
        kind: of the point estimate in ``eval()`` mode. ``"l0"`` is Eq. 13 of the paper,
            :math:`\min(1, \max(0, \text{low} + (\text{high} - \text{low})\,\sigma(\log\alpha)))`; a mean is never 0.

    Shapes: input ``(*, *shape)``, output the same.

    Raises:
        ValueError: for arguments out of range; in a call, for an input with other last dimensions than the gates.

    Example::

        >>> import torch
        >>> from pyro_sparse.nn import HardConcreteGate
        >>> gate = HardConcreteGate(4, init_open=0.25)
        >>> gate.expected_l0
        tensor(1., grad_fn=<SumBackward0>)
        >>> gate(torch.ones(32, 4)).shape
        torch.Size([32, 4])
        >>> gate.eval()(torch.ones(4))
        tensor([0., 0., 0., 0.], grad_fn=<MulBackward0>)

    Reference: C. Louizos, M. Welling, D. Kingma, *Learning sparse neural networks through L0 regularization*, ICLR
    2018, §2.2.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        init_open: float = 0.9,
        temperature: float = 2 / 3,
        low: float = -0.1,
        high: float = 1.1,
        max_logit: float | None = math.log(100),
        per_example: bool = False,
        kind: PointKind = "l0",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shape, init_open, per_example, kind)
        if not 0 < temperature < math.inf:
            raise ValueError(f"HardConcreteGate: expected temperature > 0, got {temperature!r}. Use, say, 2/3.")
        if not (-math.inf < low < 0 and 1 < high < math.inf):
            raise ValueError(
                f"HardConcreteGate: expected low < 0 and high > 1, got {low!r} and {high!r}. Use, say, -0.1 and 1.1."
            )
        logit = math.log(init_open / (1 - init_open)) + temperature * math.log(-low / high)
        if max_logit is not None and not abs(logit) <= max_logit < math.inf:
            raise ValueError(
                f"HardConcreteGate: expected max_logit of at least {abs(logit):.3f}, the initial |logit|, got "
                f"{max_logit!r}. Raise it, or move init_open towards 0.5."
            )
        if kind not in get_args(PointKind):
            raise ValueError(
                f"HardConcreteGate: expected kind in {get_args(PointKind)}, got {kind!r}. Choose one of them."
            )
        self.temperature, self.low, self.high = temperature, low, high
        self.max_logit = max_logit
        self.logits = nn.Parameter(torch.full(self.shape, logit, device=device, dtype=dtype))

    @property
    def distribution(self) -> HardConcrete:
        """Of the gates, with the logits that are used; its batch shape is ``shape``."""
        logits = self.logits if self.max_logit is None else _Bounded.apply(self.logits, self.max_logit)
        return HardConcrete(self.temperature, logits, self.low, self.high)

    def extra_repr(self) -> str:
        options = f"temperature={self.temperature:.4g}, low={self.low}, high={self.high}, max_logit={self.max_logit}"
        return f"{tuple(self.logits.shape)}, {options}, per_example={self.per_example}, kind={self.kind!r}"


_ONCE = (
    "HardConcreteGate: expected logits within max_logit for a second derivative, got some beyond, where the first is "
    "pretended. Clamp the parameter, or raise max_logit."
)


class _Bounded(torch.autograd.Function):
    """A clamp to [-bound, bound] with the gradient of the identity, except where descent would lead farther out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, bound: float) -> Tensor:
        return logits.clamp(-bound, bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        logits, ctx.bound = inputs
        ctx.save_for_backward(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        outward = ((logits > ctx.bound) & (grad < 0)) | ((logits < -ctx.bound) & (grad > 0))
        beyond = (logits.abs() > ctx.bound) & ~outward
        if torch.is_grad_enabled() and not is_true(~beyond):
            grad = grad + underivable(logits, _ONCE)
        return grad.masked_fill(outward, 0.0), None
