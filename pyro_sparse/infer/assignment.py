"""Which estimator serves which site: precedence, copies, names and state."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_sparse.estimators import Baseline, Estimator, Exact, ScoreFunction
from pyro_sparse.infer.names import group
from pyro_sparse.infer.pyro_baseline import PyroBaseline
from pyro_sparse.infer.pyro_internals import stored
from pyro_sparse.infer.refusals import refuse_guide_messenger

Given = Estimator | Baseline | None
PARAM_PREFIX = "pyro_sparse.estimators"
# Options of infer that other ELBOs read.
_READ_ELSEWHERE = {"num_samples": "TraceEnum_ELBO", "tmc": "TraceTMC_ELBO"}


def config_estimators(
    guide: Callable[..., Any] | None = None, default: Given = None, **sites: Given
) -> Callable[..., Any]:
    """
    Writes ``infer={"estimator": ...}`` at the sites of a guide, as :func:`pyro.infer.config_enumerate` writes
    ``"enumerate"``; what a site already says stays. A function or a decorator.

    Args:
        guide: the guide; None to use it as a decorator.
        default: the estimator of all sites that are not named and have no reparameterised gradient.
        sites: the estimator of each site, by name.
    """
    if guide is None:
        return lambda guide: config_estimators(guide, default, **sites)
    refuse_guide_messenger("config_estimators", guide)

    def config(msg: Any) -> dict[str, Any]:
        estimator = sites.get(msg["name"], None if _is_reparameterized(msg) else default)
        return {} if estimator is None or "estimator" in msg["infer"] else {"estimator": estimator}

    return poutine.infer_config(guide, config_fn=config)  # type: ignore[arg-type]


def asking_for_particles(estimators: Mapping[str, Estimator]) -> tuple[str, Estimator] | None:
    """The first that needs particles of the whole program, with its site; raises unless all need the same."""
    asking = {name: e for name, e in estimators.items() if e.num_particles > 1}
    if len({(e.num_particles, e.vectorized) for e in asking.values()}) > 1:
        raise ValueError(
            "EstimatorELBO: expected one number of particles, got "
            f"{ {name: e.num_particles for name, e in asking.items()} }. All sites share the program's particles: use "
            "the same n."
        )
    return next(iter(asking.items()), None)


class Assignment(nn.Module):
    """
    The estimators of an ELBO, one for each site: an object given for several serves the first, and a copy of it as it
    was then each other. They are made as soon as their names are known; what ``"*"`` gives waits as ``"*"`` for the
    first site that it serves, so that its parameters are there from the beginning.

    Sites in a sequential plate whose names differ in the last number only are one: ``z_0``, ``z_1`` are ``z_*``, in
    dicts, in the param store and in ``state_dict``.

    Args:
        given: an estimator for all sites, or one for each site by name, ``"*"`` standing for the others.
    """

    def __init__(self, given: Estimator | Mapping[str, Given]) -> None:
        super().__init__()
        entries = given if isinstance(given, Mapping) else {"*": given}
        self.entries = {name: _as_estimator(entry) for name, entry in entries.items()}
        self.sources: dict[str, Any] = {}
        self.sites = nn.ModuleDict()
        # The sites that an object serves itself: the object, and what it could learn as it was then.
        self._first: dict[str, tuple[Any, list[Tensor]]] = {}
        for name, entry in self.entries.items():
            if name != "*":
                self._serve(name, entry)
        if "*" in self.entries and _state(self.entries["*"]) and self._sharing(self.entries["*"]) is None:
            self.sites[_key("*")] = self.entries["*"]
        # Made once, and in containers because they are no submodules.
        self._plain, self._exact = (ScoreFunction(),), (Exact(),)
        self._pyro: dict[str, ScoreFunction] = {}  # those of infer["baseline"]
        self._evaluating: list[str] = []  # sites of which a run that was no training has made the estimators
        self._warned: set[tuple[str, str]] = set()

    def find(self, msg: Any) -> Estimator | None:
        """The estimator that serves a sample message; None for a reparameterised site."""
        asked = self._asked(msg)
        if asked is None:
            return None
        if not isinstance(asked, Estimator | Baseline):
            raise _no_estimator(f", site '{msg['name']}'", asked)
        whole = [e for e in (asked, self.entries.get("*")) if getattr(e, "objective", "elbo") == "bound"]
        if whole and msg["infer"].get("estimator", whole[0]) is not self.entries.get("*"):
            raise ValueError(
                f"EstimatorELBO, site '{msg['name']}': expected {type(whole[0]).__name__} alone, got an estimator in "
                f"the guide's infer, {asked}. It is the whole ELBO: pass it alone."
            )
        return self._kept(msg, asked)

    def find_for_score(self, msg: Any) -> Estimator:
        """
        The estimator of a score function that is not a latent site's own: of what a guide drew by itself, or of the
        part of a draw that is not reparameterised. It is the plain score function, with the baseline that the site or
        ``"*"`` is given: other estimators would take several draws to be independent that may be one.
        """
        name, infer = msg["name"], msg["infer"]
        named = infer.get("estimator", self._entry(msg))
        asked = self.entries.get("*") if named is None else named
        if not isinstance(asked, ScoreFunction | Baseline):
            if named is not None:
                raise ValueError(
                    f"EstimatorELBO, site '{name}': expected ScoreFunction, or a baseline, for draws that no sample "
                    f"statement of their own makes, got {type(asked).__name__}. Leave it out."
                )
            asked = self._plain[0]
        return self._kept(msg, asked)

    def of(self, name: str, frames: Any) -> Estimator:
        """The estimator that serves a site of this name in these plates."""
        return self[name if _key(name) in self.sites else group(name, frames)]

    def _entry(self, msg: Any) -> Estimator | None:
        return self.entries.get(msg["name"], self.entries.get(group(msg["name"], msg["cond_indep_stack"])))

    def _kept(self, msg: Any, asked: Any) -> Estimator:
        """What stands for an object at a site: itself or a copy, once there is one."""
        name = msg["name"]
        if name not in self.entries and name not in self.sources:
            together = group(name, msg["cond_indep_stack"])
            other = self.sources.get(together, asked)
            # Objects of their own in a sequential plate, which the guide gives, stay that.
            alone = "estimator" in msg["infer"] and other is not asked and (_state(other) or _state(asked))
            name = name if alone else together
        self._keep(name, asked)
        served: Any = self.sites[_key(name)] if _key(name) in self.sites else asked
        return _as_estimator(served)

    def _asked(self, msg: Any) -> Given:
        name, infer = msg["name"], msg["infer"]
        self._warn_unread(msg)
        asked = infer.get("estimator", self._entry(msg))
        if _is_reparameterized(msg):
            if asked is not None or "baseline" in infer:
                raise ValueError(
                    f"EstimatorELBO, site '{name}': expected a site without reparameterised gradient, got {msg['fn']}, "
                    "which needs no estimator. Leave it out."
                )
            if infer.get("enumerate") and getattr(msg["fn"], "has_enumerate_support", False):
                raise ValueError(
                    f"EstimatorELBO, site '{name}': expected no infer['enumerate'] at a site that is drawn with a "
                    f"derivative, got {infer['enumerate']!r} at {msg['fn']}. Leave it out; or use SparseEnumELBO."
                )
            return None
        if "enumerate" in infer and infer["enumerate"] is not None:
            if asked is not None and not _enumerates(asked):
                raise _two_mechanisms(name, "infer['enumerate']", type(asked).__name__)
            if "baseline" in infer:
                raise _two_mechanisms(name, "infer['enumerate']", "infer['baseline']")
            return asked or self._exact[0]
        if "baseline" in infer:
            if "estimator" in infer:
                raise _two_mechanisms(name, "infer['estimator']", "infer['baseline']")
            if asked is None:
                together = group(name, msg["cond_indep_stack"])
                if together not in self._pyro:
                    self._pyro[together] = ScoreFunction(PyroBaseline(name, infer["baseline"]))
                return self._pyro[together]
        asked = self.entries.get("*") if asked is None else asked
        return self._plain[0] if asked is None else asked

    def _keep(self, name: str, asked: Any) -> None:
        """Remembers what a site asks for; what has no state may be another at every step."""
        before = self.sources.get(name)
        if before is asked:
            return
        if before is not None and (_state(before) or _state(asked)):
            raise ValueError(
                f"EstimatorELBO, site '{name}': expected the same estimator at every step (and the one that its state "
                f"was loaded into), got a new {asked}, which would forget what was learned. Make it once, outside the "
                "guide; if the guide's infer names it, run the ELBO once before load_state_dict."
            )
        if _key(name) in self.sites and not (before is None and self.entries.get(name) is asked):
            del self.sites[_key(name)]
            self._first.pop(name, None)
        self.sources[name] = asked

    def serve(self) -> None:
        """Gives each site found so far its own estimator; the same again for those that have one."""
        for name, source in self.sources.items():
            if _key(name) not in self.sites:
                self._serve(name, source)
                if not self.training:
                    self._evaluating.append(_key(name))
        if self.training:  # which Lightning says to each module that it knew before its check of the validation data
            for key in self._evaluating:
                if key in self.sites and not self.sites[key].training:
                    self.sites[key].train()
            self._evaluating.clear()

    def _serve(self, name: str, source: Any) -> None:
        first = self._sharing(source)
        if first is None:
            if _key("*") in self.sites and _state(self.entries["*"]) & _state(source):
                del self.sites[_key("*")]
            if _state(source):
                self._first[name] = source, [copy.deepcopy(tensor.detach()) for tensor in _learned(source)]
        else:
            source = _as_it_was(source, *self._first[first])
        self.sites[_key(name)] = _as_estimator(source)

    def _sharing(self, source: Any) -> str | None:
        """The site whose own object learns what this one would learn."""
        own = _state(source)
        return next((name for name, (other, _) in self._first.items() if own & _state(other)), None)

    def __getitem__(self, name: str) -> Estimator:
        estimator: Any = self.sites[_key(name)]
        return estimator

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Assignment:
        for entry in self.entries.values():  # before the first run they are not yet submodules
            entry._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> Assignment:
        for entry in self.entries.values():
            entry.train(mode)
        super().train(mode)
        return self

    def unknown(self, names: set[str]) -> set[str]:
        """The entries that are for none of these sites."""
        return set(self.entries) - names - {"*"}

    def register(self) -> None:
        """Puts the estimators' parameters into the param store, so that ``svi.step`` trains them."""
        store = pyro.get_param_store()
        parameters = {}
        for key, estimator in self.sites.items():
            if key == _key("*"):
                continue  # it serves no site yet
            for name, parameter in estimator.named_parameters():
                if parameter.requires_grad:  # the store would train frozen ones
                    parameters[f"{PARAM_PREFIX}${_name(key)}${name}"] = parameter
        for name, parameter in parameters.items():
            held = stored(name)
            if held is not None and held is not parameter and not torch.equal(held, parameter):
                raise ValueError(
                    f"EstimatorELBO: expected parameter '{name}' in the param store to be this ELBO's, got another "
                    "tensor. Two ELBOs cannot share a site: pyro.clear_param_store(); or, to resume, "
                    "elbo.load_state_dict(...) from the same step as the param store."
                )
        for name, parameter in parameters.items():
            if stored(name) is not parameter:
                store[name] = parameter  # after a load the store has an equal copy of its own
            pyro.param(name, parameter)

    def __getstate__(self) -> dict[str, Any]:
        for module in (self, *self.entries.values()):
            without_weak_references(module)
        return self.__dict__

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        waiting = f"{prefix}sites.{_key('*')}."
        if "*" in self.entries and (first := self._sharing(self.entries["*"])) is not None:  # it serves a site by now
            for key in [key for key in state_dict if key.startswith(waiting)]:
                state_dict[f"{prefix}sites.{_key(first)}.{key[len(waiting) :]}"] = state_dict.pop(key)
        keys = [k[len(prefix + "sites.") :].split(".")[0] for k in state_dict if k.startswith(prefix + "sites.")]
        for name in dict.fromkeys(_name(key) for key in keys if key != _key("*")):
            source = self._source(name)
            self.sources.setdefault(name, source)
            if _key(name) not in self.sites:
                self._serve(name, source)
        strict = args[1]
        for key in self.sites if strict else ():  # what a site has learned that came after the state was taken
            name = _name(key)
            if key not in keys and name in self.sources and name not in self.entries:
                source = self.sources[name]
                if (first := self._sharing(source)) is not None:
                    fresh = _as_estimator(_as_it_was(source, *self._first[first]))
                    state_dict.update(fresh.state_dict(prefix=f"{prefix}sites.{key}."))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _source(self, name: str) -> Any:
        source = self.sources.get(name, self.entries.get(name, self.entries.get("*")))
        if source is None:
            raise ValueError(
                f"EstimatorELBO, site '{name}': expected an entry or '*', got none to load its state into. "
                "If the estimator is named in the guide's infer, run the ELBO once before load_state_dict."
            )
        return source

    def _warn_unread(self, msg: Any) -> None:
        name, infer = msg["name"], msg["infer"]
        options = {option: reader for option, reader in _READ_ELSEWHERE.items() if infer.get(option) is not None}
        given = infer.get("estimator", self._entry(msg) or self.entries.get("*"))
        if "enumerate_support" in infer and "enumerate" not in infer and not _enumerates(given):
            options["enumerate_support"] = "SparseEnumELBO, or EstimatorELBO with Exact()"
        for option, reader in options.items():
            together = group(name, msg["cond_indep_stack"])
            if (together, option) not in self._warned:
                self._warned.add((together, option))
                warnings.warn(
                    f"EstimatorELBO, site '{name}': infer['{option}'] is not read here, but by {reader}. Remove it.",
                    stacklevel=2,
                )


def _learned(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _as_it_was(source: Any, other: Any, before: list[Tensor]) -> Any:
    """A copy of an object, in which all that it shares with another is as it was before that learned."""
    memo: dict[int, Any] = {}
    for tensor, value in zip(_learned(other), before, strict=True):
        if not is_lazy(tensor) and not is_lazy(value):
            memo[id(tensor)] = twin = copy.deepcopy(tensor)
            with torch.no_grad():
                twin.copy_(value)
    return copy.deepcopy(source, memo)


def without_weak_references(module: nn.Module) -> None:
    """Takes from parameters what Pyro's param store leaves at them, and sets anew at its next use: it has no pickle."""
    for parameter in module.parameters():
        parameter.__dict__.pop("unconstrained", None)


def _as_estimator(given: Any) -> Estimator:
    if isinstance(given, Estimator):
        return given
    if given is None or isinstance(given, Baseline):
        return ScoreFunction(given)
    raise _no_estimator("", given)


def _no_estimator(site: str, given: Any) -> TypeError:
    return TypeError(
        f"EstimatorELBO{site}: expected an Estimator, got {given!r}. Use one of pyro_sparse.estimators, or a subclass."
    )


def _state(module: nn.Module) -> set[int]:
    """What a module may learn, by identity."""
    return {id(tensor) for tensor in _learned(module)}


def _enumerates(given: Any) -> bool:
    return isinstance(given, Estimator) and given.enumeration is not None


def _is_reparameterized(msg: Any) -> bool:
    return bool(getattr(msg["fn"], "has_rsample", False))


def _two_mechanisms(name: str, first: str, second: str) -> ValueError:
    return ValueError(f"EstimatorELBO, site '{name}': expected one mechanism, got {first} and {second}. Leave one out.")


def _key(name: str) -> str:
    """A site's name as that of a module: there dots are paths, and names such as ``type`` are taken."""
    return "$" + name.replace("%", "%25").replace(".", "%2E")


def _name(key: str) -> str:
    return key[1:].replace("%2E", ".").replace("%25", "%")
