PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The packages that build the documentation site. constraints.txt has their versions. ruff formats the signatures of functions.
DOCS := mkdocs mkdocs-material "mkdocstrings[python]" ruff

.PHONY: bench demo docs test test-slow test-docs test-lowest test-newest audit soak lint venv

# Fine-tune the built-in encoder on the built-in texts, print the scores before and after, and load the result with AutoModel.
demo: venv
	$(BIN)/python recipes/sup_simcse.py
	$(BIN)/python -c "from transformers import AutoModel; print('AutoModel loads it:', type(AutoModel.from_pretrained('outputs/quickstart')).__name__)"

# Two processes run the tests, because many tests wait for processes that they start. The tests of one file share fixtures, so
# they run in the same process.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: venv
	$(PYTEST)

test-slow: venv
	$(PYTEST) -m "slow or not slow"

test-docs: venv
	$(PYTEST) tests/test_docs.py tests/test_contributing.py

# Build the documentation site in a separate environment. The build does not import the package, so PyTorch is not needed.
docs:
	@test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(DOCS)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict
	@echo "Open site/index.html. The search needs a server: .venv-docs/bin/python -m http.server -d site"

# The core tests, which also run with other versions of the dependencies. Each set of versions has a separate environment.
CORE := $(addprefix tests/test_,objectives.py chunking.py encoder.py trainer.py distributed.py export.py loading.py tempscale.py \
	forward.py hub.py)

# Run the core tests with the lowest versions that setup.cfg allows, on the lowest Python version.
test-lowest:
	@test -x .venv-lowest/bin/python || python3.11 -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e ".[dev]"
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile $(CORE)

# Run the core tests with the newest versions in the package index that setup.cfg allows.
test-newest:
	@test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	@.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e ".[dev]"
	@.venv-newest/bin/python -m pip list --disable-pip-version-check
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile $(CORE)

# Check the pinned versions for known vulnerabilities. benchmarks/audit.py explains the exit status.
audit:
	@test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check "pip-audit>=2.10"
	@.venv-audit/bin/python benchmarks/audit.py

# Measure speed and memory beside sentence-transformers; the results go to outputs/bench. Stop other programs first. QUICK=1 takes
# about five minutes. ARGS="--model ... --nli ..." gives a model and texts; without them the built-in ones are used.
bench: venv
	$(BIN)/python benchmarks/bench.py $(if $(QUICK),--quick) $(ARGS)

# Train for half an hour on two processes that are killed, stopped, and given a full disk. It mounts small disks as root.
soak: venv
	$(BIN)/python benchmarks/reliability.py soak --minutes 30

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Create the environment, or install missing packages in it. An installed PyTorch is kept.
venv:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check setuptools -c constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[dev]"
