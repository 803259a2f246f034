# Every target does all set-up itself: a virtual environment, the project with the packages that it needs, then the work.
# Needs only make and Python 3.11 or newer (another interpreter: make PYTHON=python3.12 ...).

PYTHON ?= python3
VENV ?= .venv
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
TORCH_STAMP := $(VENV)/.installed-torch
TPU_STAMP := $(VENV)/.installed-tpu
DOCS_STAMP := $(VENV)/.installed-docs
SANDBOX_STAMP := $(VENV)/.installed-sandbox
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast test-long lint format docs setup paper paper-fast paper-smollm2 tpu clean

help: ## show the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

quickstart: $(RUN_STAMP) ## train a small model with OAPL on this machine and write its report
	$(BIN)/python -m oapl_jax.train --config configs/quickstart.yaml

# Files keep the order of tests/conftest.py: those that take long come first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint docs $(TORCH_STAMP) $(TPU_STAMP) ## lint, types, docs and every test but the longest
	$(PYTEST) -m "not long"

test-fast: $(DEV_STAMP) ## the tests that take seconds
	$(PYTEST) -m "not slow"

test-long: $(DEV_STAMP) $(TORCH_STAMP) $(TPU_STAMP) ## the tests that take many minutes, by hand
	$(PYTEST) -m long

lint: $(DEV_STAMP) ## format, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(DEV_STAMP) ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_STAMP) ## build the documentation in docs/_build/site; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -c docs/site . docs/_build/site
	@echo "docs/_build/site/docs/index.html"

paper: $(RUN_STAMP) ## the paper's claims in miniature: tables and figures in runs/paper (hours, resumable)
	$(BIN)/python -m experiments experiments/paper.yaml --out runs/paper

paper-fast: $(RUN_STAMP) ## a part of it, in runs/paper_fast (15 minutes)
	$(BIN)/python -m experiments experiments/paper_fast.yaml --out runs/paper_fast

paper-smollm2: $(RUN_STAMP) ## three objectives at three lags on SmolLM2-135M (hours; MODEL=FOLDER, or from the hub)
	$(BIN)/python -m experiments experiments/paper_smollm2.yaml --out runs/paper_smollm2 --processes 1 $(if $(MODEL),model.path=$(MODEL))

tpu: $(RUN_STAMP) $(TPU_STAMP) ## install the compiler for TPUs, which preflight needs

setup: $(DEV_STAMP) $(DOCS_STAMP) $(TORCH_STAMP) $(TPU_STAMP) ## install everything and run nothing

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) docs/_build .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "oapl_jax needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Install one and run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

# Installs are long and silent otherwise: say what happens.
$(RUN_STAMP): pyproject.toml requirements.txt | $(BIN)/python
	@echo "installing oapl-jax into $(VENV) (once; about a minute)"
	$(PIP) install -q -c requirements.txt -e .
	@touch $@

$(DEV_STAMP): requirements-dev.txt $(RUN_STAMP) | $(SANDBOX_STAMP)
	@echo "installing requirements-dev.txt and requirements.txt into $(VENV) (once; one to three minutes)"
	$(PIP) install -q -r requirements-dev.txt
	@touch $@

# Programs of a model are graded inside bubblewrap; without it code rewards are refused and their tests skip.
$(SANDBOX_STAMP): | $(BIN)/python
	@command -v bwrap >/dev/null 2>&1 \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 && echo "installing bubblewrap" \
	       && apt-get -qq update && apt-get -qq install -y --no-install-recommends bubblewrap libseccomp2 >/dev/null; } \
	  || echo "bubblewrap is not installed, so code rewards are refused and their tests skipped (docs/rewards.md);" \
	       "on Debian and Ubuntu: sudo apt-get install bubblewrap"
	@touch $@

$(DOCS_STAMP): requirements-docs.txt $(RUN_STAMP)
	@echo "installing requirements-docs.txt into $(VENV)"
	$(PIP) install -q -r requirements-docs.txt
	@touch $@

# PyTorch is for comparisons only: where it cannot be installed, those tests skip.
$(TORCH_STAMP): requirements-torch.txt | $(DEV_STAMP)
	@echo "installing requirements-torch.txt into $(VENV)"
	@$(PIP) install -q -r requirements-torch.txt && touch $@ \
	  || echo "PyTorch could not be installed: the comparisons with it will be skipped"

# For preflight only, in a folder that JAX does not look into by itself (oapl_jax/preflight/topology.py).
$(TPU_STAMP): requirements-tpu.txt | $(BIN)/python
	@echo "installing requirements-tpu.txt into $(VENV)/tpu"
	@$(PIP) install -q --no-deps --upgrade --target $(VENV)/tpu -r requirements-tpu.txt && touch $@ \
	  || echo "libtpu could not be installed: the tests that compile for TPUs will be skipped"
