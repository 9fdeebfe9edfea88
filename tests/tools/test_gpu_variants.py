"""The timing of tiles, `python -m benches.gpu variants`, on a few rows in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton", reason="Triton has no wheel for this platform")


def variants(*arguments: str, interpret: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    command = [sys.executable, "-m", "benches.gpu", "variants", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.exhaustive
def test_every_variant_runs(tmp_path) -> None:
    out = tmp_path / "variants.jsonl"
    done = variants("--out", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line for line in lines if "why" in line] == []
    names = [(line["part"], line["name"]) for line in lines]
    assert len(set(names)) == len(names)
    parts = {"rows", "sums", "alignments", "residuals", "sweeps"}  # products are CUDA's alone
    assert {part for part, _ in names} == parts


@pytest.mark.exhaustive
def test_one_share_is_compiled_by_one_process(tmp_path) -> None:
    done = variants("--part", "sweeps", "--compile", "1/3")
    assert done.returncode == 0 and done.stdout == ""


@pytest.mark.exhaustive
def test_without_a_gpu_nothing_is_timed(tmp_path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = variants("--out", str(tmp_path / "x"), interpret=False)
    assert done.returncode == 1 and "no CUDA device" in done.stderr
    assert not (tmp_path / "x").exists()
