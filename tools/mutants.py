"""Change the package at random places, one at a time, and see whether the tests notice.

    python tools/mutants.py --sample 200 --seed 17
    python tools/mutants.py --sample 50 --only 'moso_fast.full.*'

mutmut makes the changes ("mutants": another operator, a number plus one, an argument left out or
None, a branch always or never taken) and runs, for each, the tests that reach the changed function.
This file draws the sample and prints what survived. Prose is left alone: a string with a space in
it is a message or a title. The first run takes some minutes more: it makes all mutants and learns
which test reaches which function. Settings: pyproject.toml, [tool.mutmut]; results: mutants/.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import os
import random
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator

# mutmut makes all mutants when it is asked for a few: these are few, and quickly tested.
_FEW = "moso_fast.util.devices.*"
_DEAD = ("killed", "timeout", "segfault")


def main() -> int:
    """Draw, run, print; return 0 if enough of the mutants were noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=200, help="how many mutants to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument(
        "--only", default="*", help="pattern of mutants' names, such as moso_fast.full.*"
    )
    parser.add_argument("--at-least", type=float, default=0.9, help="share that must be noticed")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    mutmut = _Mutmut(options.processes)
    mutmut.run([_FEW])
    names = sorted(name for name in mutmut.outcomes() if fnmatch.fnmatch(name, options.only))
    random.Random(options.seed).shuffle(names)
    chosen = dict(_first(options.sample, names))
    if not chosen:
        parser.error(f"no mutant is called {options.only!r}")
    mutmut.run(list(chosen))
    outcomes = mutmut.outcomes()
    for name in chosen:
        if outcomes[name] == "no tests":
            outcomes[name] = mutmut.by_processes(name)
    for name, change in chosen.items():
        if outcomes[name] not in _DEAD:
            print(f"\n{name}: {outcomes[name]}\n{change}")
    counts = Counter(outcomes[name] for name in chosen)
    share = sum(counts[outcome] for outcome in _DEAD) / len(chosen)
    print(
        f"\n{share:.1%} of {len(chosen)} mutants were noticed (seed {options.seed}): {dict(counts)}"
    )
    return 0 if share >= options.at_least else 1


class _Mutmut:
    """The program of that name, in the environment of this interpreter."""

    def __init__(self, processes: int) -> None:
        self._program = [os.path.join(os.path.dirname(sys.executable), "mutmut")]
        self._processes = str(processes)
        # One thread a test: the processes share the cores, and a fork keeps no thread pool.
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(self, names: list[str]) -> None:
        subprocess.run(
            [*self._program, "run", "--max-children", self._processes, *names],
            env=self._environment,
            check=True,
        )

    def by_processes(self, name: str) -> str:
        """Run the tests of a function that none reaches in pytest's own process; return its end.

        Commands, the demo and Triton's interpreter run in processes of their own, which mutmut does
        not look into, but which obey the same variable.
        """
        interpreted = name.startswith("moso_fast.backends.triton.")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "-m", "exhaustive or not exhaustive", *_tests_of(name)],
            cwd="mutants",
            env=self._environment
            | {"MUTANT_UNDER_TEST": name, "TRITON_INTERPRET": str(int(interpreted))},
            capture_output=True,
        )
        return "killed" if done.returncode == 1 else "survived"

    def outcomes(self) -> dict[str, str]:
        """Return what became of each mutant, by its name."""
        lines = subprocess.run(
            [*self._program, "results", "--all", "true"],
            env=self._environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        return dict(line.strip().split(": ", 1) for line in lines if "__mutmut_" in line)


def _tests_of(name: str) -> list[str]:
    """Return the tests of the folder that a mutant lies in; those folders mirror the package's."""
    folder = name.split(".")[1]
    if name.startswith("moso_fast.backends."):
        kind = name.split(".")[2]
        folder = {"triton": "kernels/interpreted", "cuda": "native/cuda", "cpu": "native/cpu"}.get(
            kind, "core"
        )
    folder = {"demo": "cli", "compat": "scoring", "surrogate": "scoring"}.get(folder, folder)
    return [f"tests/{folder}" if os.path.isdir(f"tests/{folder}") else "tests"]


def _first(count: int, names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the first mutants, with their diffs, that change more than prose."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    for name in names:
        if count == 0:
            return
        change = get_diff_for_mutant(name)
        if not _prose(change):
            count -= 1
            yield name, change


def _prose(change: str) -> bool:
    """Whether a diff changes nothing but the words of a string."""
    lines = change.splitlines()[3:]
    before = _tokens([line[1:] for line in lines if line.startswith("-")])
    after = _tokens([line[1:] for line in lines if line.startswith("+")])
    if len(before) != len(after):
        return False
    changed = [old for old, new in zip(before, after, strict=True) if old != new]
    return bool(changed) and all(text[0] in "\"'" and " " in text for text in changed)


def _tokens(lines: list[str]) -> list[str]:
    found = []
    for line in lines:
        # A line may end inside parentheses: what comes before that is read all the same.
        with contextlib.suppress(tokenize.TokenError):
            for token in tokenize.generate_tokens(io.StringIO(line.strip()).readline):
                found.append(token.string)
    return found


if __name__ == "__main__":
    sys.exit(main())
