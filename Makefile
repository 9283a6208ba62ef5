# Every target does its own set-up: a fresh machine needs Python 3.11 or newer and gcc.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.shardline-setup
TESTS_STAMP := $(VENV)/.shardline-tests
QUICKSTART := runs/quickstart
PROMPT = $$(printf 'class Reader:\n    """Reads lines from a file."""\n\n    def __init__(self, ')

.PHONY: setup quickstart test test-runs test-parts check soak

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup
	@scripts/setup
	@touch $(STAMP)

$(TESTS_STAMP): $(STAMP)
	@scripts/setup --tests
	@scripts/test-packages
	@touch $(TESTS_STAMP)

# The sample is drawn once: where run and sample are there, this says so and does nothing.
quickstart: setup
	@$(BIN)/shardline run configs/quickstart.yaml
	@test -e $(QUICKSTART)/sample.txt || { \
		$(BIN)/shardline generate $(QUICKSTART) --prompt "$(PROMPT)" --temperature 0.5 > $(QUICKSTART)/sample.partial && \
		mv $(QUICKSTART)/sample.partial $(QUICKSTART)/sample.txt && \
		$(BIN)/shardline report $(QUICKSTART) && \
		printf '\nsample:\n' && cat $(QUICKSTART)/sample.txt; }

check: $(TESTS_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m trainer.config.reference --check

# Whole runs on one core, parts and some runs on the other: processes that are starting wait more than they compute.
RUNS_BESIDE_PARTS := tests/e2e/test_bad_input.py
PARTS := $(filter-out tests/e2e tests/slurm tests/__pycache__,$(patsubst %/,%,$(wildcard tests/*/)))

test: check
	@$(MAKE) --no-print-directory -j 2 --keep-going test-runs test-parts

test-runs: $(TESTS_STAMP)
	$(BIN)/python -m pytest -m "not slow" tests/e2e tests/slurm $(addprefix --ignore=,$(RUNS_BESIDE_PARTS))

test-parts: $(TESTS_STAMP)
	$(BIN)/python -m pytest -m "not slow" $(PARTS) $(wildcard tests/test_*.py) $(RUNS_BESIDE_PARTS)

soak: $(TESTS_STAMP)
	$(BIN)/python -m pytest -m slow
	$(BIN)/shardline drill all configs/quickstart.yaml
