# `make run` and `make test` do everything, the environment and the install included, on a machine that has Python ≥ 3.11.
# Another command: make run ARGS="+format=int8 block=128"

PYTHON ?= python3
ARGS ?= +format=nf4 block=64
VENV ?= .venv
BIN = $(VENV)/bin

# What follows transformers most closely, in the lowest releases that pyproject.toml takes; `make test` has the newest.
LOWEST = transformers==5.0.0 peft==0.18.0 accelerate==1.3.0 safetensors==0.5.0
CLOSEST = tests/qbench/test_transformers.py tests/qbench/test_checkpoint.py tests/qbench/test_quantize.py \
	tests/qbench/test_tune.py

.PHONY: run test test-lowest docs

run: $(VENV)/.run
	$(BIN)/python -m qbench $(ARGS)

# a process a core, of one thread; what times something is for `pytest tests/test_speed.py`
test: $(VENV)/.test
	$(BIN)/ruff check formats qbench tests experiments docs
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --benchmark-disable

test-lowest: $(VENV)-lowest/.test
	$(VENV)-lowest/bin/python -m pytest $(CLOSEST)

# the API, from its docstrings: build/api/index.html
docs: $(VENV)/.test
	$(BIN)/python docs/api/build.py build/api

# TORCH: what pip takes for PyTorch, such as the wheel of a CPU build; without it, what the registry has.
$(VENV)/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) --editable .
	touch $@

$(VENV)/.test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) --editable .[test]
	touch $@ $(VENV)/.run

$(VENV)-lowest/.test: pyproject.toml Makefile
	test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) $(LOWEST) --editable .[test]
	touch $@
