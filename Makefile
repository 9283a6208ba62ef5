# Every target does its own set-up: a fresh machine needs Python 3.11 or newer and gcc.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.shardline-setup
TESTS_STAMP := $(VENV)/.shardline-tests
QUICKSTART := runs/quickstart
PROMPT = $$(printf 'class Reader:\n    """Reads lines from a file."""\n\n    def __init__(self, ')

.PHONY: setup quickstart test test-trainer test-runs test-engines test-parts test-slurm test-packages check soak

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup scripts/launchers-of
	@scripts/setup
	@touch $(STAMP)

# What tests need includes what a run needs: one installation, not two.
$(TESTS_STAMP): pyproject.toml constraints.txt scripts/setup scripts/launchers-of
	@scripts/setup --tests
	@touch $(STAMP) $(TESTS_STAMP)

# Looks each time: where all is there, it does nothing.
test-packages:
	@scripts/test-packages

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
	$(BIN)/python -m benchmarks.presentation.figures

# Two at a time, the longest first, so that both cores are busy to the end: with three, tests of signals and of exits come
# to look at a process too late. Where there are more cores, each group is spread over half of them; jobs of Slurm stay together, on one cluster.
TEST_GROUPS := test-trainer test-runs test-engines test-slurm test-parts
CORES := $(shell nproc)
SPREAD := $(shell [ $(CORES) -lt 4 ] || echo --numprocesses=$$(($(CORES) / 2 < 8 ? $(CORES) / 2 : 8)) --dist=loadfile)
PYTEST := $(BIN)/python -m pytest -m "not slow" --durations=40
ENGINES := tests/sharding tests/benchmarks
PARTS := $(filter-out tests/trainer tests/e2e tests/slurm tests/__pycache__ $(ENGINES),$(patsubst %/,%,$(wildcard tests/*/)))

test:
	@$(MAKE) --no-print-directory -j 2 $(TESTS_STAMP) test-packages
	@$(MAKE) --no-print-directory -j 2 --keep-going $(TEST_GROUPS) check

test-trainer: $(TESTS_STAMP)
	$(PYTEST) $(SPREAD) tests/trainer

test-runs: $(TESTS_STAMP)
	$(PYTEST) $(SPREAD) tests/e2e

test-engines: $(TESTS_STAMP)
	$(PYTEST) $(SPREAD) $(ENGINES)

test-parts: $(TESTS_STAMP)
	$(PYTEST) $(SPREAD) $(PARTS) $(wildcard tests/test_*.py)

test-slurm: $(TESTS_STAMP) test-packages
	$(PYTEST) tests/slurm

soak: $(TESTS_STAMP) test-packages
	$(BIN)/python -m pytest -m slow --durations=40
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile=search
	$(BIN)/shardline drill all configs/quickstart.yaml
