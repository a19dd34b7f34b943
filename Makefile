# `make demo` and `make test` need Python 3.11 or newer, make, and a package index; they set up the rest.
PYTHON ?= python3
VENV   := .venv
# Threads that wait without spinning: see docs/architecture.md.
export OMP_WAIT_POLICY ?= passive
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo server test lint types layers docs unit test-long test-gpu bench format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,dask,ray,s3]'
	touch $@

setup: $(READY)  ## make .venv with the tested versions

demo: $(READY)  ## train the embedded specimen series and study it
	$(BIN)/ontogeny demo

test: lint types layers unit  ## all checks and tests, under ten minutes

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports

# In the order of their names: files with few tests, those of whole machines, take longest and must not come last.
unit: $(READY)
	$(BIN)/python -m pytest -m "not long and not gpu" -n logical --maxprocesses 4 --dist loadfile \
	  --no-loadscope-reorder

test-long: $(READY)  ## tests that take minutes each
	$(BIN)/python -m pytest -m long

test-gpu: $(READY)  ## tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

docs: $(READY)  ## write the generated pages of docs/ anew
	$(BIN)/python -m flows.docs

server: $(READY)  ## Prefect server and worker on this machine; deploy/RUNBOOK.md
	deploy/server.sh

bench: $(READY)  ## run all benchmarks and write docs/performance.md
	$(BIN)/python -m benchmarks all --write

format: $(READY)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
