"""All that needs a GPU, in one command of at most nine minutes and without network.

    make gpu-check        (or: python benches/gpu_check.py [--quick] [--out FOLDER])

Builds in place, runs tests/gpu, compute-sanitizer's memcheck over small shapes where that tool is
found, then times the H200 table (gpu_timing.py). Prints a short table last and writes JSON to
benches/results/<GPU>/ or --out. Without a GPU it runs to its end all the same: it says what it
skipped, and walks through the timing on tiny shapes, whose numbers are no result.

Exit code: 0 when nothing failed (skipping is not failing), 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gpu_timing  # noqa: E402 (it imports the package of this source tree)
from gpu_timing import Contender  # noqa: E402

from moso_fast.backends import backends  # noqa: E402

BUDGET = 540.0  # seconds, all stages together
CLOSING = 15.0  # of them for the table and the file
LIMITS = {"build": 90.0, "tests": 210.0, "sanitizer": 90.0}


def stage(name: str, command: Sequence[str], limit: float, **environment: str) -> dict[str, Any]:
    """Run one command; return its outcome, with the last lines it printed where it failed."""
    print(f"--- {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as child:
        try:
            output, _ = child.communicate(timeout=limit)
            outcome = "passed" if child.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            # With its children: one left on the GPU would share it with the timings.
            os.killpg(child.pid, signal.SIGKILL)
            output, _ = child.communicate()
            outcome = f"failed: not done within {limit:.0f} s"
    lines = [line for line in output.splitlines() if line.strip()]
    seconds = time.monotonic() - start
    shown = lines[-40:] if outcome != "passed" else lines[-1:]
    print("\n".join([*shown, f"--- {name}: {outcome} in {seconds:.0f} s"]), flush=True)
    return {"outcome": outcome, "seconds": round(seconds, 1), "last": lines[-1:]}


def skipped(name: str, why: str) -> dict[str, Any]:
    """Record a stage that does not run here."""
    print(f"--- {name}: skipped, {why}", flush=True)
    return {"outcome": "skipped", "why": why}


def sanitizer() -> str | None:
    """Path of compute-sanitizer, or None."""
    folders = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    for folder in [*filter(None, folders), "/usr/local/cuda"]:
        path = shutil.which("compute-sanitizer", path=str(Path(folder, "bin")))
        if path:
            return path
    return shutil.which("compute-sanitizer")


def stages(gpu: bool, quick: bool) -> dict[str, Any]:
    """Build, tests, memcheck."""
    python = sys.executable
    done: dict[str, Any] = {}
    if quick:
        done["build"] = skipped("build", "--quick takes what is built")
    else:
        command = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
        done["build"] = stage("build", command, LIMITS["build"])
    if not gpu:
        done["tests/gpu"] = skipped("tests/gpu", "no CUDA device")
        done["memcheck"] = skipped("memcheck", "no CUDA device")
        return done
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done["tests/gpu"] = stage("tests/gpu", pytest, LIMITS["tests"])
    tool = sanitizer()
    if tool is None:
        done["memcheck"] = skipped("memcheck", "compute-sanitizer is not installed")
    else:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "1", *pytest, "-k", "small"]
        # Without PyTorch's pool every tensor is an allocation of its own, with watched borders.
        done["memcheck"] = stage(
            "memcheck", command, LIMITS["sanitizer"], PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
    return done


def conditions(gpu: bool) -> dict[str, Any]:
    """GPU, driver, versions and commit."""

    def ask(*command: str) -> str | None:
        if shutil.which(command[0]) is None:
            return None
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
        return child.stdout.strip() if child.returncode == 0 else None

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    changes = ask("git", "status", "--porcelain", "--untracked-files=no")
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": ask("git", "rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "gpu": None,
    }
    if gpu:
        properties = torch.cuda.get_device_properties(0)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
        facts.update(
            gpu=properties.name,
            driver=ask(*query),
            capability=list(torch.cuda.get_device_capability(0)),
            multiprocessors=properties.multi_processor_count,
            memory_bytes=properties.total_memory,
        )
    return facts


def summary(
    shape: tuple[int, int, int], found: Sequence[Contender], roof: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Median, share of the floor, and ratio to the best plain PyTorch of the same precision."""
    medians = {(c.name, c.precision): statistics.median(c.seconds) for c in found if c.seconds}
    rows = []
    for c in found:
        median = medians.get((c.name, c.precision))
        plain = [
            medians[name, c.precision]
            for name in ("eager", "compile")
            if (name, c.precision) in medians
        ]
        floor = gpu_timing.floor_seconds(shape, c, dict(roof))
        rows.append(
            {
                "n": shape[0],
                "classes": shape[1],
                "dim": shape[2],
                "dtype": str(c.dtype).removeprefix("torch."),
                "precision": c.precision,
                "contender": c.name,
                "milliseconds": None if median is None else 1e3 * median,
                "all_milliseconds": [1e3 * s for s in c.seconds],
                "floor_milliseconds": 1e3 * floor,
                "percent_of_floor": None if median is None else 100 * floor / median,
                "times_best_plain": min(plain) / median if c.ours and median and plain else None,
                "peak_mib": c.peak_bytes / 2**20,
                "relative_error": c.error if c.error == c.error else None,
                "problem": c.problem or None,
            }
        )
    return rows


def measure(gpu: bool, deadline: float) -> dict[str, Any]:
    """Time the table on the GPU, or walk through it on the CPU."""
    device = torch.device("cuda" if gpu else "cpu")
    roof = gpu_timing.ceilings(device, gpu_timing.Clock(device))
    rows, left_out = [], []
    # torch.compile on a CPU would call a C++ compiler for numbers that mean nothing.
    for shape in gpu_timing.TABLE if gpu else gpu_timing.DRY_TABLE:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{shape} {str(dtype).removeprefix('torch.')}"
            found = gpu_timing.time_row(
                shape, dtype, device, roof, deadline, compiled=gpu, rounds=9 if gpu else 2
            )
            if isinstance(found, str):
                left_out.append({"row": name, "why": found})
                print(f"{name}: skipped, {found}", flush=True)
            else:
                rows.extend(summary(shape, found, roof))
                print(f"{name}: done", flush=True)
            if gpu:
                torch.cuda.empty_cache()
    streamed: list[dict[str, Any]] = []
    if gpu and backends()["triton"].available:
        streamed = gpu_timing.time_streaming(device, deadline, rounds=7)
    else:
        why = "no CUDA device" if not gpu else backends()["triton"].reason
        left_out.append({"row": "features in main memory", "why": why})
    return {"ceilings": roof, "rows": rows, "streamed": streamed, "skipped": left_out}


def print_table(measured: dict[str, Any]) -> None:
    """One line a contender; a wrong result shows its error in place of a number."""
    roof = measured["ceilings"]
    tera = "  ".join(f"{name} {roof[name] / 1e12:.3g} TFLOP/s" for name in gpu_timing.OURS)
    print(f"\nceilings: read {roof['read'] / 1e9:.4g} GB/s  copy {roof['copy'] / 1e9:.4g}  {tera}")
    head = ("N, C, D", "dtype", "precision", "contender", "ms", "% floor", "x best", "peak MiB")
    print("{:>22} {:>9} {:>9} {:>18} {:>9} {:>8} {:>7} {:>9}".format(*head))
    for row in measured["rows"]:
        line = (
            f"{row['n']},{row['classes']},{row['dim']}".rjust(22)
            + f" {row['dtype']:>9} {row['precision']:>9} {row['contender']:>18}"
        )
        if row["problem"]:
            print(f"{line}  {row['problem']}")
            continue
        if row["milliseconds"] is None:
            print(f"{line}  not timed: the time was up")
            continue
        ratio = "" if row["times_best_plain"] is None else f"{row['times_best_plain']:.2f}"
        print(
            f"{line} {row['milliseconds']:9.3f} {row['percent_of_floor']:8.1f} "
            f"{ratio:>7} {row['peak_mib']:9.1f}"
        )


def print_streamed(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line for each shape and number of crossings of the bus."""
    for row in rows:
        if "why" in row:
            print(f"features in main memory, {row['row']}: skipped, {row['why']}")
            continue
        what = f"{row['n']},{row['classes']},{row['dim']}, {row['crossings']} crossing(s)"
        shown = row["problem"] or (
            f"{row['milliseconds']:.2f} ms, {row['percent_of_floor']:.0f}% of a copy at "
            f"{row['gigabytes_per_second']:.1f} GB/s"
        )
        print(f"features in main memory, {what}: {shown}")


def main() -> int:
    """Run all stages; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="do not build")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    deadline = time.monotonic() + BUDGET - CLOSING
    gpu = torch.cuda.is_available()
    report: dict[str, Any] = {"conditions": conditions(gpu), "stages": stages(gpu, options.quick)}
    if not gpu:
        skipped("timing", "no CUDA device; a dry run on tiny shapes follows")
    report["dry_run"] = not gpu
    report["timing"] = measure(gpu, deadline)
    print_table(report["timing"])
    print_streamed(report["timing"]["streamed"])
    for entry in report["timing"]["skipped"]:
        print(f"skipped {entry['row']}: {entry['why']}")
    bad = [name for name, s in report["stages"].items() if s["outcome"].startswith("failed")]
    bad += [
        f"{r['contender']} {r['n']},{r['classes']},{r['dim']} {r['precision']}: {r['problem']}"
        for r in report["timing"]["rows"]
        if (r["problem"] or "").startswith(("wrong", "failed"))
        and r["contender"] not in ("eager", "compile")
    ]
    bad += [f"streaming: {r['problem']}" for r in report["timing"]["streamed"] if r.get("problem")]
    folder = options.out
    if folder is None and gpu:
        name = re.sub(r"[^A-Za-z0-9]+", "-", report["conditions"]["gpu"]).strip("-").lower()
        folder = ROOT / "benches" / "results" / name
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "gpu_check.json"
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path}")
    if not gpu:
        print("no CUDA device: nothing above is a GPU measurement; on one, run `make gpu-check`")
    for entry in bad:
        print(f"FAILED {entry}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
