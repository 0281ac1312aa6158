PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help env demo test test-all fuzz check format bench report clean

help: ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

env: $(VENV)/installed ## Make the environment in .venv (PYTHON=python3.12 chooses another Python >= 3.11)

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "icl-msr needs Python 3.11 or newer; type: make $(MAKECMDGOALS) PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: env ## Pre-train MoCo + MSR on the embedded data set, print the table and the path of the report (minutes on a CPU)
	$(BIN)/python -m icl_msr.run

test: env ## Run the tests (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-all: env ## Run all tests, the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m ''

fuzz: env ## Try random command lines and damaged files (an hour; SEED=2 chooses others)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz --seed $(or $(SEED),1)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz/test_parsers.py --hypothesis-profile=fuzz --hypothesis-seed=$(or $(SEED),1)

check: env ## Lint, check formatting, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: env ## Measure the speed of the hot paths, as ratios (three minutes at most)
	$(BIN)/python -m experiments.benchmarks.speed

report: env ## One table over all runs in runs/ (RUNS=folder chooses others)
	$(BIN)/python -m icl_msr.report $(or $(RUNS),runs)

clean: ## Remove the environment, caches and build products; runs/ stays
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
