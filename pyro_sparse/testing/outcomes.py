"""Every outcome of a program's random draws, by running it once along each path of the tree of outcomes.

The draws are intercepted where torch makes them, so that they may come from anywhere: from the sites of a Pyro
program, from the subsampling of its plates, or from an estimator's own code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")

NORMAL = ("normal", "randn", "randn_like")
KNOWN = ("bernoulli", "multinomial", "randperm", *NORMAL)  # overloads and in-place variants included


class Law(NamedTuple):
    """An urn: how heavy each outcome is, how many are drawn, and whether they are put back."""

    weights: tuple[float, ...]
    draws: int = 1
    replacement: bool = True


Laws = tuple[Law, ...]


def outcomes(function: Callable[[], T], *, max_paths: int = 10_000) -> Iterator[tuple[float, T]]:
    r"""Runs a function along every path of its random draws.

    The mean of what the function returns is then a finite sum over paths, free of Monte Carlo error:

    .. math:: \mathbb{E}[f] = \sum_{\text{path}} P(\text{path})\, f(\text{path})

    ========================================= ==========================================================================
    ``torch.bernoulli``, ``Tensor.bernoulli_`` each element is 0 or 1
    ``torch.multinomial``                     each row's categories, in order, with or without replacement
    ``torch.randperm``                        every permutation
    ``torch.randn``, ``torch.normal``, ...    each element is its mean plus or minus one standard deviation, with
                                              probability 1/2 each: a law that has the normal's mean and variance
    ========================================= ==========================================================================

    Outcomes of probability zero are not visited. A draw that starts from a state of the generator that an earlier draw
    of the same run started from is the same draw and has the same outcome, as in life.

    Args:
        function: takes no argument; what it does depends on its random draws and on nothing that an earlier run of it
            has changed.
        max_paths: the largest number of paths.

    Yields:
        the probability of a path, and what the function returned there, path by path.

    Raises:
        NotImplementedError: for any other random operation of torch; it is named.
        ValueError: if a draw starts from the same state of the generator as an earlier one with other probabilities;
            if there are more than ``max_paths`` paths; if the probabilities do not sum to one within 1e-9, because
            the function depends on more than its draws.

    Example:
        >>> def number_of_heads():
        ...     return int(torch.bernoulli(torch.tensor([0.5, 0.25], dtype=torch.float64)).sum())
        >>> sorted(outcomes(number_of_heads))
        [(0.125, 1), (0.125, 2), (0.375, 0), (0.375, 1)]
    """
    path: list[int] = []
    total = 0.0
    for _ in range(max_paths):
        with _Replay(path) as replay:
            result = function()
        probability = math.prod(replay.probabilities)
        total += probability
        yield probability, result
        # Depth first: the last draw that has an outcome left takes it, and those after it start afresh.
        path = [choice for choice, _ in replay.choices]
        while path and path[-1] + 1 == replay.choices[len(path) - 1][1]:
            path.pop()
        if not path:
            break
        path[-1] += 1
    else:
        raise ValueError(
            f"outcomes: expected at most {max_paths} paths, got more. "
            "Take fewer or smaller random draws, or raise max_paths."
        )
    if abs(total - 1) > 1e-9:
        raise ValueError(
            f"outcomes: expected probabilities that sum to 1, got {total:.12g}. "
            "Let the function depend on its random draws only: put back any state that it changes."
        )


class _Replay(TorchDispatchMode):
    """Gives each random choice the outcome that a path prescribes, and the first possible one beyond the path's end."""

    def __init__(self, path: Sequence[int]) -> None:
        super().__init__()
        self._path = path
        #: at each choice, which of the possible outcomes was taken, and how many there were
        self.choices: list[tuple[int, int]] = []
        self.probabilities: list[float] = []
        self._earlier: dict[bytes, tuple[Laws, list[int]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__.rstrip("_")
        if name not in KNOWN:
            raise NotImplementedError(
                f"outcomes: expected draws by {', '.join(KNOWN)}, the random operations whose outcomes it can list, "
                f"got {func}. Use one of these."
            )
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        generator = given.get("generator") or torch.default_generator
        state = generator.get_state()
        # torch's own draw gives the result its shape and dtype, and moves the generator on.
        result: Tensor = func(*args, **kwargs)
        moved = not torch.equal(state, generator.get_state())
        laws = _laws(name, given, result)
        values = torch.tensor(self._outcome(laws, state.numpy().tobytes() if moved else None))
        if name in NORMAL:
            noise = 2 * values.reshape(result.shape) - 1
            return result.copy_(given.get("mean", 0.0) + given.get("std", 1.0) * noise)
        return result.copy_(values.reshape(result.shape))

    def _outcome(self, laws: Laws, state: bytes | None) -> list[int]:
        """One outcome of independent rows, concatenated; an earlier one, if the generator is where it was then."""
        if state in self._earlier:
            earlier_laws, values = self._earlier[state]
            if laws != earlier_laws:
                raise ValueError(
                    "outcomes: expected draws that are independent or the same, got two with different probabilities "
                    "from one state of the generator. Restore the state of the generator less often."
                )
            return values
        values = [value for law in laws for value in self._row(law)]
        if state is not None:
            self._earlier[state] = laws, values
        return values

    def _row(self, law: Law) -> Iterator[int]:
        """Draws from one urn, one after the other."""
        weights = dict(enumerate(law.weights))
        for _ in range(law.draws):
            total = math.fsum(weights.values())
            if total > 0:
                value = self._choose({i: weight / total for i, weight in weights.items()})
            else:  # all that is possible has been drawn: torch adds any of the others
                value = next(iter(weights))
            yield value
            if not law.replacement:
                del weights[value]

    def _choose(self, probabilities: Mapping[int, float]) -> int:
        possible = [i for i, p in probabilities.items() if p > 0]
        depth = len(self.choices)
        choice = self._path[depth] if depth < len(self._path) else 0
        self.choices.append((choice, len(possible)))
        self.probabilities.append(probabilities[possible[choice]])
        return possible[choice]


def _laws(name: str, given: dict[str, Any], result: Tensor) -> Laws:
    """What a random operation draws from: one urn for each row, or for each element."""
    if name in NORMAL:
        return (Law((0.5, 0.5)),) * result.numel()
    if name == "randperm":
        return (Law((1.0,) * len(result), draws=len(result), replacement=False),)
    if name == "bernoulli":
        # bernoulli_(p) fills a tensor, bernoulli(p) and bernoulli(tensor, p) make one
        p = given["p"] if given.get("p") is not None else given["self"]
        probs = torch.as_tensor(p, dtype=torch.float64, device="cpu").expand(result.shape)
        return tuple(Law((1 - p, p)) for p in probs.flatten().tolist())
    rows = given["self"].double().reshape(-1, given["self"].shape[-1])
    draws, replacement = given["num_samples"], given.get("replacement", False)
    return tuple(Law(tuple(weights), draws, replacement) for weights in rows.tolist())
