# The interpreter of the virtual environment that is active; override with `make PYTHON=...`.
PYTHON ?= python
CXX_SOURCES = $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh csrc/*/*.inc)

.PHONY: build test bench bench-peers bench-gate gpu-check gpu-pack lint format clean

build:  ## native modules into moso_fast/, for `python -m pytest` in the source tree
	$(PYTHON) setup.py --quiet build_ext --inplace

test: build
	$(PYTHON) -m pytest

bench: build  ## under three minutes: moso_fast beside plain PyTorch on this machine
	$(PYTHON) -m moso_fast.cli bench

PEERS = .venv-peers
bench-peers: build  ## the same against other libraries, in an environment of their own
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet -r benches/peers.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps -r benches/peers-no-deps.txt
	$(PEERS)/bin/python -m moso_fast.cli bench --against peers

bench-gate: build  ## fails where instruction counts or ratios are worse than the committed ones
	$(PYTHON) -m moso_fast.cli bench --gate benches/results/gate.json

gpu-check:  ## five minutes: tests and timings that need a GPU; without one, the same on tiny shapes
	$(PYTHON) benches/gpu check

GPU_PYTHON = python3.12
gpu-pack:  ## build for an H100 or H200 beforehand, and pack what `make gpu-check` needs there
	$(PYTHON) benches/gpu pack --python $(GPU_PYTHON)

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	clang-format --dry-run -Werror $(CXX_SOURCES)

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	clang-format -i $(CXX_SOURCES)

clean:
	rm -rf build dist *.egg-info moso_fast/_build_info.json moso_fast/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
