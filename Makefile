# `make run` and `make test` do everything, the environment and the install included, on a machine that has Python ≥ 3.11.
# Another command: make run ARGS="+format=int8 block=128"

PYTHON ?= python3
ARGS ?= +format=nf4 block=64
VENV ?= .venv
BIN = $(VENV)/bin

# The releases that are tested. LOCK= lets pip take the newest that pyproject.toml accepts.
LOCK ?= requirements.lock
# TORCH: what pip takes for PyTorch, such as the wheel of a CPU build; without it, what the registry has.
INSTALL = -m pip install --quiet --disable-pip-version-check $(TORCH)
LOCKED = $(if $(LOCK),--constraint $(LOCK))

# The lowest releases that pyproject.toml accepts, and the tests that follow other libraries most closely.
LOWEST = transformers==5.0.0 peft==0.18.0 accelerate==1.3.0 safetensors==0.5.0
CLOSEST = tests/qbench/checkpoint tests/qbench/training/test_tune.py tests/qbench/measure/test_tasks.py \
	tests/qbench/cli/test_run.py tests/qbench/cli/test_quantize.py

.PHONY: run test test-thorough test-lowest test-newest lock docs

run: $(VENV)/.run
	$(BIN)/python -m qbench $(ARGS)

# a process a core, of one thread; what times something is for `pytest tests/test_speed.py`
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile \
	--no-loadscope-reorder --benchmark-disable

test: $(VENV)/.test
	$(BIN)/ruff check formats qbench tests experiments docs
	$(BIN)/mypy
	$(PYTEST) -m "not thorough"

# what takes long and seldom breaks, for CI
test-thorough: $(VENV)/.test
	$(PYTEST) -m thorough

test-lowest: $(VENV)-lowest/.test
	$(VENV)-lowest/bin/python -m pytest $(CLOSEST)

# what today's releases break that the locked ones do not: the environment is made anew each time
test-newest:
	rm -rf $(VENV)-newest
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python $(INSTALL) --editable .[test]
	$(VENV)-newest/bin/python -m pytest $(CLOSEST)

# the newest releases, for every system and Python of the README, into requirements.lock
lock:
	test -x $(VENV)-lock/bin/python || $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --disable-pip-version-check --upgrade uv
	$(VENV)-lock/bin/uv pip compile --quiet --universal --all-extras --upgrade --no-annotate \
		--custom-compile-command "make lock" --output-file requirements.lock pyproject.toml

# the pages of docs/ and the API, from its docstrings, as a site: build/site/index.html
docs: $(VENV)/.test
	$(BIN)/python docs/build.py build/site

$(VENV)/.run: pyproject.toml $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) $(LOCKED) --editable .
	touch $@

$(VENV)/.test: pyproject.toml $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) $(LOCKED) --editable .[test]
	touch $@ $(VENV)/.run

$(VENV)-lowest/.test: pyproject.toml Makefile
	test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python $(INSTALL) $(LOWEST) --editable .[test]
	touch $@
