# make demo   set up, train the embedded small model, print scores and one line of JSON
# make test   set up, pass the tests
# make lint   style, types, import contracts
# make lowest the tests that touch transformers, run kernels or go through the GPU check, on the
#             oldest torch, triton and transformers supported

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Real data beside the project, where they are; see README, "Data".
ifeq ($(origin LOWMEM_CFT_DATA),undefined)
ifneq ($(wildcard ../shared/data),)
export LOWMEM_CFT_DATA := $(abspath ../shared/data)
endif
endif

# An activated environment or a PYTHONPATH of the user's must not leak into ours.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME

.PHONY: demo test lint lowest clean

demo: $(VENV)/.run
	$(BIN)/lowmem-cft demo $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lowest: $(VENV)/.lowest
	PYTHONPATH=$(VENV)/lowest $(BIN)/python -m pytest -n auto tests/test_imports.py \
	  tests/model tests/gradient tests/planning tests/training/test_trainer.py \
	  tests/inference/test_embed.py tests/bench/gpu tests/bench/train \
	  tests/kernels/test_triton_dropout.py tests/kernels/test_triton_info_nce_compile.py \
	  tests/kernels/test_triton_info_nce.py::test_shapes_alone_and_many

$(BIN)/python:
	$(PYTHON) -c 'import sys; ok = sys.version_info >= (3, 10); \
	  sys.exit(None if ok else "lowmem-cft needs Python 3.10 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=25.1"

$(VENV)/.run: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[check]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) install --quiet --constraint constraints.txt --group dev
	touch $@

# Laid over the environment: the lower bounds of pyproject.toml for what changes most. torch needs its
# CUDA libraries (5 GB); what transformers needs is there already, and must not come twice.
$(VENV)/.lowest: $(VENV)/.dev Makefile
	rm -rf $(VENV)/lowest
	$(PIP) install --quiet --target $(VENV)/lowest torch==2.11.0 triton==3.6.0
	$(PIP) install --quiet --upgrade --target $(VENV)/lowest --no-deps \
	  transformers==5.17.0 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist
