# Each target is a thin line over one real command. PYTHON names the interpreter, DEMO the size of the demo (full, ci),
# NIGHTS how long `make soak` lasts.
PYTHON ?= python3.11
DEMO ?= full
NIGHTS ?= 200
BIN := .venv/bin
STAMP := .venv/.complete

export PYTHON
# DeepSpeed's operator, built once by set-up
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.venv/torch_extensions

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-readme faults soak lint up down status bench

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## .venv from the lock, system packages where missing; instant when nothing changed

$(STAMP): constraints.txt pyproject.toml infra/setup.sh
	infra/setup.sh
	@touch $@

demo: setup ## the whole line, from recordings to a registered policy
	$(BIN)/upvla demo --size $(DEMO)

test: setup ## fast tests and tests against real engines
	$(BIN)/pytest -m "not slow and not e2e and not gpu"

test-slow: setup ## the long tests
	$(BIN)/pytest -m slow

faults: setup ## faults and bad input, the long ones too: 50 kills of an ingest, 20 of a worker in every phase, with tables
	UPVLA_KILLS=50 UPVLA_FAULT_TABLE=docs/faults-ingest.json $(BIN)/pytest tests/faults
	$(BIN)/python -m tests.faults.kills --runs 20 --json docs/faults-training.json

soak: setup ## NIGHTS nightly runs in a row at toy size, and whether anything leaks: processes, files, memory, slots, objects
	$(BIN)/python -m tests.faults.soak --nights $(NIGHTS) --json docs/faults-soak.json

test-readme: setup ## the README's code, at the demo's CI size; goes on with the stack at UPVLA_HOME where one runs
	$(BIN)/pytest -m e2e

lint: setup ## ruff, mypy, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

up: setup ## start the local stack and wait until it is healthy
	$(BIN)/upvla up

down: setup ## stop everything that `make up` or `make demo` started
	$(BIN)/upvla down

status: setup ## what runs, where, and where its log is
	$(BIN)/upvla status

bench: setup ## every published figure, one after the other
	@set -e; for figure in benchmarks/[a-z]*.py benchmarks/gpu/*.py; do echo "== $$figure"; $(BIN)/python $$figure; done
