# rnngrad: everything runs inside $(VENV), which is made and filled on first use.
# Needs only a Python of version 3.11 or newer, and make.

PYTHON ?= python3
VENV   ?= .venv
# Handed to the experiment or to the benchmarks:  make run ARGS="--cells lstm gru --steps 1000"
ARGS   ?=
# Handed to pytest:  make test PYTEST_ARGS="-k lstm -x"
PYTEST_ARGS ?=
JOBS   ?= 2

BIN    := $(VENV)/bin
PY     := $(BIN)/python
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install run reproduce test slow optimised check format bench docs notebooks clean

help: ## List the targets
	@echo "rnngrad: how far back a recurrent network's gradient reaches"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  PYTHON=python3.12      the interpreter that makes $(VENV) (default: python3)'
	@echo '  ARGS="--help"          arguments of run, reproduce, bench and notebooks'
	@echo '  PYTEST_ARGS="-k lstm"  arguments of test, slow and optimised'

install: $(STAMP) ## Make the virtual environment and install the pinned packages

run: $(STAMP) ## Retention of vanilla, LSTM and GRU on real text: a table and a figure
	$(PY) -m experiments.retention $(ARGS)

reproduce: $(STAMP) ## Try every claim again (some 40 minutes on two cores; resumes) and write out/reproduce/report.html
	$(PY) -m experiments all $(ARGS)

# Compiling dominates the tests and takes less than half the time so; `optimised` tries the core as users compile it.
# XLA ends at once on a flag that it does not know: with another jax than the pinned one, make test QUICK=
QUICK  ?= --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
PYTEST := $(PY) -m pytest -n $(JOBS) --dist loadfile
CORE   := tests/test_chains.py tests/test_unroll_derivative.py tests/test_logscaled.py tests/test_peers.py

test: $(STAMP) ## Run the fast tests and the doctests
	XLA_FLAGS="$(QUICK)" $(PYTEST) -m "not slow" $(PYTEST_ARGS)

slow: $(STAMP) ## Run the slow tests
	XLA_FLAGS="$(QUICK)" $(PYTEST) -m slow $(PYTEST_ARGS)

optimised: $(STAMP) ## Run the fast tests of the core, and all that look at compiled programs, on optimised ones
	$(PYTEST) -m "not slow" $(CORE) $(PYTEST_ARGS)
	$(PYTEST) -m compiled $(PYTEST_ARGS)

check: $(STAMP) ## Lint, formatting and types; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## Format the code and repair what the linter can
	$(PY) -m ruff check --fix --exit-zero .
	$(PY) -m ruff format .

bench: $(STAMP) ## Run the benchmarks
	$(PY) -m benchmarks $(ARGS)

# Read afresh every time, since warnings are raised by pages that are read; the links are checked as the pages are written.
docs: $(STAMP) ## Build the documentation into out/docs: html, doctests, links
	$(PY) -m sphinx -q -E -W --keep-going -b html -d out/docs/.doctrees docs out/docs
	$(PY) -m sphinx -q -W --keep-going -b doctest -d out/docs/.doctrees docs out/docs/.doctest
	@sed -n '/^Doctest summary/,$$p' out/docs/.doctest/output.txt; echo "out/docs/index.html"

notebooks: $(STAMP) ## Run the examples and write them as notebooks
	$(PY) examples/make_notebooks.py $(ARGS)

clean: ## Remove the virtual environment, caches and builds (results in out/ stay)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# The stamp is written last, so that an interrupted install is done again. An environment without a working pip
# (an interrupted `venv`, say) is made afresh. Hashes are checked for everything that is downloaded; rnngrad itself
# goes in by a second command, because pip refuses a local folder beside hashes.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "error: no '$(PYTHON)' found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@if ! "$(PY)" -c 'import pip, sys; sys.exit(sys.prefix == sys.base_prefix)' >/dev/null 2>&1; then \
	  "$(PYTHON)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: rnngrad needs Python 3.11 or newer, found %d.%d at %s: name another one, make PYTHON=/path/to/python" % (sys.version_info[:2] + (sys.executable,)))' && \
	  { "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: '$(PYTHON)' comes without venv or ensurepip (Debian and Ubuntu: apt install python3-venv), or name another one: make PYTHON=/path/to/python" >&2; exit 1; }; } && \
	  echo "making $(VENV) with $$("$(PYTHON)" --version)" && \
	  "$(PYTHON)" -m venv --clear "$(VENV)"; \
	fi
	@"$(PY)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: $(VENV) holds Python %d.%d, rnngrad needs 3.11 or newer: make clean, then make PYTHON=/path/to/python" % sys.version_info[:2])'
	@rm -f "$(STAMP)"
	@echo "installing the packages of constraints.txt into $(VENV) (a minute or two)"
	"$(PY)" -m pip install --disable-pip-version-check --quiet -r constraints.txt
	"$(PY)" -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch "$(STAMP)"
