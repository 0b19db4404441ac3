"""A run of the model on packed rows, some at a time if need be; its log-probabilities come back in slots."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from pyro_sparse._numerics import as_like
from pyro_sparse._precision import no_autocast, unrounded
from pyro_sparse.estimators.base import Gather
from pyro_sparse.infer.expansion.masked_rows import mask_of
from pyro_sparse.infer.expansion.rows import Ran, Rows, has_rows, joined, named_leaves, place, side_by_side
from pyro_sparse.infer.expansion.views import with_fixed_value
from pyro_sparse.infer.pyro_internals import DROPOUT, dims_as_now, handlers_around, is_subsample
from pyro_sparse.infer.runs.again import made_again
from pyro_sparse.infer.runs.explanations import ON_ROWS, Alone, explained_on_rows
from pyro_sparse.infer.runs.rows_messenger import RowsMessenger
from pyro_sparse.infer.runs.together import close, evaluated
from pyro_sparse.infer.runs.undisturbed import before_every_forward, undisturbed

COMPARED = 4  # outcomes of each example that are compared with ordinary runs
# What of a node is kept of each part, and what is not of any: the rest is the first's, and would keep memory.
_OF_A_PART = ("cond_indep_stack", "scale")
_OF_A_RUN = ("log_prob", "log_prob_sum", "unscaled_log_prob", "packed")


class Compared(dict[Any, Any]):
    """
    By plate, sizes and switches of arguments, and program: the modules that a comparison called, as they were. Not
    pickled.
    """

    def __reduce__(self) -> Any:
        return Compared, ()


@dataclass(frozen=True)
class OnRows:
    """
    How a model is run on packed rows.

    Attributes:
        owner: the ELBO, in errors.
        nesting: how many dims plates have.
        chunk_rows: how many rows at a time; their graphs are made again in the backward pass. None: all at once.
        gather: ``gather(index, *args, **kwargs)`` gives ``(args, kwargs)`` for the rows of the examples ``index``.
        compared: what was compared with ordinary runs so far.
        check: whether they are to be compared under validation.
        fixed: sites whose log-probability has no derivative with respect to the value.
    """

    owner: str
    nesting: int
    chunk_rows: int | None = None
    gather: Gather | None = None
    compared: Compared = field(default_factory=lambda: Compared())
    check: bool = True
    fixed: Collection[str] = ()

    def model_trace(self, model: Any, alone: Alone, guide_trace: Any, rows: Rows | None) -> tuple[Any, Ran | None]:
        """The model's trace on the guide's values, without rows an ordinary one; and on how many rows it ran."""
        args, kwargs = alone.args, alone.kwargs
        if rows is None:
            return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs), None

        def runs_on_one() -> bool:
            return self.chunk_rows != 1 and self._runs_on_one(model, args, kwargs, guide_trace, rows)

        with explained_on_rows(alone, rows.frame.name, runs_on_one, lambda: _placed(self, rows, args, kwargs)):
            self.check_once(model, args, kwargs, guide_trace, rows)
            return self.run(model, args, kwargs, guide_trace, rows)

    def run(self, model: Any, args: Any, kwargs: Any, guide_trace: Any, rows: Rows) -> tuple[Any, Ran]:
        """The model's trace, with log-probabilities in slots, and on how many rows its largest site ran."""
        if self.chunk_rows is not None and (around := handlers_around()):
            raise ValueError(
                f"{self.owner}, chunk_rows: expected no effect handlers around the loss, which the backward pass runs "
                f"again without them, got {around}. Put them around model and guide."
            )
        guide_trace = guide_trace.copy()  # the backward pass reads it, too, when its plates have been taken out
        sites: dict[str, list[_Scored]] = {}
        result, again, ran_on = poutine.Trace(), dims_as_now(), 0
        for part in rows.parts(self.chunk_rows):
            scored: list[_Scored | None] = []

            def run(part: Rows = part, scored: list[_Scored | None] = scored) -> list[Tensor]:
                again()
                found = self._scores(model, args, kwargs, guide_trace, part)
                scored.extend(() if scored else found)
                return [site.log_prob for site in found]

            log_probs = run() if self.chunk_rows is None else made_again(run)
            in_rows = [x.numel() for site, x in zip(scored, log_probs, strict=True) if site and site.in_rows]
            ran_on += max(in_rows, default=0)
            for site, log_prob in zip(scored, log_probs, strict=True):
                assert site is not None
                kept = sites.setdefault(site.node["name"], [])
                if site.in_rows or not kept:  # what lies outside of the rows is the same in all parts
                    node = {key: site.node[key] for key in _OF_A_PART} if kept else site.node
                    kept.append(_Scored(node, log_prob, site.mask, site.rows, site.in_rows))
            scored[:] = [None]  # the backward pass holds it, and would hold what the nodes do
        for name, parts in sites.items():
            result.add_node(name, **_in_slots(self.owner, parts, guide_trace, self.nesting))
        return result, Ran(ran_on, rows.sites)

    def _runs_on_one(self, model: Any, args: Any, kwargs: Any, guide_trace: Any, rows: Rows) -> bool:
        try:
            with undisturbed(), poutine.block():
                self._scores(model, args, kwargs, guide_trace, next(iter(rows.parts(1))))
        except Exception:  # whatever it is: the error that is to be explained stays
            return False
        return True

    def check_once(self, model: Any, args: Any, kwargs: Any, guide_trace: Any, rows: Rows) -> None:
        """Under validation, raises if at the first run of such arguments the rows are not what ordinary runs have."""
        if self.check and is_validation_enabled():
            self._compare(model, args, kwargs, guide_trace, rows)

    def agrees(self, model: Any, args: Any, kwargs: Any, guide_trace: Any, rows: Rows) -> bool:
        """Whether the rows are what ordinary runs have; found out once for such arguments."""
        try:
            self._compare(model, args, kwargs, guide_trace, rows)
        except Exception:  # whatever it is: it may be for slots only
            return False
        return True

    def _compare(self, model: Any, args: Any, kwargs: Any, guide_trace: Any, rows: Rows) -> None:
        leaves, spec = tree_flatten((args, dict(kwargs)))
        key = rows.frame.name, rows.sizes[-1], repr(spec), tuple(map(_kind, leaves)), _origin(model)
        trained = self.compared.get(key)
        if trained is not None and all(module.training == training for module, training in trained.items()):
            return
        called: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

        def before_forward(module: nn.Module, _args: Any) -> None:
            called.update({part: part.training for part in module.modules()})

        with before_every_forward(before_forward):
            require_rows_alone(self, model, args, kwargs, guide_trace, rows)
        self.compared[key] = called

    def _scores(self, model: Any, args: Any, kwargs: Any, guide_trace: Any, rows: Rows) -> list[_Scored]:
        """The model's sites on some rows, with their log-probabilities unscaled."""
        given, indices = _given(guide_trace, rows), None
        if rows.frame.name in given.nodes:
            indices = given.nodes[rows.frame.name]["value"]
            given.remove_node(rows.frame.name)
        own_args, own_kwargs = self._arguments(rows, args, kwargs)
        handler = RowsMessenger(self.owner, rows, indices, lambda: _placed(self, rows, args, kwargs))
        trace = poutine.trace(handler(poutine.replay(model, trace=given))).get_trace(*own_args, **own_kwargs)
        for name in self.fixed:
            if name in trace.nodes:
                trace.nodes[name]["fn"] = with_fixed_value(trace.nodes[name]["fn"])
        trace.compute_log_prob(lambda name, node: not site_is_subsample(node))
        return [self._scored(node, rows) for node in trace.nodes.values() if node["type"] in ("param", "sample")]

    def _scored(self, node: Any, rows: Rows) -> _Scored:
        if node["type"] == "param" or site_is_subsample(node):
            return _Scored(node, torch.zeros(()), None, rows, False)
        if is_validation_enabled():
            check_site_shape(node, self.nesting)
        log_prob = node["unscaled_log_prob"]
        own = [f for f in node["cond_indep_stack"] if f.name == rows.frame.name]
        frames = tuple(rows.frame if f in own else f for f in node["cond_indep_stack"])
        scale = node["scale"]
        for frame in own:  # the rows are no more data than the examples
            scale = scale * (rows.frame.full_size / rows.frame.size) / (frame.full_size / frame.size)
        bare = {key: value for key, value in node.items() if key not in _OF_A_RUN}
        bare.update(cond_indep_stack=frames, scale=scale)
        return _Scored(bare, log_prob, mask_of(node), rows, bool(own))

    def _arguments(self, rows: Rows, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if self.gather is None:
            return place(rows.example, rows.sizes[-1], args, kwargs)
        gathered: Any = self.gather(rows.example, *args, **kwargs)
        if not (isinstance(gathered, tuple) and len(gathered) == 2 and isinstance(gathered[1], Mapping)):
            raise TypeError(
                f"{self.owner}, gather: expected (args, kwargs), a tuple and a dict, got {type(gathered).__name__}. "
                "Return ((x[index], y), {})."
            )
        own_args, own_kwargs = gathered
        before = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        for name, leaf in named_leaves(own_args, own_kwargs):
            if isinstance(leaf, Tensor) and id(leaf) not in before and rows.count not in leaf.shape:
                raise ValueError(
                    f"{self.owner}, gather: expected tensors of {rows.count} rows, got {name}. "
                    "Return (args, kwargs) with x.index_select(dim, index) of what has a row for each example."
                )
        return own_args, own_kwargs


@dataclass(frozen=True)
class _Scored:
    """A site of the model on some rows: what is left of its node, and its log-probability."""

    node: Any
    log_prob: Tensor
    mask: Tensor | None
    rows: Rows
    in_rows: bool


class _InSlots(TorchDistribution):
    """Stands for the distribution of a site whose log-probabilities are known: its shapes."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, batch_shape: torch.Size, fn: Any) -> None:
        self.has_enumerate_support = getattr(fn, "has_enumerate_support", False)
        self.has_rsample = getattr(fn, "has_rsample", False)
        super().__init__(batch_shape, fn.event_shape, validate_args=False)


def _in_slots(owner: str, parts: list[_Scored], guide_trace: Any, nesting: int) -> dict[str, Any]:
    node = dict(parts[0].node)
    if node["type"] == "param" or is_subsample(node["fn"]):
        return node
    log_prob, mask, scale = parts[0].log_prob, parts[0].mask, node["scale"]
    if parts[0].in_rows:
        rows = joined([part.rows for part in parts])
        if len({frozenset(part.node["cond_indep_stack"]) for part in parts}) > 1:
            sizes = sorted({(f.name, f.size) for part in parts for f in part.node["cond_indep_stack"]})
            raise ValueError(
                f"{owner}, site '{node['name']}': expected plates of the same sizes for all rows, got {sizes}. Give "
                "the inner plate one size, and mask what a row lacks."
            )
        scales = [part.node["scale"] for part in parts]
        if not all(_alike(each, scale) for each in scales):
            scales = [as_like(each, log_prob) for each in scales]
            scale = rows.scatter(side_by_side([(x, part.rows) for x, part in zip(scales, parts, strict=True)]))
        log_prob = rows.scatter(side_by_side([(part.log_prob, part.rows) for part in parts]))
        if any(part.mask is not None for part in parts):
            mask = rows.scatter(side_by_side([(_mask_of(part), part.rows) for part in parts]))
    node.update(
        fn=_InSlots(log_prob.shape[max(log_prob.dim() - nesting, 0) :], node["fn"]),
        mask=mask,
        scale=scale,
        unscaled_log_prob=log_prob,
    )
    if node["name"] in guide_trace.nodes and not node["is_observed"]:
        node["value"] = guide_trace.nodes[node["name"]]["value"]
    node["log_prob"] = scale_and_mask(log_prob, scale, mask)
    node["log_prob_sum"] = node["log_prob"].sum()
    return node


def _alike(a: Any, b: Any) -> bool:
    """Whether two scales are one number, but for the rounding of how many rows a part has."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return all(isinstance(x, Tensor) and x.numel() == 1 for x in (a, b)) and torch.equal(a, b)
    return math.isclose(a, b, rel_tol=1e-12)


def _mask_of(part: _Scored) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=part.log_prob.device) if part.mask is None else part.mask


def _given(guide_trace: Any, rows: Rows) -> Any:
    """What a model takes from the guide, with a row for each."""
    given = guide_trace.copy()
    for name, node in guide_trace.nodes.items():
        if node["type"] == "sample" and not site_is_subsample(node) and not node["is_observed"]:
            given.nodes[name] = {**node, "value": _of_rows(node, rows)}
    return given


def _unrounded(guide_trace: Any) -> Any:
    """With values as they would be without ``torch.autocast``."""
    wide = guide_trace.copy()
    for name, node in guide_trace.nodes.items():
        if isinstance(value := node.get("value"), Tensor) and value.is_floating_point():
            wide.nodes[name] = {**node, "value": unrounded(value)}
    return wide


def _of_rows(node: Any, rows: Rows) -> Tensor:
    """A guide site's value for each row, if it is in their plate or depends on a packed site."""
    value: Tensor = node["value"]
    event_dim = node["fn"].event_dim
    inside = any(frame.name == rows.frame.name for frame in node["cond_indep_stack"])
    varies = any(value.dim() - event_dim >= -dim and value.shape[dim - event_dim] > 1 for dim in rows.dims[:-1])
    return rows.gather(value, event_dim) if inside or varies else value


def _kind(x: Any) -> Any:
    """What of an argument a comparison is good for: a size; a switch as it is; no number, which may be a step's."""
    if isinstance(x, Tensor):
        return tuple(x.shape)
    return (type(x), x) if isinstance(x, bool | str | None) else type(x)


def _origin(model: Any) -> Any:
    """What tells one program from another, also where each call is given a new function of the same code."""
    fn = poutine.unwrap(model)
    while isinstance(fn, functools.partial):
        fn = fn.func
    plain = getattr(fn, "__func__", fn)
    code = getattr(plain, "__code__", type(fn))
    seen = [_content(cell) for cell in getattr(plain, "__closure__", None) or ()]
    return code, id(getattr(fn, "__self__", fn if isinstance(fn, nn.Module) else code)), *seen


def _content(cell: Any) -> int | None:
    try:
        return id(cell.cell_contents)
    except ValueError:  # a name that is not given yet
        return None


def _placed(on: OnRows, rows: Rows, args: Any, kwargs: Any) -> str:
    """What was given a row for each, in words."""
    size = rows.sizes[-1]
    if on.gather is not None:
        before = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        returned = named_leaves(*on._arguments(rows, args, kwargs))
        kept = [n for n, leaf in returned if isinstance(leaf, Tensor) and id(leaf) in before and size in leaf.shape]
        as_given = f", {' and '.join(kept)} as given, without a row for each" if kept else ""
        return f"The rows' arguments are what gather= returned{as_given}"
    found = [name for name, leaf in named_leaves(args, kwargs) if has_rows(leaf, size)]
    return f"By their leading sizes {' and '.join(found) or 'no arguments'} got a row for each"


def require_rows_alone(on: OnRows, model: Any, args: Any, kwargs: Any, guide_trace: Any, rows: Rows) -> None:
    """
    Raises if on packed rows the model has other log-probabilities than in ordinary runs, with one outcome for each
    example, where no noise reaches. A model that runs on rows only is not compared. It runs in float32 at least: what
    ``torch.autocast`` rounds depends on the shape.
    """
    differing: set[str] = set()
    resized: dict[str, str] = {}  # plates that have other sizes, in words
    if rows.is_batch():  # it would be compared with itself
        rows = replace(rows, index=torch.cat([rows.index, rows.index[:, -1:]], 1))
    guide_trace = _unrounded(guide_trace)
    with undisturbed(), no_autocast(), poutine.block(), evaluated(DROPOUT):
        again = dims_as_now()

        def ordinary(each: Rows) -> Any:
            again()
            trace = poutine.trace(poutine.replay(model, trace=_given(guide_trace, each))).get_trace(*args, **kwargs)
            trace.compute_log_prob()
            return trace.nodes

        packed: Any = None
        for each in rows.some_of_each(COMPARED):
            try:
                nodes, same = ordinary(each), ordinary(each)
            except Exception:  # it is for rows only: it may branch on a value
                break
            if packed is None:
                again()
                packed = on.run(model, args, kwargs, guide_trace, rows)[0].nodes
            for name, node in nodes.items():
                if node["type"] != "sample" or site_is_subsample(node):
                    continue
                got = packed[name]["log_prob"] if name in packed else node["log_prob"].new_full((), torch.nan)
                sizes = {f.name: f.size for f in packed[name]["cond_indep_stack"]} if name in packed else {}
                others = {
                    f.name: f"plate '{f.name}' of {sizes[f.name]} elements, not {f.size}"
                    for f in node["cond_indep_stack"]
                    if sizes.get(f.name, f.size) not in (f.size, rows.frame.size)
                }
                resized.update(others)
                if others:
                    continue
                inside = any(frame.name == rows.frame.name for frame in node["cond_indep_stack"])
                got = each.gather(got) if inside and name in packed else got
                if close(node["log_prob"], same[name]["log_prob"]) and not close(got, node["log_prob"]):
                    differing.add(name)
        again()
    if differing or resized:
        got = [f"other log-probabilities at {sorted(differing)}"] if differing else []
        raise ValueError(
            f"{on.owner}, plate '{rows.frame.name}': expected a model that is the same on packed rows as on the batch, "
            f"got {' and '.join([*got, *resized.values()])}. {_placed(on, rows, args, kwargs)}, and no row may "
            f"see another or how many there are. {ON_ROWS} (This is checked at the first run of arguments of these "
            "sizes and switches, under validation; check=False leaves it out.)"
        )
