"""A training in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, distributed, nn

from pyro_sparse.infer.assignment import PARAM_PREFIX
from pyro_sparse.infer.pyro_internals import optimizer_state

_FORMAT = 1


class Checkpoint:
    r"""
    A training in a file, from which it goes on with the same numbers, bit for bit, in a new process.

    It holds Pyro's param store, the parts that are given here, the number of the next step, and the random states of
    torch, Python and NumPy (on each process; of the current GPU where there is one). A save replaces the file in one
    step: whatever kills it, a whole file is there, the old one or the new. ``torch.load(path, weights_only=True)``
    reads it.

    The first run of a program makes its parameters, and :meth:`load` writes into those that are there. So run the loss
    once before, ``svi.evaluate_loss(x)``.

    On several processes each calls both methods; process 0 writes, and the others wait for it.

    Args:
        path: the file. While it is written, ``path`` with ``.part`` appended is there as well.
        parts: what else learns, by names of your choice. A :class:`pyro.infer.SVI` stands for its optimiser and its
            ELBO; without it, give the optimiser and the ELBO if it is an ``EstimatorELBO`` (or ``elbo(model, guide)``,
            which holds it with model and guide). Then what else there is: a scheduler; networks with buffers, such as
            batch normalisation, of which the param store holds the parameters only; a ``torch.Generator``. Anything
            with ``state_dict`` and ``load_state_dict``, or ``get_state`` and ``set_state``.

    Raises:
        TypeError: if a part has no state.

    Example:
        >>> import tempfile
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_sparse.estimators import MovingAverage
        >>> from pyro_sparse.infer import BaselineELBO, Checkpoint
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(0.5))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.3))))
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), BaselineELBO(MovingAverage()))
        >>> checkpoint = Checkpoint(tempfile.mkdtemp() + "/run.pt", svi=svi)
        >>> loss = svi.evaluate_loss()
        >>> start = checkpoint.load() if checkpoint.exists() else 0
        >>> for step in range(start, 3):
        ...     loss = svi.step()
        ...     checkpoint.save(step + 1)
    """

    def __init__(self, path: str | os.PathLike[str], **parts: Any) -> None:
        self.path = Path(path)
        self.parts = _parts(parts)
        self._access = {name: _access(name, part) for name, part in self.parts.items()}

    def exists(self) -> bool:
        """Whether there is a file to go on from."""
        return self.path.exists()

    def save(self, step: int) -> None:
        """
        Args:
            step: the number of the next step, which :meth:`load` returns.

        Raises:
            ValueError: if the param store has parameters of an ELBO that is no part, or a part's state is not made of
                tensors, numbers, strings and containers of these. The file is as it was.
        """
        if lost := [name for name in self._stored() if name.startswith(PARAM_PREFIX)]:
            raise ValueError(
                f"Checkpoint: expected the ELBO among the parts, got parameters of its estimators, {lost}, without it. "
                "Checkpoint(path, elbo=elbo, ...)."
            )
        state = {
            "format": _FORMAT,
            "step": step,
            "params": {name: parameter.detach() for name, parameter in self._stored().items()},
            "parts": {name: get() for name, (get, _) in self._access.items()},
            "random": _of_all_processes(_random_state()),
        }
        if _rank() == 0:
            self._write(state)
        if distributed.is_initialized():
            distributed.barrier()

    def load(self, *, random_state: bool = True) -> int:
        """
        Args:
            random_state: False leaves the random states as they are, as on another number of processes.

        Returns:
            The number of the next step.

        Raises:
            ValueError: if the file has other parts, parameters or processes than there are now; nothing has changed.
        """
        # Generators and random states live on the CPU; what belongs to a GPU is copied there.
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        self._check(state, random_state)
        for name, (_, put) in self._access.items():
            put(state["parts"][name])
        stored = self._stored()
        with torch.no_grad():
            for name, value in state["params"].items():
                stored[name].copy_(value)
        if random_state:
            _set_random_state(state["random"][_rank()])
        step: int = state["step"]
        return step

    def _stored(self) -> dict[str, Tensor]:
        """The parameters of the param store, unconstrained, which no part holds."""
        held = {id(p) for part in self.parts.values() if isinstance(part, nn.Module) for p in part.parameters()}
        return {name: p for name, p in pyro.get_param_store().named_parameters() if id(p) not in held}

    def _write(self, state: dict[str, Any]) -> None:
        part = self.path.with_name(self.path.name + ".part")
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(str(part)):
            part.unlink()
            raise ValueError(
                f"Checkpoint: expected states of tensors, numbers, strings and containers of these, got {foreign}. "
                "Leave that part out, or give it a state of these."
            )
        os.replace(part, self.path)
        if os.name == "posix":
            directory = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)

    def _check(self, state: Any, random_state: bool) -> None:
        where = f"Checkpoint {self.path}"
        if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
            raise ValueError(f"{where}: expected a file of Checkpoint.save, got another. Load it as it was saved.")
        if state["parts"].keys() != self.parts.keys():
            raise ValueError(f"{where}: expected parts {[*state['parts']]}, got {[*self.parts]}. Give the same.")
        now = {n: (p.shape, p.dtype) for n, p in self._stored().items() if not n.startswith(PARAM_PREFIX)}
        then = {n: (p.shape, p.dtype) for n, p in state["params"].items()}
        if names := sorted(n for n in now.keys() | then.keys() if now.get(n) != then.get(n)):
            raise ValueError(
                f"{where}: expected the parameters that were saved, got a param store that differs in {names}. Run the "
                "loss once before load(), svi.evaluate_loss(...): the first run makes them."
            )
        for name, part in self.parts.items():
            if getattr(part, "optim_objs", None):
                raise ValueError(
                    f"{where}: expected optimiser '{name}' before its first step, got one after it, whose state Pyro "
                    "would not replace. Make a new one, and load() before svi.step()."
                )
        processes = len(state["random"])
        if random_state and processes != _processes():
            raise ValueError(
                f"{where}: expected {processes} processes, as saved, got {_processes()}. With other random numbers it "
                "goes on by load(random_state=False)."
            )


def _parts(given: Mapping[str, Any]) -> dict[str, Any]:
    """With what an ``SVI`` stands for."""
    parts = {}
    for name, part in given.items():
        if isinstance(part, pyro.infer.SVI):
            parts[f"{name}.optim"] = part.optim
            elbo = getattr(part.loss_and_grads, "__self__", None)
            if isinstance(elbo, nn.Module):  # one that learns
                parts[f"{name}.elbo"] = elbo
        else:
            parts[name] = part
    return parts


def _access(name: str, part: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """How to get a part's state, and how to put it back."""
    if isinstance(part, pyro.optim.PyroOptim):
        return lambda: optimizer_state(part), part.set_state
    for get, put in (("state_dict", "load_state_dict"), ("get_state", "set_state")):
        if hasattr(part, get) and hasattr(part, put):
            return getattr(part, get), getattr(part, put)
    raise TypeError(
        f"Checkpoint, part '{name}': expected state_dict and load_state_dict, or get_state and set_state, got {part}. "
        "Leave out what learns nothing, such as SparseEnumELBO."
    )


def _random_state() -> dict[str, Any]:
    state = pyro.util.get_rng_state()
    kind, key, *rest = state["numpy"]
    state["numpy"] = [kind, key.tolist(), *rest]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    pyro.util.set_rng_state({**state, "numpy": tuple(state["numpy"])})
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _of_all_processes(state: Any) -> list[Any]:
    if not distributed.is_initialized():
        return [state]
    states: list[Any] = [None] * _processes()
    distributed.all_gather_object(states, state)
    return states
