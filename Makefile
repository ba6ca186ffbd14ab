# make demo   the whole method on real tasks and a real model, down to a report
# make test   the fast tests            make slow    the ones that take minutes
# make check  every static gate         make docs    the pages generated from the code
# make site   the documentation as a site, in site/
# The first call makes .venv and installs everything into it; only python3 and a package index are needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
PYTEST_FLAGS ?=

ifeq ($(origin ENSEMBLELORA_DATA),undefined)
ifneq ($(wildcard ../shared/data/.),)
export ENSEMBLELORA_DATA := $(abspath ../shared/data)
endif
endif

.PHONY: install demo test slow check docs site

install: $(STAMP)

$(STAMP): requirements.txt requirements-demo.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "error: Python 3.10 or newer is needed; name one with make PYTHON=...")'
	@echo "installing into $(VENV), once; this takes a few minutes" >&2
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps -r requirements-demo.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(STAMP)
	@$(BIN)/ensemblelora demo

# One thread per worker: torch in several processes at once fights over the cores otherwise.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(PYTEST_FLAGS)

slow: $(STAMP)
	@$(BIN)/python -m pytest -q -m slow $(PYTEST_FLAGS)

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python scripts/generate_docs.py --check
	@$(BIN)/python scripts/audit_dependencies.py

docs: $(STAMP)
	@$(BIN)/python scripts/generate_docs.py

site: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
