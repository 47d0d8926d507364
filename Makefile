# `make run` and `make test` do everything, the environment and the install included, on a machine that has Python ≥ 3.11.
# Another command: make run ARGS="+format=int8 block=128"

PYTHON ?= python3
ARGS ?= +format=nf4 block=64
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: run test

run: $(VENV)/.run
	$(BIN)/python -m qbench $(ARGS)

test: $(VENV)/.test
	$(BIN)/ruff check formats qbench tests experiments
	$(BIN)/python -m pytest

# TORCH: what pip takes for PyTorch, such as the wheel of a CPU build; without it, what the registry has.
$(VENV)/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) --editable .
	touch $@

$(VENV)/.test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) --editable .[test]
	touch $@ $(VENV)/.run
