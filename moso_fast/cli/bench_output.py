"""What ``moso-fast bench`` prints; ``python -m benches`` of a source tree prints by it too."""

from __future__ import annotations

from typing import Any

from ._common import caption_bar, emit, print_table

__all__ = ["caption_bar", "emit", "print_cases", "print_registry", "print_table"]


def print_cases(cases: dict[str, Any], machine: dict[str, Any]) -> None:
    """Print a table a case; fastest first."""
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for name, record in cases.items():
        speedup = record["speedup"]
        noise = record["noise"]
        print(f"\n{name}: {record['title']}, N={record['rows_scored']:,}")
        if speedup:
            spread = "" if noise is None else f" (spread of the ratio {noise:.0%})"
            print(f"{speedup:.2f} times as fast as {record['best_plain']}{spread}")
        rows = [
            [
                row["provider"],
                1e3 * row["seconds"] if row["seconds"] else "-",
                row.get("times_ours") or "-",
                _rounded(row.get("percent_of_floor")),
                _rounded(row["peak_bytes"] and row["peak_bytes"] / 2**20),
                f"{max(row['errors'].values()):.0e}" if row["errors"] else "-",
                row["problem"] or row["note"],
            ]
            for row in sorted(record["rows"], key=lambda row: row["seconds"] or float("inf"))
        ]
        columns = ("provider", "ms", "x ours", "% of floor", "peak MiB", "error", "")
        print_table(columns, rows)
        for entry in record["skipped"]:
            if "one chunk" not in entry["why"]:
                print(f"skipped {entry['provider']}: {entry['why']}")


def _rounded(value: float | None) -> Any:
    return "-" if value is None else f"{value:.3g}"


def print_registry(profile: str, registry: str = "moso_fast.bench.providers") -> None:
    """Print the cases and how many of the registered providers each has."""
    from ..bench.cases import CASES
    from ..bench.providers import providers_for

    rows = [
        [c.name, c.title, c.rows(profile), c.classes, c.dim, len(providers_for(c, registry))]
        for c in CASES.values()
    ]
    print_table(("case", "what", "N", "C", "D", "providers"), rows)
