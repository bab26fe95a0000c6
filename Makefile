# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first when it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= tiny
# Test processes; each of them starts trainings of one or two processes.
JOBS ?= 2

.PHONY: help setup demo test check format bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[ui,dev]'
	touch $@

setup: $(VENV)/.ready ## make .venv and install everything into it

demo: $(VENV)/.ready ## the whole pipeline on tiny models: data, four trainings, report (about 10 minutes on 2 cores)
	$(BIN)/nexus-gen run pipeline=tiny name=$(RUN)
	$(BIN)/nexus-gen report runs/$(RUN)

test: $(VENV)/.ready ## all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

check: $(VENV)/.ready ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready ## mend what the linter and the formatter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready ## benchmarks, each beside what it replaces
	$(BIN)/python -m pytest tests/bench -o python_files='bench_*.py' -s

clean: ## remove .venv, caches and build leftovers; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
