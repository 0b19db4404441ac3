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

from pyro_sparse.estimators import Baseline, Estimator, Exact, MovingAverage, ScoreFunction
from pyro_sparse.estimators.base import Site
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


class PyroBaseline(Baseline):
    """Pyro's own ``infer={"baseline": {...}}``: decaying average (ours, pooled and bias-corrected), network, value."""

    OPTIONS = ("nn_baseline", "nn_baseline_input", "use_decaying_avg_baseline", "baseline_beta", "baseline_value")

    def __init__(self, site: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        if unknown := set(options) - set(self.OPTIONS):
            raise ValueError(
                f"EstimatorELBO, site '{site}': expected infer['baseline'] with keys among {self.OPTIONS}, got "
                f"{sorted(unknown)}. Use those, or infer={{'estimator': ...}}."
            )
        if options.get("nn_baseline") is not None and options.get("baseline_value") is not None:
            raise ValueError(
                f"EstimatorELBO, site '{site}': expected nn_baseline or baseline_value, got both. Leave one out."
            )
        decaying = options.get("use_decaying_avg_baseline", False)
        self.average = MovingAverage(options.get("baseline_beta", 0.9)) if decaying else None

    def forward(self, cost: Tensor, site: Site) -> tuple[Tensor, Tensor | float]:
        value = cost.new_zeros(()) if self.average is None else self.average(cost, site)[0]
        learned = site.options.get("baseline_value")
        if (network := site.options.get("nn_baseline")) is not None:
            learned = network(_detach(site.options["nn_baseline_input"]))
        if learned is None:
            return value, 0.0
        # Broadcasting to the left only: a (B, 1) output would make a (B, B) table of differences.
        if learned.shape != cost.shape[cost.dim() - learned.dim() :]:
            raise ValueError(
                f"EstimatorELBO, site '{site.name}': expected a baseline of the cost's shape {tuple(cost.shape)}, got "
                f"{tuple(learned.shape)}. Squeeze the network's output."
            )
        value = value + learned
        return value, (cost - value).square().sum()

    def update(self, cost: Tensor, site: Site) -> None:
        if self.average is not None:
            self.average.update(cost, site)


class Assignment(nn.Module):
    """
    The estimators of an ELBO, one for each site: an object given for one site as it is, for several a copy for each.

    Args:
        given: an estimator for all sites, or one for each site by name, ``"*"`` standing for the others.
    """

    def __init__(self, given: Estimator | Mapping[str, Given]) -> None:
        super().__init__()
        entries = given if isinstance(given, Mapping) else {"*": given}
        # In dicts they are no submodules: what "*" gives is copied to the sites that it serves.
        self.entries = {name: _as_estimator(entry) for name, entry in entries.items()}
        self.sources: dict[str, Any] = {}
        self.sites = nn.ModuleDict()
        for name, entry in self.entries.items():
            if name != "*" and not _is_shared(name, self.entries):
                self.sites[_key(name)] = entry
        # Made once, and in containers because they are no submodules.
        self._plain, self._exact = (ScoreFunction(),), (Exact(),)
        self._pyro: dict[str, ScoreFunction] = {}  # those of infer["baseline"]
        self._warned: set[tuple[str, str]] = set()

    def find(self, msg: Any) -> Estimator | None:
        """The estimator that serves a sample message; None for a reparameterised site."""
        asked = self._asked(msg)
        if asked is None:
            return None
        if not isinstance(asked, Estimator | Baseline):
            raise _no_estimator(f", site '{msg['name']}'", asked)
        self._keep(msg["name"], asked)
        served: Any = self.sites[_key(msg["name"])] if _key(msg["name"]) in self.sites else asked
        return _as_estimator(served)

    def find_for_score(self, msg: Any) -> Estimator:
        """
        The estimator of a score function that is not a latent site's own: of what a guide drew by itself, or of the
        part of a draw that is not reparameterised. It is the plain score function, with the baseline that the site or
        ``"*"`` is given: other estimators would take several draws to be independent that may be one.
        """
        name, infer = msg["name"], msg["infer"]
        named = infer.get("estimator", self.entries.get(name))
        asked = self.entries.get("*") if named is None else named
        if not isinstance(asked, ScoreFunction | Baseline):
            if named is not None:
                raise ValueError(
                    f"EstimatorELBO, site '{name}': expected ScoreFunction, or a baseline, for draws that no sample "
                    f"statement of their own makes, got {type(asked).__name__}. Leave it out."
                )
            asked = self._plain[0]
        self._keep(name, asked)
        served: Any = self.sites[_key(name)] if _key(name) in self.sites else asked
        return _as_estimator(served)

    def _asked(self, msg: Any) -> Given:
        name, infer = msg["name"], msg["infer"]
        self._warn_unread(msg)
        asked = infer.get("estimator", self.entries.get(name))
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
            if asked is not None and not isinstance(asked, Exact):
                raise _two_mechanisms(name, "infer['enumerate']", type(asked).__name__)
            if "baseline" in infer:
                raise _two_mechanisms(name, "infer['enumerate']", "infer['baseline']")
            return asked or self._exact[0]
        if "baseline" in infer:
            if "estimator" in infer:
                raise _two_mechanisms(name, "infer['estimator']", "infer['baseline']")
            if asked is None:
                if name not in self._pyro:
                    self._pyro[name] = ScoreFunction(PyroBaseline(name, infer["baseline"]))
                return self._pyro[name]
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
        if _key(name) in self.sites and self.sites[_key(name)] is not asked:
            del self.sites[_key(name)]
        self.sources[name] = asked

    def serve(self) -> None:
        """Gives each site found so far its own estimator; the same again for those that have one."""
        for name, source in self.sources.items():
            if _key(name) not in self.sites:
                shared = _is_shared(name, self.sources)
                self.sites[_key(name)] = _as_estimator(copy.deepcopy(source) if shared else source)

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

    def check_names(self, names: set[str]) -> None:
        """Raises if there is an entry for a site that is none of these."""
        if unknown := self.unknown(names):
            raise ValueError(
                f"EstimatorELBO: expected entries for the sites {sorted(names)} or '*', got {sorted(unknown)}. "
                "Correct the name; a site that not every run reaches names its estimator in infer."
            )

    def unknown(self, names: set[str]) -> set[str]:
        """The entries that are for none of these sites."""
        return set(self.entries) - names - {"*"}

    def register(self) -> None:
        """Puts the estimators' parameters into the param store, so that ``svi.step`` trains them."""
        store = pyro.get_param_store()
        parameters = {}
        for key, estimator in self.sites.items():
            for name, parameter in estimator.named_parameters():
                if parameter.requires_grad:  # the store would train frozen ones
                    parameters[f"{PARAM_PREFIX}${_name(key)}${name}"] = parameter
        for name, parameter in parameters.items():
            held = store._params.get(name)
            if held is not None and held is not parameter and not torch.equal(held, parameter):
                raise ValueError(
                    f"EstimatorELBO: expected parameter '{name}' in the param store to be this ELBO's, got another "
                    "tensor. Two ELBOs cannot share a site: pyro.clear_param_store(); or, to resume, "
                    "elbo.load_state_dict(...) from the same step as the param store."
                )
        for name, parameter in parameters.items():
            if store._params.get(name) is not parameter:
                store[name] = parameter  # after a load the store has an equal copy of its own
            pyro.param(name, parameter)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        keys = {k[len(prefix + "sites.") :].split(".")[0] for k in state_dict if k.startswith(prefix + "sites.")}
        sources = {_name(key): self._source(_name(key)) for key in sorted(keys)}
        for name, source in sources.items():
            self.sources.setdefault(name, source)
            if _key(name) not in self.sites:
                self.sites[_key(name)] = copy.deepcopy(source) if _is_shared(name, sources) else source
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
        if "enumerate_support" in infer and "enumerate" not in infer and not self._is_exact(name, infer):
            options["enumerate_support"] = "SparseEnumELBO, or EstimatorELBO with Exact()"
        for option, reader in options.items():
            if (name, option) not in self._warned:
                self._warned.add((name, option))
                warnings.warn(
                    f"EstimatorELBO, site '{name}': infer['{option}'] is not read here, but by {reader}. Remove it.",
                    stacklevel=2,
                )

    def _is_exact(self, name: str, infer: Mapping[str, Any]) -> bool:
        return isinstance(infer.get("estimator", self.entries.get(name, self.entries.get("*"))), Exact)


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
    return {id(tensor) for tensor in (*module.parameters(), *module.buffers())}


def _is_shared(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether one learns what another learns, as ``ScoreFunction(b)`` made twice from one b does."""
    own = _state(modules[name])
    return any(own & _state(module) for other, module in modules.items() if other != name)


def _is_reparameterized(msg: Any) -> bool:
    return bool(getattr(msg["fn"], "has_rsample", False))


def _two_mechanisms(name: str, first: str, second: str) -> ValueError:
    return ValueError(f"EstimatorELBO, site '{name}': expected one mechanism, got {first} and {second}. Leave one out.")


def _detach(value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, value)


def _key(name: str) -> str:
    """A site's name as that of a module: there dots are paths, and names such as ``type`` are taken."""
    return "$" + name.replace("%", "%25").replace(".", "%2E")


def _name(key: str) -> str:
    return key[1:].replace("%2E", ".").replace("%25", "%")
