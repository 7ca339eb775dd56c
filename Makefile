# Every target that needs Python makes .venv first, if it is missing or older than what it is made from.
#   make train RECIPE=debug SET="distill.max_updates=50 seed=1"

RECIPE ?= easyvqa
SET ?=
TESTS ?= tests
PORT ?= 5000

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FIND_PYTHON = for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; exit; }; done
PYTHON ?= $(shell $(FIND_PYTHON))

export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONUNBUFFERED := 1
# Data loading forks after tokenizing; without this the tokenizers library warns once a worker.
export TOKENIZERS_PARALLELISM := false
# Metaflow refuses to run as root without a name, and looks for earlier runs under this one.
export METAFLOW_USER := $(or $(METAFLOW_USER),$(filter-out root,$(USER)),$(filter-out root,$(shell id -un)),matvlm)

.PHONY: help install train test test-slow test-cluster lint format up down ui gpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## make .venv and install requirements.txt and matvlm into it

$(STAMP): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "Installing requirements.txt into $(VENV); the first time this takes some minutes"
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

train: $(STAMP) ## train, evaluate and profile a hybrid (RECIPE=easyvqa, SET="field.path=value ...")
	python flows/train_flow.py --config recipe flows/recipes/$(RECIPE).yaml run --max-workers 2$(if $(SET), --set "$(SET)")

test: lint ## lint, type check and all tests but the slow ones (TESTS="tests/test_x.py -k name")
	python -m pytest -m "not slow" $(TESTS)

test-slow: $(STAMP) ## the slow tests
	python -m pytest -m slow $(TESTS)

test-cluster: $(STAMP) ## the flows on a Kubernetes API on loopback, the manifests, S3 and the local stack (15 minutes)
	python -m pytest tests/test_kubernetes*.py tests/test_infra*.py tests/test_images.py tests/test_stack.py tests/test_argo.py \
		tests/test_s3_pipeline.py tests/test_mirror.py tests/test_nodes.py tests/test_tracking_server.py tests/test_security.py

lint: $(STAMP) ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

format: $(STAMP) ## let ruff fix and format the code
	ruff check --fix .
	ruff format .

up: $(STAMP) ## MLflow's server with Postgres and an S3 store, for work without a cluster (PORT=5000)
	@python infra/stack.py up --port $(PORT)

down: $(STAMP) ## stop what `make up` started and delete what it kept
	@python infra/stack.py down

ui: $(STAMP) ## the MLflow pages: where `make up` has them, or http://127.0.0.1:5000 (PORT=5000)
	@python infra/stack.py url || mlflow ui --host 127.0.0.1 --port $(PORT)

gpu: $(STAMP) ## add the CUDA kernels (needs a GPU build of torch and nvcc; compiles for minutes)
	MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
	python -m pip install --no-cache-dir --no-build-isolation --no-deps --requirement requirements-gpu.txt

clean: ## remove .venv, caches and build leftovers; runs, checkpoints and MLflow's store stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find matvlm flows tests -name __pycache__ -type d -prune -exec rm -rf {} +
