# The commands. Every target first sets up .venv from constraints.txt if .venv is missing or stale.
SHELL := /bin/bash
PYTHON ?= python3
PORT ?= 5000
# The stamp's name is a hash of the files that .venv was installed from, so file times do not matter.
STAMP := .venv/.installed-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
# Two test files at a time: much of a test is waiting for processes to start.
LANES := --numprocesses 2 --dist loadfile
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: repro plan verify test test-slow ui docs lint

repro: $(STAMP)  ## train, measure and compare every run of params.yaml, or of PRESET with the images in SOURCE; or only RUNS, with SEEDS
	@$(if $(SOURCE),$(if $(PRESET),,$(error SOURCE needs a PRESET: one of $(notdir $(basename $(wildcard presets/*.yaml))))))\
	  $(IN_VENV) python -m stages.repro $(PRESET) $(if $(SOURCE),"$(SOURCE)") \
	  $(if $(RUNS),--runs $(RUNS)) $(if $(SEEDS),--seeds $(SEEDS))

plan: $(STAMP)  ## print what every run would take, without starting it; IMG_PER_S: training throughput of one GPU; PRESET as above
	@$(if $(PRESET),$(IN_VENV) python -m stages.preset $(PRESET) $(if $(SOURCE),"$(SOURCE)"))
	@$(IN_VENV) python -m stages.plan $(IMG_PER_S)

verify: $(STAMP)  ## check every byte of the shards against their manifest
	@$(IN_VENV) python -m stages.verify

test: $(STAMP)  ## run the tests, without the slow ones
	$(IN_VENV) python -m pytest $(LANES) -m "not slow"

test-slow: $(STAMP)  ## run the tests that start clusters and servers, or kill processes
	$(IN_VENV) python -m pytest $(LANES) -m slow

ui: $(STAMP)  ## show the runs in the MLflow UI, on 127.0.0.1
	@$(IN_VENV) python -m stages.ui $(PORT)
	@case "$$MLFLOW_TRACKING_URI" in http*) ;; *) \
	  $(IN_VENV) MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --host 127.0.0.1 --port $(PORT) --workers 1 \
	    --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}" ;; esac

docs: $(STAMP)  ## build the documentation site in site/
	@$(IN_VENV) NO_MKDOCS_2_WARNING=1 mkdocs build --strict

lint: $(STAMP)  ## check style, types and import directions
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) pyright
	$(IN_VENV) lint-imports

# An interrupted set-up has no stamp and starts over. A stale .venv is updated in place.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Python 3.11 or newer is needed, and '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing);" \
	       "name another one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@compgen -G '.venv/.installed-*' >/dev/null || $(PYTHON) -m venv --clear .venv
	@rm -f .venv/.installed-*
	@echo "installing into .venv (about 4 minutes the first time)"
	@$(IN_VENV) python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	@$(IN_VENV) python -m pip install --progress-bar on --disable-pip-version-check -c constraints.txt \
	  --no-build-isolation --editable '.[pipeline,dev]'
	@touch $@
