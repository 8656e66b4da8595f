# Two commands do all set-up: `make demo` walks the whole road, `make check` is all that CI runs.
PYTHON ?= python3.11
VENV ?= .venv
RECIPE ?= vista_trees
RUNNER ?= FnApiRunner
PORT ?= 8000
PAGE ?= .memoir/reliability.md
DATASETS ?= online_retail
SEEDS ?= 5
TORCH ?= torch==2.13.0
# Where a CPU build of torch is found when no local wheel offers one. A CUDA build of the same version does as well.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
export PYTHONUNBUFFERED := 1

.PHONY: help setup demo refresh serve compare check lint types test format bench bench-gpu reliability lock clean

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(VENV)/.installed  ## make the virtual environment from the lock

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { echo "Memoir needs Python 3.11 or 3.12, and $(PYTHON) is neither: make setup PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-deps --require-hashes -r requirements.lock
	$(PIP) install --quiet --no-index $(TORCH) 2>/dev/null || $(PIP) install --quiet --extra-index-url $(TORCH_INDEX) $(TORCH)
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(PIP) check
	touch $@

demo: setup  ## the whole road: raw rows in, a ranked list out
	@$(RUN) -m modeling about $(RECIPE)
	$(RUN) -m beam_jobs events --runner=$(RUNNER)
	$(RUN) -m beam_jobs user_history --runner=$(RUNNER)
	$(RUN) -m beam_jobs item_stats --runner=$(RUNNER)
	$(RUN) -m beam_jobs training_examples --runner=$(RUNNER)
	$(RUN) -m feature_repo apply
	$(RUN) -m beam_jobs materialize --runner=$(RUNNER)
	@set -e; $(RUN) -m modeling road $(RECIPE) --runner=$(RUNNER) | while read -r command; do \
		echo "$(RUN) -m $$command"; $(RUN) -m $$command < /dev/null; done
	$(RUN) -m modeling memory --effort small
	$(RUN) -m serving demo --recipe $(RECIPE)

refresh: setup  ## new raw rows into tables, online store and summary tokens
	$(RUN) -m beam_jobs refresh --runner=$(RUNNER)

serve: setup  ## rank over HTTP with the live bundle, as of the end of the data
	$(RUN) -m serving --replay --port $(PORT)

compare: setup  ## all rankers side by side, on DATASETS with SEEDS: resumes, uses all cores, writes a page
	$(RUN) -m modeling.benchmarks.compare --datasets $(DATASETS) --seeds $(SEEDS) --curve --next_item

check: setup lint types test  ## all that CI runs

lint: setup  ## ruff
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: setup  ## mypy
	$(RUN) -m mypy

test: setup  ## pytest, a process on each core; each file in one of them, so that its worlds are built once
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

format: setup  ## ruff, mending
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: setup  ## fast paths beside their plain twins
	$(RUN) -m modeling.benchmarks.amortised
	$(RUN) -m modeling.benchmarks.kv_cache
	$(RUN) -m modeling.benchmarks.grouped_training
	$(RUN) -m modeling.benchmarks.sequence
	$(RUN) -m modeling.benchmarks.operators
	$(RUN) -m modeling.benchmarks.catalogue
	$(RUN) -m modeling.benchmarks.ctr
	$(RUN) -m modeling.benchmarks.precision
	$(RUN) -m modeling.benchmarks.systems
	$(RUN) -m modeling.benchmarks.vista
	$(RUN) -m modeling.benchmarks.planted
	$(RUN) -m modeling.benchmarks.trees
	$(RUN) -m beam_jobs.benchmarks.summary_tokens
	$(RUN) -m feature_repo.benchmarks.point_in_time

bench-gpu: setup  ## the same on a GPU
	$(RUN) -m modeling.benchmarks.amortised --device cuda
	$(RUN) -m modeling.benchmarks.kv_cache --device cuda
	$(RUN) -m modeling.benchmarks.precision --device cuda
	$(RUN) -m modeling.benchmarks.systems --device cuda

reliability: setup  ## what make check samples, whole: schemas, faults, loads, a soak; over an hour, leaves PAGE
	$(RUN) -m pytest -m whole tests --page $(PAGE)

lock: setup  ## renew requirements.lock; releases younger than two weeks are left out
	$(RUN) .ci/lock.py

clean:  ## drop everything that was built, not the environment
	rm -rf .memoir feature_repo/data/*.db feature_repo/data/*.pb .mypy_cache .pytest_cache .ruff_cache .hypothesis
