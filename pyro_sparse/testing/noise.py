r"""Draws that two runs of different shape can share.

To compare two ELBOs exactly, both must see the same noise. After a site with :math:`K` outcomes is enumerated,
a draw has shape :math:`(K, B)` when all outcomes are visited and :math:`(S, B)` when only :math:`S` of them are, so
one random seed gives different noise for the same outcome. :class:`TableNormal` looks its noise up instead.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


class TableNormal(dist.Normal):
    r"""A normal distribution whose one draw is read from a table.

    .. math:: y = \mu + \sigma\,\varepsilon[i], \qquad \log p(y) = \log \mathcal{N}(y; \mu, \sigma).

    Only the draw differs from :class:`~pyro.distributions.Normal`: density, gradients and score parts are the normal's.
    **Base measure: Lebesgue; rsample: yes unless** ``reparameterized=False``; **enumerable: no.**

    ===========  ==============================================================
    batch_shape  ``loc``, ``scale`` and the indices in ``index``, broadcast together
    event_shape  ``()``
    ===========  ==============================================================

    Args:
        loc: the mean :math:`\mu`.
        scale: the standard deviation :math:`\sigma`.
        table: the noise :math:`\varepsilon`, one dimension for each index.
        index: long tensors that broadcast together, for example the enumerated outcome and the example's position
            in its plate. An outcome then meets the same noise wherever, and however often, it is enumerated.
        reparameterized: whether draws carry gradients to ``loc`` and ``scale``. If False, the site is a Monte Carlo
            site with a score function.
        validate_args: as in torch.

    Example:
        >>> table = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> outcome = torch.tensor([[1], [0], [1]])
        >>> example = torch.tensor([0, 1])
        >>> TableNormal(torch.zeros(()), torch.ones(()), table, (outcome, example)).sample()
        tensor([[2., 3.],
                [0., 1.],
                [2., 3.]])
    """

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        table: Tensor,
        index: tuple[Tensor, ...],
        *,
        reparameterized: bool = True,
        validate_args: bool | None = None,
    ) -> None:
        if len(index) != table.dim():
            raise ValueError(
                f"TableNormal: expected one index per dimension of table, got {len(index)} for {table.dim()}. "
                "Pass a tuple of long tensors."
            )
        self.noise = table[index]
        self.has_rsample = reparameterized
        loc, scale, _ = torch.broadcast_tensors(loc, scale, self.noise)
        super().__init__(loc, scale, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TableNormal:
        """Repeats the distribution, noise included, to ``batch_shape``."""
        new: TableNormal = self._get_checked_instance(TableNormal, _instance)
        new.noise = self.noise.expand(batch_shape)
        new.has_rsample = self.has_rsample
        super().expand(batch_shape, _instance=new)
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """The one draw that the table holds; ``sample_shape`` must be empty."""
        if len(sample_shape):
            raise ValueError(
                f"TableNormal: expected an empty sample_shape, got {tuple(sample_shape)}. "
                "The table holds one draw per index; add a dimension to the index for more."
            )
        return self.loc + self.scale * self.noise

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """As :meth:`rsample`, without gradients."""
        return self.rsample(sample_shape).detach()
