"""A check that a gradient estimator is unbiased, by enumeration of its random draws."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_sparse.estimators import Baseline, Estimator, ScoreFunction
from pyro_sparse.infer import EstimatorELBO
from pyro_sparse.testing.comparison import clean_room, drawn_log_prob, sampled, wrong_quantities
from pyro_sparse.testing.estimator_models import EstimatorModel, estimator_models
from pyro_sparse.testing.outcomes import outcomes

SHOWN = 5  # failures that the error message spells out
FIRST_RUNS = 20  # of guide and model, in which they make their parameters, those of every branch
WARM_UP = 3  # steps that give running means a past

MakeELBO = Callable[..., ELBO]


def check_estimator(
    e: Estimator | Baseline | MakeELBO, *, models: Iterable[EstimatorModel] | None = None, tol: float = 1e-6
) -> None:
    r"""Proves a gradient estimator unbiased, without Monte Carlo.

    The random draws of a step, the guide's and the estimator's own, are intercepted, and the step is run for every
    outcome :math:`\omega` that they can have (:func:`~pyro_sparse.testing.outcomes.outcomes`). The mean of the
    gradients must be the gradient of the objective, itself enumerated over the outcomes z of plain runs of guide and
    model:

    .. math:: \sum_\omega P(\omega)\,\hat g(\omega) =
        \nabla_\theta \sum_z q_\theta(z)\,\bigl(\log p_\theta(x, z) - \log q_\theta(z)\bigr)

    for every parameter :math:`\theta` of model and guide, in float64; the mean of the losses must be the objective's
    negative. For an estimator of the n-particle bound, the objective is the sum over the outcomes of n plain runs of

    .. math:: q_\theta(z_1) \cdots q_\theta(z_n) \sum_i \log \frac1n \sum_k p_\theta(x_i, z_{ki}) / q_\theta(z_{ki}),

    i in the plates that all sites share. The noise of normal sites is :math:`\pm 1` throughout; reparameterised
    gradients cannot tell. What an estimator has learnt is frozen: its buffers after a few steps, its parameters at
    random values, both put back before every step. So state belongs in buffers.

    Runs under validation, float64 and a parameter store of its own, all of which are put back, as is the state of the
    random number generators. Estimators and baselines are copied, not changed.

    Args:
        e: the estimator; or a baseline, for ``ScoreFunction(e)``; or what makes an ELBO from the keyword
            ``max_plate_nesting``: a class, or a ``functools.partial`` of it.
        models: what to check it on. The default is
            :func:`~pyro_sparse.testing.estimator_models.estimator_models`: some 60 small models, seconds of work,
            tens of them where the estimator draws twice at each site. The estimator may refuse a kind of them, by
            errors that name a site. For a model of your own, pass an
            :class:`~pyro_sparse.testing.estimator_models.EstimatorModel`.
        tol: the largest difference, absolute up to one and relative above.

    Raises:
        AssertionError: where they differ; it counts the models, and names the first few with the quantity, the value
            expected and the value got. Also where a step raises: it names the model, the error is its cause. That is
            no failure if the model's kind may be refused, the error names a site, all models of the kind are
            refused, and some other kind is served.
        TypeError: if ``e`` is none of the above.
        ValueError: if there is no model.

    Example:
        >>> from pyro_sparse.estimators import LeaveOneOut, MovingAverage
        >>> check_estimator(LeaveOneOut(2), models=estimator_models()[:2])
        >>> check_estimator(MovingAverage(0.9), models=estimator_models()[:2])

        A baseline that sees the draw is biased:

        >>> class Cheat(MovingAverage):
        ...     def forward(self, cost, site):
        ...         return 0.5 * cost, 0.0
        >>> check_estimator(Cheat(), models=estimator_models()[:2])
        Traceback (most recent call last):
        ...
        AssertionError: check_estimator: expected the gradient of the enumerated objective, but 2 of 2 models differ...
    """
    make_elbo = _maker(e)
    models = estimator_models() if models is None else list(models)
    if not models:
        raise ValueError("check_estimator: expected at least one model, got none. Leave out models for the default.")
    failures: list[str] = []
    errors: dict[str, Exception] = {}
    for model in models:
        try:
            wrong = _check_model(make_elbo, model, tol)
        except Exception as error:  # whatever it is, say in which model
            errors[model.name] = error
        else:
            failures += [f"model {model.name}: {wrong}"] if wrong else []
    served = {model.kind for model in models if model.name not in errors}
    for model in models:
        if model.name in errors and not _is_refused(model, errors[model.name], served):
            raise AssertionError(
                f"check_estimator: model {model.name}: the estimator raised {errors[model.name]!r}"
            ) from errors[model.name]
    if failures:
        shown = [*failures[:SHOWN], *(["..."] if len(failures) > SHOWN else [])]
        raise AssertionError(
            "check_estimator: expected the gradient of the enumerated objective, "
            f"but {len(failures)} of {len(models) - len(errors)} models differ.\n" + "\n".join(shown)
        )


def _maker(e: Estimator | Baseline | MakeELBO) -> MakeELBO:
    if isinstance(e, Baseline):
        e = ScoreFunction(e)
    if isinstance(e, Estimator):
        return lambda **options: EstimatorELBO(copy.deepcopy(e).double(), **options)
    if isinstance(e, ELBO) or not callable(e):
        raise TypeError(
            f"check_estimator: expected an Estimator, a Baseline or something that makes an ELBO, got {e!r}. "
            "Pass the ELBO's class, or functools.partial(its class, options)."
        )
    return e


def _is_refused(model: EstimatorModel, error: Exception, served: set[str]) -> bool:
    """Whether an error says, naming a site, that models of this kind are not served, and none is but another kind."""
    if not model.kind or not served or model.kind in served:
        return False
    with clean_room():
        trace = poutine.trace(model.guide).get_trace(*model.args)
    return any(f"'{site['name']}'" in str(error) for site in sampled(trace))


def _check_model(make_elbo: MakeELBO, model: EstimatorModel, tol: float) -> str:
    """What is wrong on one model; empty if nothing is."""
    with clean_room():
        pyro.set_rng_seed(0)
        branches = _first_runs(model, FIRST_RUNS)
        parameters = dict(pyro.get_param_store().named_parameters())
        elbo: Any = make_elbo(max_plate_nesting=model.max_plate_nesting)
        if branches:  # the steps that follow may miss one: give its sites their estimators
            for _ in range(FIRST_RUNS):
                elbo.loss(model.model, model.guide, *model.args)
        for _ in range(WARM_UP):
            elbo.loss_and_grads(model.model, model.guide, *model.args)
        _disturb_others(elbo, parameters)
        expected = _objective(model, _particles_of_bound(elbo), parameters)
        return wrong_quantities(expected, _mean_step(elbo, model, parameters), tol)


def _first_runs(model: EstimatorModel, count: int) -> bool:
    """Makes the parameters of model and guide; whether the guide has branches."""
    reached = set()
    for _ in range(count):
        guide_trace = poutine.trace(model.guide).get_trace(*model.args)
        poutine.replay(model.model, trace=guide_trace)(*model.args)
        reached.add(frozenset(guide_trace.nodes))
    return len(reached) > 1


def _disturb_others(elbo: Any, parameters: dict[str, Tensor]) -> None:
    """Gives the estimator's own parameters values that are not zero, as training would."""
    ours = {id(parameter) for parameter in parameters.values()}
    stored = dict(pyro.get_param_store().named_parameters())
    theirs = [*stored.values(), *(elbo.parameters() if isinstance(elbo, nn.Module) else ())]
    with torch.no_grad():
        for parameter in {id(p): p for p in theirs if id(p) not in ours}.values():
            parameter.add_(torch.randn_like(parameter))


def _particles_of_bound(elbo: Any) -> int:
    """n, if the ELBO is an n-particle bound, and 0 if it is the ELBO."""
    modules = elbo.modules() if isinstance(elbo, nn.Module) else ()
    bounds = [m.num_particles for m in modules if isinstance(m, Estimator) and m.objective == "bound"]
    return bounds[0] if bounds else 0


def _mean_step(elbo: Any, model: EstimatorModel, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The expected loss and gradients of a step, over all that the step may draw."""
    state = copy.deepcopy(elbo.state_dict()) if isinstance(elbo, nn.Module) else None

    def step() -> dict[str, Tensor]:
        if state is not None:
            elbo.load_state_dict(state)
        for _, parameter in pyro.get_param_store().named_parameters():
            parameter.grad = None
        loss = elbo.loss_and_grads(model.model, model.guide, *model.args)
        return {"loss": torch.as_tensor(loss), **_gradients(parameters)}

    mean: dict[str, Tensor] = {}
    for probability, result in outcomes(step):
        for name, value in result.items():
            mean[name] = mean.get(name, 0.0) + probability * value
    return mean


def _gradients(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"gradient of {name}": torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in parameters.items()
    }


# The objective, from plain runs of guide and model.


def _objective(model: EstimatorModel, n: int, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The enumerated loss, that of the n-particle bound if there are particles, and its gradients by autograd."""
    loss = torch.zeros(())
    for parameter in parameters.values():
        parameter.grad = None
    for probability, (log_q, value) in outcomes(lambda: _bound(model, n) if n else _elbo(model)):
        # The probability of the path, whose derivative is that of the guide's discrete values.
        weight = probability * (log_q - log_q.detach()).exp()
        loss = loss - weight.detach() * value.detach()
        (-weight * value).backward()
    return {"loss": loss, **_gradients(parameters)}


def _elbo(model: EstimatorModel) -> tuple[Tensor, Tensor]:
    """The guide's log-probability of what it drew, and the ELBO there."""
    guide_trace, model_trace = _traces(model.guide, model.model, model.args)
    return _log_q(guide_trace), model_trace.log_prob_sum() - guide_trace.log_prob_sum()


def _bound(model: EstimatorModel, n: int) -> tuple[Tensor, Tensor]:
    """The same for the n-particle bound, with one weight for each element of the plates that all sites share."""
    dim = -1 - model.max_plate_nesting

    def particles(program: Callable[..., Any]) -> Callable[..., Any]:
        return pyro.plate("particles", n, dim=dim)(program)

    guide_trace, model_trace = _traces(particles(model.guide), particles(model.model), model.args)
    sites = [(1, site) for site in sampled(model_trace)] + [(-1, site) for site in sampled(guide_trace)]
    stacks = [{frame.name: frame for frame in site["cond_indep_stack"]} for _, site in sites]
    shared = set.intersection(*(set(stack) for stack in stacks))
    scale = math.prod(frame.full_size / frame.size for name, frame in stacks[0].items() if name in shared)
    log_weights: Any = 0.0
    for (sign, site), stack in zip(sites, stacks, strict=True):
        log_prob = site["log_prob"]
        for name in set(stack) - shared:
            log_prob = log_prob.sum(stack[name].dim, keepdim=True)
        log_weights = log_weights + sign * log_prob / scale
    return _log_q(guide_trace), scale * (log_weights.logsumexp(dim) - math.log(n)).sum()


def _traces(guide: Callable[..., Any], model: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Any]:
    guide_trace = poutine.trace(guide).get_trace(*args)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    for trace in (guide_trace, model_trace):
        trace.compute_log_prob()
    return guide_trace, model_trace


def _log_q(guide_trace: Any) -> Tensor:
    """The log-probability with which the discrete values were drawn, whatever their scale and mask."""
    total = torch.zeros(())
    for site in sampled(guide_trace):
        if not site["fn"].has_rsample:
            total = total + drawn_log_prob(site).sum()
    return total
