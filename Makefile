# make demo: set up, then train the laptop task.   make test: set up, then the whole test suite.
# The environment lives in .venv, or where OPD_VENV says. Python: PYTHON=python3.11 make ...

OPD_VENV ?= .venv
PYTHON ?= python3
unexport PYTHON  # it makes the environment; scripts that read a PYTHON of their own take the environment's
PYTEST_ARGS ?=
# Test processes side by side; files stay whole, so that what a file starts is started once. 1: in one process.
TEST_WORKERS ?= 2
BIN := $(abspath $(OPD_VENV))/bin
STAMP := $(OPD_VENV)/.opd-installed

# One thread per process: several processes with a thread per core each crawl on a small machine.
export OMP_NUM_THREADS ?= 1
# Every model and data set is a local folder; a look-up over the network would only hang.
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test lint docs check clean

setup: $(STAMP)

# The stamp comes last, so an interrupted set-up goes on at the next call and a finished one is not repeated.
$(STAMP): requirements-cpu.lock setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"error: Python {v[0]}.{v[1]} is too old: opd needs 3.11 or newer. Choose another with PYTHON=python3.11 make setup")'
	@echo "setting up $(OPD_VENV): about 160 packages, some minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(OPD_VENV)
	@$(BIN)/python -m pip install -q --no-deps -r requirements-cpu.lock
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@
	@echo "set up: $(BIN)/python"

demo: setup
	@PATH="$(BIN):$$PATH" bash examples/on_policy_distillation/run-tiny-cpu.sh

test: setup
	@PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .
	@$(BIN)/mypy

# The site in build/docs/, with tools of its own.
docs:
	@test -x build/docs-venv/bin/sphinx-build || { $(PYTHON) -m venv build/docs-venv && build/docs-venv/bin/python -m pip install -q -r docs/requirements.txt; }
	@build/docs-venv/bin/sphinx-build -q -W -b html docs build/docs
	@echo "built: build/docs/index.html"

check: setup
	@$(BIN)/python tools/check_environment.py

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache
