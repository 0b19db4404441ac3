# `make demo` and `make test` do all set-up by themselves; the other targets are for people who change the code.
PYTHON ?= python3
VENV = .venv
# An index of PyTorch's own, to choose the CPU-only or a CUDA build: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX =
# The versions to install: make test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
CONSTRAINTS = constraints.txt
# Options of the demo: make demo ARGS="--num-codes 64 --epochs 5"
ARGS =

RUN = $(VENV)/bin/python
PYTEST = $(RUN) -m pytest
# Two at a time, one thread each: the suites are made for two cores.
PARALLEL = -n 2
NOTEBOOKS = $(patsubst tutorials/%.md,build/tutorials/%.ipynb,$(wildcard tutorials/[0-9]*.md))

.PHONY: demo test test-slow test-versions lint types contracts doctest tutorials tutorials-full bench clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

demo: $(VENV)/tutorials.installed
	$(RUN) tutorials/demo.py $(ARGS)

test: $(VENV)/test.installed
	$(PYTEST) -m "not slow" $(PARALLEL)

test-slow: $(VENV)/test.installed
	$(PYTEST) -m slow $(PARALLEL)

# The fast tests on the oldest and the newest versions, each in an environment of its own. pip's own torch is a CUDA build
# of several GB, unless TORCH_INDEX says otherwise.
test-versions:
	for versions in oldest newest; do \
		$(MAKE) test VENV=$(VENV)-$$versions CONSTRAINTS=constraints-$$versions.txt || exit 1; \
	done

lint: $(VENV)/dev.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/dev.installed
	$(RUN) -m mypy

contracts: $(VENV)/dev.installed
	$(VENV)/bin/lint-imports --no-logo

doctest: $(VENV)/test.installed
	$(PYTEST) --doctest-modules pyro_sparse

# Executes every notebook with its training shortened.
tutorials: $(VENV)/test.installed $(NOTEBOOKS)
	PYRO_SPARSE_FAST=1 $(PYTEST) --nbmake $(PARALLEL) --durations=0 $(NOTEBOOKS)

# Makes the figures that the texts quote; the executed notebooks are left in build/tutorials.
tutorials-full: $(VENV)/test.installed $(NOTEBOOKS)
	$(PYTEST) --nbmake --nbmake-timeout=3600 --overwrite --durations=0 $(NOTEBOOKS)

build/tutorials/%.ipynb: tutorials/%.md $(VENV)/test.installed
	mkdir -p $(@D)
	$(RUN) -m jupytext --quiet --to ipynb --output $@ $<

bench: $(VENV)/test.installed
	for script in benchmarks/*.py; do $(RUN) $$script || exit 1; done

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache

# One environment; each stamp says that the extra of its name is installed in it, and is renewed when the files change
# that decide what that means.
$(VENV)/%.installed: setup.cfg pyproject.toml $(CONSTRAINTS)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	$(RUN) -m pip install --constraint $(CONSTRAINTS) --index-url $(TORCH_INDEX) torch
	echo "$(TORCH_INDEX)" > $(VENV)/torch-index
endif
	$(RUN) -m pip install --constraint $(CONSTRAINTS) --editable ".[$*]"
	touch $@

# pip keeps the torch that it finds, so another index would change nothing.
ifneq ($(TORCH_INDEX),)
ifneq ($(wildcard $(VENV)/*.installed),)
ifneq ($(TORCH_INDEX),$(shell cat $(VENV)/torch-index 2>/dev/null))
$(error TORCH_INDEX: expected the index that $(VENV) was installed from, got $(TORCH_INDEX). Run `make clean` first)
endif
endif
endif
