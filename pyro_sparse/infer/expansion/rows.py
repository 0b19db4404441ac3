r"""
Packed rows: one for each example and joint outcome of positive probability, in place of a plate's elements.

The guide's sites have their outcomes in slots, dims of their own, ``(S_k, ..., S_1, *batch)``. Of these, padded to the
longest support, :class:`Rows` takes the ones that have probability: N of :math:`B S_1 \cdots S_k`. Values go to the
rows (:meth:`Rows.gather`), the model runs on N rows, and its log-probabilities come back to the slots
(:meth:`Rows.scatter`), zero where there was no row: what sums the ELBO knows of slots only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from pyro_sparse.infer.expansion.law import law
from pyro_sparse.infer.pyro_internals import PARTICLES, Frame


@dataclass(frozen=True)
class Rows:
    """
    Attributes:
        frame: the plate that the rows stand in for, as the guide has it.
        sites: the packed ones.
        dims: the slot dims of the packed sites, then the plate's dim, from the right.
        sizes: of these.
        index: ``(len(dims), N)``: where in these dims each row comes from, ordered by example.
        spare: how many rows at the end repeat another, so that their number is not that of something else.
    """

    frame: Frame
    sites: frozenset[str]
    dims: tuple[int, ...]
    sizes: tuple[int, ...]
    index: Tensor
    spare: int = 0

    @property
    def count(self) -> int:
        """How many rows the model runs on."""
        return self.index.shape[1]

    @property
    def example(self) -> Tensor:
        """The number of each row's example, ``(N,)``."""
        return self.index[-1]

    @property
    def dim(self) -> int:
        """The plate's."""
        return self.dims[-1]

    def part(self, start: int, stop: int) -> Rows:
        """Some of them. Where their number is that of the plate, rows are repeated: else it would tell nothing."""
        index, spare, size = self.index[:, start:stop], 0, self.sizes[-1]
        count = index.shape[1]
        if count == size and self.is_batch(index):
            return replace(self, index=index, spare=0)
        while count + spare in (size, self.frame.full_size):
            index, spare = torch.cat([index, index[:, -1:]], 1), spare + 1
        return replace(self, index=index, spare=spare)

    def is_batch(self, index: Tensor | None = None) -> bool:
        """Whether the rows are the plate's elements, one each in their order."""
        index = self.index if index is None else index
        return index.shape[1] == self.sizes[-1] and bool((index[-1].diff() == 1).all())

    def parts(self, size: int | None) -> Iterator[Rows]:
        """All of them, so many at a time."""
        size = self.count if size is None else size
        for start in range(0, self.count, size):
            yield self.part(start, min(start + size, self.count))

    def some_of_each(self, how_many: int) -> Iterator[Rows]:
        """So many times one row for each example: its last, its first, and others between."""
        first = torch.searchsorted(self.example, torch.arange(self.sizes[-1], device=self.index.device))
        count = self.example.bincount(minlength=self.sizes[-1])
        for i in range(min(how_many, int(count.max()))):
            place = torch.zeros_like(count) if i == 1 else (count - 1) // max(i, 1)
            yield replace(self, index=self.index[:, first + place])

    def gather(self, value: Tensor, event_dim: int = 0) -> Tensor:
        """What belongs to each row of values that vary in these dims: the plate's dim has N elements then."""
        value = with_dims(value, -min(self.dims) + event_dim)
        places = [dim - event_dim for dim in self.dims]
        sizes = [value.shape[place] for place in places]
        front = range(len(places))
        rows = value.movedim(places, tuple(front)).flatten(0, len(places) - 1)
        rows = rows.index_select(0, self._flat(sizes))
        rows = rows.reshape((1,) * (len(places) - 1) + rows.shape).movedim(tuple(front), places)
        while rows.dim() - event_dim > -self.dim and len(rows) == 1:
            rows = rows.squeeze(0)
        return rows

    def scatter(self, value: Tensor) -> Tensor:
        """A value of each row, none of them spare, brought back to the slots and the plate; zero or False elsewhere."""
        value = with_dims(value, -min(self.dims))
        rows = value.movedim(self.dims, tuple(range(len(self.dims)))).flatten(0, len(self.dims) - 1)
        slots = rows.new_zeros(math.prod(self.sizes), *rows.shape[1:])
        slots = slots.index_copy(0, self._flat(self.sizes), rows)
        slots = slots.reshape(self.sizes + rows.shape[1:]).movedim(tuple(range(len(self.dims))), self.dims)
        while slots.dim() and len(slots) == 1:
            slots = slots.squeeze(0)
        return slots

    def _flat(self, sizes: Sequence[int]) -> Tensor:
        """Where the rows lie among dims of these sizes, the first of which vary slowest; one of size one has all."""
        index, stride = torch.zeros_like(self.index[0]), 1
        for places, size in zip(reversed(self.index), reversed(sizes), strict=True):
            if size > 1:
                index, stride = index + stride * places, stride * size
        return index


class Ran(NamedTuple):
    """On how many rows the model ran, and of which sites."""

    rows: int
    sites: frozenset[str]


def with_dims(value: Tensor, dims: int) -> Tensor:
    """With so many dims at least, those that it lacks of size one."""
    missing = dims - value.dim()
    return value.reshape((1,) * missing + value.shape) if missing > 0 else value


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, without spare ones."""
    index = torch.cat([part.index[:, : part.count - part.spare] for part in parts], 1)
    return replace(parts[0], index=index, spare=0)


def side_by_side(parts: Sequence[tuple[Tensor, Rows]]) -> Tensor:
    """The values of all parts along the dim of the rows, also where all rows have the same; without spare ones."""
    dim = parts[0][1].dim
    values = []
    for value, rows in parts:
        value = with_dims(value, -dim)
        shape = list(value.shape)
        shape[dim] = rows.count
        values.append(value.expand(shape).narrow(dim, 0, rows.count - rows.spare))
    shape = list(torch.broadcast_shapes(*(value.movedim(dim, -1).shape[:-1] for value in values)))
    together = torch.cat([value.movedim(dim, -1).expand(*shape, value.shape[dim]) for value in values], -1)
    return together.movedim(-1, dim) if dim != -1 else together


def rows_of(owner: str, guide_trace: Any, names: Collection[str]) -> Rows | None:
    """
    The rows of the sites of these names that are in one plate and no other; None without any. Those in a plate inside
    of it keep their slots, since rows would be combinations of the outcomes of all its elements; so do those in another
    plate beside it.

    Args:
        owner: the ELBO, in errors.
        guide_trace: with the sites' slots.
        names: sites with slots.

    Raises:
        ValueError: naming the site, for one in ``pyro.markov`` or outside of all plates, or if none is in one alone.
    """
    found: dict[str, list[Any]] = {}
    frames: dict[str, tuple[Frame, ...]] = {}
    for name, node in guide_trace.nodes.items():
        if name not in names or "_enumerate_dim" not in node["infer"]:
            continue
        if "_markov_scope" in node["infer"]:
            raise _refusal(owner, name, "a site outside of pyro.markov, whose dims are recycled, got one in it")
        frames[name] = own = tuple(f for f in node["cond_indep_stack"] if f.vectorized and f.name != PARTICLES)
        if not own:
            raise _refusal(owner, name, "a site in a plate, whose elements the rows stand in for, got one outside")
        if len(own) == 1:
            found.setdefault(own[0].name, []).append(node)
    if not frames:
        return None
    if not found:
        name = next(iter(frames))
        plates = [frame.name for frame in frames[name]]
        raise _refusal(owner, name, f"some sparse site in one plate alone, got this in {plates}")
    nodes = next(iter(found.values()))
    frame = frames[nodes[0]["name"]][0]
    size = max([frame.size, *(node["fn"].batch_shape[frame.dim] for node in nodes)])  # -1: made without a size
    dims = tuple(sorted(node["infer"]["_enumerate_dim"] for node in nodes))
    packed = frozenset(node["name"] for node in nodes)
    return Rows(frame, packed, (*dims, frame.dim), *_active(nodes, dims, frame.dim, size))


def _refusal(owner: str, name: str, expected: str) -> ValueError:
    return ValueError(f"{owner}, site '{name}', mode 'packed': expected {expected}. Use mode='padded'.")


def _active(nodes: list[Any], slots: tuple[int, ...], dim: int, size: int) -> tuple[tuple[int, ...], Tensor]:
    """The sizes of the dims, and where the joint probability of the outcomes is positive, by example."""
    active = torch.ones((), dtype=torch.bool)
    for node in nodes:
        drawn = law(node["fn"])
        active = (drawn.log_prob(node["value"]).detach() > -math.inf) & active.to(node["value"].device)
    kept = with_dims(active, -min(slots)).movedim((dim, *slots), tuple(range(1 + len(slots))))
    kept = kept.reshape(*kept.shape[: 1 + len(slots)], -1).any(-1).expand(size, *(-1,) * len(slots))
    index = kept.nonzero().T  # waits for the device: how many rows there are decides what is computed
    return (*kept.shape[1:], size), torch.cat([index[1:], index[:1]])


def named_leaves(args: Any, kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is in arguments, with the words for each."""
    for name, given in (("args", args), ("kwargs", dict(kwargs))):
        for path, leaf in tree_flatten_with_path(given)[0]:
            shape = f" of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else ""
            yield f"{name}{keystr(path)}{shape}", leaf


_TAKEN = (torch.strided, torch.sparse_coo)  # of other layouts torch takes no rows


def has_rows(leaf: Any, size: int) -> bool:
    """Whether an argument is taken to have a row for each element of a plate of this size."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size and leaf.layout in _TAKEN


def place(index: Tensor, size: int, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The rows' own parts of arguments: of each tensor whose leading dim has the plate's size."""

    def of(leaf: Any) -> Any:
        return leaf.index_select(0, index.to(leaf.device)) if has_rows(leaf, size) else leaf

    placed: tuple[Any, Any] = tree_map(of, (args, dict(kwargs)))
    return placed
