# `make demo` and `make test` share one virtual environment at .venv.
PYTHON ?= python3
BIN := .venv/bin
# One thread for each process. The many processes that tests start must not compile the project again
# where bytecode is switched off.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest
# Several processes: files are not divided among them, and keep their order.
SHARED := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-quick test-slow lint types schema install lock

demo: .venv/.installed
	$(BIN)/python jobs/demo.py

test: .venv/.installed lint types
	$(PYTEST) $(SHARED) -m "not slow"

# For a change at hand: no clusters, servers, trainings, extractions, compilers or references.
test-quick: .venv/.installed
	$(PYTEST) $(SHARED) -m "not slow and not cluster and not long"

test-slow: .venv/.installed
	$(PYTEST) -m slow

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	$(BIN)/mypy

# Run after a change of the manifest, a commit record or the index.
schema: .venv/.installed
	$(BIN)/python -m schemas.json_schema

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Pin the installed versions: run in a new environment, then commit constraints.txt.
lock:
	$(BIN)/python -m pip freeze --exclude-editable > constraints.txt
