"""The protocol of estimators and baselines: costs and log-probabilities in, surrogate out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from pyro_sparse._precision import Accumulating

Gather = Callable[..., Any]


@dataclass(frozen=True)
class Plate:
    """A plate around a site: name, batch dim, present size, full size, and the indices that it was subsampled to."""

    name: str
    dim: int
    size: int
    full_size: int
    indices: Tensor | None = None


class Slots(NamedTuple):
    """
    Several values of one site, on all of which the model runs.

    Attributes:
        values: ``(S, *batch_shape, *event_shape)``.
        log_weights: ``(S, *batch_shape)``; they sum to one over S and make a weighted mean of costs unbiased for the
            expected cost.
        num_enumerated: how many of the S slots, the first, are outcomes in their own right and not draws.
        memo: what :meth:`Estimator.draw` leaves for :meth:`Estimator.forward`.
    """

    values: Tensor
    log_weights: Tensor
    num_enumerated: int = 0
    memo: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether no slot is a draw: the weighted sum of costs is then the expectation, right in all derivatives."""
        return self.num_enumerated == len(self.log_weights)


@dataclass(frozen=True)
class Enumeration:
    """How an ELBO lists the outcomes of a site by itself: the options of :class:`~pyro_sparse.estimators.Exact`."""

    mode: str = "padded"
    max_support: int | None = None
    chunk_rows: int | None = None
    gather: Gather | None = None
    check: bool = True


@dataclass
class Site:
    r"""
    What an estimator or baseline may know about one guide site.

    Attributes:
        name: the site's name.
        fn: what the guide's site is drawn from, without the masks that lie on its log-probability; its batch shape that
            of the plates (and of the particles and slots upstream). At a site with slots it has all dims to the right
            of these, of size one where nothing varies, as its costs do.
        plates: the data plates around it, outermost first.
        args, kwargs: the arguments of model and guide.
        log_prob: :math:`\log q(z)` at the values that were drawn, attached to the guide's parameters, with the shape of
            the cost, and without a mask. Zero while values are being drawn.
        mask: where the site counts, as ``poutine.mask`` and ``.mask()`` say, broadcastable to the cost; None:
            everywhere. Elsewhere there is nothing to learn from the cost.
        value: what was drawn, ``(*batch_shape, *event_shape)``, or all slots.
        slots: what :meth:`Estimator.draw` returned; here too the slot dim is in front of all others.
        options: the site's ``infer["baseline"]``, for Pyro's own baselines.
        memo: what a baseline leaves for its own :meth:`Baseline.update`.
        rerun: ``rerun("mode")`` and ``rerun("sample")`` give this site's cost, unscaled and detached, in one extra run
            of guide and model in which this and all other score-function sites take their mode or a new draw.
        attached_cost: ``attached_cost()`` gives the cost attached to the slots' values, with the gradient with respect
            to them of its expectation over all that is drawn later.
    """

    name: str
    fn: Distribution
    plates: tuple[Plate, ...] = ()
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    log_prob: Tensor = field(default_factory=lambda: torch.zeros(()))
    mask: Tensor | None = None
    value: Tensor | None = None
    slots: Slots | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    memo: dict[nn.Module, Tensor] = field(default_factory=dict)
    rerun: Callable[[str], Tensor] | None = None
    attached_cost: Callable[[], Tensor] | None = None

    @property
    def batch_shape(self) -> torch.Size:
        """The sizes of the data plates by their dims: ``(B,)`` in one plate at dim -1."""
        sizes = {plate.dim: plate.size for plate in self.plates}
        return torch.Size(sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0))


class Baseline(Accumulating):
    r"""
    A baseline b for the score-function estimator :math:`(f - b)\,\nabla \log q(z)`.

    **Bias:** none, whatever it returns, as long as its value for a draw z does not depend on that z (nor, therefore,
    on the ``cost`` argument, which serves to fit it and for its shape, dtype and device).

    Subclasses define :meth:`forward`. What they learn by gradients are parameters, trained along by ``svi.step`` or by
    a torch optimiser; running means are buffers, moved in :meth:`update`; they do not follow
    ``.to(torch.bfloat16)``.
    """

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        """
        Args:
            cost: the site's cost, unscaled and detached, one for each data-plate element (and particle).
            site: see :class:`Site`.

        Returns:
            The value to subtract, which broadcasts to the cost's shape and is detached by the caller; and the
            baseline's own loss, a scalar whose gradient reaches the baseline's parameters only (0.0 if it has none).
        """
        raise NotImplementedError

    def update(self, cost: Tensor, site: Site) -> None:
        """Moves running means by this step's cost, after the old ones were used. The default has none."""

    def extra_repr(self) -> str:
        return _arguments(self)


class Estimator(nn.Module):
    r"""
    An estimator of :math:`\nabla\, E_{q(z)} f(z)` with respect to the parameters of q, at one site.

    The surrogate stands for its first derivative. Where all slots are outcomes (:attr:`Slots.complete`) an ELBO puts in
    place of ours the sum of the costs, weighted by probabilities that keep their derivatives: it is right in all.

    A subclass says which values its site has by what it implements, beside or in place of :meth:`forward`:
    :meth:`draw`, several; :meth:`reparameterized`, one with a derivative; neither, a draw of the site's own.

    Attributes:
        objective: what the gradient is the gradient of: ``"elbo"``, or ``"bound"`` for the n-particle :meth:`bound`,
            which is then the whole loss.
        num_particles: how many particles of the whole program it needs; all estimators of an ELBO share them.
        vectorized: whether those particles are one vectorised run (else one run each).
        relaxes: whether it differentiates the model with respect to the slots' values, some of which, of weight zero,
            may lie between the outcomes. Log-probabilities of the site are then linear in its value.
        enumeration: how the ELBO is to list all outcomes, in place of :meth:`draw`; None if it is not to.
        unbiased: whether its expectation is the gradient of the objective.
    """

    objective: ClassVar[str] = "elbo"
    unbiased: ClassVar[bool] = True
    relaxes: ClassVar[bool] = False
    num_particles: int = 1
    vectorized: bool = True

    @property
    def enumeration(self) -> Enumeration | None:
        return None

    def draw(self, site: Site) -> Slots:
        """Lays out the values on which the model runs, in a dim of their own."""
        raise NotImplementedError

    def reparameterized(self, site: Site) -> Tensor:
        """A draw with a derivative with respect to the parameters of q."""
        raise NotImplementedError

    def bound(self, log_weights: Tensor) -> Tensor:
        """The n-particle bound of log-weights ``(n, ...)``, of an estimator that has it for its objective."""
        raise NotImplementedError

    # Cached, so that a class or an object may set another.

    @cached_property
    def draws_slots(self) -> bool:
        """Whether its site has several values: it implements :meth:`draw`, or says how they are listed."""
        return type(self).draw is not Estimator.draw or self.enumeration is not None

    @cached_property
    def reparameterizes(self) -> bool:
        """
        Whether one value with a derivative is all there is to it: it implements :meth:`reparameterized` and no
        :meth:`forward`. The site's KL divergence is then taken in closed form.
        """
        return type(self).reparameterized is not Estimator.reparameterized and type(self).forward is Estimator.forward

    @cached_property
    def splits(self) -> bool:
        """
        Whether everything but the site's own log-probabilities has such a value: it implements both. The difference of
        those alone, with z held fixed, is then the cost of :meth:`forward`.
        """
        return type(self).reparameterized is not Estimator.reparameterized and not self.reparameterizes

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        r"""
        Args:
            cost: f, unscaled and detached, one for each data-plate element; in front, a dim for the slots that
                :meth:`draw` laid out or for the particles that :attr:`num_particles` asked for.
            site: with ``log_prob`` in the shape of the cost.

        Returns:
            Terms of the cost's shape whose sum over slots (mean over particles) has the estimate as its gradient;
            and a loss of the estimator's own, 0.0 if it has none.
        """
        raise NotImplementedError

    def update(self, cost: Tensor, site: Site) -> None:
        """Moves running means by this step's cost, after the old ones were used. The default has none."""

    def extra_repr(self) -> str:
        return _arguments(self)


def _arguments(module: nn.Module) -> str:
    """The numbers and words that a module was made with, as they are now; those without a default by place."""
    shown = []
    for name, argument in inspect.signature(type(module)).parameters.items():
        value = getattr(module, name, argument.default)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.detach().tolist()
        if isinstance(value, bool | int | float | str) and value != argument.default:
            shown.append(f"{value!r}" if argument.default is argument.empty else f"{name}={value!r}")
    return ", ".join(shown)


def element(fn: Distribution) -> Any:
    """The distribution of one element of a vector under ``to_event``; of any other, itself."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


def lists_outcomes(fn: Distribution) -> bool:
    """Whether ``fn.enumerate_support`` works: torch does not list the outcomes of vectors under ``to_event``."""
    return bool(getattr(fn, "has_enumerate_support", False)) and not isinstance(fn, Independent)


def require_outcomes(estimator: str, site: Site) -> None:
    """Raises if the site's distribution cannot list its outcomes."""
    if not lists_outcomes(site.fn):
        raise ValueError(
            f"{estimator}, site '{site.name}': expected a distribution that lists its outcomes, got {site.fn}. "
            "Use LeaveOneOut(n), which needs draws only, or a plate in place of to_event."
        )


def take_outcomes(outcomes: Tensor, index: Tensor) -> Tensor:
    """The outcomes at ``index`` (S, *batch) along the first dim."""
    event_dims = outcomes.dim() - index.dim()
    index = index.reshape(index.shape + (1,) * event_dims).expand(index.shape + outcomes.shape[index.dim() :])
    return outcomes.gather(0, index)
