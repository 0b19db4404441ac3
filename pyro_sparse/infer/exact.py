"""The gradient of the ELBO by enumeration of every discrete choice: what estimators are compared with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from pyro.util import check_traceenum_requirements
from torch import Tensor
from torch.distributions import Independent

from pyro_sparse.estimators.base import element
from pyro_sparse.infer.expansion.law import law
from pyro_sparse.infer.expansion.views import with_values, with_whole_score
from pyro_sparse.infer.refusals import refuse_guide_messenger
from pyro_sparse.infer.runs.ordinary import nesting_of, run_once
from pyro_sparse.infer.runs.undisturbed import random_state, undisturbed
from pyro_sparse.infer.terms.factors import as_costs

STRATEGIES = ("parallel", "sequential")
MAX_OUTCOMES = 4096


class NoiseLeftError(ValueError):
    """The program draws random numbers that cannot be enumerated."""


def exact_gradient(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    parameters: Iterable[Tensor],
    strategy: str = "parallel",
    max_outcomes: int = MAX_OUTCOMES,
) -> list[Tensor]:
    r"""
    .. math:: -\nabla \sum_z q(z)\,\bigl(\log p(x, z) - \log q(z)\bigr)

    over all outcomes z of all guide sites, by stock :class:`~pyro.infer.TraceEnum_ELBO`: the gradient of the loss, as
    ``loss_and_grads`` leaves it in ``.grad``, without noise. It needs no mark at the sites. The random number
    generators and every ``.grad`` stay as they were.

    Noise cannot be enumerated, so a program that draws any is refused: a continuous site, a plate that subsamples,
    dropout. There, average the gradients of :class:`EnumeratedELBO`, which sums over the discrete sites only.

    Args:
        model, guide: as for :class:`pyro.infer.SVI`.
        args, kwargs: their arguments.
        parameters: the tensors to differentiate with respect to, such as those of
            ``pyro.get_param_store().named_parameters()``.
        strategy, max_outcomes: see :class:`EnumeratedELBO`.

    Returns:
        One gradient for each parameter; zeros for those on which the ELBO does not depend.

    Raises:
        NoiseLeftError: (a ValueError) if random numbers matter that are not enumerated.
        ValueError: those of :class:`EnumeratedELBO`.
        NotImplementedError: for a ``GuideMessenger``.
    """
    refuse_guide_messenger("exact_gradient", guide)
    elbo = EnumeratedELBO(strategy, max_outcomes=max_outcomes)
    parameters = list(parameters)

    def evaluate() -> list[Tensor]:
        loss = elbo.differentiable_loss(model, guide, *args, **(kwargs or {}))
        return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    with undisturbed(), torch.enable_grad():
        elbo.find_plates(model, guide, args, kwargs or {})
        before = random_state()
        gradients = evaluate()
        # What draws may be no more than the first value of a parameter, as in pyro.param("w", torch.randn(3)).
        noisy = random_state() != before and (elbo.sampled or not _close(gradients, evaluate()))
    if noisy:
        where = f" at {sorted(elbo.sampled)}" if elbo.sampled else " outside of the guide's sites, such as dropout"
        raise NoiseLeftError(
            f"exact_gradient: expected a program whose every choice can be enumerated, got random numbers{where}. "
            "Average the gradients of EnumeratedELBO, or fix the noise."
        )
    return gradients


def _close(a: list[Tensor], b: list[Tensor]) -> bool:
    """Equal but for rounding."""
    size = sum(float(x.square().sum()) for x in a) ** 0.5
    distance = sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True)) ** 0.5
    return distance <= 100 * max(torch.finfo(x.dtype).eps for x in a) * size


class EnumeratedELBO(TraceEnum_ELBO):
    """
    :class:`~pyro.infer.TraceEnum_ELBO` that enumerates every guide site with a finite support, marked or not: vectors
    under ``to_event`` too, over all combinations of their elements. What else is random is sampled: the gradient is
    unbiased, and exact where nothing else is.

    Args:
        strategy: ``"parallel"``: guide and model run once, on all outcomes. ``"sequential"``: once for each
            combination of outcomes, for programs that branch in Python on one of them. A site's own
            ``infer={"enumerate": ...}`` wins.
        max_outcomes: the largest number of combinations of outcomes that is accepted (of sites whose dims
            ``pyro.markov`` does not recycle).
        kwargs: every keyword of :class:`pyro.infer.ELBO`.

    Raises:
        ValueError: for more than ``max_outcomes`` combinations, or a site outside of a plate that may depend on the
            enumerated sites in it.
        NotImplementedError: for a ``GuideMessenger``.
    """

    def __init__(self, strategy: str = "parallel", *, max_outcomes: int = MAX_OUTCOMES, **kwargs: Any) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"EnumeratedELBO: expected strategy in {STRATEGIES}, got {strategy!r}. Use one of them.")
        super().__init__(**{"strict_enumeration_warning": False, **kwargs})
        self.strategy = strategy
        self.max_outcomes = max_outcomes
        #: guide sites that the last step enumerated, and those that it drew, with the plates that it subsampled
        self.enumerated: set[str] = set()
        self.sampled: set[str] = set()

    def find_plates(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Finds ``max_plate_nesting``, if it was not given, by an ordinary run. The first loss would."""
        if self.max_plate_nesting == float("inf"):
            with torch.no_grad(), poutine.block():
                traces = run_once(model, guide, args, kwargs)
            self.max_plate_nesting = nesting_of(traces)

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[Any]:
        refuse_guide_messenger("EnumeratedELBO", guide)
        self.find_plates(model, guide, args, kwargs)
        messenger = _EnumerateAll(self.strategy, self.max_outcomes)
        self.enumerated, self.sampled = messenger.enumerated, messenger.sampled
        yield from super()._get_traces(model, messenger(as_costs(guide, args, kwargs)), args, kwargs)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        with warnings.catch_warnings():
            # Pyro warns and goes on; the sum would be over the wrong combinations.
            warnings.filterwarnings("error", r"(?s).*possibly invalid dependency", RuntimeWarning)
            try:
                traces = super()._get_trace(model, guide, args, kwargs)
                check_traceenum_requirements(*traces)  # with Pyro's validation off, too
            except RuntimeWarning as warning:
                raise ValueError(
                    f"EnumeratedELBO: expected that no site outside of a plate depends on enumerated sites in it, got: "
                    f"{warning}. Move it into the plate or before it, or use an estimator that draws."
                ) from warning
        return traces


class _EnumerateAll(Messenger):
    """Marks each guide site with a finite support for enumeration, and counts the combinations."""

    def __init__(self, strategy: str, max_outcomes: int) -> None:
        super().__init__()
        self.strategy = strategy
        self.max_outcomes = max_outcomes
        self.enumerated: set[str] = set()
        self.sampled: set[str] = set()
        self._sizes: dict[int | str, int] = {}  # of each enumeration dim, of each site enumerated sequentially

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or site_is_subsample(msg):
            return
        view, drawn = fn, law(fn)
        if isinstance(drawn, Independent):
            values = self._combinations(drawn, msg["name"])
            if values is None:
                return
            view = with_values(fn, values)
        elif not getattr(fn, "has_enumerate_support", False):
            return
        # The weights of its outcomes: those of straight-through ones would be 1, and no mask may lie on them.
        if getattr(fn, "has_rsample", False) or drawn is not fn:
            view = with_whole_score(view)
        msg["fn"] = view
        asked = msg["infer"].get("enumerate") or self.strategy
        others = {k: v for k, v in msg["infer"].items() if k not in ("num_samples", "tmc", "expand")}
        msg["infer"] = {**others, "enumerate": asked}
        self.enumerated.add(msg["name"])

    def _combinations(self, fn: Any, name: str) -> Tensor | None:
        """All combinations of the outcomes of an event's elements, ``(K**n, 1, ..., 1, *event_shape)``."""
        base = element(fn)
        if not getattr(base, "has_enumerate_support", False):
            return None
        elements = math.prod(base.batch_shape[len(fn.batch_shape) :])
        outcomes = base.enumerate_support(expand=False).reshape(-1, *base.event_shape)
        self._count(name, len(outcomes) ** elements)
        each = torch.arange(len(outcomes), device=outcomes.device)
        index = torch.cartesian_prod(*[each] * elements).reshape(-1, elements)
        return outcomes[index].reshape(-1, *(1,) * len(fn.batch_shape), *fn.event_shape)

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            if msg["value"].numel() < msg["fn"].size:
                self.sampled.add(msg["name"])
        elif (dim := msg["infer"].get("_enumerate_dim")) is not None:
            self._sizes.pop(msg["name"], None)
            self._count(dim, max(msg["value"].shape[dim - msg["fn"].event_dim], self._sizes.get(dim, 1)))
        elif (total := msg["infer"].get("_enum_total")) is not None:
            self._count(msg["name"], total)
        elif not msg["is_observed"] and not msg["infer"].get("enumerate"):
            self.sampled.add(msg["name"])

    def _count(self, where: int | str, outcomes: int) -> None:
        self._sizes[where] = outcomes
        if (total := math.prod(self._sizes.values())) > self.max_outcomes:
            raise ValueError(
                f"EnumeratedELBO: expected at most max_outcomes={self.max_outcomes} combinations of outcomes, got "
                f"{total}. Raise max_outcomes, or use an estimator that draws."
            )
