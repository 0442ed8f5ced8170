# Every target works on a fresh checkout: it makes .venv, installs into it what it needs, and says so first. Nothing is
# taken from an environment that happens to be active, except the Python that .venv is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# what an editable install does not follow by itself
INPUTS := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

# By default OpenMP's threads spin while they wait; on few cores they take the time of those they wait for.
export OMP_WAIT_POLICY := passive
unexport PYTHONHOME PYTHONPATH

.PHONY: help demo test test-all lint bench gpu sanitize-gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## decompose a small network and write its report
	@echo "demo: running fastapd demo"
	@$(BIN)/fastapd demo

test: lint ## what CI runs: lint, types, tests
	@echo "test: running the tests"
	@$(BIN)/python -P -m pytest -q -ra

test-all: test ## test, then the tests marked slow: sanitizers, other builds, all of the GPU kernels (an hour)
	@echo "test-all: running the tests marked slow: sanitizers, other builds, all of the GPU kernels (an hour on two cores)"
	@$(BIN)/python -P -m pytest -q -ra -m slow

lint: $(VENV)/.dev ## ruff and basedpyright
	@echo "lint: checking style with ruff"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@echo "lint: checking types with basedpyright"
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

bench: $(VENV)/.dev ## time every op and step on one thread against the goals; keeps the results
	@echo "bench: running the benchmarks on one thread, best on an otherwise idle machine (minutes; up to 16 GiB)"
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -P -m pytest bench --benchmark-only -q -rs --tb=short --save-results

# A machine with a GPU may have no network, and has torch already: nothing is installed, and without .venv the Python at
# hand is taken. ARGS are the command's, as in: make gpu ARGS="--only timing/step"
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu: ## build, check and time everything on a GPU (9 minutes; keeps the results); without one it says so
	@echo "gpu: running bench/gpu.py with $(GPU_PYTHON)"
	@$(GPU_PYTHON) -P bench/gpu.py $(ARGS)

# torch's own allocator would hide what is read beside a tensor
sanitize-gpu: ## every CUDA C++ kernel on a GPU under compute-sanitizer (minutes); without one it says so
	@if ! $(GPU_PYTHON) -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then \
	echo "sanitize-gpu: torch finds no CUDA device, so nothing was run"; \
	else for tool in memcheck racecheck initcheck synccheck; do \
	echo "sanitize-gpu: running every CUDA kernel under $$tool"; \
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(GPU_PYTHON) -P -m pytest -q \
	-rs -p no:cacheprovider tests/cuda/check_on_card.py || exit 1; done; fi

clean: ## remove what these targets and the build made, .venv included
	@echo "clean: removing $(VENV), build products and caches"
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	@rm -f fastapd/_C*.so fastapd/_build_info.json

# pip hides what the build prints, so say here which native module is missing and why.
SAY_WHAT_IS_MISSING = $(BIN)/python -c "import json; info = json.load(open('fastapd/_build_info.json')); \
	[print(f'install: fastapd.{m} is not built: {info[m]}') for m in ('_C', '_C_cuda') if info[m]]"

$(VENV)/.made:
	@echo "install: making $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "make: PYTHON must be \
	Python 3.11 or newer, got $(PYTHON) ($$($(PYTHON) --version 2>&1)); give one as in: make demo PYTHON=python3.12" >&2; \
	exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "make: $(PYTHON) -m venv must work, got the error above; install it (Debian and \
	Ubuntu: apt install python3-venv), then run make clean and try again" >&2; exit 1; }
	@touch $@

$(VENV)/.build-tools: $(VENV)/.made constraints.txt
	@echo "install: getting the build tools"
	@$(INSTALL) setuptools wheel pybind11 ninja
	@touch $@

$(VENV)/.demo: $(VENV)/.build-tools $(INPUTS)
	@echo "install: building fastapd and installing it with what it needs (torch is large; minutes, the first time)"
	@$(INSTALL) --no-build-isolation -e .
	@$(SAY_WHAT_IS_MISSING)
	@touch $@

$(VENV)/.dev: $(VENV)/.build-tools $(INPUTS)
	@echo "install: building fastapd and installing it with the development tools (torch is large; minutes, the first time)"
	@$(INSTALL) --no-build-isolation -e ".[dev]"
	@$(SAY_WHAT_IS_MISSING)
	@touch $(VENV)/.demo $@
