# Set-up in a virtual environment of the project's own, and the two commands everybody needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Idle OpenMP threads must not spin against each other.
export OMP_WAIT_POLICY = PASSIVE
export GOMP_SPINCOUNT = 0

.PHONY: quickstart test unit lint types install dev clean

quickstart: install  ## set up from nothing and run the main job on the embedded base
	$(BIN)/tunery train examples/quickstart.yaml

test: dev  ## all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

unit: dev  ## the fast tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev
	$(BIN)/pyright --pythonpath $(BIN)/python

install: $(VENV)/.installed
dev: $(VENV)/.dev

$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Tunery needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch  # first and pinned: a looser requirement met later would not be satisfied again
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --editable '.[dev,tensorboard]'
	touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info
