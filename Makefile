# `make demo` and `make test` work on a fresh machine with Python >= 3.11: each sets up .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CHECKPOINT := samples/tiny-gemma
# Each with one thread for torch; modules of tests stay together, since they share what they export.
TEST_PROCESSES ?= 2
DEMO_BUNDLE := build/demo-bundle

.PHONY: help setup demo test gpu lint types contracts wheel check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       export the small model and generate text with it"
	@echo "make test       run the tests"
	@echo "make gpu        on a machine with a GPU: the tests that need one, and the benchmarks (40 GB of disk)"
	@echo "make check      lint, types, contracts, wheel and tests: all that CI runs"
	@echo "make lint | types | contracts | wheel"
	@echo "make clean      remove .venv and build/"

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gemma-deploy needs Python 3.11 or newer; run make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/gemma-deploy export $(CHECKPOINT) --output $(DEMO_BUNDLE) --fp16 --force
	$(BIN)/gemma-deploy generate $(DEMO_BUNDLE) "The for statement is used to" --max-new-tokens 60 --repetition-penalty 1.2

test: setup
	@echo "About 5,100 tests, in $(TEST_PROCESSES) processes. With 2 they take 10 minutes on 2 idle cores of a server of 2023;"
	@echo "an old, throttled or busy machine takes several times as long. Only a test that hangs is ended."
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadscope

gpu: setup
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python -m benchmarks.gpu

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: setup
	$(BIN)/mypy

contracts: setup
	$(BIN)/lint-imports

# Installs the wheel where nothing else is: it must hold every package, and --help must need no torch.
wheel: setup
	rm -rf build/wheel build/lib
	$(BIN)/python -m build --quiet --wheel --outdir build/wheel
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt click rich
	build/wheel/venv/bin/pip install --quiet --disable-pip-version-check --no-deps build/wheel/*.whl
	build/wheel/venv/bin/gemma-deploy --help > /dev/null
	@echo "the wheel installs and answers"

check: lint types contracts wheel test

clean:
	rm -rf $(VENV) build
