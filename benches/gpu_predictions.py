"""Predicted bytes, FLOPs and times of every kernel on an H200, for every row of the H200 table.

    python benches/gpu_predictions.py            write benches/results/gpu_predictions.md and .json
    python benches/gpu_predictions.py --count    count the launches of a job first (interpreter)

No GPU is used and nothing here is a measurement: gpu_model.py has the model, the backends make
the choices. gpu_check.py prints these times beside the measured ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benches")]

import torch  # noqa: E402
from gpu_model import COUNTS, predict_cuda, predict_triton  # noqa: E402
from gpu_roofline import H200, LAUNCH_SECONDS, RESULTS, Prediction  # noqa: E402
from gpu_timing import OURS, TABLE, Contender, floor_seconds  # noqa: E402

TABLE_FILE = RESULTS / "gpu_predictions.md"
JSON_FILE = RESULTS / "gpu_predictions.json"

KINDS = ((torch.bfloat16, "medium"), (torch.float32, "high"), (torch.float32, "highest"))
# Triton versions that choose differently: the oldest supported, and what few_classes needs.
VERSIONS = ((3, 9), (3, 6))
Shape = tuple[int, int, int]


def predictions(
    shape: Shape, dtype: torch.dtype, precision: str
) -> Iterator[tuple[str, Prediction | str]]:
    """Yield the name and the prediction (or why there is none) of every way for a row."""
    by_version = {v: predict_triton(shape, dtype, precision, triton_version=v) for v in VERSIONS}
    newest = by_version[VERSIONS[0]]
    yield "triton", newest
    for version, found in by_version.items():
        if found.described != newest.described:
            yield f"triton, Triton {version[0]}.{version[1]}", found
    yield "cuda", predict_cuda(shape, dtype, precision)


def floor_of(shape: Shape, dtype: torch.dtype, precision: str) -> float:
    """Seconds that no two-pass algorithm beats at the ceilings of the H200; as in gpu_timing."""
    rates = dict(zip(OURS, (H200.flops[n] for n in ("float32", "tf32", "bfloat16")), strict=True))
    roof = {"read": H200.read, "copy": 0.0, **rates}
    contender = Contender("", precision, dtype, lambda *data: data, True)
    return floor_seconds(shape, contender, roof)


def record() -> dict[str, Any]:
    """Everything, for JSON."""
    rows = []
    for shape in TABLE:
        for dtype, precision in KINDS:
            floor = floor_of(shape, dtype, precision)
            for name, found in predictions(shape, dtype, precision):
                row: dict[str, Any] = {
                    **dict(zip(("n", "classes", "dim"), shape, strict=True)),
                    "dtype": str(dtype).removeprefix("torch."),
                    "precision": precision,
                    "contender": name,
                    "floor_milliseconds": _round(1e3 * floor),
                }
                row |= {"why_not": found} if isinstance(found, str) else _described(found, floor)
                rows.append(row)
    ceilings = {"read_bytes": H200.read, "launch_seconds": LAUNCH_SECONDS, **H200.flops}
    return {"gpu": H200.name, "ceilings": ceilings, "rows": rows}


def _described(found: Prediction, floor: float) -> dict[str, Any]:
    seconds = found.seconds(H200)
    return {
        "milliseconds": _round(1e3 * seconds),
        "percent_of_floor": _round(100 * floor / seconds),
        "what": found.described,
        "residuals_kept": found.kept,
        "chunks": found.chunks,
        "launches": found.launches,
        "steps": [
            {
                "kernel": step.name,
                "gigabytes": _round(step.bytes / 1e9),
                "gigaflops": _round(step.flops / 1e9),
                "rate": step.rate if step.flops else None,
                "milliseconds": _round(1e3 * step.seconds(H200)),
                "bound": step.bound(H200),
                "note": step.note,
            }
            for step in found.steps
        ],
    }


def _round(value: float) -> float:
    """Four digits: the model has no more."""
    return float(f"{value:.4g}")


_HEAD = """# What every kernel should take on an H200

Predicted, not measured: no kernel of this package has run on a GPU. Made by
`python benches/gpu_predictions.py`, which asks the backends for regime, tiles, slabs and splits
and takes for every kernel the longer of its bytes at {read:.3g} TB/s and its products at {bf16:.0f}
(bfloat16), {tf32:.0f} (tf32) or {fp32:.0f} (float32) TFLOP/s, and {launch:.0f} us for every launch.
The memory's nominal rate is 4.8 TB/s; what large copies reach is taken. FLOPs are those executed:
classes padded to the tile, three tf32 products for a float32 one. Bytes are to and from device
memory; what may come from the L2 cache (60 MB) instead is counted in full.

A step is slower than this where: it has fewer bytes in flight than the memory's latency of 600 ns
asks for ("x of y KiB in flight", a multiprocessor); its last round of blocks leaves
multiprocessors idle ("waves"); it multiplies by `mma.sync` (HMMA), which reaches half or two
thirds of the rate of HGMMA; or operands that several programs share miss the L2 cache. It is
quicker where features or residuals of the pass before are still in the L2 cache: all of them at
50,000 rows of 512 bfloat16 numbers (51 MB).

## Jobs

| N, C, D | operands | way | kernels and PyTorch | launches | predicted ms | floor ms | % of floor |
|---|---|---|---|---|---|---|---|
"""


def render(found: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    roof = found["ceilings"]
    text = _HEAD.format(
        read=roof["read_bytes"] / 1e12,
        bf16=roof["bfloat16"] / 1e12,
        tf32=roof["tf32"] / 1e12,
        fp32=roof["float32"] / 1e12,
        launch=1e6 * roof["launch_seconds"],
    )
    for row in found["rows"]:
        if "why_not" not in row:
            text += (
                f"| {_shape(row)} | {row['dtype']}, {row['precision']} | {row['contender']} | "
                f"{row['what'].split(':')[0].split(',')[0]} | {row['launches']} | "
                f"{row['milliseconds']:g} | {row['floor_milliseconds']:g} | "
                f"{row['percent_of_floor']:.0f} |\n"
            )
    text += "\n## Kernels\n"
    for row in found["rows"]:
        text += (
            f'\n### {_shape(row)}, {row["dtype"]} at "{row["precision"]}": {row["contender"]}\n\n'
        )
        if "why_not" in row:
            text += f"None: {row['why_not']}.\n"
            continue
        kept = "residuals kept" if row["residuals_kept"] else "residuals not kept"
        text += f"{row['what']}; {kept}, {row['chunks']} chunk(s).\n\n"
        text += "| step | GB | GFLOP | ms | bound | what would explain a miss |\n"
        text += "|---|---|---|---|---|---|\n"
        for step in row["steps"]:
            text += (
                f"| {step['kernel']} | {step['gigabytes']:g} | {step['gigaflops']:g} | "
                f"{step['milliseconds']:g} | {step['bound']} | {step['note']} |\n"
            )
    return text


def _shape(row: dict[str, Any]) -> str:
    return f"{row['n']:,}; {row['classes']:,}; {row['dim']:,}"


def dump(found: dict[str, Any]) -> str:
    """JSON with one line a row."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in found["rows"])
    head = json.dumps({key: found[key] for key in ("gpu", "ceilings")}, indent=1)[:-2]
    return f'{head},\n "rows": [\n{lines}\n ]\n}}\n'


def count() -> dict[str, list[int]]:
    """Count the launches of every way, in an interpreter of their own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = ROOT / "benches" / "gpu_launches.py"
    child = subprocess.run(
        [sys.executable, str(script)], env=environment, check=True, capture_output=True, text=True
    )
    found: dict[str, list[int]] = json.loads(child.stdout)
    return found


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="count launches again")
    if parser.parse_args().count:
        before = json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.exists() else {}
        counts = json.dumps(before | count(), indent=1)  # without the CUDA module: its old ones
        COUNTS.write_text(counts + "\n", encoding="utf-8")
    found = record()
    JSON_FILE.write_text(dump(found), encoding="utf-8")
    TABLE_FILE.write_text(render(found), encoding="utf-8")


if __name__ == "__main__":
    main()
