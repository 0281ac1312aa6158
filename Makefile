PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help env demo test test-all test-slurm fuzz check format bench report clean faults

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

faults: env ## Kill, fill, cut and delete in every phase of small runs, and print one table (as root; half an hour)
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python tests/faults/campaign.py

test-slurm: env ## Run the tests that need SLURM, on a cluster of their own (as root on Debian, which gets its packages)
	@command -v slurmctld >/dev/null || { apt-get update -q && apt-get install -y -q slurm-wlm munge; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/slurm

check: env ## Lint, check formatting, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(VENV)-peers/installed: experiments/benchmarks/peers.txt pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $< --editable '.[dev]'
	@touch $@

bench: $(VENV)-peers/installed ## Measure the speed of the hot paths, and against other libraries, as ratios (40 minutes)
	$(VENV)-peers/bin/python -m experiments.benchmarks.speed
	NO_ALBUMENTATIONS_UPDATE=1 $(VENV)-peers/bin/python -m experiments.benchmarks.peers
	OMP_NUM_THREADS=1 $(VENV)-peers/bin/python -m experiments.benchmarks.scaling

report: env ## One table over all runs in runs/ (RUNS=folder chooses others)
	$(BIN)/python -m icl_msr.report $(or $(RUNS),runs)

clean: ## Remove the environment, caches and build products; runs/ stays
	rm -rf $(VENV) $(VENV)-peers .cache .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
