# `make demo` and `make test` need nothing but make, git and Python 3.10 or newer.
PYTHON ?= python3
VENV_PYTHON = .venv/bin/python

# simsiam_cifar10 in miniature: an eighth of the width, small heads, 6,000 generated pictures.
DEMO = --dataset shapes --width 8 --projector-dim 512 --predictor-dim 128 --batch-size 64 \
	--base-lr 0.1 --epochs 6 --warmup-epochs 1 --linear-epochs 0 --run-dir runs/demo

.PHONY: demo test lint

demo: .venv/installed
	$(VENV_PYTHON) simsiam_cifar10/run.py $(DEMO)

test: .venv/installed-tests
	$(VENV_PYTHON) -m pytest -n 2 --dist loadfile

lint: .venv/installed-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

$(VENV_PYTHON):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one with make PYTHON=…")'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/installed: requirements.txt pyproject.toml | $(VENV_PYTHON)
	$(VENV_PYTHON) -m pip install -r requirements.txt
	touch $@

.venv/installed-tests: tests/requirements.txt .venv/installed
	$(VENV_PYTHON) -m pip install -r tests/requirements.txt
	touch $@
