# `make run` and `make test` do all the setup on a fresh machine.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2
SUDO = $(if $(filter 0,$(shell id -u)),,sudo)
DEV := $(VENV)/.installed-dev
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help run install test test-fast check format bench demo-model screenshots browser clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

run: $(STAMP) ## Set up and start Trellis
	$(BIN)/trellis $(ARGS)

install: $(DEV) ## Set up the environment for development

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Trellis needs Python 3.11 or newer; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $(STAMP)

$(DEV): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(DEV)

check: $(DEV) ## Check format, lint, types, import contracts
	$(BIN)/ruff format --check src tests bench
	$(BIN)/ruff check src tests bench
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(DEV) ## Format and fix with ruff
	$(BIN)/ruff format src tests bench
	$(BIN)/ruff check --fix src tests bench

test-fast: $(DEV) ## Run the tests that need neither torch nor a browser
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m 'not engine and not browser and not slow'

test: check browser ## Run all checks and tests
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

browser: $(DEV) # nginx and the browser for the tests: Debian's if apt is available, otherwise Playwright's
	@test -x /usr/sbin/nginx || command -v nginx >/dev/null \
	  || { command -v apt-get >/dev/null && $(SUDO) apt-get update -qq \
	       && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nginx-light; }
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	  || { command -v apt-get >/dev/null && $(SUDO) apt-get update -qq \
	       && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } \
	  || $(BIN)/python -m playwright install --with-deps chromium

bench: $(DEV) ## Run the benchmarks
	$(BIN)/python bench/decoding.py
	$(BIN)/python bench/speed.py
	$(BIN)/python bench/crowd.py
	$(BIN)/python bench/timeline.py
	$(BIN)/python bench/chats.py
	$(BIN)/python bench/sockets.py
	$(BIN)/python bench/learning.py --methods choice --seeds 1
	$(BIN)/python bench/scale.py

demo-model: $(STAMP) ## Train the demo model from scratch (about 12 minutes on two cores)
	$(BIN)/python -m trellis.demo.text.make

screenshots: browser ## Take screenshots of every page (light, dark, phone) into docs/images
	$(BIN)/python -m tests.screenshots

clean: ## Remove the environment and build files
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .hypothesis
