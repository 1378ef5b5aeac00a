# `make demo` and `make test` need nothing but make, git and Python 3.10 or newer.
PYTHON ?= python3
VENV_PYTHON = .venv/bin/python

.PHONY: demo test lint

demo: .venv/installed
	$(VENV_PYTHON) simsiam_cifar10/run.py --dataset shapes $(DEMO) --run-dir runs/demo

test: .venv/installed-tests
	$(VENV_PYTHON) -m pytest

lint: .venv/installed-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

$(VENV_PYTHON):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one with make PYTHON=…")'
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt pyproject.toml | $(VENV_PYTHON)
	$(VENV_PYTHON) -m pip install -r requirements.txt
	touch $@

.venv/installed-tests: tests/requirements.txt .venv/installed
	$(VENV_PYTHON) -m pip install -r tests/requirements.txt
	touch $@
