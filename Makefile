PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What builds the documentation site; constraints.txt has the versions. ruff lays out the signatures of functions.
DOCS := mkdocs mkdocs-material "mkdocstrings[python]" ruff

.PHONY: demo docs test test-slow test-docs test-lowest test-newest audit soak lint venv

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

test-docs: venv
	$(PYTEST) tests/test_docs.py tests/test_contributing.py

# The documentation site, in an environment of its own: it reads the code without importing it, so PyTorch is not needed.
docs:
	@test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(DOCS)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict
	@echo "Open site/index.html. The search needs a server: .venv-docs/bin/python -m http.server -d site"

# The core of the tests with other versions of the dependencies, each set in an environment of its own.
CORE := $(addprefix tests/test_,objectives.py chunking.py encoder.py trainer.py distributed.py export.py loading.py tempscale.py \
	forward.py hub.py)

# The lower bounds of setup.cfg, on the lowest Python.
test-lowest:
	@test -x .venv-lowest/bin/python || python3.11 -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e ".[dev]"
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile $(CORE)

# The newest versions in the package index that setup.cfg allows.
test-newest:
	@test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	@.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e ".[dev]"
	@.venv-newest/bin/python -m pip list --disable-pip-version-check
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile $(CORE)

# Known vulnerabilities of the pinned versions; benchmarks/audit.py says what its exit status means.
audit:
	@test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check "pip-audit>=2.10"
	@.venv-audit/bin/python benchmarks/audit.py

# Half an hour of training on two processes that are killed, stopped and left without room; as root, for it makes small disks.
soak: venv
	$(BIN)/python benchmarks/reliability.py soak --minutes 30

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Makes the environment, or installs what is missing in it. A PyTorch that is there already stays.
venv:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check setuptools -c constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[dev]"
