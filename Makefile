# Each target sets up what it needs; nothing is downloaded at run time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := setup.py $(shell find csrc -type f 2>/dev/null)

.PHONY: setup demo test lint bench gpu clean

setup: $(STAMP)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.requirements: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(STAMP): $(VENV)/.requirements pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/latentfast demo --out latentfast-demo

test: setup
	$(BIN)/python -m pytest --numprocesses auto

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format --dry-run --Werror

bench: setup
	$(BIN)/latentfast bench run --device cpu --out benchmarks/results

# On a machine with a GPU, with torch already there: no virtual environment, no downloads.
gpu:
	bash tools/gpu.sh

clean:
	rm -rf build dist $(STAMP) latentfast/_native_*.so
