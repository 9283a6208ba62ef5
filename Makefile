# Every target does its own set-up: a fresh machine needs Python 3.11 or newer and gcc.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.shardline-setup
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: setup quickstart test check soak

setup: $(STAMP)

# A machine that has torch already (a GPU machine, as a rule) keeps it: the environment sees the system's packages, and
# torch is neither installed nor pinned.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not there; set PYTHON to a Python 3.11 or newer"; exit 2; }
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
		echo "keeping the torch that $(PYTHON) has"; \
		$(PYTHON) -m venv --system-site-packages $(VENV); \
		grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	else \
		$(PYTHON) -m venv $(VENV); \
		cp constraints.txt $(VENV)/constraints.txt; \
		$(BIN)/python -m pip install --quiet torch==$(TORCH); \
	fi
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[dev]"
	@touch $(STAMP)

quickstart: setup
	$(BIN)/shardline run configs/quickstart.yaml
	$(BIN)/shardline generate runs/quickstart --prompt "def "

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m trainer.config_docs --check

test: check
	$(BIN)/python -m pytest -m "not slow"

soak: setup
	$(BIN)/python -m pytest -m slow
