# Everything runs out of .venv, which this file makes by itself from a plain python3 and refreshes only when
# pyproject.toml changed. Paths are relative, so that the repository may lie anywhere.

PYTHON ?= python3
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
# A file of tests to a worker, those that last long first; how many workers: tests/conftest.py.
PYTEST := $(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder
UV := $(shell command -v uv 2>/dev/null)

ifneq ($(UV),)
MAKE_VENV = uv venv -q --allow-existing --python "$(PYTHON)" $(VENV)
INSTALL = uv pip install -q --python $(RUN)
else
MAKE_VENV = "$(PYTHON)" -m venv $(VENV)
INSTALL = $(RUN) -m pip install -qq --disable-pip-version-check
endif

.PHONY: help demo test test-system torture bench check clean
.DEFAULT_GOAL := help

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | while IFS='|' read -r name text; do printf '%-12s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.installed-demo ## embed real documents and search them: the main job, end to end (ARGS='--documents 500')
	@$(RUN) -m sidecar_daemon demo $(ARGS)

test: $(VENV)/.installed-dev ## run all tests, then hold the core to 90 % branch coverage (ARGS='-k lease' runs a part)
	@$(PYTEST) --cov --cov-branch --cov-report= $(ARGS)
ifeq ($(strip $(ARGS)),)
	@$(RUN) -m coverage report --show-missing --skip-covered --fail-under=90
else
	@echo "coverage is not held to 90 %: ARGS ran a part of the tests"
endif

test-system: $(VENV)/.installed-dev ## tests that need a tool of the operating system (PgBouncer, Prometheus, …); says what is missing
	@$(PYTEST) tests/system tests/integration/stories --through-pgbouncer $(ARGS)

check: $(VENV)/.installed-dev ## lint, formatting, types, import layers
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(RUN) -c 'import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())'

torture: $(VENV)/.installed-dev ## nothing lost, nothing stale, whatever crashes: ten minutes of it (ARGS='--only T5 --seed 7')
	@$(RUN) -m tests.torture --profile ci --json $(ARGS)

bench: $(VENV)/.installed-dev ## how close to the limit of the machine, beside what one would pick instead (ARGS='--quick --only P4')
	@$(RUN) -m tests.bench $(ARGS)

clean: ## remove .venv, caches and build output (the demo's data in .sidecar stays)
	@rm -rf $(VENV) build dist *.egg-info .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find sidecar_daemon tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Making an environment over an existing one mends a half-made one and keeps what is installed.
$(VENV)/.made:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$("$(PYTHON)" --version 2>/dev/null || echo missing): make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "making $(VENV) …" >&2
	@$(MAKE_VENV)
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.made pyproject.toml
	@echo "installing into $(VENV): what the demo needs …" >&2
	@$(INSTALL) -e '.[demo]'
	@touch $@

# The tests need all that the demo needs, so one install serves both.
$(VENV)/.installed-dev: $(VENV)/.made pyproject.toml
	@echo "installing into $(VENV): what the demo, the tests and the checks need …" >&2
	@$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed-demo $@
