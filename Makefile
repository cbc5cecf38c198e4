# Every target sets up what it needs. `make PYTHON=python3.12 test` uses another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow test-all check bench docs clean

# One stamp per set of extras: a second call of a target installs nothing. torch goes first, by its exact version, so
# that no other package pulls in another build of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.examples: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable ".[examples]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable ".[examples,dev]"
	touch $@

$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable ".[examples,bench,integrations]"
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable ".[docs]"
	touch $@

## demo: the cytology pipeline on synthetic cells, from slide labels to a report; continues an interrupted run
demo: $(VENV)/.examples
	$(BIN)/python -m examples.slam_ags_cytology run --out $(RUN)

## test: all tests but the long ones
test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

## test-slow: the long tests
test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

## test-all: all tests
test-all: test test-slow

## check: formatting, lint and types
check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

## bench: measure; results go to benchmarks/results
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.step_cost
	$(BIN)/python -m benchmarks.peak_memory
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.reuse
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.solver_cost
	$(BIN)/python -m benchmarks.against_peers
	$(BIN)/python -m benchmarks.contract_matrix
	$(BIN)/python -m benchmarks.landscape
	$(BIN)/python -m benchmarks.pinn

## docs: build the documentation, warnings are errors
docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
