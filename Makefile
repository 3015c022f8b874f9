# Two commands to begin with: `make demo` diffs the embedded pair, `make test` runs the tests.
# Every target makes .venv by itself when it is missing or its inputs changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ORGANISM ?= taboo
OUTPUT ?= demo-output/$(ORGANISM)
# Processes that the tests are shared out to, a file at a time.
TEST_WORKERS ?= 2
# More flags of the tests.
PYTEST_FLAGS ?=
# Threads that wait do not take the core from those that work.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test coverage slow lint types notebooks docs bench bench-step bench-data bench-demo bench-analysis bench-causal bench-verdicts bench-report bench-exports clean

demo: $(VENV)/ready
	$(BIN)/tl-crosscoder demo --organism $(ORGANISM) --output $(OUTPUT) --resume

# A thread a process: more would wait for each other on as many cores as processes.
test slow: export OMP_NUM_THREADS := 1

test: $(VENV)/ready
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(PYTEST_FLAGS)

coverage: $(VENV)/ready
	$(MAKE) test PYTEST_FLAGS="--cov --cov-report=term --cov-fail-under=90"

slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow -n $(TEST_WORKERS) --dist loadfile $(PYTEST_FLAGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/ready
	$(BIN)/pyright

# The .ipynb files are written from the .py files beside them, with outputs; minutes, and a Chromium.
notebooks: $(VENV)/ready
	$(BIN)/python docs/executed_notebooks.py

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: bench-step bench-data bench-demo bench-analysis

bench-step: $(VENV)/ready-bench
	$(BIN)/python benchmarks/training_step.py

bench-data: $(VENV)/ready
	TQDM_DISABLE=1 $(BIN)/python benchmarks/data_path.py

bench-demo: $(VENV)/ready
	$(BIN)/python benchmarks/demo_recovery.py

bench-analysis: $(VENV)/ready
	$(BIN)/python benchmarks/analysis_speed.py

# Needs Chromium and its driver, and a run on a real pair: make bench-report REAL_RUN=FOLDER REAL_NAME=SmolLM2-135M
bench-report: $(VENV)/ready
	$(BIN)/python benchmarks/report_size.py tl_crosscoder/taboo-batchtopk $(REAL_RUN) --names world-base $(REAL_NAME) --output benchmarks/results/report_size.json

bench-exports: $(VENV)/ready
	$(BIN)/python benchmarks/exports.py --output benchmarks/results/exports.json

# An hour and a half: three seeds of two presets on two organisms.
bench-causal: $(VENV)/ready
	TQDM_DISABLE=1 $(BIN)/python benchmarks/causal_tests.py --resume

# Half an hour: 24 null pairs and a dictionary for each.
bench-verdicts: $(VENV)/ready
	TQDM_DISABLE=1 $(BIN)/python benchmarks/verdict_nulls.py --resume

# Torch first and alone: pip then takes the pinned build instead of the newest with CUDA packages.
$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/ready-bench: $(VENV)/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,bench]'
	touch $@

clean:
	rm -rf $(VENV) demo-output
