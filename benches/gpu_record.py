"""What gpu_check.py has found so far: one JSON file that several short runs fill together.

The file is written whole and put in place after every stage and every row, so that a run that is
killed loses only what was under way. A later run of the same source on the same GPU with the same
versions goes on from there; anything else begins anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Conditions that results of one file share.
SAME = ("source", "gpu", "driver", "torch", "triton", "cuda", "python")
_SOURCES = ("moso_fast", "kernels", "csrc", "benches", "tests/gpu")
_SUFFIXES = {".py", ".cu", ".cuh", ".h", ".cpp"}


def source_hash(root: Path = ROOT) -> str:
    """Hash of what is run and timed, whether it is committed or not."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in _SUFFIXES:
                digest.update(path.relative_to(root).as_posix().encode() + b"\0")
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Record:
    """The report, in memory and in ``path`` (None: in memory alone)."""

    def __init__(self, path: Path | None, conditions: dict[str, Any], fresh: bool = False) -> None:
        self.path = path
        before = None if fresh or path is None else _read(path)
        self.continued = before is not None and all(
            before.get("conditions", {}).get(name) == conditions.get(name) for name in SAME
        )
        self.report: dict[str, Any] = {"runs": [], "stages": {}, "timing": {"rows": []}}
        if self.continued and before is not None:
            self.report = before
        self.report["conditions"] = conditions
        self.report["runs"].append({"date": conditions.get("date")})

    @property
    def stages(self) -> dict[str, Any]:
        """Outcome of every stage by its name."""
        found: dict[str, Any] = self.report["stages"]
        return found

    @property
    def timing(self) -> dict[str, Any]:
        """Ceilings, rows, streamed rows, the network, and what was skipped."""
        found: dict[str, Any] = self.report["timing"]
        return found

    @property
    def run(self) -> dict[str, Any]:
        """What is known of this run alone."""
        found: dict[str, Any] = self.report["runs"][-1]
        return found

    def passed(self, stage: str) -> bool:
        """Whether an earlier run passed this stage."""
        return bool(self.stages.get(stage, {}).get("outcome") == "passed")

    def timed(self, shape: tuple[int, int, int], dtype: str) -> bool:
        """Whether an earlier run has timed every contender of this row."""
        rows = [r for r in self.timing["rows"] if _key(r) == (*shape, dtype)]
        return bool(rows) and all(r["milliseconds"] is not None or r["problem"] for r in rows)

    def put_stage(self, name: str, outcome: dict[str, Any]) -> None:
        """Keep the outcome of a stage."""
        self.stages[name] = outcome
        self.save()

    def put_rows(self, rows: list[dict[str, Any]]) -> None:
        """Keep the rows of one shape and dtype in place of those of an earlier run."""
        keys = {_key(r) for r in rows}
        kept = [r for r in self.timing["rows"] if _key(r) not in keys]
        number = len(self.report["runs"]) - 1
        self.timing["rows"] = [*kept, *({**r, "run": number} for r in rows)]
        self.save()

    def put(self, name: str, value: Any) -> None:
        """Keep anything else of the timing."""
        self.timing[name] = value
        self.save()

    def save(self) -> None:
        """Write the file and put it in place at once."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["n"], row["classes"], row["dim"], row["dtype"]


def _read(path: Path) -> dict[str, Any] | None:
    """Return an earlier report; None for no file, or one that is of another kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    right = isinstance(found, dict) and {"runs", "stages", "timing", "conditions"} <= found.keys()
    return found if right else None
