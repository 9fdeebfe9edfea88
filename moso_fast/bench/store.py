"""Results on disk: one JSON file a machine and profile, filled case by case.

A file holds ``{"schema", "profile", "machine", "cases": {name: record}, "growth": {...}}``. A
record is self-contained (conditions, ceilings, rows), so that short runs fill one file and a case
can be measured again alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..util.files import atomic_path
from .cases import CASES

__all__ = ["SCHEMA", "load", "merge", "save"]

SCHEMA = 1


def load(path: str | Path) -> dict[str, Any]:
    """Read a results file.

    Raises
    ------
    OSError
        No such file.
    ValueError
        It is no results file of this version.
    """
    path = Path(path)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        found = results["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no results file of moso-fast bench: {error}") from None
    if found != SCHEMA:
        raise ValueError(f"{path} has schema {found!r}; this version reads {SCHEMA}")
    return results


def merge(old: dict[str, Any] | None, new: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return ``new`` with the cases that only ``old`` holds, in the registry's order.

    Raises
    ------
    ValueError
        They come from different machines or profiles.
    """
    if old is None:
        return new
    for key in ("profile", "machine"):
        if old[key] != new[key]:
            raise ValueError(
                f"{path} holds results of another {key} ({old[key]}, now {new[key]}); "
                "choose another --out"
            )
    cases = {**old["cases"], **new["cases"]}
    order = [*CASES, *(name for name in cases if name not in CASES)]
    return {
        **new,
        "cases": {name: cases[name] for name in order if name in cases},
        "growth": {**old.get("growth", {}), **new.get("growth", {})},
    }


def save(results: dict[str, Any], path: Path) -> Path:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(results), indent=1, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def _rounded(value: Any) -> Any:
    """Five significant digits: more would be noise, and diffs stay readable."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return value
