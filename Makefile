# mtnrec: every target creates the environment that it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Each process imports torch, so more than eight bring nothing. The tests of a file share runs.
PARALLEL := --numprocesses=auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup train quickstart test test-all test-versions docs benchmark check format clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(STAMP)  ## Create .venv with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@if [ -d .git ]; then $(BIN)/pre-commit install; fi
	@touch $@

train: $(STAMP)  ## Generate a click log and train ESMM with MTN on it
	$(BIN)/python -m mtnrec.train model=esmm mtn.enabled=true

quickstart: $(STAMP)  ## Sweep small models on a small log and write the report
	$(BIN)/python -m mtnrec.train experiment=quickstart
	$(BIN)/python -m mtnrec.report runs=runs/quickstart

test: $(STAMP)  ## Run the test suite
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(STAMP)  ## Run the test suite including the slow tests
	$(BIN)/python -m pytest $(PARALLEL) -m ''

test-versions: $(STAMP)  ## Run the test suite with the oldest, pinned and newest versions: 20 GB in .versions
	$(BIN)/python tests/stress/versions.py

docs: $(STAMP)  ## Build the documentation, warnings as errors: docs/_build/html
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

benchmark: $(STAMP)  ## Measure the published speed and memory: benchmarks/results.md
	$(BIN)/python benchmarks/measure_all.py

check: $(STAMP)  ## Check lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Sort imports and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and the caches
	rm -rf $(VENV) .versions dist docs/_build docs/_generated docs/notebooks .mypy_cache .pytest_cache .ruff_cache
