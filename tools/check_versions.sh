#!/usr/bin/env bash
# Runs the plain tests with the oldest and the newest torch that pyproject.toml allows, under
# several Pythons. Each pair gets a virtual environment of its own, with the C++ module built in it.
# Needs the interpreters, a C++ compiler and a package index; no GPU.
#
#     tools/check_versions.sh [FOLDER [PYTHON/TORCH ...]]
#
# FOLDER keeps environments and logs for the next run (default: a temporary one). PYTHON/TORCH names
# pairs, as 3.10/oldest, 3.13/newest or 3.12/2.12.1 (default: every pair of PYTHONS and TORCHES
# below). The interpreter of 3.12 is the one that PYTHON3_12 names, else python3.12 on PATH.
# MOSO_FAST_BUILD=none leaves the C++ module out: its tests are skipped, all others must be green.
# PYTEST_ADDOPTS reaches pytest, as always. The exit code is 1 where a pair failed or could not run.
set -euo pipefail

PYTHONS="3.10 3.12 3.13"
TORCHES="oldest newest"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
oldest=$(sed -n 's/^dependencies = \["torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
triton=$(sed -n 's/^triton = \["triton>=\([0-9.]*\)"\]$/\1/p' pyproject.toml)
if [ -z "$oldest" ] || [ -z "$triton" ]; then
    echo "no 'dependencies = [\"torch>=...\"' or 'triton = [\"triton>=...\"]' in pyproject.toml" >&2
    exit 1
fi
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
    shift
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
pairs=("$@")
if [ ${#pairs[@]} -eq 0 ]; then
    for python in $PYTHONS; do
        for torch in $TORCHES; do pairs+=("$python/$torch"); done
    done
fi
# Only the new environments decide what is imported.
unset PYTHONPATH PYTHONHOME TRITON_INTERPRET
export MOSO_FAST_BUILD=${MOSO_FAST_BUILD-cpu}

# The interpreter of a version, or the reason why there is none on stderr.
interpreter() {
    local variable="PYTHON${1//./_}"
    local program=${!variable:-python$1} found
    found=$("$program" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || {
        echo "no interpreter: '$program' does not run (set $variable)" >&2
        return 1
    }
    [ "$found" = "$1" ] || {
        echo "no interpreter: '$program' is Python $found (set $variable)" >&2
        return 1
    }
    echo "$program"
}

# What the extra `test` asks for, one a line, less Triton: every torch for CUDA brings its own, and
# pip would rather exchange the torch than take another Triton.
test_packages() {
    "$1" -c '
from importlib.metadata import requires
for line in requires("moso-fast"):
    package, _, marker = line.partition(";")
    if "\"test\"" in marker and not package.startswith(("moso-fast", "moso_fast", "triton")):
        print(package.strip())'
}

# Whether a Triton is installed that is older than the kernels need.
has_old_triton() {
    "$1" -c '
import sys
from importlib.metadata import PackageNotFoundError, version
numbers = lambda text: [int(part) for part in text.split(".")[:2]]
try:
    sys.exit(numbers(version("triton")) >= numbers(sys.argv[1]))
except PackageNotFoundError:
    sys.exit(1)' "$triton"
}

install() { # environment, torch requirement
    local pip="$1/bin/python -m pip --disable-pip-version-check --quiet"
    $pip install "$2" && $pip install "$2" ".[demo,bench]" &&
        test_packages "$1/bin/python" | xargs $pip install "$2" || return 1
    # The package counts the Triton of the oldest torch as none; without it the tests of the kernels
    # are skipped with that reason. tools/check_oldest_triton.sh runs them.
    if has_old_triton "$1/bin/python"; then $pip uninstall --yes triton; fi
}

rows=() failed=0
for pair in "${pairs[@]}"; do
    python=${pair%%/*} torch=${pair#*/} outcome=""
    case $torch in
    oldest) requirement="torch==$oldest.*" ;;
    newest) requirement="torch>=$oldest" ;;
    *) requirement="torch==$torch" ;;
    esac
    log="$folder/$python-$torch.log" venv="$folder/$python-$torch"
    echo "--- Python $python, $requirement (log: $log)"
    versions="$python | $torch"
    if ! program=$(interpreter "$python" 2>"$log"); then
        outcome="not run: $(tail -n 1 "$log")"
    elif ! { "$program" -m venv "$venv" && install "$venv" "$requirement"; } >"$log" 2>&1; then
        outcome="not installed: $(grep -i error "$log" | tail -n 1 || true)"
    else
        versions=$("$venv/bin/python" -c '
import platform, torch
print(platform.python_version(), "|", torch.__version__)')
        # Plain pytest, not python -m: what was installed is tested, not the source tree.
        if "$venv/bin/pytest" -q -p no:cacheprovider tests >>"$log" 2>&1; then code=0; else code=$?; fi
        outcome=$(tail -n 1 "$log" | tr -d = | xargs)
        [ $code -eq 0 ] || outcome="FAILED (exit code $code): $outcome"
    fi
    case $outcome in not* | FAILED*) failed=1 ;; esac
    echo "    $outcome"
    rows+=("| $versions | $outcome |")
done

echo
echo "| Python | torch | outcome |"
echo "|---|---|---|"
printf '%s\n' "${rows[@]}"
exit $failed
