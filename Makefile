# make demo   set up, then compare every method on the bundled model (about two minutes after installation)
# make test   set up, then run the tests
# make check  lint, types and tests: what CI runs
# make docs   the documentation as a site, in site/

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: help setup demo test lint typecheck format check bench build docs clean

help:
	@sed -n 's/^# //p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "longext needs Python 3.10 or newer; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev]'
	@touch $(READY)

demo: setup
	$(BIN)/longext compare -c compare/books-5m-4k -o results/demo --force

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint typecheck test

bench: setup
	$(BIN)/python benchmarks/extend_speed.py
	$(BIN)/python benchmarks/sliding_perplexity.py
	$(BIN)/python benchmarks/chunked_loss.py
	$(BIN)/python benchmarks/s2_attention.py books-5m --lengths 2048,8192

build: setup
	$(BIN)/python -m build

docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) dist build results site
