# make demo: set up, then train the laptop task.   make test: set up, then the whole test suite.
# The environment lives in .venv, or where OPD_VENV says. Python: PYTHON=python3.11 make ...

OPD_VENV ?= .venv
PYTHON ?= python3
unexport PYTHON  # it makes the environment; scripts that read a PYTHON of their own take the environment's
PYTEST_ARGS ?=
# Further train.py flags: make demo DEMO_ARGS="--num-rollout 10"
DEMO_ARGS ?=
# Test processes side by side; files stay whole, so that what a file starts is started once. 1: in one process.
TEST_WORKERS ?= 2
BIN := $(abspath $(OPD_VENV))/bin
STAMP := $(OPD_VENV)/.opd-installed

# One thread per process: several processes with a thread per core each crawl on a small machine.
export OMP_NUM_THREADS ?= 1
# Every model and data set is a local folder; a look-up over the network would only hang.
export HF_HUB_OFFLINE ?= 1

.PHONY: setup cuda-libraries demo test lint coverage dist docs check clean

setup: $(STAMP)

# The stamp comes last, so an interrupted set-up goes on at the next call and a finished one is not repeated.
$(STAMP): requirements-cpu.lock setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"error: Python {v[0]}.{v[1]} is too old: opd needs 3.11 or newer. Choose another with PYTHON=python3.11 make setup")'
	@echo "setting up $(OPD_VENV): about 160 packages, some minutes the first time, without further output"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(OPD_VENV)
	@$(BIN)/python -m pip install -q --no-deps -r requirements-cpu.lock
	@$(BIN)/python -c 'import torch' 2> /dev/null || $(MAKE) -s cuda-libraries
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@
	@echo "set up: $(BIN)/python"

# What the CUDA build of torch cannot be imported without; the lock leaves it out, as the CPU build needs none of it.
cuda-libraries:
	@echo "pip found torch's CUDA build: adding the libraries that it needs, 3 GB (docs/quick_start.md says how to do without)"
	@$(BIN)/python -m pip install -q $$(grep '^torch==' requirements-cpu.lock)
	@$(BIN)/python -c 'import torch'

demo: setup
	@PATH="$(BIN):$$PATH" bash examples/on_policy_distillation/run-tiny-cpu.sh $(DEMO_ARGS)

test: setup
	@PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .
	@$(BIN)/mypy

# Lines of opd/ that the unit tests run, the least covered files first; build/coverage/html/ shows which.
coverage: setup
	@mkdir -p build/coverage && rm -f build/coverage/data*
	@PATH="$(BIN):$$PATH" $(BIN)/coverage run -m pytest -q tests/unit $(PYTEST_ARGS)
	@$(BIN)/coverage combine -q
	@$(BIN)/coverage html -q -d build/coverage/html
	@$(BIN)/coverage report --sort=cover --skip-covered

# A wheel and a source distribution in dist/. build/lib would bring files along that are no more.
dist: setup
	@rm -rf build/lib build/bdist.* dist
	@$(BIN)/python -c 'from setuptools import build_meta as b; b.build_wheel("dist"); b.build_sdist("dist")' > /dev/null
	@ls -l dist

# The site in build/docs/, with tools of its own.
docs:
	@test -x build/docs-venv/bin/sphinx-build || { $(PYTHON) -m venv build/docs-venv && build/docs-venv/bin/python -m pip install -q -r docs/requirements.txt; }
	@build/docs-venv/bin/sphinx-build -q -W -b html docs build/docs
	@echo "built: build/docs/index.html"

check: setup
	@$(BIN)/python tools/check_environment.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
