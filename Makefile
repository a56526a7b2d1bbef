# The verbs of the project. `make demo` and `make test` work on a fresh machine: both set up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test quick lint bench notebooks clean

setup: $(STAMP)

# flash-attn is never among these: it would want a compiler and a GPU. See README, "GPUs".
# Most of the 25,000 files that come along are never imported: those that are get compiled then.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/mmctx data build emoji data/emoji
	$(BIN)/mmctx train configs/demo.yaml
	@echo "report: runs/demo/report.html"

# One process a core, each with one thread: most tests are too small to use more.
test: setup
	$(BIN)/python -m pytest -n auto --dist worksteal

quick: setup
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" -x -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup
	for script in $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py)); do \
		echo "== $$script"; $(BIN)/python $$script || exit 1; done

# Runs the notebooks and keeps what they show.
notebooks: setup
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf $(VENV) build *.egg-info
