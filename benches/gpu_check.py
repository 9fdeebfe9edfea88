"""All that needs a GPU, in one command of at most nine minutes and without network.

    make gpu-check        (or: python benches/gpu_check.py [--quick] [--out FOLDER])

Builds in place (the CUDA module for this GPU's generation alone), runs tests/gpu, where
compute-sanitizer is found its memcheck, racecheck and initcheck over the small shapes of the CUDA
C++ kernels and memcheck over those of the other backends, then times the H200 table
(gpu_timing.py), short jobs in CUDA graphs too. Prints a short table last and writes JSON to
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
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import gpu_timing  # noqa: E402 (it imports the package of this source tree)
from gpu_timing import Contender  # noqa: E402
from native_plan import find_nvcc  # noqa: E402

from moso_fast.backends import backends  # noqa: E402

BUDGET = 540.0  # seconds, all stages together
CLOSING = 15.0  # of them for the table and the file
LIMITS = {"build": 150.0, "tests": 210.0, "sanitizer": 60.0, "memcheck": 90.0}
TIMING = 120.0  # of them that checks leave to the timing
SHORTEST = 20.0  # a check with less time than this is not begun
CUDA_TESTS = "tests/gpu/test_gpu_cuda.py"


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


def architecture() -> dict[str, str]:
    """Environment that compiles the CUDA module for this GPU alone, a third of the time."""
    if "MOSO_FAST_CUDA_ARCHITECTURES" in os.environ or not torch.cuda.is_available():
        return {}
    major = torch.cuda.get_device_capability(0)[0]
    known = find_nvcc(os.environ)[1]
    names = [name for name in known if int(name.rstrip("a")) // 10 == major]
    return {"MOSO_FAST_CUDA_ARCHITECTURES": names[-1]} if names else {}


def bounded(
    name: str, command: Sequence[str], limit: float, deadline: float, **environment: str
) -> dict[str, Any]:
    """Run a stage in what is left of the time; being cut short by that is no failure."""
    left = deadline - time.monotonic()
    if left < SHORTEST:
        return skipped(name, "the time is up")
    done = stage(name, command, min(limit, left), **environment)
    if left < limit and done["outcome"].startswith("failed: not done"):
        done["outcome"] = f"cut short after {left:.0f} s: the time was up"
    return done


def checks(pytest: Sequence[str]) -> list[tuple[str, str, float, list[str], dict[str, str]]]:
    """Name, tool of compute-sanitizer, limit, test command and environment of each check."""
    # Without PyTorch's pool every tensor is an allocation of its own, with watched borders.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    cuda = [*pytest, CUDA_TESTS, "-k", "small"]
    others = [*pytest, "tests/gpu", f"--ignore={CUDA_TESTS}", "-k", "small"]
    found = [
        (f"cuda {tool}", tool, LIMITS["sanitizer"], cuda, environment)
        for tool, environment in (
            ("memcheck", apart),
            ("racecheck", {}),
            ("initcheck", {**apart, "MOSO_FAST_RAW_MEMORY": "1"}),
        )
        if backends()["cuda"].available
    ]
    return [*found, ("memcheck", "memcheck", LIMITS["memcheck"], others, apart)]


def stages(gpu: bool, quick: bool, deadline: float) -> dict[str, Any]:
    """Build, tests, compute-sanitizer."""
    python = sys.executable
    done: dict[str, Any] = {}
    if quick:
        done["build"] = skipped("build", "--quick takes what is built")
    else:
        command = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
        done["build"] = stage("build", command, LIMITS["build"], **architecture())
    if not gpu:
        for name in ("tests/gpu", "memcheck"):
            done[name] = skipped(name, "no CUDA device")
        return done
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done["tests/gpu"] = bounded("tests/gpu", [*pytest, "tests/gpu"], LIMITS["tests"], deadline)
    if not backends()["cuda"].available:
        done["cuda"] = skipped("cuda", backends()["cuda"].reason)
    program = sanitizer()
    for name, tool, limit, tests, environment in checks(pytest):
        if program is None:
            done[name] = skipped(name, "compute-sanitizer is not installed")
            continue
        command = [program, "--tool", tool, "--error-exitcode", "1", *tests]
        done[name] = bounded(name, command, limit, deadline, **environment)
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
                "peak_mib": None if c.peak_bytes is None else c.peak_bytes / 2**20,
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
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
        print(
            f"{line} {row['milliseconds']:9.3f} {row['percent_of_floor']:8.1f} {ratio:>7} {peak:>9}"
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
    report: dict[str, Any] = {"conditions": conditions(gpu)}
    report["stages"] = stages(gpu, options.quick, deadline - TIMING)
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
