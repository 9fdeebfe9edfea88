"""Two runs side by side, and whether the second reproduces the ratios of the first.

    python -m benches compare A.json B.json

Says also where the machine was too noisy to tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moso_fast.bench import store
from moso_fast.bench.runner import NOISE_LIMIT
from moso_fast.cli.bench_output import emit, print_table

from .arguments import bad_input, parser

__all__ = ["compare", "verdict"]

COLUMNS = ("case", "provider", "ratio A", "ratio B", "change", "spread in a run")


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for every provider of every case that both results hold with a number.

    The ratio is the provider's time over ours in the same case and run; ``change`` is
    ratio_b / ratio_a - 1, positive where we became faster beside it. Where a case lacks our own
    number there is nothing to compare.
    """
    rows = []
    for name, first in a["cases"].items():
        second = b["cases"].get(name)
        if second is None:
            continue
        theirs = {row["provider"]: row for row in second["rows"]}
        for row in first["rows"]:
            other = theirs.get(row["provider"], {})
            if row.get("times_ours") is None or other.get("times_ours") is None:
                continue
            if row["family"] == "ours" and row["times_ours"] == 1.0:
                continue
            few = min(row["rounds"], other["rounds"]) < 3
            rows.append(
                {
                    "case": name,
                    "provider": row["provider"],
                    "a": row["times_ours"],
                    "b": other["times_ours"],
                    "change": other["times_ours"] / row["times_ours"] - 1,
                    "noise": max(_noise(first), _noise(second), _spread(row), _spread(other)),
                    "single_calls": few,
                }
            )
    return rows


def verdict(rows: list[dict[str, Any]], limit: float = NOISE_LIMIT) -> tuple[bool, str]:
    """Whether every ratio is within ``limit``, and one sentence that says by how much not."""
    if not rows:
        return False, "the two results have no case and provider in common"
    off = [row for row in rows if abs(row["change"]) > limit]
    worst = max(rows, key=lambda row: abs(row["change"]))
    text = f"{len(rows) - len(off)} of {len(rows)} ratios within {limit:.0%}"
    if not off:
        return True, f"{text}; largest change {worst['change']:+.0%} ({_where(worst)})"
    noisy = sum(row["noise"] > limit for row in off)
    return False, (
        f"{text}; largest change {worst['change']:+.0%} ({_where(worst)}); in {noisy} of the "
        f"{len(off)} others the rounds of one run alone spread by more than {limit:.0%}: there "
        "the machine was too noisy to tell"
    )


def _where(row: dict[str, Any]) -> str:
    return f"{row['case']}, {row['provider']}"


def _noise(record: dict[str, Any]) -> float:
    return record["noise"] or 0.0


def _spread(row: dict[str, Any]) -> float:
    low, high = row["quartiles"]
    return (high - low) / row["seconds"]


def main(arguments: Sequence[str]) -> int:
    """Compare two results files and print the rows and the verdict."""
    made = parser("compare", __doc__)
    made.add_argument("first", type=Path, metavar="A.json")
    made.add_argument("second", type=Path, metavar="B.json")
    options = made.parse_args(arguments)
    with bad_input():
        rows = compare(store.load(options.first), store.load(options.second))
    agreed, text = verdict(rows)
    if options.json:
        found = {"agreed": agreed, "verdict": text, "rows": rows}
        emit(found, as_json=True, quiet=options.quiet)
        return 0
    if not options.quiet:
        print_table(COLUMNS, [_cells(row) for row in rows])
    print(text)
    return 0


def _cells(row: dict[str, Any]) -> list[Any]:
    shown = [row[name] for name in ("case", "provider", "a", "b")]
    return [*shown, f"{row['change']:+.0%}", f"{row['noise']:.0%}"]
