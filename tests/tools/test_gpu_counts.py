"""Launches and instructions that the predictions for a GPU are made of, counted again; no GPU."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="its kernels, compiler and disassembler are what is counted")

from moso_fast.util.native import build_info, load_native

compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="starts or compiles what is not interpreted"
)


@pytest.fixture
def load():
    return lambda name: importlib.import_module(f"benches.gpu.{name}")


@pytest.fixture
def built() -> None:
    if load_native("_cuda").module is None:
        pytest.skip("moso_fast._cuda, whose plans and code are looked at, is not built")


@pytest.mark.generated
@compiles
def test_launches_are_those_that_are_counted(load) -> None:
    script = load("model.predictions")
    committed = json.loads(script.COUNTS.read_text(encoding="utf-8"))
    for name, (once, each) in script.count().items():
        # Versions of PyTorch compose a few operations differently.
        assert abs(once - committed[name][0]) <= 4 and abs(each - committed[name][1]) <= 4, name


@pytest.mark.generated
@compiles
def test_instructions_are_those_that_the_compiler_makes(load) -> None:
    instructions, occupancy = load("model.instructions"), load("model.occupancy")
    version = instructions.installed()
    committed = occupancy._counted().get(version)
    if committed is None:
        pytest.skip(
            f"nobody has counted with Triton {version}: python -m benches.gpu predict --count"
        )
    case = "first-16x16x512-bf16-bf16-full"
    (found,) = instructions.count(case).values()
    for phase, (length, barriers) in found.items():
        assert committed[case][phase][0] == pytest.approx(length, rel=0.1, abs=20), phase
        assert abs(committed[case][phase][1] - barriers) <= 3, phase


@pytest.mark.generated
def test_loops_of_cuda_kernels_are_those_that_were_counted(load, built, tmp_path) -> None:
    """Innermost loops that multiply: the last one makes the gradient, those before the logits."""
    if "90a" not in build_info().get("cuda_architectures", []):
        pytest.skip("counted for sm_90a, which this module was not built for")
    work, instructions = load("model.cuda_work"), load("model.instructions")
    tools = Path(importlib.import_module("triton").__file__).parent / "backends" / "nvidia" / "bin"
    module = load_native("_cuda").module
    subprocess.run([tools / "cuobjdump", "-xelf", "sm_90a", module.__file__], cwd=tmp_path,
                   check=True, capture_output=True)  # fmt: skip
    name = re.compile(r"first_pass_kernelILNS\w*?7FeatureE([01])ELb([01])ELi(\d+)EE")
    seen = set()
    for cubin in tmp_path.glob("*.cubin"):
        sass = subprocess.run([tools / "nvdisasm", "-c", cubin], check=True, capture_output=True,
                              text=True).stdout  # fmt: skip
        for part in re.split(r"^\.text\.", sass, flags=re.MULTILINE)[1:]:
            found = name.match(
                part.partition(":")[0].partition("few_classes")[2].lstrip("0123456789")
            )
            if found is None:
                continue
            key = (4 if found[1] == "0" else 2, found[2] == "1", int(found[3]))
            if key in work.LOGITS:
                *logits, gradient = instructions.innermost_products(instructions.read_code(part))
                length = sum(each for each, _ in logits)
                assert work.LOGITS[key].instructions == pytest.approx(length, rel=0.1), key
                assert work.GRADIENT[key].instructions == pytest.approx(gradient[0], rel=0.1), key
                seen.add(key)
    assert seen == set(work.LOGITS)


def test_issue_cycles_of_a_tile_are_what_they_were(load, built) -> None:
    """Some 2,972 for 64 rows of 512 bfloat16 elements and 10 classes, by the loops of the kernel.

    The kernel before it, with one block a multiprocessor, took 4,600.
    """
    work, jobs, gpu = load("model.cuda_work"), load("model.jobs"), load("model.roofline").H200
    problem = jobs.outline((1_280_000, 10, 512), torch.bfloat16, "medium")
    plan = jobs.cuda_jobs.plan_of(problem, gpu.shared_bytes)
    kernel = work.Kernel(plan, 10, 512, 2, False)
    phases = work.first_phases(kernel, 1.0, gpu, 0.0, 0.0)
    cycles = sum(phase.cycles for phase in phases)
    assert cycles * 64 / plan["tile_rows"] == pytest.approx(2972, rel=0.05)
