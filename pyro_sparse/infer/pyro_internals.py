"""
What is not public in Pyro and torch and is needed here, one name each: what for, what would break without it, and
which public way would replace it. The first place to look after an upgrade.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pyro
from pyro.infer.discrete import _sample_posterior_from_trace
from pyro.infer.traceenum_elbo import _check_tmc_elbo_constraint, _compute_dice_elbo, _find_ordinal, _get_common_scale
from pyro.infer.util import Dice
from pyro.optim import PyroOptim
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.runtime import _ENUM_ALLOCATOR, _PYRO_STACK
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.distributions.kl import _dispatch_kl, _kl_transformed_transformed
from torch.nn.parallel import DistributedDataParallel

from pyro_sparse._autograd import has_compiled
from pyro_sparse._precision import no_autocast

#: ``pyro.poutine.indep_messenger.CondIndepStackFrame``: a plate around a site, with the dim that it took. Its module is
#: not documented; the frames that a trace holds are.
Frame = Any

#: the plate that ``pyro.infer.ELBO`` puts around vectorised particles; its name is in no constant
PARTICLES = "num_particles_vectorized"

#: Modules that mix rows, or draw, in training only: their bases have no public name, and naming every subclass would
#: miss the next one.
DROPOUT = (nn.modules.dropout._DropoutNd,)
TRAINING_ONLY = (nn.modules.batchnorm._NormBase, *DROPOUT)


def is_subsample(fn: Any) -> bool:
    """
    Whether a message is a plate's, which draws the indices. ``pyro.poutine.util.site_is_subsample`` asks a site of a
    trace by the type's name; a message that is not yet done has this distribution only.
    """
    return isinstance(fn, _Subsample)


def dims_as_now() -> Callable[[], None]:
    """
    The result gives enumeration its next dims as they are now: a model that runs several times is to have the same
    each time. Only a guide's messenger can begin anew in public, by ``first_available_dim``.
    """
    before = {k: copy.copy(v) for k, v in vars(_ENUM_ALLOCATOR).items()}

    def put_back() -> None:
        vars(_ENUM_ALLOCATOR).update({k: copy.copy(v) for k, v in before.items()})

    return put_back


def global_ids(dim: int) -> set[int]:
    """Who has an enumeration dim outside of all ``pyro.markov``: nobody, or one. Only the allocator knows."""
    ids = _ENUM_ALLOCATOR.dim_to_id
    return {ids[dim]} if dim in ids else set()


def handlers_around() -> list[str]:
    """
    The effect handlers that are active now, but for those that only look, as SVI's own does. There is no public way to
    ask for the stack.
    """
    looking = (TraceMessenger, BlockMessenger)
    return [type(handler).__name__ for handler in _PYRO_STACK if not isinstance(handler, looking)]


# The sum of TraceEnum_ELBO has no public form that takes traces; without it SparseEnumELBO would be a copy of it.


def dice_elbo(model_trace: Any, guide_trace: Any) -> Any:
    """The ELBO of two packed traces, zero without terms, whose derivative is that of its expectation."""
    with no_autocast():
        return _compute_dice_elbo(model_trace, guide_trace)


def dice_expectation(name: str, model_trace: Any, guide_trace: Any) -> Any:
    """The expectation of one model site's log-probability, by the same weights."""
    ordering = {
        site: _find_ordinal(trace, trace.nodes[site])
        for trace in (model_trace, guide_trace)
        for site in [*trace.stochastic_nodes, *trace.observation_nodes]
    }
    cost = {ordering[name]: [model_trace.nodes[name]["packed"]["log_prob"]]}
    with no_autocast():
        return Dice(guide_trace, ordering).compute_expectation(cost)


def check_local_sampling(model_trace: Any, guide_trace: Any) -> None:
    """Pyro's own refusal of ``num_samples`` where its sum would be wrong."""
    _check_tmc_elbo_constraint(model_trace, guide_trace)


def common_scale(scales: list[Any]) -> Any:
    """The scale of factors that are summed out together; raises as ``TraceEnum_ELBO`` does where they differ."""
    return _get_common_scale(scales)


def sample_posterior_from_trace(
    fn: Any, enum_trace: Any, temperature: int, strict: bool, *args: Any, **kwargs: Any
) -> Any:
    """What ``pyro.infer.infer_discrete`` does with the trace of its enumerating run, which it makes itself."""
    with no_autocast():
        return _sample_posterior_from_trace(fn, enum_trace, temperature, strict, *args, **kwargs)


# The param store. Its public mapping gives constrained values, and makes a new one at each read.


def stored(name: str) -> Tensor | None:
    """The unconstrained parameter of this name itself."""
    parameter: Tensor | None = pyro.get_param_store()._params.get(name)
    return parameter


def optimizer_state(optimizer: PyroOptim) -> dict[str, Any]:
    """
    Its state, with that which was loaded for parameters that it has not met since: ``get_state`` leaves that out, and
    training that is saved again before it meets them would begin anew there.
    """
    return {**optimizer._state_waiting_to_be_consumed, **optimizer.get_state()}


def set_optimizer_state(optimizer: PyroOptim, state: dict[str, Any]) -> None:
    """
    Replaces its state, also after its first step: ``set_state`` alone would wait for parameters that are there, and
    keep what an earlier call has given.
    """
    optimizer.optim_objs.clear()
    optimizer.grad_clip.clear()
    optimizer._state_waiting_to_be_consumed = dict(state)


@contextmanager
def no_new_parameters() -> Iterator[None]:
    """
    On leaving, the param store holds what it held: a parameter that the run made is made again, by the random numbers
    that its first value draws. One tensor may have several names in it, which ``get_state`` and ``set_state`` part.
    """
    store: Any = pyro.get_param_store()
    before = dict(store._params), dict(store._param_to_name), dict(store._constraints)
    try:
        yield
    finally:
        store._params, store._param_to_name, store._constraints = before


def is_that_of_the_bases(p: Any, q: Any) -> bool:
    """
    Whether torch's divergence is that of what two distributions transform, which holds for one-to-one maps without
    parameters only. There is no public way to ask which formula serves a pair.
    """
    return _dispatch_kl(type(p), type(q)) is _kl_transformed_transformed


def data_parallel() -> DistributedDataParallel | None:
    """
    The ``DistributedDataParallel`` whose forward pass this is: a module is not told what wraps it. Without it a
    parameter that a batch leaves out is an error of torch at the next step, on one process, while the others wait.
    """
    around: DistributedDataParallel | None = DistributedDataParallel._get_active_ddp_module()
    return around


def buffers_kept() -> AbstractContextManager[None]:
    """
    Networks compiled meanwhile can be differentiated more than once: else torch gives away what a second backward
    would need, and raises. Of older versions of torch all can.
    """
    if not has_compiled():
        return nullcontext()
    config: Any = importlib.import_module("torch._functorch.config")  # which torch imports when it first compiles
    return config.patch(donated_buffer=False) if hasattr(config, "donated_buffer") else nullcontext()
