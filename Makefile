# `make run` and `make test` do everything on a fresh machine: virtual environment, install, compile.
# They need Python 3.11 or newer and, to compile for a CPU, a C++ compiler.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test check bench bench-gpu dynamo-demo test-dynamo format clean
SHELL := /bin/bash

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DYNAMO ?= .venv-dynamo
HOST   ?= 127.0.0.1
PORT   ?= 8000
TESTS  ?= tests
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)

# The value as typed, a dollar sign included; it reaches the recipe through the environment, so quotes are safe.
override PROMPT := $(value PROMPT)
export PROMPT

MODEL    := examples/nano
ARTIFACT := build/nano-cpu
# An artifact is stale when the model or anything on the compile side changed.
SOURCES  := $(wildcard $(MODEL)/*.safetensors $(MODEL)/*.json) \
            $(shell find dsv4c passes schedules -type f ! -name '*.pyc' ! -path 'dsv4c/chat/*' ! -path dsv4c/cli.py ! -path 'dsv4c/commands/*' ! -path 'dsv4c/launch*.py' ! -path dsv4c/describe.py)

help:
	@echo 'make run                 compile the bundled nano model for this CPU and serve it on $(HOST):$(PORT)'
	@echo 'make run PROMPT="..."    answer once and exit'
	@echo 'make test                run the test suite (TESTS=tests/runtime for a part)'
	@echo 'make check               format, lint, types, import direction'
	@echo 'make bench               nano artifact beside transformers on the same weights, on this CPU'
	@echo 'make bench-gpu           every op on this GPU beside its limit, eager and compiled PyTorch (FAMILY=hyper for one)'
	@echo 'make dynamo-demo         NVIDIA Dynamo on this host: its frontend, a prefill and a decode worker, one question'
	@echo 'make test-dynamo         the tests that need Dynamo and NIXL'
	@echo 'make format              let ruff rewrite the tree'
	@echo 'make clean               remove $(VENV), build/, dist/ and caches'

# --- environment -----------------------------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: `$(PYTHON)` is older than 3.11, or absent'; echo 'hint: make PYTHON=python3.12 ...'; exit 2; } >&2
	@echo 'creating $(VENV)' >&2
	@$(PYTHON) -m venv $(VENV) || \
	  { echo 'error: cannot create `$(VENV)`'; echo 'hint: on Debian, install the package python3-venv'; exit 2; } >&2

# What serving needs.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo 'installing dsv4c (torch is large: minutes on a slow line)' >&2
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable .
	@touch $@

# What tests, checks and benchmarks need besides.
$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo 'installing dsv4c with its development tools (torch is large: minutes on a slow line)' >&2
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed

# --- run -------------------------------------------------------------------------------------------------------

$(ARTIFACT)/manifest.json: $(SOURCES) | $(VENV)/.installed
	@rm -rf $(ARTIFACT)
	@$(BIN)/dsv4c compile $(MODEL) --target cpu -o $(ARTIFACT)

run: $(VENV)/.installed $(ARTIFACT)/manifest.json
ifneq ($(PROMPT),)
	@$(BIN)/dsv4c run $(ARTIFACT) --prompt "$$PROMPT"
else
	@echo 'Try it from another terminal (it waits until the server listens):' >&2
	@echo >&2
	@echo "  curl -s --retry 60 --retry-delay 1 --retry-connrefused http://$(HOST):$(PORT)/v1/completions \\" >&2
	@echo "    -H 'Content-Type: application/json' -d '{\"model\": \"nano\", \"prompt\": \"The package provides\", \"max_tokens\": 48}'" >&2
	@echo >&2
	@exec $(BIN)/dsv4c run $(ARTIFACT) --model-name nano --host $(HOST) --port $(PORT)
endif

# --- test, check, bench ----------------------------------------------------------------------------------------

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest --quiet -n $(JOBS) --dist loadfile $(TESTS)

check: $(VENV)/.installed-dev
	@echo 'ruff format' >&2; $(BIN)/ruff format --check --quiet . || \
	  { $(BIN)/ruff format --check . ; echo 'hint: make format' >&2; exit 1; }
	@echo 'ruff check' >&2; $(BIN)/ruff check --quiet .
	@echo 'mypy' >&2; $(BIN)/mypy --no-error-summary
	@echo 'import direction' >&2; $(BIN)/python -m pytest --quiet --no-header -p no:cacheprovider tests/test_imports.py

bench: $(VENV)/.installed-dev $(ARTIFACT)/manifest.json
	@$(BIN)/python benchmarks/cpu.py

bench-gpu: $(VENV)/.installed-dev
	@$(BIN)/python benchmarks/gpu.py $(if $(FAMILY),--family $(FAMILY)) --rows benchmarks/gpu.jsonl

# --- NVIDIA Dynamo ---------------------------------------------------------------------------------------------

# An environment of its own: Dynamo pins what the server does not. CONTRIBUTING.md says why --no-deps.
$(DYNAMO)/.installed: pyproject.toml examples/dynamo/requirements.txt
	@echo 'installing dsv4c with NVIDIA Dynamo in $(DYNAMO)' >&2
	@$(PYTHON) -m venv $(DYNAMO)
	@$(DYNAMO)/bin/python -m pip install -qq --disable-pip-version-check --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1 nixl-cu12==1.5.1
	@$(DYNAMO)/bin/python -m pip install -qq --disable-pip-version-check --editable . --requirement examples/dynamo/requirements.txt
	@touch $@

dynamo-demo: $(DYNAMO)/.installed $(ARTIFACT)/manifest.json
	@$(DYNAMO)/bin/python examples/dynamo/serve.py $(ARTIFACT) --demo

test-dynamo: $(DYNAMO)/.installed
	@$(DYNAMO)/bin/python -m pytest --quiet tests/dynamo tests/runtime/dynamo tests/runtime/transfer/test_nixl.py

format: $(VENV)/.installed-dev
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .

clean:
	rm -rf $(VENV) $(DYNAMO) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
