# Every target makes what it needs, the environment included; none needs another to have run before.
PYTHON ?= python3
VENV ?= .venv
# The torch that the project is developed with; any from 2.10 on serves, for example `make test TORCH=torch`.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
SETUP := pyproject.toml setup.py

.PHONY: demo test lint format bench-quick clean help

help:  ## This list.
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.package  ## Watch a small model decode with a rolling lookahead tree, then compare it with plain decoding.
	$(BIN)/lbr-kernels build
	$(BIN)/lbr-kernels demo

test: $(VENV)/.test  ## Build the kernels and run the tests.
	$(BIN)/lbr-kernels build
	$(BIN)/pytest

lint: $(VENV)/.lint  ## ruff, mypy and clang-format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.cpp' '*.h' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.lint  ## Put all sources into shape.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' | xargs $(BIN)/clang-format -i

bench-quick: $(VENV)/.test  ## Each op against plain PyTorch, generate against model.generate; correctness first.
	$(BIN)/lbr-kernels build
	mkdir -p .benchmarks
	$(BIN)/pytest bench --benchmark-enable --benchmark-only --benchmark-group-by=group \
		--benchmark-columns=min,median,iqr,rounds --benchmark-json=.benchmarks/run.json
	$(BIN)/python bench/report.py .benchmarks/run.json

clean:  ## Remove the environment and what tools have left.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: $(SETUP) | $(VENV)/bin/python
	$(BIN)/pip install --quiet "$(TORCH)" --editable .
	touch $@

$(VENV)/.test: $(SETUP) | $(VENV)/bin/python
	$(BIN)/pip install --quiet "$(TORCH)" --editable '.[test]'
	touch $@

$(VENV)/.lint: $(SETUP) | $(VENV)/bin/python
	$(BIN)/pip install --quiet "$(TORCH)" --editable '.[test,lint]'
	touch $@
