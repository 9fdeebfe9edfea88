"""What is built: MOSO_FAST_BUILD, compilers, GPUs, and what is said where something is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging_support import BUILD_MODULES, CXX, build, built, script

if TYPE_CHECKING:
    from native_plan import Plan

needs_cxx = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")


BROKEN_NVCC = (
    'case "$*" in *--list-gpu-code*) echo sm_90;; *) echo "x.cu: error: broken"; exit 1;; esac'
)


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("mode", "programs", "env", "message"),
    [
        ("fast", {}, {}, "MOSO_FAST_BUILD='fast' is not one of auto, none, cpu, cuda, all"),
        ("cpu", {}, {}, "MOSO_FAST_BUILD=cpu cannot be met: no C++ compiler was found"),
        ("cuda", {}, {}, "MOSO_FAST_BUILD=cuda cannot be met: no C++ compiler was found"),
        ("cuda", {"c++": ""}, {}, "MOSO_FAST_BUILD=cuda cannot be met: nvcc was not found"),
        ("all", {"c++": ""}, {}, "MOSO_FAST_BUILD=all cannot be met: nvcc was not found"),
        (
            "cuda",
            {"c++": "", "nvcc": "echo sm_52"},
            {},
            "nvcc supports none of sm_80, sm_90a, sm_100",
        ),
        (
            "auto",
            {"c++": "", "nvcc": "echo sm_80 sm_90"},
            {"MOSO_FAST_CUDA_ARCHITECTURES": "80 89"},
            "MOSO_FAST_CUDA_ARCHITECTURES names '89', which is not one of 80 90a all",
        ),
        ("auto", {}, {"CXX": "no-such-c++ -m64"}, "CXX names 'no-such-c++', which cannot be found"),
        ("auto", {"c++": "echo broken; exit 1"}, {}, "MOSO_FAST_BUILD=none installs pure Python"),
    ],
)
def test_a_choice_that_cannot_be_met_ends_in_one_line(
    source: Path, tmp_path: Path, mode: str, programs: dict, env: dict, message: str
) -> None:
    for name, text in programs.items():
        script(tmp_path / "bin" / name, text)
    done = build(source, "build_wheel", tmp_path, mode, PATH=f"{tmp_path / 'bin'}", **env)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("moso_fast: error: ")
    assert message in last


@pytest.mark.exhaustive
@needs_cxx
@pytest.mark.usefixtures("native_wheel")  # its objects are reused
def test_broken_nvcc_is_reported_and_left_out_unless_asked_for(
    source: Path, tmp_path: Path
) -> None:
    home = script(tmp_path / "cuda" / "bin" / "nvcc", BROKEN_NVCC).parent.parent
    every = {"MOSO_FAST_CUDA_ARCHITECTURES": ""}
    done = build(source, "build_wheel", tmp_path, "auto", CUDA_HOME=str(home), **every)
    names = zipfile.ZipFile(built(done, tmp_path)).namelist()
    assert any(re.match(r"moso_fast/_cpu\..*so$", name) for name in names)
    assert not any(name.startswith("moso_fast/_cuda") for name in names)
    assert "moso_fast._cuda is left out" in done.stderr
    assert "x.cu: error: broken" in done.stderr

    done = build(source, "build_wheel", tmp_path, "cuda", CUDA_HOME=str(home), **every)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("moso_fast: error: the CUDA build")


@pytest.fixture
def plan_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Return make_plan on a machine with a C++ compiler, an nvcc and the given programs."""
    monkeypatch.syspath_prepend(BUILD_MODULES)
    import native_gpu
    from native_plan import make_plan

    monkeypatch.setattr(native_gpu, "WSL_FOLDER", "/nowhere")

    def plan_for(env: dict, pass_on: bool = False, **programs: str) -> Plan:
        for name, text in {"c++": "", "nvcc": "echo sm_80 sm_90 sm_100", **programs}.items():
            script(tmp_path / "bin" / name, text)
        return make_plan({"PATH": str(tmp_path / "bin"), **env}, pass_on)

    return plan_for


# What nvidia-smi prints, and the program beside nvcc that `nvcc -arch=native` asks.
SMI, QUERY = "nvidia-smi", "__nvcc_device_query"
OLD_SMI = "echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2"
NO_DRIVER = "echo NVIDIA-SMI has failed because it could not reach the driver; exit 9"


@pytest.mark.parametrize(
    ("programs", "built_for", "reason"),
    [
        ({SMI: "echo 9.0"}, ["90a"], ""),
        ({SMI: "echo 8.9; echo 8.6"}, ["80"], ""),
        ({SMI: "echo 10.3; echo 8.0; echo 10.3"}, ["80", "100"], ""),
        ({SMI: OLD_SMI, QUERY: "echo 90"}, ["90a"], ""),
        ({QUERY: "echo 80,100"}, ["80", "100"], ""),
        ({}, [], "nvcc was found but no GPU"),
        ({SMI: NO_DRIVER, QUERY: "echo failed with error 0x3; exit 1"}, [], "but no GPU"),
        ({SMI: "echo 7.5"}, [], "for sm_80, sm_90a, sm_100, and this machine's GPU is sm_75"),
        ({SMI: "echo 12.0"}, [], "and this machine's GPU is sm_120"),
        (
            {SMI: "echo 10.0", "nvcc": "echo sm_80 sm_90"},
            [],
            "nvcc is too old for this machine's GPU, sm_100",
        ),
    ],
)
def test_cuda_is_built_for_the_gpus_of_this_machine_alone(
    plan_for: Callable[..., Plan], programs: dict, built_for: list, reason: str
) -> None:
    plan = plan_for({}, **programs)
    assert not plan.error
    assert plan.modules == (["_cpu", "_cuda"] if built_for else ["_cpu"])
    if built_for:
        assert plan.cuda_architectures == built_for
        assert plan.missing == {}
    else:
        assert reason in plan.missing["_cuda"]


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ("80", ["80", "86"], "80"),
        ("89", ["80", "86", "90a"], "86"),
        ("90", ["80", "90a", "100"], "90a"),
        ("91", ["80", "90a", "100"], None),
        ("103", ["100", "120"], "100"),
        ("120", ["80", "90a", "100"], None),
    ],
)
def test_code_runs_on_later_devices_of_a_major_version_unless_it_has_an_a(
    monkeypatch: pytest.MonkeyPatch, capability: str, architectures: list, expected: str | None
) -> None:
    monkeypatch.syspath_prepend(BUILD_MODULES)
    from native_gpu import architecture_of

    assert architecture_of(capability, architectures) == expected


def test_each_kind_of_gpu_is_named_once_oldest_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(BUILD_MODULES)
    from native_gpu import capabilities

    script(tmp_path / SMI, "echo 10.3; echo 9.0; echo 10.3; echo 8.6")
    assert capabilities({"PATH": str(tmp_path)}, "/nowhere/nvcc") == ["86", "90", "103"]


@pytest.mark.parametrize(
    ("env", "pass_on", "built_for"),
    [
        ({"MOSO_FAST_CUDA_ARCHITECTURES": "all"}, False, ["80", "90a", "100"]),
        ({"MOSO_FAST_CUDA_ARCHITECTURES": "100, 80"}, False, ["80", "100"]),
        ({"MOSO_FAST_BUILD": "cuda"}, False, ["80", "90a", "100"]),
        ({"MOSO_FAST_BUILD": "all"}, False, ["80", "90a", "100"]),
        ({"MOSO_FAST_BUILD": "all", "MOSO_FAST_CUDA_ARCHITECTURES": "90a"}, False, ["90a"]),
        ({}, True, ["80", "90a", "100"]),
        ({"MOSO_FAST_BUILD": "cpu", "MOSO_FAST_CUDA_ARCHITECTURES": "all"}, False, []),
        ({"MOSO_FAST_BUILD": "cpu"}, True, []),
    ],
)
@pytest.mark.parametrize("gpu", [{}, {SMI: "echo 9.0"}], ids=["no GPU", "GPU"])
def test_whoever_asks_gets_cuda_whatever_gpu_is_here(
    plan_for: Callable[..., Plan], env: dict, pass_on: bool, built_for: list, gpu: dict
) -> None:
    plan = plan_for(env, pass_on=pass_on, **gpu)
    assert not plan.error
    assert plan.modules == (["_cpu", "_cuda"] if built_for else ["_cpu"])
    assert plan.cuda_architectures == built_for


@pytest.mark.parametrize(
    ("command", "env", "expected"),
    [
        ("bdist_wheel", {}, True),  # python -m build
        ("bdist_wheel", {"PIP_BUILD_TRACKER": "/tmp/x"}, False),  # pip install
        ("bdist_wheel", {"PIP_REQ_TRACKER": "/tmp/x"}, False),
        ("bdist_wheel", {"UV": "/usr/bin/uv"}, False),
        ("editable_wheel", {}, False),
        ("build_ext", {}, False),
    ],
)
def test_a_wheel_is_for_others_unless_an_installer_builds_it(
    monkeypatch: pytest.MonkeyPatch, command: str, env: dict, expected: bool
) -> None:
    monkeypatch.syspath_prepend(BUILD_MODULES)
    from native_plan import wheel_to_pass_on

    assert wheel_to_pass_on(["setup.py", command, "--dist-dir", "x"], env) is expected


# pip's own environment, not what a test believes of it: the backend of this project writes it down.
RECORDER = """
import os, sys
def build_wheel(folder, settings=None, metadata=None):
    with open(os.path.join(os.path.dirname(__file__), "seen"), "w") as file:
        file.write("\\n".join(os.environ))
    raise SystemExit("recorded")
"""


@pytest.mark.exhaustive
def test_pip_leaves_the_mark_by_which_an_installation_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("this environment has no pip")
    monkeypatch.syspath_prepend(BUILD_MODULES)
    from native_plan import wheel_to_pass_on

    (tmp_path / "recorder.py").write_text(RECORDER)
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "recorder"\nbackend-path = ["."]\n'
        '[project]\nname = "recorder"\nversion = "1"\n'
    )
    command = [*pip, "install", "--no-build-isolation", "--no-deps", "--target", "x", "."]
    env = {name: value for name, value in os.environ.items() if name != "UV"}
    subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False)
    seen = dict.fromkeys((tmp_path / "seen").read_text().splitlines(), "set")
    assert not wheel_to_pass_on(["setup.py", "bdist_wheel"], seen)
