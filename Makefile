# The checks and the tests, in an environment that has the extras: pip install -c constraints.txt '.[dev]'
PYTHON ?= python

.PHONY: check test docs format

check:  ## style, types, the direction of imports, and pages that are generated
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -n 0 tests/test_structure.py tests/test_commands.py

test:
	$(PYTHON) -m pytest

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

docs:
	$(PYTHON) scripts/make_docs.py
	$(PYTHON) -m mkdocs build --strict
