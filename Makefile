# `make generate PROMPT="..."` and `make test` set up everything that they need on a machine that has
# only Python >= 3.11, pip and make. The environments are rebuilt only when the requirements change.

PYTHON ?= python3
VENV := .venv
PARITY := .venv-parity
NEWEST := .venv-newest
SMOKE := $(addprefix tests/,core diffusion samplers guidance nn models) \
  tests/experiments/test_command.py::test_log_and_samples
# by file, those with slow tests first, as tests/conftest.py orders them
PYTEST := pytest -n auto --dist loadfile --no-loadscope-reorder
PROMPT ?= a small red circle above a large blue square
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONDONTWRITEBYTECODE :=  # the checked modules of the tests take long to compile

.PHONY: help generate test test-all newest check format fuzz parity parity-full ci clean

help:
	@echo 'make generate PROMPT="..."  draw a picture from words with the embedded model (ARGS="--seed 7 ...")'
	@echo 'make test                   the tests (ARGS="tests/samplers -k euler" for some of them)'
	@echo 'make test-all               these and the slow ones: processes, kills, long trainings'
	@echo 'make newest PYTHON=...      a part of them in an environment of its own, with the newest of everything'
	@echo 'make check                  formatter, linter and type checker'
	@echo 'make fuzz                   10,000 broken or odd inputs (ARGS="--inputs 100 --seed 1")'
	@echo 'make parity                 compare with PyTorch in an environment of its own'
	@echo 'make parity-full            the published networks at full size against PyTorch: 12 GB of memory'
	@echo 'make ci                     all of it, as the continuous integration runs it'

generate: $(VENV)/.run
	@$(VENV)/bin/python generate.py "$(PROMPT)" $(ARGS)

test: $(VENV)/.dev
	@$(VENV)/bin/python -m $(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.dev
	@$(VENV)/bin/python -m $(PYTEST) $(ARGS)

newest: $(NEWEST)/.dev
	@$(NEWEST)/bin/python -c 'import jax, sys; print("Python", sys.version.split()[0], "jax", jax.__version__)'
	@$(NEWEST)/bin/python -m $(PYTEST) -m "not slow" $(SMOKE) $(ARGS)
	@$(NEWEST)/bin/python -W error generate.py "$(PROMPT)" --steps 4 --output "$$(mktemp -d)"

check: $(VENV)/.dev
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/.dev
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

fuzz: $(VENV)/.dev
	@PYTHONPATH=.:tests JAX_PLATFORMS=cpu $(VENV)/bin/python -m fuzz $(ARGS)

parity: $(PARITY)/.ready
	@$(PARITY)/bin/python -m $(PYTEST) tests/parity $(ARGS)

parity-full: $(PARITY)/.ready
	@PYTHONPATH=. JAX_PLATFORMS=cpu $(PARITY)/bin/python tests/parity/full_size.py $(ARGS)

ci:
	@bash .ci/run

clean:
	rm -rf $(VENV) $(PARITY) $(NEWEST)

# A virtual environment; where the system's Python cannot put pip into it, the system's pip does.
define create
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "PYTHON: got $$($(PYTHON) -V 2>&1), expected Python 3.11 or newer (make PYTHON=python3.12 ...)"; exit 2; }
	@test -x $(1)/bin/pip || $(PYTHON) -m venv $(1) 2>/dev/null \
	  || { rm -rf $(1); $(PYTHON) -m venv --without-pip $(1) \
	    && $(PYTHON) -m pip --python $(1)/bin/python install -q pip; }
endef

$(VENV)/.run: requirements.txt
	$(call create,$(VENV))
	@echo "Setting up $(VENV): one to two minutes, once"
	@$(VENV)/bin/python -m pip install -q -r requirements.txt
	@touch $@

$(VENV)/.dev $(NEWEST)/.dev: requirements.txt requirements-serve.txt requirements-dev.txt
	$(call create,$(@D))
	@echo "Setting up $(@D) for the tests: one to two minutes, once"
	@$(@D)/bin/python -m pip install -q -r requirements-dev.txt
	@touch $@ $(@D)/.run

# torch first and alone: the exact version has a CPU build, a range would bring gigabytes.
$(PARITY)/.ready: requirements.txt requirements-serve.txt requirements-dev.txt requirements-parity.txt
	$(call create,$(PARITY))
	@echo "Setting up $(PARITY): PyTorch and diffusers, a few minutes, once"
	@$(PARITY)/bin/python -m pip install -q $$(grep '^torch==' requirements-parity.txt)
	@$(PARITY)/bin/python -m pip install -q -r requirements-parity.txt
	@touch $@
