# Every target works from a bare checkout: it makes .venv and installs the pinned dependencies first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install install-gpu demo test test-all test-gpu check format docs clean

help:
	@echo "make demo      train, resume, export and reopen a small model (minutes on 2 CPU cores)"
	@echo "make install-gpu  on a machine with a GPU: exact versions with the CuTe kernels, then moescale doctor"
	@echo "make test      checks and the ordinary tests"
	@echo "make test-all  the same and the slow tests"
	@echo "make test-gpu  tests that need a CUDA device, with the python that has torch (PYTHON=...)"
	@echo "make check     format, lint, types, import rules"
	@echo "make docs      the documentation as a site, in build/site"

install: $(STAMP)

# A fresh GPU machine: Linux on x86-64 with an NVIDIA driver for CUDA 13. Exact versions, those of the extra cute included.
install-gpu:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints-gpu.txt --editable ".[cute,hub,report]"
	$(BIN)/moescale doctor

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy triton setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[hub,test]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=20 -m "not slow and not gpu" tests

test-all: check
	$(BIN)/python -m pip install --quiet --constraint constraints.txt wandb
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=20 -m "not gpu" tests

test-gpu:
	$(PYTHON) -m pytest -m gpu tests
	PYTHONPATH=. compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) tests/kernels/memcheck.py

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs-installed
	$(BIN)/python docs/write_reference.py
	$(BIN)/python docs/build_site.py

$(VENV)/.docs-installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $(VENV)/.docs-installed

clean:
	rm -rf $(VENV) demo-output build/site build/site-sources
