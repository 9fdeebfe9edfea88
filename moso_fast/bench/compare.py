"""Two runs side by side, and whether the second reproduces the ratios of the first."""

from __future__ import annotations

from typing import Any

from .runner import NOISE_LIMIT

__all__ = ["compare", "verdict"]


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
