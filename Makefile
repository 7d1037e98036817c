# Everything a newcomer runs. `make demo` and `make test` set up what they need by themselves.
# A different interpreter or folder: make PYTHON=python3.12 VENV=/tmp/memlm-venv demo

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.memlm-installed
# Tiny tensors: more threads only get into each other's way; two processes share the files.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# In the order of the folders: by the number of their tests, the slowest files would come last.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format clean

help: ## Show these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Create the virtual environment and install memlm with its tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: memlm needs Python 3.11 or newer, but '$(PYTHON)' is older or not installed;" \
	       "choose another with: make PYTHON=python3.12 setup" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" \
	       "or choose another Python with: make PYTHON=... setup" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	@touch $@

demo: setup ## Train a small model with a memory, then look for needles (at most 8 minutes, CPU)
	GOMP_SPINCOUNT=10000 $(BIN)/python -m memlm.demo

test: setup ## Run the tests; coverage of the memories and the models must reach 95 %
	$(PYTEST) $(PARALLEL) --cov=memlm/memory --cov=memlm/models --cov-report=term-missing --cov-fail-under=95

test-slow: setup ## Run the tests that take minutes
	$(PYTEST) -m slow

lint: setup ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the virtual environment and everything that was built (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
