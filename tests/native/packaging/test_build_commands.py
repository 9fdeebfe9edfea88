"""The commands that build.ninja spells out, by file name, compiler and GPU; and their run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from packaging_support import BUILD_MODULES, script


@pytest.mark.parametrize(
    ("listed", "expected", "ptx"),
    [
        ("sm_75\nsm_80\nsm_90\nsm_100\nsm_103\nsm_120\n", ["80", "90a", "100"], "compute_100"),
        ("sm_70\nsm_80\nsm_90\n", ["80", "90a"], "compute_90"),
        ("sm_70\nsm_80\nsm_86\n", ["80"], "compute_80"),
        ("sm_100\nsm_120\n", ["100"], "compute_100"),
    ],
)
def test_architectures_are_those_that_nvcc_supports(
    monkeypatch: pytest.MonkeyPatch, listed: str, expected: list[str], ptx: str
) -> None:
    monkeypatch.syspath_prepend(BUILD_MODULES)
    from native_plan import gencode_flags, supported_architectures

    assert supported_architectures(listed) == expected
    flags = gencode_flags(expected)
    assert flags[-1] == f"-gencode=arch={ptx},code={ptx}"
    assert flags[:-1] == [f"-gencode=arch=compute_{a},code=sm_{a}" for a in expected]


AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl"
X86 = "-DMOSO_FAST_X86=1"
NO_AMX = "-DMOSO_FAST_NO_AMX=1"
NO_BF16 = f"-DMOSO_FAST_NO_AVX512BF16=1 {NO_AMX}"
GNU = "-Wa,-mbranches-within-32B-boundaries"
CLANG = "-mbranches-within-32B-boundaries"


def x86_compiler(*refused: str) -> str:
    """Return a shell script for a compiler that refuses options which hold one of these texts."""
    patterns = "|".join(f"*{text}*" for text in refused) or "nothing"
    return f"case \"$*\" in {patterns}) exit 1;; *) echo '#define __x86_64__ 1';; esac"


@pytest.mark.parametrize(
    ("compiler", "expected"),
    [
        (
            x86_compiler(),
            {
                "a": f"{X86} {GNU}",
                "a_avx2": f"{X86} {GNU} -mavx2 -mfma -mf16c",
                "a_avx512": f"{X86} {GNU} {AVX512} -mavx512bf16 -mavx2 -mfma -mf16c",
                "a_amx": f"{X86} {GNU} -mamx-tile -mamx-bf16 {AVX512} -mavx512bf16 -mavx2 "
                "-mfma -mf16c",
            },
        ),
        (
            x86_compiler("-Wa,", "amx"),
            {
                "a": f"{X86} {NO_AMX} {CLANG}",
                "a_avx2": f"{X86} {NO_AMX} {CLANG} -mavx2 -mfma -mf16c",
                "a_avx512": f"{X86} {NO_AMX} {CLANG} {AVX512} -mavx512bf16 -mavx2 -mfma -mf16c",
            },
        ),
        (
            x86_compiler("branches", "bf16"),
            {
                "a": f"{X86} {NO_BF16}",
                "a_avx2": f"{X86} {NO_BF16} -mavx2 -mfma -mf16c",
                "a_avx512": f"{X86} {NO_BF16} {AVX512} -mavx2 -mfma -mf16c",
            },
        ),
        ("echo '#define __aarch64__ 1'", {"a": ""}),
    ],
    ids=["g++", "clang without AMX", "old g++ and assembler", "aarch64"],
)
def test_instruction_sets_follow_file_name_and_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str, expected: dict[str, str]
) -> None:
    monkeypatch.syspath_prepend(BUILD_MODULES)
    monkeypatch.setenv("CXXFLAGS", "-DUSER")
    from native_ninja import CXX_FLAGS, Ninja, add_cpu
    from native_plan import Plan

    cxx = str(script(tmp_path / "c++", compiler))
    folder = tmp_path / "cpu"
    folder.mkdir()
    for name in ("a", "a_avx2", "a_avx512", "a_amx"):
        (folder / f"{name}.cpp").touch()
    ninja = Ninja(tmp_path / "build")
    add_cpu(ninja, Plan(mode="cpu", cxx=[cxx]), folder)
    ninja.write()
    text = (tmp_path / "build" / "build.ninja").read_text()
    commands = dict(re.findall(r"^build cpu/(\w+)\.cpp\.o: .*\n  cmd = (.*)$", text, re.MULTILINE))
    start = " ".join([cxx, *CXX_FLAGS, f"-I{folder}"])
    assert commands == {
        name: " ".join(filter(None, [start, flags, "-DUSER"])) for name, flags in expected.items()
    }


def test_nvcc_is_looked_for_where_it_usually_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(BUILD_MODULES)
    import native_plan

    places = {
        name: script(tmp_path / name / "bin" / "nvcc", "echo sm_90")
        for name in ("CUDA_HOME", "CUDA_PATH", "PATH", "fixed")
    }
    monkeypatch.setattr(native_plan, "NVCC_FOLDER", str(places["fixed"].parent))
    env = {name: str(tmp_path / name) for name in ("CUDA_HOME", "CUDA_PATH")}
    env |= {"PATH": str(places["PATH"].parent), "MOSO_FAST_BUILD": "cuda"}
    for nvcc in places.values():
        assert native_plan.find_nvcc(env) == (str(nvcc), ["90a"], "")
        nvcc.unlink()
    script(tmp_path / "PATH" / "bin" / "c++", "")
    error = native_plan.make_plan(env).error
    assert error.startswith("MOSO_FAST_BUILD=cuda cannot be met: nvcc was not found")
    for place in ("$CUDA_HOME/bin", "$CUDA_PATH/bin", "PATH", native_plan.NVCC_FOLDER):
        assert place in error


@pytest.mark.parametrize(("value", "debug"), [("", False), ("0", False), ("1", True)])
def test_nvcc_bounds_waits_in_debug_builds_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str, debug: bool
) -> None:
    monkeypatch.syspath_prepend(BUILD_MODULES)
    from native_ninja import Ninja, add_cuda
    from native_plan import make_plan, write_info

    for name, text in (("c++", ""), ("nvcc", "echo sm_90")):
        script(tmp_path / "bin" / name, text)
    wanted = {"MOSO_FAST_CUDA_ARCHITECTURES": "all", "MOSO_FAST_CUDA_DEBUG": value}
    plan = make_plan({"PATH": str(tmp_path / "bin"), **wanted})
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "a.cu").touch()
    ninja = Ninja(tmp_path / "build")
    add_cuda(ninja, plan, tmp_path / "cuda")
    ninja.write()
    text = (tmp_path / "build" / "build.ninja").read_text()
    (command,) = re.findall(r"^build cuda/a\.cu\.o: .*\n  cmd = (.*)$", text, re.MULTILINE)
    for flag in ("-DMOSO_FAST_BOUNDED_WAITS", "-lineinfo"):
        assert (flag in command.split()) == debug
    write_info(plan, tmp_path)
    assert json.loads((tmp_path / "_build_info.json").read_text())["cuda_debug"] == debug


def test_one_ninja_run_for_all_goes_on_past_what_may_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BUILD_MODULES)
    from native_ninja import Ninja

    monkeypatch.setenv("MAX_JOBS", "1")  # what comes after an error is not already under way
    compiler = script(
        tmp_path / "c++",
        'for out in "$@"; do :; done\n'  # the last argument
        'case "$*" in *broken*) echo "x: error: broken"; exit 1;; esac; : > "$out"; : > "$out.d"',
    )

    def ninja(name: str, *broken: str) -> Ninja:
        ninja = Ninja(tmp_path / name)
        for module in ("cuda", "cpu"):
            (tmp_path / module).mkdir(exist_ok=True)
            source = tmp_path / module / ("broken.cpp" if module in broken else "good.cpp")
            source.touch()
            ninja.link(f"_{module}.so", [ninja.compile(source, [str(compiler)])], [str(compiler)])
        ninja.write()
        return ninja

    assert ninja("good").run(["_cpu", "_cuda"])[0] == set()
    tried = ninja("cuda", "cuda")
    failed, words = tried.run(["_cpu"], ["_cuda"])
    assert failed == {"_cuda"}
    assert "x: error: broken" in words
    assert (tmp_path / "cuda" / "_cpu.so").is_file()
    assert tried.run(["_cpu", "_cuda"])[0] == {"_cuda"}
    assert ninja("cpu", "cpu").run(["_cpu"], ["_cuda"])[0] == {"_cpu"}
    assert ninja("both", "cpu", "cuda").run(["_cpu"], ["_cuda"])[0] == {"_cpu", "_cuda"}
    without_source = ninja("without source")
    (tmp_path / "cpu" / "good.cpp").unlink()
    with pytest.raises(SystemExit, match="ninja ended with exit code 1"):
        without_source.run(["_cpu"])
