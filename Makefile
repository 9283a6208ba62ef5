# Every target does its own set-up: a fresh machine needs Python 3.11 or newer and gcc.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.shardline-setup
QUICKSTART := runs/quickstart
PROMPT = $$(printf 'class Reader:\n    """Reads lines from a file."""\n\n    def __init__(self, ')

.PHONY: setup quickstart test check soak

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup
	@scripts/setup
	@touch $(STAMP)

# The sample is drawn once: where run and sample are there, this says so and does nothing.
quickstart: setup
	@$(BIN)/shardline run configs/quickstart.yaml
	@test -e $(QUICKSTART)/sample.txt || { \
		$(BIN)/shardline generate $(QUICKSTART) --prompt "$(PROMPT)" --temperature 0.5 > $(QUICKSTART)/sample.partial && \
		mv $(QUICKSTART)/sample.partial $(QUICKSTART)/sample.txt && \
		printf '\nsample:\n' && cat $(QUICKSTART)/sample.txt; }

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m trainer.config_docs --check

test: check
	$(BIN)/python -m pytest -m "not slow"

soak: setup
	$(BIN)/python -m pytest -m slow
