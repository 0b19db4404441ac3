"""Importing the package changes nothing but the package: torch, Pyro and the random numbers stay as they were."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import pyro_sparse

MODULES = sorted(module.name for module in pkgutil.walk_packages(pyro_sparse.__path__, "pyro_sparse."))
ROOMS = sorted(module.name for module in pkgutil.iter_modules(pyro_sparse.__path__, "pyro_sparse.") if module.ispkg)

# Runs in a process of its own, with the modules as arguments: snapshots, imports all of them, and compares.
SCRIPT = r"""
import importlib, random, sys, types, warnings
import numpy, torch, pyro, pyro.infer, pyro.optim, pyro.contrib.autoname
from torch.distributions import Distribution, constraint_registry, kl

WATCHED = [
    torch, torch.Tensor, torch.nn, torch.nn.Module, torch.nn.functional, torch.autograd, torch.distributions,
    Distribution, pyro, pyro.distributions, pyro.distributions.Categorical, pyro.infer, pyro.infer.TraceEnum_ELBO,
    pyro.poutine,
]
REGISTRIES = {
    "kl": kl._KL_REGISTRY,
    "biject_to": constraint_registry.biject_to._registry,
    "transform_to": constraint_registry.transform_to._registry,
}


def flags():
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "torch RNG": hash(torch.get_rng_state().numpy().tobytes()),
        "python RNG": hash(random.getstate()),
        "numpy RNG": hash(str(numpy.random.get_state())),
        "torch validation": Distribution._validate_args,
        "pyro validation": (pyro.distributions.is_validation_enabled(), pyro.infer.util.is_validation_enabled(),
                            pyro.poutine.util.is_validation_enabled()),
        "pyro settings": pyro.settings.get(),
        "parameter store": list(pyro.get_param_store()),
        "pyro's handlers": list(pyro.poutine.runtime._PYRO_STACK),
        "warning filters": list(warnings.filters),
    }


coercions = list(pyro.distributions.distribution.COERCIONS)
before = flags()
attributes = [dict(vars(owner)) for owner in WATCHED]
registered = {name: dict(registry) for name, registry in REGISTRIES.items()}

for name in sys.argv[1:]:
    importlib.import_module(name)

for name, value in flags().items():
    assert value == before[name], f"{name}: {before[name]} became {value}"

for owner, old in zip(WATCHED, attributes):
    new = vars(owner)
    changed = [key for key in old if new.get(key) is not old[key]]
    # torch imports some of its own submodules late; anything else that appears is ours, and does not belong there.
    added = [key for key in new if key not in old and not isinstance(new[key], types.ModuleType)]
    assert not changed and not added, f"{owner}: changed {changed}, added {added}"


# Pyro asks those in this list before it builds one of its wrappers; ours answers for our own families only.
new = pyro.distributions.distribution.COERCIONS
assert new[:-1] == coercions and new[-1].__module__ == "pyro_sparse.distributions.stock_wrappers", new
normal = pyro.distributions.Normal(torch.zeros(3), 1.0)
for wrapped in (normal.to_event(1), normal.mask(True), pyro.distributions.TransformedDistribution(normal, [])):
    assert not type(wrapped).__module__.startswith("pyro_sparse")


def is_ours(classes):
    return any(getattr(c, "__module__", "").startswith("pyro_sparse") for c in classes)


for name, registry in REGISTRIES.items():
    for key, function in registered[name].items():
        assert registry.get(key) is function, f"{name}: the entry of {key} was replaced"
    for key in registry.keys() - registered[name].keys():
        assert is_ours(key if isinstance(key, tuple) else (key,)), f"{name}: an entry for {key} was added"

drawn_in = {"matplotlib", "sklearn", "entmax", "scipy", "pandas", "pytest"} & sys.modules.keys()
assert not drawn_in, f"imported {drawn_in}"
"""


def test_import_has_no_side_effect() -> None:
    # "-W error": an import that warns breaks every user who makes warnings errors.
    command = [sys.executable, "-W", "error", "-c", SCRIPT, *MODULES]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_exist_once(room: str) -> None:
    module = importlib.import_module(room)
    names = module.__all__
    assert len(names) == len(set(names)) > 0
    assert [name for name in names if not hasattr(module, name)] == []


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_are_documented(room: str) -> None:
    module = importlib.import_module(room)
    assert [name for name in module.__all__ if not getattr(module, name).__doc__] == []


def test_what_needs_torch_only_does_not_bring_pyro() -> None:
    script = "import sys, pyro_sparse.projections, pyro_sparse.estimators; assert 'pyro' not in sys.modules"
    script += "; from pyro_sparse import sample_mixed; assert 'pyro' in sys.modules"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_unknown_attributes_are_named() -> None:
    with pytest.raises(AttributeError, match="module 'pyro_sparse' has no attribute 'sample_mix'"):
        _ = pyro_sparse.sample_mix
