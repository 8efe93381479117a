# Every target makes what it needs, the environment included; none needs another to have run before.
PYTHON ?= python3
VENV ?= .venv
# The torch that the project is developed with; any from 2.10 on serves, for example `make test TORCH=torch`.
TORCH ?= torch==2.13.0

# Tests that run at a time. Each keeps to one thread, but for those that try several and `make test-sanitize`.
JOBS ?= 2

BIN := $(VENV)/bin
SETUP := pyproject.toml setup.py

STUDY ?= .study
PRESET ?= cpu
SEEDS ?= 0 1 2

.PHONY: demo study test test-full test-sanitize gpu-check gpu-resources lint format bench bench-quick bench-check clean help

help:  ## This list.
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.package  ## Watch a small model decode with a rolling lookahead tree, then compare it with plain decoding.
	$(BIN)/lbr-kernels build
	$(BIN)/lbr-kernels demo

study: $(VENV)/.test  ## The paper's synthetic study: up to an hour a seed on two cores; PRESET=smoke SEEDS=0 takes 2 minutes.
	$(BIN)/lbr-kernels build
	$(BIN)/python python/reachability/synthetic.py run $(STUDY)/$(PRESET) --preset $(PRESET) --jobs $(JOBS) $(addprefix --seed ,$(SEEDS))
	$(BIN)/python python/reachability/synthetic.py report $(STUDY)/$(PRESET) --results $(STUDY)

test: $(VENV)/.test  ## Build the kernels and run the tests.
	$(BIN)/lbr-kernels build
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal --durations=15 --durations-min=5

lint: $(VENV)/.lint  ## ruff, mypy and clang-format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.cpp' '*.cu' '*.cuh' '*.h' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.lint  ## Put all sources into shape.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.cu' '*.cuh' '*.h' | xargs $(BIN)/clang-format -i

# The kernels are built again with the sanitizers' checks; their runtimes have to be in the process from the start.
SANITIZED = LBR_KERNELS_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)"
KERNEL_TESTS = $(addprefix tests/test_,tree_attention.py commit.py sample_children.py route.py linear.py bad_input.py)
CUDA_TESTS = $(addprefix tests/test_,tree_attention.py tree_attention_cuda.py commit.py commit_cuda.py sample_children.py sample_children_cuda.py route.py route_cuda.py simt.py)

THREADS = 4
test-sanitize: $(VENV)/.test  ## The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, on 4 threads.
	set -e; for threads in $(THREADS); do OMP_NUM_THREADS=$$threads $(SANITIZED) \
		$(BIN)/pytest -q --capture=sys $(KERNEL_TESTS) -k "not simt and not triton and not never_drawn"; done
	OMP_NUM_THREADS=2 $(SANITIZED) $(BIN)/pytest -q --capture=sys tests/test_packed_tree_attention.py \
		-k "cpu-avx and not compiles and not any_shape and not long"
	$(SANITIZED) $(BIN)/pytest -q -n $(JOBS) --capture=sys $(CUDA_TESTS) -k "(simt or cuda) and not triton" --simt-seed=1

test-full: GPU_CHECK = --full
test-full: THREADS = 1 2 4
test-full: test test-sanitize gpu-check  ## All of it: other schedules of the CUDA kernels too; 80 minutes at most.
	set -e; for seed in 2 3 4 5 6 7 8 9; do \
		OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) $(CUDA_TESTS) tests/test_barriers.py tests/test_sample_children_barriers.py tests/test_route_barriers.py -k "(simt or cuda or barriers) and not triton" --simt-seed=$$seed; done
	$(SANITIZED) $(BIN)/pytest -q -n $(JOBS) --capture=sys $(CUDA_TESTS) -k "(simt or cuda) and not triton" --simt-seed=10
	$(BIN)/pytest -q bench
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) -m "full or hypothesis" --full

gpu-check: $(VENV)/.test  ## Compile the GPU kernels for sm_80, 90, 100: registers, spills, occupancy; fails if one is worse.
	$(BIN)/python bench/gpu_resources.py check $(GPU_CHECK)

gpu-resources: $(VENV)/.test  ## Keep what gpu-check finds, to compare with from now on.
	$(BIN)/python bench/gpu_resources.py update

bench: $(VENV)/.test  ## All benchmarks, 15 minutes at most on two cores; correctness first.
	$(BIN)/lbr-kernels build
	mkdir -p .benchmarks
	$(BIN)/pytest bench $(BENCH) --benchmark-enable --benchmark-only --benchmark-columns=median,iqr,rounds \
		--benchmark-json=.benchmarks/run.json
	$(BIN)/python bench/report.py show .benchmarks/run.json

bench-quick: BENCH = --quick
bench-quick: bench  ## A selection of the benchmarks, 2 minutes.

bench-check: $(VENV)/.test  ## What the benchmarks compare is equal; nothing is timed.
	$(BIN)/pytest -q bench --quick

clean:  ## Remove the environment and what tools have left.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: $(SETUP) | $(VENV)/bin/python
	$(BIN)/pip install --quiet "$(TORCH)" --editable .
	touch $@

$(VENV)/.test: $(SETUP) | $(VENV)/bin/python
	$(BIN)/pip install --quiet "$(TORCH)" --editable '.[test,bench]'
	touch $@

$(VENV)/.lint: $(SETUP) | $(VENV)/bin/python
	$(BIN)/pip install --quiet "$(TORCH)" --editable '.[test,bench,lint]'
	touch $@
