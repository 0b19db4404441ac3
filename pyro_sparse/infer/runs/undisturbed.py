"""Runs on the side that leave random numbers, modules' buffers and parameters as they were, and what tells of draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pyro_sparse._autograd import has_compiled


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without gradients; on leaving, buffers and generators (of torch, CPU and GPUs, Python, numpy) are as before."""
    state = pyro.util.get_rng_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), buffers_as_they_were():
            yield
    finally:
        pyro.util.set_rng_state(state)


@contextmanager
def buffers_as_they_were() -> Iterator[None]:
    """
    On leaving, each module that was called has the buffers it had, so that batch normalisation counts a step once.
    The run writes to copies: an earlier run's graph may need what is in the buffers.
    """
    kept: dict[nn.Module, dict[str, Any]] = {}

    def before_forward(module: nn.Module, args: Any) -> None:
        if module in kept:
            return
        for part in module.modules():  # of a compiled module no part is seen to be called
            if part not in kept and not isinstance(part, torch.jit.ScriptModule):  # whose buffers are not Python's
                kept[part] = dict(part._buffers)
                part._buffers.update({name: x.clone() for name, x in _filled(part).items()})

    try:
        with before_every_forward(before_forward):
            yield
    finally:
        for module, buffers in kept.items():
            module._buffers.update(buffers)


def _filled(module: nn.Module) -> dict[str, Any]:
    """Its buffers, but for those of a lazy module that wait for their sizes."""
    return {name: x for name, x in module._buffers.items() if x is not None and not is_lazy(x)}


@contextmanager
def before_every_forward(act: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Calls ``act`` before each call of a module; of a compiled one once, from outside."""

    act = torch.compiler.disable(act) if has_compiled() else act  # the compiler would take it into the network

    def before_forward(module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            act(module, args)

    with ExitStack() as stack:
        if has_compiled():  # a compiled module warns that it calls a hook twice
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings(
                "ignore", r"Using `torch\.compile\(module\)` when there are global hooks", UserWarning
            )
        hook = nn.modules.module.register_module_forward_pre_hook(before_forward)
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def rewindable() -> Iterator[Callable[[], None]]:
    """
    For a run that may have to be done again: gives what puts back the state of the generators of torch (CPU and GPUs),
    Python and numpy, and the buffers of the modules called until then.
    """
    state = generators()
    kept: dict[nn.Module, dict[str, Any]] = {}

    def before_forward(module: nn.Module, args: Any) -> None:
        if module not in kept:
            for part in module.modules():  # of a compiled module no part is seen to be called
                if part not in kept:
                    kept[part] = {name: (x, x.clone()) for name, x in _filled(part).items()}

    def put_back() -> None:
        set_generators(state)
        with torch.no_grad():
            for module, own in kept.items():
                for name, (x, value) in own.items():
                    module._buffers[name] = x
                    # Batch normalisation's writes do not count as versions. A write to others would invalidate the
                    # graphs of earlier runs.
                    if not torch.equal(x, value):
                        x.copy_(value)

    with before_every_forward(before_forward):
        yield put_back


Generators = tuple[Any, list[torch.Tensor]]


def generators() -> Generators:
    """The state of the generators of torch (CPU and GPUs), Python and numpy."""
    return pyro.util.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_generators(state: Generators) -> None:
    """Puts it back."""
    pyro.util.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1])  # nothing, where there is none


def random_state(state: Generators | None = None) -> tuple[Any, ...]:
    """That of every generator that a program may draw from (now, by default), to compare."""
    own, cuda = generators() if state is None else state
    return *(x.numpy().tobytes() for x in [own["torch"], *cuda]), *_of_python(own)


def random_state_of_python() -> tuple[Any, ...]:
    """That of the generators that torch does not know: Python's and numpy's."""
    return _of_python(pyro.util.get_rng_state())


def _of_python(state: Any) -> tuple[Any, ...]:
    _, keys, *position = state["numpy"]
    return state["random"], keys.tobytes(), position
