# Every target runs in .venv, which the first one that needs it makes from
# $(PYTHON). It is installed anew only when pyproject.toml changes.

PYTHON ?= python3
ARGS ?=

VENV := .venv
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format clean

help:  ## Show this help.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) \
	  | awk -F '|' '{ printf "%-18s %s\n", $$1, $$2 }'
	@echo
	@echo '  PYTHON=python3.12  the interpreter to make .venv from'
	@echo '  ARGS="-k fusion"   more arguments for demo, test and test-slow'

install: $(INSTALLED)  ## Make .venv and install the package with its tools.

demo: $(INSTALLED)  ## Reconstruct and score a synthetic walk: output/demo/demo.png.
	$(VENV)/bin/python -m point3r_jax.cli.demo --output output/demo $(ARGS)

# On the CPU unless told otherwise: most of a test's time is compilation, the
# tolerances are a CPU's, and a broken GPU driver must not fail the suite.
test: $(INSTALLED)  ## Run the tests.
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} \
	  $(VENV)/bin/python -m pytest -n 2 $(ARGS)

test-slow: $(INSTALLED)  ## Run the tests that take minutes or gigabytes.
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} \
	  $(VENV)/bin/python -m pytest -m slow $(ARGS)

lint: $(INSTALLED)  ## Check style.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(INSTALLED)  ## Apply it.
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## Remove .venv, caches and the demo's output.
	rm -rf $(VENV) build dist *.egg-info output/demo
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find point3r_jax tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml | $(VENV)/bin/python
	@echo 'Installing into $(VENV); the first time takes a minute or two ...'
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --editable '.[dev]'
	@touch $@

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'error: there is no $(PYTHON); install Python 3.11 or newer, or' \
	    'name one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), but Python 3.11" \
	    'or newer is needed; name one: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'error: $(PYTHON) lacks the venv module; on Debian and Ubuntu:' \
	    'apt install python3-venv' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
