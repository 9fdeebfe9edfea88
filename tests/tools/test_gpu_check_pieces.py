"""benches/gpu/check, piece by piece: log, junit file, sources of a contender, aims, floor."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moso_fast.backends.triton.choice import REGIMES

ROOT = Path(__file__).resolve().parents[2]


def test_the_log_is_bounded(tmp_path) -> None:
    log = importlib.import_module("benches.gpu.check.log").Log(tmp_path / "log.txt", limit=1000)
    for number in range(200):
        log.write(f"line {number}")
    log.close()
    text = (tmp_path / "log.txt").read_text()
    assert text.startswith("line 0\nline 1\n") and len(text) < 1100
    assert text.endswith("[the log is full: nothing more is kept]\n")


def test_files_of_tests_go_into_one_junit_file(tmp_path) -> None:
    junit = importlib.import_module("benches.gpu.check.run").junit
    out = tmp_path / "junit.xml"
    suite = '<testsuites><testsuite name="pytest"><testcase name="{}"/></testsuite></testsuites>'
    for name, case in (("a", "old"), ("b", "other")):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.xml").write_text(suite.format(case))
    junit(tmp_path / "in", out)
    (tmp_path / "in" / "a.xml").write_text(suite.format("new"))
    junit(tmp_path / "in", out)
    junit(tmp_path / "in", out)  # nothing new: as it was
    text = out.read_text()
    assert 'name="new"' in text and 'name="other"' in text and 'name="old"' not in text


def copy_of_the_source(folder: Path) -> Path:
    for name in ("moso_fast", "kernels", "csrc", "benches/gpu", "tests"):
        for path in (ROOT / name).rglob("*"):
            if path.suffix in {".py", ".cu", ".cuh", ".h", ".cpp"}:
                out = folder / path.relative_to(ROOT)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_bytes(path.read_bytes())
    return folder


TOUCHED = {
    # Its splits and its self-term serve others too; regime blas asks where they are launched for
    # its norms and its masked gradient sum.
    "kernels/stored_alignment_kernels.py": {
        "triton/row_tiles",
        "triton/stored",
        "triton/blas",
        "triton/few_classes",
        "triton/recompute",
    },
    "kernels/stacked_alignment.py": {"triton/recompute"},
    "kernels/few_classes_tiles.py": {"triton/few_classes"},
    "kernels/row_tiles_kernel.py": {"triton/row_tiles"},
    "kernels/softmax_residual.py": {"triton/stored", "triton/recompute", "triton/blas"},
    "kernels/row_norms.py": {"triton/*"},  # named where they share what they keep of a row
    "moso_fast/backends/triton/regimes/blas.py": None,
    "csrc/cuda/few_classes_first.cuh": {"cuda"},
    "tests/native/cuda/emulator/block.cpp": set(),
    "moso_fast/backends/cuda/backend.py": {"cuda"},
    "moso_fast/core/engine.py": {"cuda", "torch", "triton/*"},
    "moso_fast/bench/providers/plain.py": {"plain"},
    "moso_fast/tables/table.py": set(),
    "benches/gpu/check/tables.py": set(),
}


def test_a_fix_leaves_timed_what_it_does_not_touch(tmp_path) -> None:
    """The hash of a contender follows the files that it runs, and no others."""
    sources = importlib.import_module("benches.gpu.check.sources")
    root = copy_of_the_source(tmp_path)
    regimes = {f"triton/{name}" for name in REGIMES}
    names = {"cuda", "torch", "plain", *regimes}

    def hashes() -> dict[str, str]:
        sources.fingerprint.cache_clear()
        return {n: sources.fingerprint(sources.of_contender(n), root) for n in names}

    before = hashes()
    assert before == {n: sources.of_unit([n]) for n in names}, "a copy is the same source"
    assert len(set(before.values())) == len(names)
    for path, expected in TOUCHED.items():
        original = (root / path).read_bytes()
        (root / path).write_bytes(original + b"\n")
        changed = {name for name, value in hashes().items() if value != before[name]}
        (root / path).write_bytes(original)
        if expected is None:
            assert "triton/blas" in changed and not changed & {"cuda", "torch", "plain"}
            continue
        wanted = {n for e in expected for n in (regimes if e == "triton/*" else {e})}
        assert changed == wanted, path
    assert hashes() == before


def test_tests_are_run_again_where_any_backend_has_changed(tmp_path) -> None:
    sources = importlib.import_module("benches.gpu.check.sources")
    found = sources.closure(sources.of_contender("tests/gpu/test_gpu_cuda.py"))
    assert "tests/support/core_support.py" in found


def timed(**more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    unit = {"shape": (1_280_000, 10, 512), "dtype": "bfloat16", "precision": "medium"} | {
        k: v for k, v in more.items() if k in ("shape", "dtype", "precision", "contender")
    }
    data = {k: v for k, v in more.items() if k not in unit}
    return unit, {"item_bytes": 2 if unit["dtype"] == "bfloat16" else 4, **data}


def test_aims_are_held_against_the_best_of_ours() -> None:
    aims = importlib.import_module("benches.gpu.check.aims")
    result_of = importlib.import_module("benches.gpu.check.record").Result
    fp32 = {"dtype": "float32", "precision": "highest"}
    given = [
        timed(contender="triton", milliseconds=1.0),
        timed(contender="cuda", milliseconds=0.8),
        timed(contender="compile", milliseconds=1.0),
        timed(contender="triton", milliseconds=2.0, **fp32),
        timed(contender="eager", milliseconds=6.0, **fp32),
        timed(contender="triton", shape=(50_000, 10, 512), milliseconds=1.0,
              graph_milliseconds=0.09),
    ]  # fmt: skip
    units = {str(number): unit for number, (unit, _) in enumerate(given)}
    found = [
        result_of("calls", str(number), "", 0, "done", data=data)
        for number, (_, data) in enumerate(given)
    ]
    found.append(result_of("calls", "0", "", 0, "wrong", data={"milliseconds": 0.1}))
    roof = {"read": 3.0e12, "copy": 3.6e12, "medium": 8e14, "highest": 6e13}
    rows = list(aims.rows(found, units, roof).values())
    assert len(rows) == 6, "a wrong result has no row"
    assert rows[1]["times"] == {"compile bf16": 1.25, "eager fp32": 7.5}
    assert "times" not in rows[2]
    floor = 2 * 1_280_000 * 512 * 2 / 3.6e9
    assert rows[1]["percent_of_floor"] == pytest.approx(100 * floor / 0.8)
    by_name = {(aim["row"], aim["what"]): aim for aim in aims.aims(rows)}
    row = "1280000,10,512"
    best = by_name[f"{row} bfloat16", "% of floor"]
    assert best["met"] is True and best["contender"] == "cuda"
    assert by_name[f"{row} bfloat16", "compile bf16"]["met"] is False
    assert by_name[f"{row} float32", "eager fp32"]["met"] is True
    assert by_name["50000,10,512 bfloat16", "ms in a graph, at most"]["met"] is True
    assert by_name["1280000,1000,512 bfloat16", "% of floor"]["met"] is None
    assert aims.rows(found[:1], units, {})["0"]["percent_of_floor"] is None


def test_floor_is_the_longer_of_reading_and_multiplying() -> None:
    floor_seconds = importlib.import_module("benches.gpu.table").floor_seconds
    roof = {"read": 4e12, "copy": 3e12, "medium": 8e14}
    few = floor_seconds((1_280_000, 10, 512), 2, "medium", roof)
    assert few == pytest.approx(2 * 1_280_000 * 512 * 2 / 4e12)
    many = floor_seconds((1_280_000, 1000, 2048), 2, "medium", roof)
    assert many == pytest.approx(6 * 1_280_000 * 1000 * 2048 / 8e14)


def test_the_process_that_runs_the_check_loads_nothing_that_a_gpu_takes_along() -> None:
    script = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "import benches.gpu.check.main\n"
        "print(sorted({'torch', 'triton', 'numpy', 'moso_fast'} & sys.modules.keys()))"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.stdout.strip() == "[]", child.stderr
