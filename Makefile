# Two commands do everything on a machine that has Python 3.11+, pip and make:
#   make demo   its own environment, install, score real examples with the bundled model
#   make test   environment with the dev extra, the whole suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

.PHONY: demo test test-slow test-frameworks docs lint clean

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.base

demo: $(VENV)/.base
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -n auto -m 'not slow'

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# Frameworks that want other versions of common packages than we do: an environment of their own, without CUDA
FRAMEWORKS := .venv-frameworks
$(FRAMEWORKS)/.ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(FRAMEWORKS)
	grep -E '^(fastapi|hypothesis|numpy|pyarrow|pytest|ray|starlette|torch|uvicorn)==' constraints.txt > $(FRAMEWORKS)/constraints.txt
	$(FRAMEWORKS)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(FRAMEWORKS)/constraints.txt \
	  --editable '.[serve,eval]' hypothesis pytest pytest-timeout pytest-xdist verl==0.9.1 ms-swift==4.6.0
	$(FRAMEWORKS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps openrlhf==0.11.2
	@touch $@

test-frameworks: $(FRAMEWORKS)/.ready
	$(FRAMEWORKS)/bin/python -m pytest tests/rft

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

lint: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(FRAMEWORKS) build dist .pytest_cache .mypy_cache .ruff_cache
