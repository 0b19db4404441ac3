"""A check that estimators which sum over all outcomes agree with enumeration on random programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, config_enumerate
from torch import Tensor

from pyro_sparse.infer import EstimatorELBO
from pyro_sparse.testing.comparison import clean_room, drawn_log_prob, sampled, wrong_quantities
from pyro_sparse.testing.random_programs import RandomProgram, random_program

SHOWN = 3  # failures that the error message spells out


def check_random_programs(
    make_elbo: Callable[..., ELBO] = EstimatorELBO,
    *,
    programs: Iterable[RandomProgram] | None = None,
    tol: float = 1e-10,
) -> None:
    r"""Checks that sums over all outcomes, by whichever estimators, are stock enumeration.

    At each site of a random program one of :data:`HOW` is drawn, or enumeration by ``infer``. None of them is noisy
    where it visits all outcomes, so at every draw, however the sites depend on each other, loss and gradients must be
    those of :class:`~pyro.infer.TraceEnum_ELBO`, here of :func:`enumerated_loss`: to a difference of ``tol``, absolute
    up to one and relative above, in float64.

    Args:
        make_elbo: ``(estimators, **options) -> elbo``, where the estimators are a dict by site.
        programs: what to check it on; the default is ``map(random_program, range(60))``, three seconds of work.
        tol: the largest difference.

    Raises:
        AssertionError: where they differ or the ELBO raises; it counts the programs and shows the first few, each with
            its seed and structure.

    Example:
        >>> check_random_programs(programs=map(random_program, range(3)))
    """
    programs = list(map(random_program, range(60)) if programs is None else programs)
    failures = [f"{wrong}\n{program}" for program in programs if (wrong := _check_program(make_elbo, program, tol))]
    if failures:
        shown = [*failures[:SHOWN], *(["..."] if len(failures) > SHOWN else [])]
        raise AssertionError(
            "check_random_programs: expected the values of stock enumeration, "
            f"but {len(failures)} of {len(programs)} programs differ.\n" + "\n".join(shown)
        )


def _check_program(make_elbo: Callable[..., ELBO], program: RandomProgram, tol: float) -> str:
    """What is wrong with one program; empty if nothing is."""
    with clean_room():
        pyro.set_rng_seed(program.seed)
        guide_trace = poutine.trace(program.guide).get_trace()
        poutine.replay(program.model, trace=guide_trace)()
        parameters = dict(pyro.get_param_store().named_parameters())
        expected = gradients(enumerated_loss(program), parameters)
        try:
            elbo: Any = make_elbo(program.estimators(), **program.options)
            got = gradients(elbo.differentiable_loss(program.model, program.served_guide()), parameters)
        except Exception as error:  # whatever it is, say in which program
            return f"raised {error!r} in"
        wrong = wrong_quantities(expected, got, tol)
        return f"{wrong}, in" if wrong else ""


def enumerated_loss(program: RandomProgram) -> Tensor:
    r"""The loss by its definition: for each term, the sum over all outcomes of the sites that it may depend on.

    .. math:: -\sum_i \sum_z \Bigl(\prod_j q(z_j \mid z_{<j})\Bigr)\, f_i(z)

    with j over the sites whose plates are among those of term i. Scales and masks are for the terms, not for q. It is
    what :class:`~pyro.infer.TraceEnum_ELBO` computes by messages, which some programs with sites apart crash.
    """
    guide = poutine.enum(config_enumerate(program.guide), first_available_dim=-1 - program.nesting)
    guide_trace = poutine.trace(guide).get_trace()
    model_trace = poutine.trace(poutine.replay(program.model, trace=guide_trace)).get_trace()
    log_qs = [(_plates_of(site), drawn_log_prob(site)) for site in sampled(guide_trace)]
    loss = torch.zeros(())
    for sign, trace in ((1, model_trace), (-1, guide_trace)):
        trace.compute_log_prob()
        for site in sampled(trace):
            plates = _plates_of(site)
            log_weight = sum((log_q for inside, log_q in log_qs if inside <= plates), torch.zeros(()))
            weight, term = torch.broadcast_tensors(log_weight.exp(), sign * site["log_prob"])
            visited = weight > 0  # elsewhere a term may be infinite
            loss = loss - (weight[visited] * term[visited]).sum()
    return loss


def _plates_of(site: Any) -> frozenset[str]:
    return frozenset(frame.name for frame in site["cond_indep_stack"])


def gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The loss and all its gradients."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) if loss.requires_grad else ()
    gradients = {f"gradient of {name}": torch.zeros_like(p) for name, p in parameters.items()}
    gradients |= {f"gradient of {name}": g for name, g in zip(parameters, found, strict=False) if g is not None}
    return {"loss": loss.detach(), **gradients}
