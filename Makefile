# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first when it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= demo
# Test processes; each of them starts trainings of one or two processes.
JOBS ?= 2

.PHONY: help setup demo examples ui test mutants check format bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[ui,dev]'
	touch $@

setup: $(VENV)/.ready ## make .venv and install everything into it

# Of each task, painted in half the decoders' own steps.
SCORE := --rows runs/$(RUN)/shapes/artifact/heldout.jsonl --tasks understanding generation editing --num 48 --num-inference-steps 10
demo: $(VENV)/.ready ## teach the weights that ship something new, through every stage; scores before and after (8 minutes on 2 cores)
	$(BIN)/nexus-gen run pipeline=demo name=$(RUN)
	$(BIN)/nexus-gen evaluate weights/shapes $(SCORE) --output runs/$(RUN)/before
	$(BIN)/nexus-gen evaluate runs/$(RUN) $(SCORE)
	$(BIN)/nexus-gen report runs/$(RUN) --against runs/$(RUN)/before

EXAMPLES := runs/examples
examples: $(VENV)/.ready ## paint, edit and answer with the weights that ship, in English and Chinese (a minute)
	$(BIN)/nexus-gen generate --prompt "a red circle to the left of a blue square on a white background" --result-path $(EXAMPLES)/circle.png
	$(BIN)/nexus-gen edit --input-image $(EXAMPLES)/circle.png --instruction "make the blue square yellow" --result-path $(EXAMPLES)/yellow.png
	$(BIN)/nexus-gen understand --input-image $(EXAMPLES)/yellow.png --prompt "What colour is the square?"
	$(BIN)/nexus-gen generate --language zh --prompt "三个绿色正方形，黑色背景" --result-path $(EXAMPLES)/squares.png
	$(BIN)/nexus-gen edit --language zh --input-image $(EXAMPLES)/circle.png --instruction "把红色圆形移到右上角" --result-path $(EXAMPLES)/moved.png
	$(BIN)/nexus-gen understand --input-image $(EXAMPLES)/moved.png --prompt "红色圆形在哪里？"

ui: $(VENV)/.ready ## the weights that ship in the browser
	$(BIN)/nexus-gen ui

test: $(VENV)/.ready ## all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

# MODULES="train/scores/scoring.py data/shards/quantize.py" tries changes in these alone.
mutants: $(VENV)/.ready ## single-line changes of figures and choices, one by one: which ones do the tests not notice (1 hour)
	$(BIN)/python tests/mutation/run.py $(MODULES)

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
