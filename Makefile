# make quickstart: train and evaluate a small model on real pictures.   make check, make test: the linter, the whole test suite.
# Each does its own set-up: a virtual environment in .venv, made once and again when pyproject.toml changes.
# make test-old: the suite on the oldest versions, in .venv-old.   make aot TRITON=3.9.0: kernels compiled by that triton.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
CONSTRAINTS :=
EXTRAS := dev
TRITON :=
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
comma := ,
# OpenMP's threads give their core up while they wait; by default they spin, which takes a busy machine many times as long
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup quickstart check test test-old aot bench pictures clean

help:  ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## Make .venv and install everything into it

$(PY):
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or newer, or say make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11; say make PYTHON=/path/to/a/newer/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 1; }

# $(call install,EXTRAS): a line for each package, the rest goes to .venv/install.log. An environment without pip was cut short.
define install
@$(PY) -m pip --version >/dev/null 2>&1 || { echo "== making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
@echo "== installing (several minutes the first time: torch alone is some GB)"
@$(PY) -m pip install --disable-pip-version-check --progress-bar off $(addprefix -c ,$(CONSTRAINTS)) -e '.[$(1)]' 2>&1 | tee $(VENV)/install.log | sed -un -E 's/^Collecting ([^ ;<>=!~[]+).*/   \1/p; s/^(Installing collected packages).*/== installing the packages (a few minutes)/p' \
	|| { tail -n 5 $(VENV)/install.log; echo "make: the installation failed; the lines above and $(VENV)/install.log say why"; exit 1; }
endef

$(STAMP): pyproject.toml $(CONSTRAINTS) | $(PY)
	$(call install,$(EXTRAS))
	@touch $(STAMP) $(STAMP)-quickstart

$(STAMP)-quickstart: pyproject.toml | $(PY)
	$(call install,quickstart$(comma)eval)
	@touch $@

quickstart: $(STAMP)-quickstart  ## Draw a benchmark, train a small model on it, evaluate before and after, write report.html
	@$(PY) -m vlm2vec.quickstart build quickstart
	@$(VENV)/bin/vlm2vec eval quickstart/model-init --data quickstart/data/eval --images quickstart/data/images --output quickstart/scores-before
	@$(PY) -m train train/recipes/quickstart.yaml
	@$(VENV)/bin/vlm2vec eval quickstart/model --data quickstart/data/eval --images quickstart/data/images --output quickstart/scores-after
	@$(PY) -m vlm2vec.quickstart report quickstart

check: $(STAMP)  ## Lint and check the formatting (seconds)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

test: $(STAMP)  ## Run the whole test suite
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-old:  ## The same on the oldest versions that pyproject.toml allows (tests/oldest.txt), in .venv-old; Python 3.11 or 3.12
	@$(MAKE) --no-print-directory test VENV=.venv-old CONSTRAINTS=tests/oldest.txt EXTRAS=dev,clients

# another triton lies in a folder of its own before the installed one; torch on a CPU does not mind which it is
.triton/%/.installed: | $(STAMP)
	@$(PY) -m pip install --disable-pip-version-check --progress-bar off -q --no-deps --upgrade --target .triton/$* triton==$*
	@touch $@

aot: $(STAMP) $(TRITON:%=.triton/%/.installed)  ## Compile every kernel for sm_80, 90 and 100 and judge it; TRITON=3.9.0 takes that version
	@PYTHONPATH=$(TRITON:%=$(CURDIR)/.triton/%:)$${PYTHONPATH:-} $(PY) -m bench aot

bench: $(STAMP)  ## Short benchmarks
	@$(PY) -m pytest bench --benchmark-only

pictures: $(STAMP)-quickstart  ## Make the README's pictures anew from docs/measured.csv and the quickstart's report (needs chromium)
	@$(PY) docs/pictures.py

clean:  ## Remove the environments and everything the quickstart wrote
	rm -rf $(VENV) .venv-old .triton quickstart build dist *.egg-info
