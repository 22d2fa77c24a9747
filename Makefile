# make run    execute every notebook and leave readable pages in build/
# make test   everything that CI checks
# make lab    open JupyterLab
# make build  make the executed notebooks from their sources
# make bench  measure the samplers, the flows, the students, the updates, the grader, and the notebooks as on Colab
# Only the first command, whichever it is, needs a network: it installs into .venv.

PYTHON ?= python3
IN = .venv/bin/python

export HF_HUB_OFFLINE = 1
export HF_DATASETS_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export DO_NOT_TRACK = 1

.PHONY: help run test lab build bench .venv
.DEFAULT_GOAL = help

help:
	@sed -n 's/^# make/make/p' Makefile

run: .venv/installed
	@$(IN) -m dgm_course.cli run

test: export OMP_NUM_THREADS = 1
test: .venv/installed
	$(IN) -m ruff check
	$(IN) -m ruff format --check
	$(IN) -m pytest -n 2 --nbval

lab: .venv/lab
	$(IN) -m jupyter lab notebooks

build: .venv/installed
	@$(IN) -m dgm_course.cli build

bench: .venv/installed
	@$(IN) -m dgm_course.cli bench

.venv: .venv/installed

# The stamps are the last line of their recipes: an interrupted install leaves none, and is taken up again.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; PYTHON=$(PYTHON) is not. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@rm -f $@
	$(PYTHON) -m venv .venv
	$(IN) -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

.venv/lab: .venv/installed
	$(IN) -m pip install -c constraints.txt -e '.[lab]'
	@touch $@
