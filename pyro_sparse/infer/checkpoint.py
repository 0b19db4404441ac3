"""A training in a file."""

from __future__ import annotations

import copy
import io
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from pyro_sparse.infer.assignment import PARAM_PREFIX
from pyro_sparse.infer.pyro_internals import optimizer_state, set_optimizer_state

_FORMAT = 1


class Checkpoint:
    r"""
    A training in a file, from which it goes on with the same numbers, bit for bit, in a new process.

    It holds Pyro's param store, the parts that are given here, the number of the next step, and the random states of
    torch, Python and NumPy (on each process; of the current GPU where there is one). A save replaces the file in one
    step: whatever kills it, a whole file is there, the old one or the new. ``torch.load(path, weights_only=True)``
    reads it.

    The first run of a program makes its parameters, and :meth:`load` writes into those that are there. So run the loss
    once before, ``svi.evaluate_loss(x)``. Settings are those of the file, such as a learning rate. With
    ``mode="auto"``, whose choice depends on what it has counted, training goes on with the same numbers up to rounding.

    On several processes each calls all methods; process 0 writes, and the others wait for it. All read the one file.

    Args:
        path: the file, in a folder that exists. While it is written, ``path`` with ``.part`` appended is there as well.
        parts: what else learns, by names of your choice. A :class:`pyro.infer.SVI` stands for its optimiser and its
            ELBO; without it, give the optimiser and the ELBO if it is an ``EstimatorELBO`` (or ``elbo(model, guide)``,
            which holds it with model and guide; ``DistributedDataParallel`` stands for what it wraps). Then what else
            there is: a scheduler; networks with buffers, such as batch normalisation, of which the param store holds
            the parameters only; a ``torch.Generator``, each process its own. Anything with ``state_dict`` and
            ``load_state_dict``, or ``get_state`` and ``set_state``, of tensors, numbers and strings.

    Raises:
        TypeError: if a part has no state.
        ValueError: if the path is a folder, or its folder does not exist.

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
        self.path = Path(path).resolve()  # where it is now, wherever the program goes
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise ValueError(
                f"Checkpoint: expected a file in a folder that exists, got {self.path}. Make the folder; name a file."
            )
        self.parts = _parts(parts)
        self._access = {n: _access(n, part) for n, part in self.parts.items() if not isinstance(part, torch.Generator)}

    def exists(self) -> bool:
        """
        Whether there is a file to go on from.

        Raises:
            ValueError: if some processes see it and others do not.
        """
        found = _of_all_processes(self.path.is_file())
        if len(set(found)) > 1:
            raise ValueError(
                f"Checkpoint {self.path}: expected all processes to see the file, got {found}. Put it where all read."
            )
        return all(found)

    def save(self, step: int) -> None:
        """
        Args:
            step: the number of the next step, which :meth:`load` returns.

        Raises:
            TypeError: if it is no integer.
            ValueError: if the param store has parameters of an ELBO that is no part, a part's state is not made of
                tensors, numbers, strings and containers of these, or processes differ in step or parameters. The file
                is as it was.
        """
        if not hasattr(step, "__index__") or isinstance(step, bool) or int(step) < 0:
            raise TypeError(
                f"Checkpoint.save: expected the number of the next step, 0 or more, got {step!r}. Count them."
            )
        if lost := [name for name in self._stored() if name.startswith(PARAM_PREFIX)]:
            raise ValueError(
                f"Checkpoint: expected the ELBO among the parts, got parameters of its estimators, {lost}, without it. "
                "Checkpoint(path, elbo=elbo, ...)."
            )
        constraints = pyro.get_param_store().get_state()["constraints"]
        stored = {name: (parameter.detach(), repr(constraints[name])) for name, parameter in self._stored().items()}
        self._check_processes(int(step), {name: value for name, (value, _) in stored.items()})
        state = {
            "format": _FORMAT,
            "step": int(step),
            "params": stored,
            "parts": {name: get() for name, (get, _) in self._access.items()},
            "kinds": {name: _kind(part) for name, part in self.parts.items()},
            "random": _of_all_processes(self._random_state()),
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
            FileNotFoundError: if there is no file.
            ValueError: if the file has other parts, parameters, constraints or processes than there are now. Nothing
                has changed then, nor where a part raises an error of its own.
        """
        if not self.path.exists():
            raise FileNotFoundError(f"Checkpoint {self.path}: expected a file, got none. Ask exists() before.")
        # torch's own files are archives; of another, or of half a one, it raises whatever it stumbles on.
        whole = zipfile.is_zipfile(self.path)
        # Generators and random states live on the CPU; what belongs to a GPU is copied there.
        state: Any = torch.load(self.path, map_location="cpu", weights_only=True) if whole else None
        self._check(state, random_state)
        before = copy.deepcopy({name: get() for name, (get, _) in self._access.items()})
        loaded = False
        try:
            for name, (_, put) in self._access.items():
                put(state["parts"][name])
            loaded = True
        finally:
            if not loaded:
                for name, (_, put) in self._access.items():
                    put(before[name])
        stored = self._stored()
        with torch.no_grad():
            for name, (value, _) in state["params"].items():
                stored[name].copy_(value)
        if random_state:
            self._set_random_state(state["random"][_rank()])
        step: int = state["step"]
        return step

    def _stored(self) -> dict[str, Tensor]:
        """The parameters of the param store, unconstrained, which no part holds."""
        held = {id(p) for part in self.parts.values() if isinstance(part, nn.Module) for p in part.parameters()}
        return {name: p for name, p in pyro.get_param_store().named_parameters() if id(p) not in held}

    def _check_processes(self, step: int, stored: Mapping[str, Tensor]) -> None:
        modules = {name: part for name, part in self.parts.items() if isinstance(part, nn.Module)}
        learned = {**stored, **{f"{n}.{k}": p for n, part in modules.items() for k, p in part.named_parameters()}}
        sums = {name: repr(p.detach().double().sum().item()) for name, p in learned.items() if not is_lazy(p)}
        for rank, (other_step, others) in enumerate(_of_all_processes((step, sums))):
            if other_step != step:
                raise ValueError(
                    f"Checkpoint.save: expected one step on all processes, got {step} and, on process {rank}, "
                    f"{other_step}. Save after the same number of steps on each."
                )
            if differing := sorted(name for name in sums.keys() | others.keys() if sums.get(name) != others.get(name)):
                raise ValueError(
                    "Checkpoint.save: expected the same parameters on all processes, got others on process "
                    f"{rank}: {differing}. SVI exchanges no gradients, DistributedDataParallel(elbo(...)) does."
                )

    def _write(self, state: dict[str, Any]) -> None:
        part = self.path.with_name(self.path.name + ".part")
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(str(part)):
            part.unlink()
            names = [name for name, its in state["parts"].items() if _foreign(its)]
            raise ValueError(
                f"Checkpoint, parts {names}: expected states of tensors, numbers, strings and containers of these, got "
                f"{foreign}. Give the part Python's own numbers, such as float(lr), or leave it out."
            )
        os.replace(part, self.path)
        if os.name == "posix":
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def _check(self, state: Any, random_state: bool) -> None:
        where = f"Checkpoint {self.path}"
        if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
            raise ValueError(f"{where}: expected a whole file of Checkpoint.save, got another. Take the one before it.")
        kinds = {name: _kind(part) for name, part in self.parts.items()}
        if state["kinds"] != kinds:
            raise ValueError(f"{where}: expected parts as saved, {state['kinds']}, got {kinds}. Give the same.")
        constraints = pyro.get_param_store().get_state()["constraints"]
        now = {
            name: f"{_shown(parameter)}, {constraints[name]!r}"
            for name, parameter in self._stored().items()
            if not name.startswith(PARAM_PREFIX)
        }
        then = {name: f"{_shown(value)}, {constraint}" for name, (value, constraint) in state["params"].items()}
        if missing := sorted(then.keys() - now.keys()):
            raise ValueError(
                f"{where}: expected the parameters that were saved, got a param store without {missing}. Run the "
                "program before load() until it has made them: svi.evaluate_loss(...), or svi.step(...) if a step does."
            )
        if differing := {n: (then.get(n, "none"), d) for n, d in now.items() if then.get(n) != d}:
            saved, got = ({n: pair[i] for n, pair in differing.items()} for i in (0, 1))
            raise ValueError(
                f"{where}: expected the parameters that were saved, {saved}, got {got}. Load it into the same program."
            )
        processes = len(state["random"])
        if random_state and processes != _processes():
            raise ValueError(
                f"{where}: expected {processes} processes, as saved, got {_processes()}. With other random numbers it "
                "goes on by load(random_state=False)."
            )

    def _random_state(self) -> dict[str, Any]:
        state = pyro.util.get_rng_state()
        kind, key, *rest = state["numpy"]
        state["numpy"] = [kind, key.tolist(), *rest]
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        state["parts"] = {name: part.get_state() for name, part in self._generators().items()}
        return state

    def _set_random_state(self, state: dict[str, Any]) -> None:
        pyro.util.set_rng_state({**state, "numpy": tuple(state["numpy"])})
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        for name, part in self._generators().items():
            part.set_state(state["parts"][name])

    def _generators(self) -> dict[str, torch.Generator]:
        return {name: part for name, part in self.parts.items() if isinstance(part, torch.Generator)}


def _parts(given: Mapping[str, Any]) -> dict[str, Any]:
    """With what an ``SVI`` stands for."""
    parts = {}
    for name, part in given.items():
        if isinstance(part, DistributedDataParallel):
            parts[name] = part.module
        elif isinstance(part, pyro.infer.SVI):
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
        return lambda: optimizer_state(part), lambda state: set_optimizer_state(part, state)
    for get, put in (("state_dict", "load_state_dict"), ("get_state", "set_state")):
        if hasattr(part, get) and hasattr(part, put):
            return getattr(part, get), getattr(part, put)
    raise TypeError(
        f"Checkpoint, part '{name}': expected state_dict and load_state_dict, or get_state and set_state, got {part}. "
        "Leave out what learns nothing, such as SparseEnumELBO."
    )


def _kind(part: Any) -> str:
    made_by = getattr(part, "pt_optim_constructor", type(part))  # of Pyro's optimisers
    return str(getattr(made_by, "__name__", type(part).__name__))


def _shown(value: Tensor) -> str:
    return f"{value.dtype} {tuple(value.shape)}"


def _foreign(state: Any) -> list[str]:
    """What of a state ``weights_only`` does not read."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.serialization.get_unsafe_globals_in_checkpoint(file)


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
