# Each target first does the set-up it needs, so all of them work from a fresh clone.
PYTHON := .venv/bin/python
STAMP := .venv/.migkit-setup
PYTEST_ARGS ?=
BROWSER_ARGS ?=
BENCH_ARGS ?=
SOAK_ARGS ?=
RUNS ?= 2000000
MINUTES ?= 10
TORTURE_ARGS ?=
.DEFAULT_GOAL := help
.PHONY: help demo lab test test-browser lint docs bench soak torture fuzz setup clean FORCE
.PRECIOUS: $(STAMP) # interrupted, make would delete it, and with it that set-up is unfinished

help: ## List what can be made
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: $(STAMP) ## Migrate a guest, draw what happened, execute the first notebook
	@scripts/demo

lab: $(STAMP) ## Open JupyterLab on notebooks/
	.venv/bin/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

# They took 7 minutes on 2 cores, 9 where others used them too. At the limit pytest is interrupted:
# it says where it was and tears its fixtures down.
test: $(STAMP) ## Run the tests (PYTEST_ARGS="-k wire -x")
	timeout --foreground --signal=INT --kill-after=30 840 $(PYTHON) -m pytest $(PYTEST_ARGS)

test-browser: docs ## Press the buttons in a real browser (BROWSER_ARGS=--renew-pictures)
	timeout --foreground --signal=INT --kill-after=30 420 $(PYTHON) -m pytest tests/browser $(BROWSER_ARGS)

lint: $(STAMP) ## Check style (ruff) and types (mypy --strict)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# The theme's makers advertise their next project on every build, unless told not to.
docs: $(STAMP) ## Build the documentation into build/docs, without any warning
	$(PYTHON) -c 'import axe_playwright_python, material, mkdocstrings' 2>/dev/null || \
	  $(PYTHON) -m pip install -q --disable-pip-version-check -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --clean
	@echo "Open build/docs/index.html; for its search: python3 -m http.server -d build/docs"

bench: $(STAMP) ## Measure the engine against a C floor (BENCH_ARGS=...)
	$(PYTHON) -m benchmarks $(BENCH_ARGS)

soak: $(STAMP) ## Migrate over and over, every run checked by the oracle (SOAK_ARGS=...)
	$(PYTHON) -m benchmarks.soak $(SOAK_ARGS)

torture: $(STAMP) ## Migrate while everything goes wrong, from a printed seed (MINUTES=10)
	$(PYTHON) -m benchmarks.torture --minutes $(MINUTES) $(TORTURE_ARGS)

fuzz: $(STAMP) ## Feed the decoders mutated bytes, guided by coverage (RUNS=2000000)
	$(PYTHON) -c 'import atheris' 2>/dev/null || \
	  $(PYTHON) -m pip install -q --disable-pip-version-check -e '.[fuzz]'
	$(PYTHON) -m fuzz --runs $(RUNS)

setup: ## Only set up, again even where it was done
	@scripts/setup

clean: ## Remove .venv, caches and build/; your runs/ stay
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The stamp names the folder that set-up finished in; another name, a copied checkout or an
# unfinished set-up, makes it stale whatever its date.
ifneq ($(file <$(STAMP)),$(CURDIR))
$(STAMP): FORCE
endif
$(STAMP): pyproject.toml scripts/setup
	@scripts/setup
