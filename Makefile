# make run    everything from an empty checkout to a served model that answers
# make test   format, lint, types and the tests that every change must pass
# make test-all   what needs peers, a browser, servers from Debian or many kills
# make bench  every benchmark, quickly; rewrites benchmarks/RESULTS.md
# make lint   make clean   make down

# The first Python of a version we support that really starts.
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
  && { echo $$python; break; }; done)
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PYTEST := $(VENV)/bin/python -m pytest
EVERY_CHANGE := not slow and not peer and not browser

.PHONY: run env test test-all lint bench down clean
.DEFAULT_GOAL := run

run: env
	$(VENV)/bin/gristmill demo $(ARGS)

env: $(VENV)/installed

# The directory is made anew when the interpreter is another one or an earlier attempt broke off.
$(VENV)/made:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found; install one" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); choose one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || \
	  { echo "this Python has no venv; on Debian: apt-get install python3-venv" >&2; exit 1; }
	touch $@

$(VENV)/installed: requirements.lock pyproject.toml $(VENV)/made
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) install -c requirements.lock -e ".[test]"
	touch $@

$(VENV)/installed-all: $(VENV)/installed-test
	$(PIP) install -c requirements.lock -e ".[test,peers]"
	touch $@

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	$(PYTEST) -m "$(EVERY_CHANGE)" $(ARGS)

test-all: $(VENV)/installed-all
	@{ command -v chromium && ls /usr/lib/postgresql/*/bin/initdb; } >/dev/null 2>&1 || \
	  test "$$(id -u)" != 0 || \
	  { apt-get update -q && apt-get install -y -q --no-install-recommends chromium postgresql; }
	$(PYTEST) -m "not ($(EVERY_CHANGE))" $(ARGS)

bench: $(VENV)/installed-all
	$(VENV)/bin/python -m benchmarks --quick

down:
	-test ! -x $(VENV)/bin/gristmill || $(VENV)/bin/gristmill down

# Models, corpora and runs stay in .gristmill/; remove that directory to forget them.
clean: down
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
