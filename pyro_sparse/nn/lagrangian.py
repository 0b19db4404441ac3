r"""Keeps a quantity, such as the share of open gates, at a target while something else is minimised."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from pyro_sparse._precision import Accumulating, widened

Kind = Literal["equal", "at_most", "at_least"]


class ConstraintLagrangian(Accumulating):
    r"""
    The term to add to a loss so that :math:`\min_\theta L(\theta)` is found under :math:`c(\theta) = 0`, where
    :math:`c = \text{value} - \text{target}`:

    .. math:: \lambda\,c + \frac{\rho}{2}\,c^2, \qquad \text{and after each call in training mode} \qquad
        \lambda \leftarrow \lambda + \eta\,c .

    The parameters descend the gradient :math:`(\lambda + \rho\,c)\,\nabla c` of the term by whatever optimiser trains
    the loss, and the multiplier :math:`\lambda`, which is a buffer and no parameter, climbs by itself: as long as the
    value is above the target it grows, and pushes harder. So there is no weight to tune: :math:`\lambda` settles where
    the value is on target (on average, if the value is a noisy estimate), and is then the price of the constraint,
    :math:`\lambda = -\,dL^* / d\,\text{target}`. The square damps the oscillation of a price that follows a quantity
    that follows a price: an error of now pushes as hard as the same error held for :math:`\rho / \eta` steps.

    ``kind="at_most"`` and ``"at_least"`` stand for :math:`c \le 0` and :math:`c \ge 0`. There the multiplier keeps
    its sign (:math:`\lambda \ge 0`, :math:`\lambda \le 0`), and so does the whole push :math:`\lambda + \rho c`: where
    the constraint holds by itself both go to zero and the term is no more than a constant.

    One call in training mode is one step of the multiplier, so call it once in a training step. In ``eval()`` mode it
    stays. It is in the ``state_dict``: a run that is loaded continues exactly. ``.to(torch.bfloat16)`` leaves it in
    float32, where it does not stand still, and so is the term.

    Args:
        target: what the value is to be, at most, or at least.
        kind: ``"equal"``, ``"at_most"`` or ``"at_least"``.
        rate: :math:`\eta > 0`. The default suits values in :math:`[0, 1]`, such as shares, losses of order one and
            thousands of steps: an error of .1 moves the price by 1 in a thousand steps.
        damping: :math:`\rho \ge 0`. Raise it, or lower the rate, if the value swings about the target: the
            parameters then take more than :math:`\rho / \eta` steps to follow. Much of it, and a value that begins far
            from the target is driven there at once, before the loss can say how.

    Raises:
        ValueError: for arguments out of range; in a call, for a value that is no finite scalar (before
            :math:`\lambda` moves; the check waits for the device).

    Example::

        >>> import torch
        >>> from pyro_sparse.nn import ConstraintLagrangian, HardConcreteGate
        >>> gate = HardConcreteGate(100)
        >>> lagrangian = ConstraintLagrangian(0.3, rate=0.1, damping=10.0)  # 30 % of the gates open, soon
        >>> optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
        >>> for _ in range(300):
        ...     optimizer.zero_grad()
        ...     lagrangian(gate.expected_l0 / 100).backward()  # plus the loss of a network that uses the gate
        ...     optimizer.step()
        >>> print(f"{gate.expected_l0 / 100:.2f}")
        0.30

    Reference: J. Platt, A. Barr, *Constrained differential optimization*, NIPS 1987 (the modified differential method
    of multipliers). For gates: J. Bastings, W. Aziz, I. Titov, *Interpretable neural predictions with differentiable
    binary variables*, ACL 2019, §4.3.
    """

    multiplier: Tensor

    def __init__(self, target: float, kind: Kind = "equal", *, rate: float = 0.01, damping: float = 3.0) -> None:
        super().__init__()
        if not math.isfinite(target):
            raise ValueError(f"ConstraintLagrangian: expected a finite target, got {target!r}. Use, say, 0.3.")
        if kind not in get_args(Kind):
            raise ValueError(f"ConstraintLagrangian: expected kind in {get_args(Kind)}, got {kind!r}. Choose one.")
        if not 0 < rate < math.inf:
            raise ValueError(f"ConstraintLagrangian: expected rate > 0, got {rate!r}. Use, say, 0.01.")
        if not 0 <= damping < math.inf:
            raise ValueError(f"ConstraintLagrangian: expected damping >= 0, got {damping!r}. Use, say, 3.0.")
        self.target = target
        self.kind = kind
        self.rate = rate
        self.damping = damping
        self.register_buffer("multiplier", torch.zeros(()))

    def forward(self, value: Tensor) -> Tensor:
        """The term to add to the loss, a scalar; ``value`` is a scalar too, with its gradient."""
        if value.dim() != 0 or not value.isfinite():
            shown = value.item() if value.dim() == 0 else f"shape {tuple(value.shape)}"
            raise ValueError(
                f"ConstraintLagrangian: expected a finite scalar, got {shown}. Reduce the value with sum or mean, and "
                "look for what made it infinite."
            )
        excess, multiplier = widened(value) - self.target, self.multiplier.clone()  # the buffer is about to change
        if self.training:
            self.multiplier.copy_(self._signed(multiplier + self.rate * excess.detach()))
        if self.damping == 0:
            return multiplier * excess
        push = self._signed(multiplier + self.damping * excess)
        return (push.square() - multiplier.square()) / (2 * self.damping)

    def _signed(self, multiplier: Tensor) -> Tensor:
        if self.kind == "at_most":
            return multiplier.clamp(min=0)
        if self.kind == "at_least":
            return multiplier.clamp(max=0)
        return multiplier

    def extra_repr(self) -> str:
        return f"{self.target}, {self.kind!r}, rate={self.rate}, damping={self.damping}"
