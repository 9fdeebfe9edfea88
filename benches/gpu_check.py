"""All that needs a GPU, in one command of at most nine minutes and without network.

    make gpu-check        (or: python benches/gpu_check.py [--quick] [--out FOLDER] [--fresh])

Builds in place (the CUDA module for this GPU's generation alone), runs tests/gpu, where
compute-sanitizer is found its memcheck, racecheck and initcheck over the small shapes of the CUDA
C++ kernels and memcheck over those of the other backends, then times the H200 table
(gpu_timing.py; short jobs in CUDA graphs too) beside the times that gpu_predictions.py foretold,
and the gradients of a whole ResNet-50 (gpu_network.py). Prints a short table last and writes JSON
to benches/results/<GPU>/ or --out. Without a GPU it runs to its end all the same: it says what it
skipped, and walks through the timing on tiny shapes, whose numbers are no result.

The whole may take longer than one run: whatever is done is kept at once, and the same command goes
on from there, after a limit or a kill, while source, GPU and versions stay the same (--fresh begins
anew). "nothing is left" is the last line when all is there.

Exit code: 0 when nothing failed (skipping is not failing), 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import gpu_timing  # noqa: E402 (it imports the package of this source tree)
from gpu_network import print_network, time_network  # noqa: E402
from gpu_record import Record, source_hash  # noqa: E402
from gpu_report import aims, print_aims, print_streamed, print_table, ratios, summary  # noqa: E402
from native_plan import find_nvcc  # noqa: E402

from moso_fast.backends import backends  # noqa: E402

BUDGET = 540.0  # seconds, all stages together
CLOSING = 15.0  # of them for the table and the file
LIMITS = {"build": 300.0, "tests": 300.0, "sanitizer": 150.0, "memcheck": 240.0}
TIMING = 120.0  # of them that checks leave to the timing
NETWORK_AFTER = 5  # rows of the table, the most important first
SHORTEST = 20.0  # a check with less time than this is not begun
CUDA_TESTS = "tests/gpu/test_gpu_cuda.py"
GPU_TESTS = sorted(f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py"))


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


def stages(gpu: bool, quick: bool, deadline: float, record: Record) -> None:
    """Build, tests, compute-sanitizer; what an earlier run passed is not run again."""
    python = sys.executable

    def once(name: str, run: Callable[[], dict[str, Any]]) -> None:
        if record.passed(name):
            print(f"--- {name}: passed before", flush=True)
        else:
            record.put_stage(name, run())

    if quick:
        record.put_stage("build", skipped("build", "--quick takes what is built"))
    else:
        # Again in every run: where nothing changed, nothing is compiled.
        command = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
        record.put_stage("build", stage("build", command, LIMITS["build"], **architecture()))
    if not gpu:
        for name in (*GPU_TESTS, "memcheck"):
            record.put_stage(name, skipped(name, "no CUDA device"))
        return
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    for name in GPU_TESTS:
        command = [*pytest, name]
        once(name, lambda n=name, c=command: bounded(n, c, LIMITS["tests"], deadline))
    if not backends()["cuda"].available:
        record.put_stage("cuda", skipped("cuda", backends()["cuda"].reason))
    program = sanitizer()
    for name, tool, limit, tests, environment in checks(pytest):
        if program is None:
            record.put_stage(name, skipped(name, "compute-sanitizer is not installed"))
            continue
        command = [program, "--tool", tool, "--error-exitcode", "1", *tests]
        once(
            name,
            lambda n=name, c=command, s=limit, e=environment: bounded(n, c, s, deadline, **e),
        )


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
        "commit": ask("git", "rev-parse", "HEAD") or os.environ.get("MOSO_FAST_COMMIT"),
        "source": source_hash(),
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


def measure(gpu: bool, deadline: float, record: Record) -> None:
    """Time the table on the GPU, or walk through it on the CPU."""
    device = torch.device("cuda" if gpu else "cpu")
    left_out: list[dict[str, str]] = []
    roof = gpu_timing.ceilings(device, gpu_timing.Clock(device))
    record.run["ceilings"] = roof
    record.put("ceilings", roof)
    model = gpu_timing.ceilings_of_model(device, roof)

    def table(shapes: Sequence[tuple[int, int, int]]) -> None:
        # torch.compile on a CPU would call a C++ compiler for numbers that mean nothing.
        for shape in shapes:
            for dtype in (torch.bfloat16, torch.float32):
                kind = str(dtype).removeprefix("torch.")
                if record.timed(shape, kind):
                    print(f"{shape} {kind}: timed before", flush=True)
                    continue
                found = gpu_timing.time_row(
                    shape, dtype, device, roof, deadline, compiled=gpu, rounds=9 if gpu else 2
                )
                if isinstance(found, str):
                    left_out.append({"row": f"{shape} {kind}", "why": found})
                    print(f"{shape} {kind}: skipped, {found}", flush=True)
                else:
                    record.put_rows(summary(shape, found, roof, model))
                    print(f"{shape} {kind}: done", flush=True)
                if gpu:
                    torch.cuda.empty_cache()

    shapes = gpu_timing.TABLE if gpu else gpu_timing.DRY_TABLE
    table(shapes[:NETWORK_AFTER])
    _once(record, "network", deadline, left_out, lambda: time_network(device, 3 if gpu else 1))
    table(shapes[NETWORK_AFTER:])
    why = "no CUDA device" if not gpu else backends()["triton"].reason
    if gpu and backends()["triton"].available:
        before = record.timing.get("streamed", [])
        if not before or any("why" in row for row in before):
            record.put("streamed", gpu_timing.time_streaming(device, deadline, rounds=7))
    else:
        record.timing.setdefault("streamed", [])
        left_out.append({"row": "features in main memory", "why": why})
    record.put("skipped", left_out)


def _once(
    record: Record,
    name: str,
    deadline: float,
    left_out: list[dict[str, str]],
    work: Callable[[], dict[str, Any]],
) -> None:
    """Keep what ``work`` finds, unless an earlier run did or the time is up."""
    if name in record.timing:
        print(f"{name}: timed before", flush=True)
    elif time.monotonic() > deadline:
        left_out.append({"row": name, "why": "the time is up"})
    else:
        try:
            record.put(name, work())
            print(f"{name}: done", flush=True)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            left_out.append({"row": name, "why": "out of memory"})


def timed_to_its_end(gpu: bool, deadline: float, record: Record) -> dict[str, Any]:
    """Measure; return the outcome, also where a kernel took the device's context with it."""
    try:
        measure(gpu, deadline, record)
    except RuntimeError as error:
        record.timing.setdefault("streamed", [])
        record.timing.setdefault("skipped", [])
        outcome = f"failed: {str(error).splitlines()[0][:200]}"
        print(f"--- timing: {outcome}", flush=True)
        return {"outcome": outcome}
    return {"outcome": "passed"}


def unfinished(record: Record) -> list[str]:
    """Name what a further run would still do."""
    waits = ("the time is up", "cut short")
    found = [
        name
        for name, outcome in record.stages.items()
        if any(outcome.get(key, "").startswith(waits) for key in ("why", "outcome"))
    ]
    found += [e["row"] for e in record.timing["skipped"] if e["why"] == "the time is up"]
    found += [str(r["row"]) for r in record.timing["streamed"] if r.get("why") == "the time is up"]
    timed = {(r["n"], r["classes"], r["dim"], r["dtype"]) for r in record.timing["rows"]}
    return found + [str(key) for key in sorted(timed) if not record.timed(key[:3], key[3])]


def failures(record: Record) -> list[str]:
    """Name what is wrong: stages that failed, results of ours that are wrong or that failed."""
    bad = [name for name, s in record.stages.items() if s["outcome"].startswith("failed")]
    bad += [
        f"{r['contender']} {r['n']},{r['classes']},{r['dim']} {r['precision']}: {r['problem']}"
        for r in record.timing["rows"]
        if (r["problem"] or "").startswith(("wrong", "failed"))
        and r["contender"] not in ("eager", "compile")
    ]
    bad += [f"streaming: {r['problem']}" for r in record.timing["streamed"] if r.get("problem")]
    network = record.timing.get("network", {})
    return bad + ([f"whole network: {network['problem']}"] if network.get("problem") else [])


def main() -> int:
    """Run what no earlier run has done; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="do not build")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--fresh", action="store_true", help="do not go on with an earlier run")
    parser.add_argument(
        "--seconds", type=float, default=BUDGET, help="end after so long, the rest in another run"
    )
    options = parser.parse_args()
    begin = time.monotonic()
    deadline = begin + options.seconds - CLOSING
    gpu = torch.cuda.is_available()
    facts = conditions(gpu)
    folder = options.out
    if folder is None and gpu:
        name = re.sub(r"[^A-Za-z0-9]+", "-", facts["gpu"]).strip("-").lower()
        folder = ROOT / "benches" / "results" / name
    record = Record(None if folder is None else folder / "gpu_check.json", facts, options.fresh)
    if record.continued:
        print(f"going on with {record.path}, run {len(record.report['runs'])}", flush=True)
    record.report["dry_run"] = not gpu
    stages(gpu, options.quick, deadline - TIMING, record)
    if not gpu:
        skipped("timing", "no CUDA device; a dry run on tiny shapes follows")
    record.put_stage("timing", timed_to_its_end(gpu, deadline, record))
    rows = record.timing["rows"]
    ratios(rows)
    record.timing["aims"] = list(aims(rows))
    record.run["seconds"] = round(time.monotonic() - begin, 1)
    record.save()
    print_table(record.timing)
    print_streamed(record.timing["streamed"])
    if "network" in record.timing:
        print_network(record.timing["network"])
    print_aims(record.timing["aims"] if gpu else [])
    for entry in record.timing["skipped"]:
        print(f"skipped {entry['row']}: {entry['why']}")
    if record.path is not None:
        print(f"written: {record.path}")
    if not gpu:
        print("no CUDA device: nothing above is a GPU measurement; on one, run `make gpu-check`")
    bad, left = failures(record), unfinished(record)
    for entry in bad:
        print(f"FAILED {entry}")
    print(f"to be done by another run: {', '.join(left)}" if left else "nothing is left")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
