# Each target sets up what it needs in .venv, on a fresh machine too; a second call starts at once.
PYTHON ?= python3
# The exact torch is named first: a bare "torch" may resolve to another build and bring gigabytes of CUDA with it.
TORCH ?= $(shell grep '^torch==' constraints.txt)
BIN := .venv/bin
READY := .venv/.ready
# The lowest versions that pyproject.toml allows, on the lowest Python, have an environment of their own.
OLDEST_PYTHON ?= python3.10
OLDEST_TORCH ?= $(shell grep '^torch==' constraints-oldest.txt)
OLDEST_BIN := .venv-oldest/bin
OLDEST_READY := .venv-oldest/.ready

.PHONY: demo test test-oldest slow lint docs clean

demo: $(READY)
	$(BIN)/python examples/digits.py

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

test-oldest: $(OLDEST_READY)
	OMP_NUM_THREADS=1 $(OLDEST_BIN)/python -m pytest -n 2 $(ARGS)

slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/*.py

docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

clean:
	rm -rf .venv .venv-oldest site .mypy_cache .pytest_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

$(OLDEST_READY): pyproject.toml constraints-oldest.txt
	test -x $(OLDEST_BIN)/python || $(OLDEST_PYTHON) -m venv .venv-oldest
	$(OLDEST_BIN)/python -m pip install --quiet --constraint constraints-oldest.txt $(OLDEST_TORCH)
	$(OLDEST_BIN)/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	touch $@
