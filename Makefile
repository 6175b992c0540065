# `make quickstart` and `make test` need nothing but make and Python >= 3.10: the first call makes the virtual
# environment .venv and installs into it, later calls go straight to work. `make help` lists the targets.
#
#   PYTHON=/path/to/python3 make test     the interpreter to make the environment with
#   VENV=/path make test                  another place for the environment
#   make test ARGS="tests/callbacks -x"   arguments for what is run (also of quickstart, test-slow and bench)

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow lint format types bench clean
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
# What decides on the content of the environment: when one of these changes, it is brought up to date.
DEPENDENCIES := setup.cfg pyproject.toml constraints.txt

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1	/p' Makefile | expand -t 14

quickstart: $(READY) ## train a small network on two processes and test it
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(READY) ## the tests, but for the slow ones
	$(BIN)/pytest $(ARGS)

test-slow: $(READY) ## the slow tests
	$(BIN)/pytest -m slow $(ARGS)

lint: $(READY_DEV) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY_DEV) ## ruff: put right what it can by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The root of the repository is the package `paceline`, a name that no folder here bears, and type checkers cannot
# follow the import hook of an editable install. So the wheel is built and unpacked, which also shows that it is
# complete and typed, and mypy checks that copy. The paths it prints are those of the checkout: the prefix is cut off.
types: $(READY_DEV) ## mypy, strict
	@rm -rf build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-compile \
	    --target build/types .
	@rm -rf build/lib build/bdist.* paceline.egg-info # a later build would take modules from there that are gone by then
	@set -o pipefail; cd build/types && "$(abspath $(BIN))/mypy" --config-file "$(CURDIR)/setup.cfg" \
	    --cache-dir "$(CURDIR)/.mypy_cache" -p paceline | sed 's|^paceline/||'

bench: $(READY) ## time a step against a hand-written loop
	$(BIN)/python benchmarks/overhead.py $(ARGS)

clean: ## remove builds and caches; the environment and the runs stay
	rm -rf build dist paceline.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# --- the environment ------------------------------------------------------------------------------------------------
$(READY): $(BIN)/python $(DEPENDENCIES)
	@echo "==> Installing Paceline, its tests and its examples into $(VENV). The first time this takes minutes."
	$(INSTALL) -e ".[test,examples]"
	@touch $@

$(READY_DEV): $(READY)
	@echo "==> Installing the linter and the type checker into $(VENV)"
	$(INSTALL) -e ".[dev]"
	@touch $@

# A name on the PATH may be too old, a stub without an interpreter behind it, or a Python without venv: each is tried.
$(BIN)/python:
	@for candidate in $${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do \
	    if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	        echo "==> Making the virtual environment $(VENV) with $$("$$candidate" --version)"; \
	        "$$candidate" -m venv "$(VENV)" && exit 0; \
	    fi; \
	done; \
	echo "Found no Python >= 3.10 with the modules venv and ensurepip (tried: $${PYTHON:-python3, python3.13 ... python3.10, python})." >&2; \
	echo "Install one (on Debian and Ubuntu: apt install python3 python3-venv), or name one: PYTHON=/path/to/python3 make ..." >&2; \
	exit 1
