# Every target sets up what it needs. `make PYTHON=python3.12 test` uses another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLD := .venv-min
RUN ?= runs/demo
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow test-all test-min check bench docs clean

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

# An environment of its own, without the frameworks of `integrations`, which want newer versions.
$(OLD)/.test: constraints-min.txt pyproject.toml
	$(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install --quiet --constraint constraints-min.txt "$$(grep '^torch==' constraints-min.txt)"
	$(OLD)/bin/python -m pip install --quiet --constraint constraints-min.txt --editable ".[examples,test]"
	touch $@

## demo: the cytology pipeline on synthetic cells, from slide labels to a report; continues an interrupted run
demo: $(VENV)/.examples
	$(BIN)/python -m examples.slam_ags_cytology run --out $(RUN) \
		--synthetic.size 48 --pretrain.patch 48 --pretrain.crop 42

## test: all tests but the long ones
test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

## test-slow: the long tests
test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

## test-all: all tests
test-all: test test-slow

## test-min: the quick tests on the oldest versions that are supported; with the oldest Python: `make PYTHON=python3.11 test-min`
test-min: $(OLD)/.test
	$(OLD)/bin/python -m pytest -m "not slow"

## check: formatting, lint and types
check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

## bench: measure, the short ones first; results go to benchmarks/results, tables of them into the documents
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.needs
	$(BIN)/python -m benchmarks.against_peers
	$(BIN)/python -m benchmarks.reuse
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.contract_matrix
	$(BIN)/python -m benchmarks.step_cost
	$(BIN)/python -m benchmarks.solver_cost
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.multitask
	$(BIN)/python -m benchmarks.peak_memory
	$(BIN)/python -m benchmarks.multitask --optimizer sgd
	$(BIN)/python -m benchmarks.cytology
	$(BIN)/python -m benchmarks.landscape
	$(BIN)/python -m benchmarks.pinn
	$(BIN)/python -m benchmarks.collapse
	$(BIN)/python -m benchmarks

## docs: build the documentation, warnings are errors
docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) $(OLD) docs/_build docs/_generated docs/methods .pytest_cache .mypy_cache .ruff_cache .hypothesis
