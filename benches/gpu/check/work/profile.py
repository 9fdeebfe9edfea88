"""Why a kernel takes what it takes: Nsight Compute's counters of both passes, as numbers.

``ncu`` runs this module in a process of its own (``python -m benches.gpu profiled``) and writes one
line a kernel; what is kept of it: time, share of the memory's and of the tensor cores' peak, and
what warps wait for most. Clocks are left as they are.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...build import ROOT, cuda_program
from ..worker import Skipped, run_child

SECTIONS = ("SpeedOfLight", "WarpStateStats", "ComputeWorkloadAnalysis", "Occupancy", "LaunchStats")
_STALL = re.compile(r"issue_stalled_(\w+?)(?:_not_issued)?(?:_per_\w+_active)?\.(?:ratio|pct)$")
_TENSOR = re.compile(r"^sm__\w*pipe_tensor\w*\..*pct_of_peak_sustained_(?:active|elapsed)$")
_WANTED = {
    "dram_percent": re.compile(r"dram_+throughput\..*pct_of_peak_sustained_elapsed$"),
    "occupancy_percent": re.compile(r"^sm__warps_active\..*pct_of_peak_sustained_active$"),
    "registers": re.compile(r"^launch__registers_per_thread$"),
    "nanoseconds": re.compile(r"^gpu__time_duration\.sum$"),
}


def run(unit: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Profile both passes of every job of the unit in one process."""
    program = cuda_program("ncu")
    if program is None:
        raise Skipped("Nsight Compute (ncu) is not installed")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "counters.csv")
        code = run_child(command(program, unit, path), cwd=ROOT)
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows = kernels(text)
    emit(kernels=rows)
    for number, row in enumerate(sorted(rows, key=lambda r: -(r["microseconds"] or 0.0))[:4]):
        # All that count something: their names differ between versions.
        found = counters(text)[rows.index(row)]
        emit(**{f"counters {number}": {k: v for k, v in found.items() if _tells(k, v)}})
    if code:
        raise RuntimeError(f"ncu ended with exit code {code}; {text.strip()[-200:]}")
    if not rows:
        raise RuntimeError("ncu has written no kernel")


def command(program: str, unit: Mapping[str, Any], out: Path) -> list[str]:
    """Return the command that profiles a unit and writes the counters to ``out``."""
    sections = [word for name in SECTIONS for word in ("--section", name)]
    return [
        program,
        *("--csv", "--page", "raw", "--print-units", "base", "--log-file", str(out)),
        *("--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"),
        *sections,
        *(sys.executable, "-m", "benches.gpu", "profiled", json.dumps(dict(unit))),
    ]


def main(arguments: Sequence[str]) -> int:
    """Run both passes once between the marks that ncu waits for."""
    import torch

    from .kernels import Passes
    from .timing import device, inputs, job_of

    for unit in json.loads(arguments[0])["jobs"]:
        shape, dtype, precision = job_of(unit)
        job = Passes(unit["contender"], precision, inputs(shape, dtype, device()))
        job.first()
        job.second()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        with torch.cuda.nvtx.range(f"{unit['contender']} {unit['shape']}"):
            job.first()
            job.second()
            torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del job
    return 0


def counters(text: str) -> list[dict[str, str]]:
    """Read ncu's lines: names of columns, their units, then one line a kernel."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.reader(io.StringIO("\n".join(lines))))
    if len(table) < 3:
        return []
    names, _, *rows = table
    return [dict(zip(names, row, strict=False)) for row in rows]


def kernels(text: str) -> list[dict[str, Any]]:
    """Return what is looked for among the counters of every kernel."""
    found = []
    for row in counters(text):
        values = {name: _number(text) for name, text in row.items()}
        line: dict[str, Any] = {"kernel": row["Kernel Name"][:120], "grid": row.get("Grid Size")}
        for key, pattern in _WANTED.items():
            line[key] = _largest(values, pattern)
        line["tensor_percent"] = _largest(values, _TENSOR)
        nanoseconds = line.pop("nanoseconds")
        line["microseconds"] = None if nanoseconds is None else nanoseconds / 1e3
        line["stalls"] = stalls(values.items())
        found.append(line)
    return found


def _tells(name: str, value: str) -> bool:
    """Whether a counter says something of this kernel that no other one of the list says."""
    constant = name.startswith(("device__", "derived__", "c2clink__", "nvlink__", "pcie__"))
    repeats = re.search(r"\.(min|max|sum)\.(pct|per_)", name)
    return not constant and not repeats and value not in ("", "0", "0.00")


def stalls(values: Iterable[tuple[str, float | None]]) -> list[tuple[str, float]]:
    """Return what a warp waits for, in cycles an instruction or per cent, the three largest."""
    found = {}
    for name, value in values:
        match = _STALL.search(name)
        if match and value is not None and match[1] != "selected":
            found[match[1]] = value
    return sorted(found.items(), key=lambda item: -item[1])[:3]


def _largest(values: Mapping[str, float | None], pattern: re.Pattern[str]) -> float | None:
    found = [v for name, v in values.items() if v is not None and pattern.search(name)]
    return max(found, default=None)


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
