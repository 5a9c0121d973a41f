# make demo       the whole method on the embedded world
# make test       all tests; make test-fast leaves out the slow ones
# make lint       ruff and mypy
#
# Each sets up .venv first (Python 3.11+). TORCH is what pip is told about torch: by default the version in constraints.txt from
# your own index. For another build say so once, when .venv is made, for example
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
WORKERS ?= 2
BIN := $(VENV)/bin

# Idle threads sleep instead of spinning: five to ten times faster on a small busy machine.
export OMP_WAIT_POLICY := PASSIVE
export KMP_BLOCKTIME := 0
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test test-fast lint install clean
.DEFAULT_GOAL := demo

install: $(VENV)/installed

# Again only if what is to be installed has changed.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/python -m pip install $(TORCH))
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/python experiments/demo/run.py --out runs/demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope

test-fast: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
