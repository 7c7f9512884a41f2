PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint types venv

# Fine-tune the built-in encoder on the built-in texts, print before -> after, load the result with AutoModel alone.
demo: venv
	$(BIN)/python recipes/sup_simcse.py
	$(BIN)/python -c "from transformers import AutoModel; print('AutoModel loads it:', type(AutoModel.from_pretrained('outputs/quickstart')).__name__)"

# Two processes: much of the time goes into starting others. A file's tests stay together, for they share fixtures.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: venv
	$(PYTEST)

test-slow: venv
	$(PYTEST) -m "slow or not slow"

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

# Makes the environment, or installs what is missing in it. A PyTorch that is there already stays.
venv:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check setuptools -c constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[dev]"
