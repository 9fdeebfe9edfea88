"""All that needs a GPU, in runs of five minutes and without network.

    make gpu-check                          (or: python -m benches.gpu check [--help])
    python -m benches.gpu check --stage smoke --stage kernels

Ten stages, what says the most first: smoke, ceilings, kernels, profile, calls, tests, compile,
sanitizer, network, pruning. Each has a share of the time, what is left goes round again. Every
unit (a kernel on a job, a file of tests) runs in a process of its own under a limit; whatever is
found is on disk at once, and the next run goes on from there, unit by unit, while the files that
a unit runs, GPU, driver and versions stay the same (--fresh begins anew; --continue FOLDER where
the results of the last run lie elsewhere). A contender that hung or died twice is not run again.

Writes to --out, else the folder that the variable OUT names, else benches/results/GPU: five files,
results.jsonl (every line as it came), gpu_check.json (all of it at the end of a stage), tables.txt,
log.txt (what the processes printed) and junit.xml. Without a GPU everything runs to its end on tiny
shapes, whose numbers are no results, and is written to build/gpu-check.

Exit code: 0 when nothing failed (skipping is not failing), 1 otherwise, 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ..build import ask_gpu, build_where_missing
from . import pool
from .log import Log
from .record import LINES, Record
from .run import Check
from .sources import ROOT
from .stages import CLOSING_SECONDS, PLAN, RUN_SECONDS, STAGES, Stage

LAYER = "benches.gpu.check.layer"


def main(arguments: Sequence[str], layer: str = LAYER) -> int:
    """Run what no earlier run has done; return the exit code. ``layer``: what the workers load."""
    options = _parser().parse_args(arguments)
    chosen = [s for s in STAGES if not options.stage or s.name in options.stage]
    fault = build_where_missing() if layer == LAYER else None
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, _terminate)
    named = ask_gpu("name")
    folder = options.out or _folder(named)
    if options.earlier is not None:
        take_over(options.earlier, folder)
    log = Log(folder / "log.txt")
    crew = pool.Crew(layer, log, spares=1 if named is None else 2)
    try:
        crew.prepare(1 if named is None else 1 + chosen[0].workers)  # while it is planned
        facts, planned, faults = plan(crew, chosen)
        if facts is None:
            print(f"FAILED plan: {faults['plan']}; {folder / 'log.txt'} has the rest")
            return 1
        gpu = facts["gpu"] is not None
        record = Record(folder, facts, options.fresh)
        if fault is not None:
            faults["build"] = fault
        if named is not None and not gpu and layer == LAYER:
            faults["device"] = f"nvidia-smi names {named}, and PyTorch {facts['torch']} finds none"
        with tempfile.TemporaryDirectory() as scratch:
            check = Check(record, crew, planned, faults, Path(scratch), gpu)
            if record.continued:
                print(f"going on with {folder}, run {len(record.runs)}", flush=True)
            check.run(chosen, begin + options.seconds - CLOSING_SECONDS)
            return check.close(chosen)
    finally:
        crew.close()
        log.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benches.gpu check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stage", action="append", choices=names, help="only this; repeatable")
    out = os.environ.get("OUT")
    parser.add_argument("--out", type=Path, default=out and Path(out), help="folder for results")
    parser.add_argument(
        "--continue",
        dest="earlier",
        type=Path,
        metavar="FOLDER",
        help="go on with the results of FOLDER, where --out is another",
    )
    parser.add_argument("--fresh", action="store_true", help="do not go on with earlier runs")
    parser.add_argument(
        "--seconds",
        type=float,
        default=RUN_SECONDS,
        help="end after so long (default: %(default)g)",
    )
    return parser


def _terminate(number: int, frame: FrameType | None) -> None:
    """End as after Ctrl-C, so that no process is left on the GPU."""
    sys.exit(128 + number)


def _folder(gpu: str | None) -> Path:
    if gpu is None:
        return ROOT / "build" / "gpu-check"
    slug = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-").lower()
    return ROOT / "benches" / "results" / slug


def take_over(earlier: Path, folder: Path) -> None:
    """Put what an earlier run has written into a folder that has no results yet."""
    if not (earlier / LINES).is_file():
        raise SystemExit(f"--continue {earlier}: there is no {LINES} in it")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LINES, "junit.xml"):
        if (earlier / name).is_file() and not (folder / name).exists():
            shutil.copy(earlier / name, folder / name)


def plan(
    crew: pool.Crew, chosen: Sequence[Stage]
) -> tuple[dict[str, Any] | None, dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Ask a process for the facts, the units of each stage, and why a stage has none."""
    found: dict[str, Any] = {}
    faults: dict[str, str] = {}

    def tell(unit: pool.Unit, kind: str, message: dict[str, Any]) -> None:
        if kind == "data":
            found.update(message)
        elif message["outcome"] != "done":
            faults["plan"] = f"{message['outcome']}: {message['why']}"

    unit = {**PLAN, "stages": [stage.name for stage in chosen]}
    pool.run([unit], crew, tell, float("inf"))
    units = {}
    for stage in chosen:
        units[stage.name] = found.get(f"units of {stage.name}", [])
        fault = found.get(f"fault of {stage.name}")
        if fault is None and f"units of {stage.name}" not in found:
            fault = faults.get("plan", "the plan does not name it")
        if fault is not None:
            faults[stage.name] = fault
    return found.get("facts"), units, faults
