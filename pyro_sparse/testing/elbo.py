"""A check that an ELBO which visits only part of a support is nevertheless exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, TraceEnum_ELBO, config_enumerate
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from pyro_sparse.testing.comparison import clean_room, wrong_quantities
from pyro_sparse.testing.models import Case, grid

METHODS = ("loss", "loss_and_grads", "differentiable_loss")
SHOWN = 5  # failures that the error message spells out


def check_elbo(elbo: Callable[..., ELBO], *, cases: Iterable[Case] | None = None, tol: float = 1e-10) -> None:
    r"""Checks an ELBO against :class:`~pyro.infer.TraceEnum_ELBO` on the dense support.

    For each case, with dense loss :math:`\mathcal{L}` and tested loss :math:`\hat{\mathcal{L}}` as functions of the
    parameters :math:`\theta` of model and guide, the check demands in float64

    .. math::
        |\hat{\mathcal{L}} - \mathcal{L}| \le \mathrm{tol} \cdot \max(1, |\mathcal{L}|), \qquad
        |\partial_i \hat{\mathcal{L}} - \partial_i \mathcal{L}| \le \mathrm{tol} \cdot \max(1, |\partial_i \mathcal{L}|)
        \quad \text{for every entry } i \text{ of } \theta.

    The loss is taken from ``loss``, ``loss_and_grads`` and ``differentiable_loss``, the gradient from the last two.
    The reference enumerates with ``config_enumerate(guide)``; the tested ELBO gets the guide as it is.

    Runs under validation, float64 and a parameter store of its own, all of which are put back, as is the state of the
    random number generators. Gradients of modules registered by ``pyro.module`` end up cleared.

    Args:
        elbo: makes the ELBO to be checked from the keywords of a case (``max_plate_nesting``, ``num_particles``,
            ``vectorize_particles``): the class itself, or a ``functools.partial`` that sets more.
        cases: what to check it on. The default is :func:`~pyro_sparse.testing.models.grid`: some 115 small models,
            ten seconds of work. For a model of your own, pass a :class:`~pyro_sparse.testing.models.Case`. Draws
            downstream of an enumerated site must not depend on how many of its outcomes are visited:
            :class:`~pyro_sparse.testing.noise.TableNormal` draws such noise.
        tol: the largest difference, absolute up to one and relative above.

    Raises:
        AssertionError: where they differ; it counts the cases, and names the first few with the quantity, the value
            expected and the value got. Also where the ELBO raises: it names the case, the error is its cause.
        ValueError: if there is no case.

    Example:
        One case takes milliseconds; leave out ``cases`` to check everything.

        >>> from functools import partial
        >>> from pyro_sparse.infer import SparseEnumELBO
        >>> check_elbo(partial(SparseEnumELBO, mode="union"), cases=grid()[:1])

        An ELBO that scores one draw of a discrete site is unbiased, but not exact:

        >>> from pyro.infer import Trace_ELBO
        >>> check_elbo(Trace_ELBO, cases=grid()[:1])
        Traceback (most recent call last):
        ...
        AssertionError: check_elbo: expected the values of TraceEnum_ELBO on the dense support, but 1 of 1 cases ...

    Reference: G. Correia et al., *Efficient marginalization of discrete and structured latent variables via sparsity*,
    NeurIPS 2020, §3: outcomes of probability zero contribute neither to the expectation nor to its gradient.
    """
    cases = grid() if cases is None else list(cases)
    if not cases:
        raise ValueError("check_elbo: expected at least one case, got none. Leave out cases for the whole grid.")
    failures = [failure for case in cases if (failure := _check_case(elbo, case, tol))]
    if failures:
        shown = [*failures[:SHOWN], *(["..."] if len(failures) > SHOWN else [])]
        raise AssertionError(
            "check_elbo: expected the values of TraceEnum_ELBO on the dense support, "
            f"but {len(failures)} of {len(cases)} cases differ.\n" + "\n".join(shown)
        )


def _check_case(elbo: Callable[..., ELBO], case: Case, tol: float) -> str:
    """What is wrong in one case; empty if nothing is."""
    with clean_room():
        guide = case.guide if case.reference_guide is None else case.reference_guide
        # One method is enough, but where the first call of all draws more than the others, to guess the nesting.
        methods = METHODS[1:2] if "max_plate_nesting" in case.elbo_options else METHODS[:2]
        dense = evaluate(TraceEnum_ELBO, case, config_enumerate(guide), methods)
    with clean_room():
        try:
            got = evaluate(elbo, case, case.guide)
        except Exception as error:  # whatever it is, say in which case
            raise AssertionError(f"check_elbo: case {case.name}: the ELBO raised {error!r}") from error
    again = {name.replace("loss_and_grads", "differentiable_loss"): value for name, value in dense.items()}
    expected = {"loss of loss": dense["loss of loss_and_grads"], **again, **dense}
    wrong = wrong_quantities(expected, got, tol)
    return f"case {case.name}: {wrong}" if wrong else ""


def evaluate(
    make_elbo: Callable[..., ELBO], case: Case, guide: Callable[..., Any], methods: Sequence[str] = METHODS
) -> dict[str, Tensor]:
    """The loss by each method and, where the method has one, the gradient of every parameter."""
    # A run without enumeration registers the parameters, so that drawing their first values takes no noise later.
    pyro.set_rng_seed(0)
    with poutine.block():
        trace = poutine.trace(guide).get_trace(*case.args)
        poutine.replay(case.model, trace=trace)(*case.args)
    parameters = dict(pyro.get_param_store().named_parameters())
    elbo = make_elbo(**case.elbo_options)
    pyro.set_rng_seed(1)
    rng = get_rng_state()
    results = {}
    for method in methods:
        for parameter in parameters.values():
            parameter.grad = None
        set_rng_state(rng)
        loss = getattr(elbo, method)(case.model, guide, *case.args)
        results[f"loss of {method}"] = torch.as_tensor(loss).detach()
        if method == "loss":
            continue
        if method == "differentiable_loss":
            loss.backward()
        for name, parameter in parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            results[f"gradient of {name} by {method}"] = gradient.detach()
            parameter.grad = None
    return results
