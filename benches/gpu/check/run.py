"""One run over the stages: what is left of each, its share of the time, its table, the outcome."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from . import pool
from .aims import aims, ceilings, rows
from .record import LINES, Record
from .sources import of_unit
from .stages import Stage
from .tables import aim_lines, table

WHOLE = ("build", "device")  # faults of the machine, not of a stage
LOST_TWICE = 2


class Check:
    """The stages over one record."""

    def __init__(
        self,
        record: Record,
        crew: pool.Crew,
        units: Mapping[str, list[dict[str, Any]]],
        faults: Mapping[str, str],
        scratch: Path,
        gpu: bool,
    ) -> None:
        self.record, self.crew, self.gpu = record, crew, gpu
        self.faults = dict(faults)
        self.scratch = scratch
        self.units = {
            unit["key"]: {**unit, "scratch": str(scratch)}
            for each in units.values()
            for unit in each
        }
        self.sources = {key: of_unit(unit["sources"]) for key, unit in self.units.items()}
        self._lost: Counter[str] = Counter()  # units by contender that hung or died in this run

    def run(self, chosen: Sequence[Stage], deadline: float) -> None:
        """Give each stage its share, then go round again with what is left of the time."""
        for name in WHOLE:
            if name in self.faults:
                self._fault(name)
        for stage in chosen:
            if stage.name in self.faults:
                self._fault(stage.name)
            share = deadline if len(chosen) == 1 else time.monotonic() + stage.seconds
            self._stage(stage, deadline, share)
        for stage in chosen:
            if time.monotonic() < deadline and self._left(stage):
                self._stage(stage, deadline, deadline)

    def _left(self, stage: Stage) -> list[dict[str, Any]]:
        """Return the units of a stage that are not done, nor have failed in this run."""
        tried = {r.unit for r in self.record.of(stage.name) if r.run == self.record.number}
        late = {r.unit for r in self.record.of(stage.name) if r.outcome == "late"}
        return [
            unit
            for key, unit in self.units.items()
            if unit["stage"] == stage.name
            and not self.record.done(key, self.sources[key])
            and (key not in tried or key in late)
        ]

    def _stage(self, stage: Stage, deadline: float, share: float) -> None:
        todo = self._left(stage)
        print(f"--- {stage.name}: {len(todo)} to do", flush=True)
        for unit in todo:
            key = unit["key"]
            self.record.begin(stage.name, key, self.sources[key], bool(unit.get("informs")))
        workers = stage.workers if self.gpu else 1
        pool.run(
            todo,
            self.crew,
            self._tell,
            deadline,
            workers=workers,
            reuse=stage.reuse or not self.gpu,
            begin_until=share,
            refuse=self._refuse,
        )
        try:
            junit(self.scratch, self.record.folder / "junit.xml")
            self._report(stage)
        except Exception as error:  # what is found is on disk, and the next stage must find more
            traceback.print_exc()
            name = f"table of {stage.name}"
            self.faults[name] = f"{type(error).__name__}: {error}"
            self._fault(name)

    def _refuse(self, unit: pool.Unit) -> str | None:
        """Say why a unit is not run: what hung twice would hang again and again."""
        contender = unit.get("contender", "")
        if self._lost[contender] < LOST_TWICE:
            return None
        return f"{LOST_TWICE} units of {contender} have hung or died in this run"

    def _tell(self, unit: pool.Unit, kind: str, message: dict[str, Any]) -> None:
        where = unit["stage"], unit["key"], self.sources[unit["key"]]
        if kind == "data":
            self.record.data(*where, message)
            return
        self.record.outcome(*where, message["outcome"], message["why"], message["seconds"])
        if message["outcome"] in ("hung", "died") and unit.get("contender"):
            self._lost[unit["contender"]] += 1
        why = f": {message['why']}" if message["why"] else ""
        if message["outcome"] != "late":
            line = f"{message['seconds']:6.1f} s  {unit['key']}  {message['outcome']}{why}"
            print(line, flush=True)

    def _fault(self, stage: str) -> None:
        """Keep why the modules were not built, or why a stage has no units."""
        whole = stage in WHOLE or stage.startswith("table of ")
        key = stage if whole else f"{stage} plan"
        self.record.begin(stage, key, "")
        self.record.outcome(stage, key, "", "failed", self.faults[stage], 0.0)

    def _rows(self) -> dict[str, Any]:
        roof = ceilings(self.record.of("ceilings"))
        return rows([*self.record.of("calls"), *self.record.of("compile")], self.units, roof)

    def _report(self, stage: Stage) -> None:
        """Print and keep the table of a stage, and save all that there is."""
        lines = table(stage, self.record.of(stage.name), self._rows())
        text = "\n".join(lines)
        print(text, flush=True)
        with (self.record.folder / "tables.txt").open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        self._save()

    def _save(self) -> Path:
        found = self._rows()
        return self.record.save(
            {"dry_run": not self.gpu, "aims": list(aims(found.values())), "rows": found}
        )

    def close(self, chosen: Sequence[Stage]) -> int:
        """Print aims, failures and what another run would do; return the exit code."""
        path = self.record.folder / LINES
        try:
            path = self._save()
            if self.gpu:
                print("\n".join(aim_lines(aims(self._rows().values()))))
        except Exception:  # the lines are there
            traceback.print_exc()
        names = dict.fromkeys([*self.faults, *(stage.name for stage in chosen)])
        results = [r for name in names for r in self.record.of(name)]
        for result in results:
            if result.outcome == "skipped":
                print(f"skipped {result.unit}: {result.why}")
        bad = [r for r in results if r.bad]
        for result in bad:
            print(f"FAILED {result.unit}: {result.outcome}: {result.why}")
        print(f"written: {path}")
        if not self.gpu:
            print("no CUDA device: nothing above is a GPU measurement; run `make gpu-check` on one")
        left = [r.unit for r in results if r.outcome == "late"]
        first = f"{', '.join(left[:8])}{', ...' if len(left) > 8 else ''}"
        print(f"to be done by another run: {len(left)}: {first}" if left else "nothing is left")
        return 1 if bad else 0


def junit(scratch: Path, out: Path) -> None:
    """Add the results of each file of tests to one file, in place of its earlier ones."""
    new = sorted(scratch.glob("*.xml"))
    if not new:
        return
    root = ElementTree.Element("testsuites")
    suites: dict[str, ElementTree.Element] = {}
    if out.exists():
        for suite in ElementTree.parse(out).getroot():
            suites[suite.get("name", "")] = suite
    for path in new:
        for suite in ElementTree.parse(path).getroot().iter("testsuite"):
            suite.set("name", path.stem)
            suites[path.stem] = suite
        path.unlink()
    root.extend(suites.values())
    ElementTree.ElementTree(root).write(out, encoding="utf-8", xml_declaration=True)
