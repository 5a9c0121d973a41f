# make demo       the whole method on the embedded world
# make test       all tests; make test-fast leaves out the slow ones
# make lint       ruff and mypy
# make engine     a real completions server for the tests that need one: built from source, some 6 minutes and a C++ compiler
#
# Each sets up .venv first (Python 3.11+). TORCH is what pip is told about torch: by default the version in constraints.txt from
# your own index. For another build say so once, when .venv is made, for example
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"

PYTHON ?= python3
VENV ?= .venv
ENGINE ?= .llama
TORCH ?=
WORKERS ?= 2
BIN := $(VENV)/bin

# Idle threads sleep instead of spinning: five to ten times faster on a small busy machine.
export OMP_WAIT_POLICY := PASSIVE
export KMP_BLOCKTIME := 0
export PATH := $(abspath $(BIN)):$(PATH)

# The tests of a real engine are skipped where there is none.
export RFTT_LLAMA_PYTHON ?= $(wildcard $(abspath $(ENGINE))/bin/python)

.PHONY: demo test test-fast lint install engine clean
.DEFAULT_GOAL := demo

install: $(VENV)/installed

# Again only if what is to be installed has changed.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/python -m pip install $(TORCH))
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@

engine: $(ENGINE)/installed

# Of its own, since it brings a web server; its log-probs are compared with ours, so its version is fixed.
$(ENGINE)/installed:
	$(PYTHON) -m venv $(ENGINE)
	CMAKE_BUILD_PARALLEL_LEVEL=$(WORKERS) $(ENGINE)/bin/python -m pip install "llama-cpp-python[server]==0.3.36" gguf==0.19.0
	touch $@

demo: install
	$(BIN)/rftt sweep --config experiments/demo/sweep.yaml --out runs/demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope

test-fast: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(ENGINE) runs .pytest_cache .mypy_cache .ruff_cache
