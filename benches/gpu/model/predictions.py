"""Predicted bytes, FLOPs and times of every job of the table, on an H200 and on an H100.

    python -m benches.gpu predict            write benches/results/gpu_predictions.md and .json
    python -m benches.gpu predict --count    before that, count launches (interpreter) and the
                                          instructions of loops (compiler) anew

No GPU is used and nothing here is a measurement: jobs.py has the model, the backends make the
choices. The check prints these times beside the measured ones.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..table import ITEM_BYTES, KINDS, TABLE, Shape, floor_seconds
from .jobs import COUNTS, predict_cuda, predict_triton
from .occupancy import INSTRUCTIONS
from .page import render
from .roofline import GPUS, LAUNCH_SECONDS, RESULTS, Gpu, Prediction

ROOT = RESULTS.parents[1]
TABLE_FILE = RESULTS / "gpu_predictions.md"
JSON_FILE = RESULTS / "gpu_predictions.json"

# Triton versions that choose or compile differently: the newest, and the oldest supported.
VERSIONS = ((3, 9), (3, 6))
# Of the time, below which two of them are not worth two rows.
_SAME = 0.02
Found = Prediction | str  # or why there is none


def ways(shape: Shape, dtype: torch.dtype, precision: str) -> Iterator[tuple[str, list[Found]]]:
    """Yield every way for a row, by name, with what it takes on each of ``GPUS``."""
    newest: list[Prediction] = []
    for version in VERSIONS:
        found = [
            predict_triton(shape, dtype, precision, triton_version=version, gpu=gpu) for gpu in GPUS
        ]
        if not newest:
            newest = found
            yield "triton", list(found)
        elif _differ(found[0], newest[0]):
            yield f"triton, Triton {version[0]}.{version[1]}", list(found)
    yield "cuda", [predict_cuda(shape, dtype, precision, gpu) for gpu in GPUS]


def _differ(one: Prediction, other: Prediction) -> bool:
    times = one.seconds(GPUS[0]), other.seconds(GPUS[0])
    return one.described != other.described or abs(times[0] / times[1] - 1) > _SAME


def floor_of(shape: Shape, dtype: str, precision: str, gpu: Gpu) -> float:
    """Seconds that no two-pass algorithm beats at the ceilings of a GPU."""
    rates = {"highest": "float32", "high": "tf32", "medium": "bfloat16"}
    roof = {"read": gpu.read, "copy": 0.0, precision: gpu.flops[rates[precision]]}
    return floor_seconds(shape, ITEM_BYTES[dtype], precision, roof)


def record() -> dict[str, Any]:
    """Everything, for JSON."""
    rows = []
    for shape in TABLE:
        for dtype, precision in KINDS:
            for name, found in ways(shape, getattr(torch, dtype), precision):
                row: dict[str, Any] = {
                    **dict(zip(("n", "classes", "dim"), shape, strict=True)),
                    "dtype": dtype,
                    "precision": precision,
                    "contender": name,
                }
                why_not = next((text for text in found if isinstance(text, str)), None)
                if why_not is not None:
                    rows.append(row | {"why_not": why_not})
                    continue
                for gpu, one in zip(GPUS, found, strict=True):
                    floor = floor_of(shape, dtype, precision, gpu)
                    row[gpu.name] = _described(one, gpu, floor)
                rows.append(row)
    return {"ceilings": {gpu.name: _ceilings(gpu) for gpu in GPUS}, "rows": rows}


def _ceilings(gpu: Gpu) -> dict[str, float]:
    return {"read_bytes": gpu.read, "launch_seconds": LAUNCH_SECONDS, **gpu.flops}


def _described(found: Prediction, gpu: Gpu, floor: float) -> dict[str, Any]:
    seconds = found.seconds(gpu)
    return {
        "milliseconds": _round(1e3 * seconds),
        "floor_milliseconds": _round(1e3 * floor),
        "percent_of_floor": _round(100 * floor / seconds),
        "what": found.described,
        "residuals_kept": found.kept,
        "chunks": found.chunks,
        "launches": found.launches,
        "steps": [
            {
                "kernel": step.name,
                "part": step.part,
                "gigabytes": _round(step.bytes / 1e9),
                "gigaflops": _round(step.flops / 1e9),
                "milliseconds": _round(1e3 * step.seconds(gpu)),
                "bound": step.bound(gpu),
                "blocks": step.blocks,
                "note": step.note,
            }
            for step in found.steps
        ],
    }


def _round(value: float) -> float:
    """Four digits: the model has no more."""
    return float(f"{value:.4g}")


def dump(found: dict[str, Any]) -> str:
    """JSON with one line a row."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in found["rows"])
    head = json.dumps({"ceilings": found["ceilings"]}, indent=1)[:-2]
    return f'{head},\n "rows": [\n{lines}\n ]\n}}\n'


def count() -> dict[str, list[int]]:
    """Count the launches of every way, in an interpreter of their own."""
    found: dict[str, list[int]] = _child("benches.gpu.model.launches", interpreted=True)
    return found


def count_instructions() -> dict[str, Any]:
    """Count the instructions of kernels' loops as the installed Triton compiles them."""
    found: dict[str, Any] = _child("benches.gpu.model.instructions", interpreted=False)
    return found


def _child(module: str, interpreted: bool) -> Any:
    """Return what a module prints as JSON, run with the repository's folders on the path."""
    folders = (ROOT, ROOT / "tests" / "support")
    path = os.pathsep.join(map(str, folders))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", module]
    child = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    return json.loads(child.stdout)


def _pairs(found: dict[str, Any]) -> str:
    """JSON with a pair of counts on one line."""
    return re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", json.dumps(found, indent=1)) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write both files."""
    parser = argparse.ArgumentParser(
        prog="python -m benches.gpu predict", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--count", action="store_true", help="count launches and instructions anew")
    if parser.parse_args(argv).count:
        # What cannot be counted here (no CUDA module, another Triton) stays as it was.
        for file, counted in ((COUNTS, count()), (INSTRUCTIONS, count_instructions())):
            before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            file.write_text(_pairs(before | counted), encoding="utf-8")
    found = record()
    JSON_FILE.write_text(dump(found), encoding="utf-8")
    TABLE_FILE.write_text(render(found), encoding="utf-8")
    return 0
