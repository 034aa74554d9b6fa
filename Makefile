# Everything a user or a developer types. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two test processes at a time; files stay together, since their fixtures are dear.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup run test test-fast test-edits test-integrity test-kills check format bench image ui clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*?## "} {printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## make .venv with everything in it, and the default data set
	@$(BIN)/python -m data shakespeare --fallback stdlib

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "DARWIN needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.11 setup"; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "Python's venv module is missing; on Debian: apt-get install python3-venv"; exit 2; }
	@echo "Installing into $(VENV); the first time takes a few minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

run: setup ## evolve the default trainer for a few minutes
	$(BIN)/python -m darwin_exp +experiment=baseline

test: setup ## run the whole suite
	$(PYTEST)

test-fast: setup ## run what needs neither long training nor a browser
	$(PYTEST) -m "not slow and not browser"

test-edits: setup ## train all pairs of built-in edits and a draw of triples, on all cores
	$(BIN)/python -m pytest -n auto -m edits tests/mutation

test-integrity: setup ## score every honest model and every cheat of the zoos under ten secrets
	$(BIN)/python -m pytest -n auto -m integrity tests/evaluation

test-kills: setup ## kill a run a hundred times while its language models answer
	$(BIN)/python -m pytest -s -m kills tests/faults

check: setup ## formatter, linter, types and the import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## run the benchmarks and print their table
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only

image: setup ## make the training image of sandbox=docker (BASE_IMAGE=... for another base)
	$(BIN)/python -m darwin_exp.image

ui: setup ## the MLflow UI on this checkout's runs, at http://127.0.0.1:5000
	@mkdir -p runs
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/runs/mlflow.sqlite --default-artifact-root $(CURDIR)/runs/mlartifacts --host 127.0.0.1 --port 5000

clean: ## remove caches and the environment; runs and data stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
