"""What the runs have found: one file of JSON lines, which grows line by line.

A line is either data of a unit or its outcome, with the run it belongs to, the unit's source (a
hash of the files that it runs) and the conditions (GPU, driver, versions). A unit is done where
its last outcome says so under the same source and conditions; anything else is run again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Conditions that results of one table share.
SAME = ("gpu", "driver", "torch", "triton", "cuda", "python")
LINES, REPORT = "results.jsonl", "gpu_check.json"


@dataclass
class Result:
    """The last outcome of a unit and what it said on the way there."""

    stage: str
    unit: str
    source: str
    run: int
    outcome: str = "begun"
    why: str = ""
    seconds: float = 0.0
    informs: bool = False  # for information: no outcome of it is a failure of the check
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether its numbers count."""
        return self.outcome == "done"

    @property
    def bad(self) -> bool:
        """Whether the check failed here; what the time did not suffice for has not."""
        return self.outcome not in ("done", "late", "skipped") and not self.informs


class Record:
    """Results in memory, every line of them in ``folder``/results.jsonl as well."""

    def __init__(self, folder: Path, conditions: Mapping[str, Any], fresh: bool = False) -> None:
        self.folder = folder
        self.conditions = dict(conditions)
        self.results: dict[str, Result] = {}
        self.runs: list[dict[str, Any]] = []
        self._same = {name: conditions.get(name) for name in SAME}
        folder.mkdir(parents=True, exist_ok=True)
        lines = _read(folder / LINES)
        self.number = 1 + max((line.get("run", -1) for line in lines), default=-1)
        if not fresh:
            self._replay(lines)
        self.continued = bool(self.results)
        self._file = (folder / LINES).open("a", encoding="utf-8")
        self._begin()

    def _replay(self, lines: list[dict[str, Any]]) -> None:
        """Take over what earlier runs found under the same conditions."""
        ours = set()
        for line in lines:
            if "conditions" in line:
                if {name: line["conditions"].get(name) for name in SAME} == self._same:
                    ours.add(line["run"])
                    self.runs.append(line)
            elif line.get("run") in ours and "unit" in line:
                self._take(line)

    def _begin(self) -> None:
        run = {"run": self.number, "conditions": self.conditions}
        self.runs.append(run)
        self._append(run)

    def begin(self, stage: str, unit: str, source: str, informs: bool = False) -> None:
        """Forget what an earlier run found of this unit: it is run again."""
        self._put(stage, unit, source, begun=True, informs=informs)

    def data(self, stage: str, unit: str, source: str, data: Mapping[str, Any]) -> None:
        """Keep something that a unit found."""
        self._put(stage, unit, source, data=clean(data))

    def outcome(
        self, stage: str, unit: str, source: str, outcome: str, why: str, seconds: float
    ) -> None:
        """Keep how a unit ended."""
        self._put(stage, unit, source, outcome=outcome, why=why, seconds=round(seconds, 2))

    def done(self, unit: str, source: str) -> bool:
        """Whether an earlier run has done this unit with this source."""
        found = self.results.get(unit)
        return found is not None and found.done and found.source == source

    def of(self, stage: str) -> list[Result]:
        """Return the results of a stage in the order in which they were begun."""
        return [r for r in self.results.values() if r.stage == stage]

    def save(self, more: Mapping[str, Any]) -> Path:
        """Write the report, results and ``more``, and put it in place at once."""
        report = {
            "conditions": self.conditions,
            "runs": self.runs,
            **more,
            "results": [vars(r) for r in self.results.values()],
        }
        path = self.folder / REPORT
        part = path.with_name(path.name + ".part")
        text = json.dumps(clean(report), indent=1, allow_nan=False) + "\n"
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
        return path

    def _put(self, stage: str, unit: str, source: str, **rest: Any) -> None:
        line = {"run": self.number, "stage": stage, "unit": unit, "source": source, **rest}
        self._take(line)
        self._append(line)

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def _take(self, line: Mapping[str, Any]) -> None:
        unit = line["unit"]
        if line.get("begun") or unit not in self.results:
            self.results.pop(unit, None)
            self.results[unit] = Result(
                line["stage"], unit, line["source"], line["run"], informs=bool(line.get("informs"))
            )
        found = self.results[unit]
        found.data.update(line.get("data", {}))
        found.outcome = line.get("outcome", found.outcome)
        found.why = line.get("why", found.why)
        found.seconds = line.get("seconds", found.seconds)


def clean(value: Any) -> Any:
    """Return the same with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): clean(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(each) for each in value]
    return value


def _read(path: Path) -> list[dict[str, Any]]:
    """Lines of an earlier run; the last one may be half a line, where it was killed."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "run" in line:
            found.append(line)
    return found
