# Everything a newcomer and CI need. `make run` and `make test` do all the set-up on a fresh machine.
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

help: ## Say what can be done
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

run: $(STAMP) ## Start the studio on the demo model
	$(BIN)/trellis $(ARGS)

install: $(DEV) ## Make the environment, with what developers need

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Trellis needs Python 3.11 or newer; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $(STAMP)

$(DEV): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(DEV)

check: $(DEV) ## Format, lint, types, import contracts
	$(BIN)/ruff format --check src tests bench
	$(BIN)/ruff check src tests bench
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(DEV) ## Let ruff write the format
	$(BIN)/ruff format src tests bench
	$(BIN)/ruff check --fix src tests bench

test-fast: $(DEV) ## The tests that need neither torch nor a browser nor patience
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m 'not engine and not browser and not slow'

test: check browser ## Everything
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

browser: $(DEV) # nginx and the browser that the tests drive: Debian's where apt is there, else Playwright's own
	@test -x /usr/sbin/nginx || command -v nginx >/dev/null \
	  || { command -v apt-get >/dev/null && $(SUDO) apt-get update -qq \
	       && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nginx-light; }
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	  || { command -v apt-get >/dev/null && $(SUDO) apt-get update -qq \
	       && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } \
	  || $(BIN)/python -m playwright install --with-deps chromium

bench: $(DEV) ## Measure: drawing, the loop's speed, how soon a model takes up a voice, how it scales
	$(BIN)/python bench/decoding.py
	$(BIN)/python bench/speed.py
	$(BIN)/python bench/crowd.py
	$(BIN)/python bench/timeline.py
	$(BIN)/python bench/chats.py
	$(BIN)/python bench/sockets.py
	$(BIN)/python bench/learning.py --methods choice --seeds 1
	$(BIN)/python bench/scale.py

demo-model: $(STAMP) ## Train the demo model from nothing (about 12 minutes on two cores)
	$(BIN)/python -m trellis.demo.text.make

screenshots: browser ## Take every page in light, dark and phone into docs/images
	$(BIN)/python -m tests.screenshots

clean: ## Remove the environment and what was built
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .hypothesis
