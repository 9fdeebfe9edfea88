# The interpreter of the virtual environment that is active; override with `make PYTHON=...`.
PYTHON ?= python
CXX_FOLDERS = csrc csrc/* csrc/cpu/simd tests/native/cuda/emulator
CXX_SOURCES = $(wildcard $(foreach type,cpp h cu cuh,$(addsuffix /*.$(type),$(CXX_FOLDERS))))

.PHONY: build test test-all check-generated mutants bench bench-peers bench-gate gpu-check gpu-pack lint format clean

# CUDA too where nvcc is found, with or without a GPU: its tests need none.
build: export MOSO_FAST_CUDA_ARCHITECTURES ?= all
build:  ## native modules into moso_fast/, for `python -m pytest` in the source tree
	$(PYTHON) setup.py --quiet build_ext --inplace

test: build  ## what an editor runs: under two minutes
	$(PYTHON) -m pytest

test-all: build  ## every parameter set, slow builds and child processes as well
	$(PYTHON) -m pytest -m "exhaustive or not exhaustive"

check-generated: build  ## whether pages and figures that are made of others are current
	$(PYTHON) tools/layouts_table.py --check
	$(PYTHON) benches/readme.py --check
	$(PYTHON) -m pytest -q -m generated

mutants: build  ## changes the package at 200 random places: which of them do the tests not notice?
	$(PYTHON) tools/mutants.py --seed $(SEED)
SEED = 0

bench: build  ## under three minutes: moso_fast beside plain PyTorch on this machine
	$(PYTHON) -m benches run

PEERS = .venv-peers
bench-peers: build  ## the same against other libraries, in an environment of their own
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet -r benches/peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps -r benches/peers/requirements-no-deps.txt
	$(PEERS)/bin/python -m benches run --against peers

bench-gate: build  ## fails where instruction counts or ratios are worse than the committed ones
	$(PYTHON) -m benches gate benches/results/gate.json

gpu-check:  ## five minutes: tests and timings that need a GPU; without one, the same on tiny shapes
	$(PYTHON) -m benches.gpu check

GPU_PYTHON = python3.12
gpu-pack:  ## build for an H100 or H200 beforehand, and pack what `make gpu-check` needs there
	$(PYTHON) -m benches.gpu pack --python $(GPU_PYTHON)

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	lint-imports
	clang-format --dry-run -Werror $(CXX_SOURCES)

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	clang-format -i $(CXX_SOURCES)

clean:
	rm -rf build dist mutants *.egg-info moso_fast/_build_info.json moso_fast/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
