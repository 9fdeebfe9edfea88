#!/usr/bin/env bash
# Runs the Triton suites (interpreter and ahead-of-time compiler) with the oldest Triton that
# pyproject.toml allows, in a virtual environment of their own. Needs Python and a package index,
# no GPU and nothing built. PYTHON names the interpreter (default: python3). FOLDER, the only
# argument, keeps the environment for the next run; without it a temporary one is used.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
oldest=$(sed -n 's/^triton = \["triton>=\([0-9.]*\)"\]$/\1/p' pyproject.toml)
torch=$(sed -n 's/^\(torch==[0-9.]*\)$/\1/p' constraints.txt)
if [ -z "$oldest" ] || [ -z "$torch" ]; then
    echo "no 'triton = [\"triton>=...\"]' in pyproject.toml or no 'torch==...' in constraints.txt" >&2
    exit 1
fi
if [ $# -gt 0 ]; then
    venv=$1
else
    venv=$(mktemp -d)
    trap 'rm -rf "$venv"' EXIT
fi
# Only the new environment decides what is imported.
unset PYTHONPATH PYTHONHOME TRITON_INTERPRET
"${PYTHON:-python3}" -m venv "$venv"
# The interpreter of Triton 3.6 takes no numpy 2.4: it calls range() on arrays of one element.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    "$torch" "triton==$oldest.*" "numpy<2.4" pytest pytest-timeout pytest-xdist hypothesis
"$venv/bin/python" -c 'import triton; print("Triton", triton.__version__)'
"$venv/bin/python" -m pytest -q -p no:cacheprovider -m "exhaustive or not exhaustive" tests/kernels/
