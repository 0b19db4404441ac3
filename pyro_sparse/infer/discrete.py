"""Posterior marginals, draws and the best outcomes of discrete sites that the model alone has, over all K outcomes."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import prune_subsample_sites

from pyro_sparse.infer.expansion.law import law
from pyro_sparse.infer.expansion.numbers import Numbers, Outcomes
from pyro_sparse.infer.pyro_internals import sample_posterior_from_trace
from pyro_sparse.infer.runs.explanations import Alone
from pyro_sparse.infer.runs.window import require_window

Program = Callable[..., Any]


def infer_discrete(
    fn: Program | None = None,
    first_available_dim: int | None = None,
    temperature: int = 1,
    *,
    strict_enumeration_warning: bool = True,
) -> Any:
    r"""
    .. math:: z \sim p(z \mid x) \quad (\text{temperature } 1), \qquad
        z = \arg\max_z p(z \mid x) \quad (\text{temperature } 0)

    :func:`pyro.infer.infer_discrete`, also for outcomes that are vectors, such as one-hot vectors and faces, at which
    Pyro's own raises. Sites are marked as there, ``infer={"enumerate": "parallel"}``.

    Under ``poutine.mask`` a row's data do not count, and it follows its prior. (Pyro masks the prior, too: there such
    rows take outcomes of probability zero.) Under ``.mask()`` a masked site has no prior, as in Pyro's ELBOs.

    Args:
        fn: a model with data; None to decorate one.
        first_available_dim: a negative number: the first dim to the left of all plates.
        temperature: 1 to draw from the joint posterior, 0 for its best outcome.
        strict_enumeration_warning: whether to warn if no site is enumerated.

    Returns:
        ``fn`` with its sites at such values.

    Raises:
        ValueError: another temperature; a dim that is not negative; under Pyro's validation a site that depends on an
            enumerated one outside of its ``pyro.markov``'s window.
    """
    if first_available_dim is None or first_available_dim >= 0:
        raise ValueError(
            f"infer_discrete: expected a negative first_available_dim, got {first_available_dim}. Count one further "
            "than the plates: -1 without any."
        )
    if temperature not in (0, 1):
        raise ValueError(f"infer_discrete: expected temperature 0 or 1, got {temperature!r}. Use 1 to draw.")
    if fn is None:
        return functools.partial(
            infer_discrete,
            first_available_dim=first_available_dim,
            temperature=temperature,
            strict_enumeration_warning=strict_enumeration_warning,
        )
    return functools.partial(posterior_run, fn, first_available_dim, temperature, strict_enumeration_warning)


def posterior_run(
    fn: Program, first_available_dim: int, temperature: int, strict: bool, *args: Any, **kwargs: Any
) -> Any:
    """Runs a model with its enumerated sites at a draw from their posterior, or at its best outcome."""
    numbers = Numbers()
    with poutine.block(), EnumMessenger(first_available_dim):
        trace = prune_subsample_sites(poutine.trace(numbers(fn)).get_trace(*args, **kwargs))
    _check_window(numbers, Alone(fn, _no_guide, args, kwargs, "infer_discrete"))
    trace.compute_log_prob()
    trace.pack_tensors()
    nodes: dict[str, Any] = trace.nodes
    for node in nodes.values():
        if node["type"] == "sample" and "_enumerate_dim" in node["infer"]:
            # As in Pyro's ELBOs, which sum such a site out: what masks its data leaves it its prior.
            node["packed"]["masked_log_prob"] = node["packed"]["unscaled_log_prob"]
    with Outcomes(numbers.outcomes):
        return sample_posterior_from_trace(fn, trace, temperature, strict, *args, **kwargs)


def marginals(
    owner: str, model: Program, guide: Program, args: Any, kwargs: Mapping[str, Any], **options: Any
) -> OrderedDict[str, Any]:
    """
    :meth:`pyro.infer.TraceEnum_ELBO.compute_marginals`, for all families that list their outcomes. The guide's sites
    are drawn.

    Args:
        options: of ``TraceEnum_ELBO``.
    """
    held = _Visited()
    numbers = Numbers(held.names)
    found = _Marginals(owner, **options).compute_marginals(numbers(model), held(guide), *args, **kwargs)
    _check_window(numbers, Alone(model, guide, args, kwargs, owner))
    return OrderedDict(
        (name, numbers.marginal(name, d.logits) if name in numbers.outcomes else d) for name, d in found.items()
    )


def _no_guide(*args: Any, **kwargs: Any) -> None:
    pass


def _check_window(numbers: Numbers, alone: Alone) -> None:
    if numbers.in_markov and is_validation_enabled():
        require_window(alone, numbers.laws)


class _Visited(poutine.messenger.Messenger):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        self.names.add(msg["name"])


class _Marginals(TraceEnum_ELBO):
    """Of a model whose sites are numbers."""

    def __init__(self, owner: str, **kwargs: Any) -> None:
        super().__init__(strict_enumeration_warning=False, **kwargs)
        self.owner = owner

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        for name in guide_trace.stochastic_nodes:
            infer = guide_trace.nodes[name]["infer"]
            if "_enumerate_dim" in infer or "_enum_total" in infer:
                raise NotImplementedError(
                    f"{self.owner}.compute_marginals, site '{name}': expected a guide site that is drawn, got "
                    f"infer['enumerate'] {infer['enumerate']!r}. Leave that out, or the site out of the guide."
                )
        for name in model_trace.stochastic_nodes:
            node = model_trace.nodes[name]
            if "_enumerate_dim" in node["infer"]:  # the log-probabilities are there: a mask would be made a family of
                node["fn"] = law(node["fn"])
        return model_trace, guide_trace
