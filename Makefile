# Everything here works on a fresh machine: each target makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# A CPU build of torch is taken where pip's find-links offer one; uv reads its own variable.
LINKS = $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null || $(PYTHON) -m pip config get :env:.find-links 2>/dev/null)
export UV_FIND_LINKS ?= $(if $(PIP_FIND_LINKS),$(PIP_FIND_LINKS),$(LINKS))
# Spinning threads of two pools starve each other on few cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-all quick lint types env env-test bench clean

env: $(VENV)/.demo
env-test: $(VENV)/.test

$(VENV)/.demo: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory install EXTRAS=cpu
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory install EXTRAS=test
	@touch $@ $(VENV)/.demo

.PHONY: install
install:
	@echo "creating $(VENV) (the first time this takes a minute)"
	@if command -v uv >/dev/null 2>&1; then \
	  test -x $(BIN)/python || uv venv --quiet --python $(PYTHON) $(VENV); \
	  uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[$(EXTRAS)]'; \
	else \
	  test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]' >$(VENV)/install.log 2>&1 \
	    || { cat $(VENV)/install.log; exit 1; }; \
	fi
	@$(BIN)/python -m compileall -q featstore probes cli
	@$(BIN)/python -c 'import cli.main'

demo: env
	$(BIN)/featstore demo

# Two processes, each test file in one of them: half the time on two cores, and fixtures of a file are made once.
# Lint and types run beside them: tests wait for files and for each other now and then.
JOBS ?= 2
test: env-test
	@$(MAKE) --no-print-directory -j 3 lint types quick

quick: env-test
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

test-all: env-test lint types
	$(BIN)/python -m pytest

lint: env-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env-test
	$(BIN)/mypy

bench: env-test
	$(BIN)/python benchmarks/bench_store.py --output benchmarks/results
	$(BIN)/python benchmarks/bench_probes.py --output benchmarks/results
	$(BIN)/python benchmarks/bench_extract.py --output benchmarks/results

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache dist build
