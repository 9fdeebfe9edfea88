"""Wheel, sdist, editable and uninstalled trees: built offline by this environment's tools.

One copy of the tree serves every test, so that the native sources are compiled once. What was
built is imported by an isolated interpreter that sees this environment's packages, but neither
its moso_fast nor the working directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
CXX = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree"),
    pytest.mark.skipif(os.name == "nt", reason="nothing native is built on Windows"),
]
needs_cxx = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

# Of the compilers of this machine, a build finds those on its PATH.
HOOK = """
import json, sys
sys.path.insert(0, "tools")
import native_plan
native_plan.NVCC_FOLDER = "/nowhere"
from setuptools import build_meta
hook, folder, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
name = getattr(build_meta, hook)(folder, *([settings] if settings else []))
print("built:" + name)
"""

# Runs under -I -S: sys.path is the standard library, then what is given here.
PROBE = """
import importlib, importlib.util, json, site, sys
target, dependencies, names = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
site.addsitedir(target)
sys.path.append(dependencies)
import moso_fast
from moso_fast.util.native import build_info, load_native
specs = {name: importlib.util.find_spec("moso_fast.kernels." + name) for name in names}
if importlib.util.find_spec("triton") is not None:
    for name in names:
        importlib.import_module("moso_fast.kernels." + name)
top = importlib.util.find_spec("kernels")
native = {name: load_native(name) for name in ("_cpu", "_cuda")}
json.dump({
    "package": moso_fast.__file__,
    "kernels": {name: spec and spec.origin for name, spec in specs.items()},
    "top_level_kernels": top and (top.origin or list(top.submodule_search_locations)),
    "native": {name: found.module and found.module.__file__ for name, found in native.items()},
    "reason": {name: found.reason for name, found in native.items()},
    "how": {name: found.how for name, found in native.items()},
    "info": build_info(),
}, sys.stdout)
"""


def copy_tree(target: Path) -> None:
    """Copy what is packed or built: the files at the root and these folders, no build outputs."""
    target.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for name in ("benches", "csrc", "kernels", "moso_fast", "tests", "tools"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, target)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the source tree; build folders and objects in it are shared."""
    target = tmp_path_factory.mktemp("source") / "moso_fast"
    copy_tree(target)
    return target


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of links to every installed package but ours."""
    farm = tmp_path_factory.mktemp("dependencies")
    paths = sysconfig.get_paths()
    for folder in dict.fromkeys([paths["purelib"], paths["platlib"], *site.getsitepackages()]):
        for entry in Path(folder).iterdir() if Path(folder).is_dir() else ():
            ours = entry.name.lower().startswith(("moso_fast", "__editable__", "kernels"))
            if not (ours or entry.suffix == ".pth" or (farm / entry.name).exists()):
                (farm / entry.name).symlink_to(entry)
    return farm


def build(
    source: Path,
    hook: str,
    out: Path,
    mode: str,
    *,
    settings: dict[str, str] | None = None,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Call one build hook (PEP 517) as pip does, with MOSO_FAST_BUILD=mode."""
    out.mkdir(parents=True, exist_ok=True)
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "CUDA_PATH")}
    # -O1 and one kind of GPU: the tests need the modules to exist, not to be fast.
    clean |= {"MOSO_FAST_BUILD": mode, "CXXFLAGS": "-O1", "MOSO_FAST_CUDA_ARCHITECTURES": "80"}
    clean |= env
    command = [sys.executable, "-c", HOOK, hook, str(out), json.dumps(settings)]
    return subprocess.run(
        command, cwd=source, env=clean, capture_output=True, text=True, check=False
    )


def built(done: subprocess.CompletedProcess[str], out: Path) -> Path:
    """Return the file that a successful hook reported."""
    assert done.returncode == 0, done.stderr[-4000:]
    return out / re.findall(r"^built:(.+)$", done.stdout, re.MULTILINE)[-1]


def install(wheel: Path, target: Path) -> Path:
    """Unpack a wheel as pip would into site-packages (less the scripts)."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def probe(target: Path, dependencies: Path) -> dict:
    """Import moso_fast and its kernels from target in a bare interpreter; return what it saw."""
    command = [sys.executable, "-I", "-S", "-c", PROBE, str(target), str(dependencies)]
    done = subprocess.run(
        [*command, json.dumps(KERNELS)], cwd=target, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def assert_kernels_in(seen: dict, folder: Path) -> None:
    assert KERNELS, "kernels/ holds no module: the checks below would show nothing"
    for name, origin in seen["kernels"].items():
        assert origin is not None, f"moso_fast.kernels.{name} is not importable"
        assert Path(origin).resolve() == (folder / f"{name}.py").resolve()


@pytest.fixture(scope="module")
def native_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel with the modules whose compilers are found here."""
    out = tmp_path_factory.mktemp("native")
    return built(build(source, "build_wheel", out, "auto"), out)


@needs_cxx
def test_wheel_holds_native_modules_and_kernels(
    native_wheel: Path, dependencies: Path, tmp_path: Path
) -> None:
    assert not native_wheel.name.endswith("-none-any.whl")
    target = install(native_wheel, tmp_path / "site")
    names = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert {"moso_fast/py.typed", "moso_fast/_build_info.json"} <= names
    assert {f"moso_fast/kernels/{name}.py" for name in KERNELS} <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"moso_fast"}
    entry_points = next(target.glob("*.dist-info/entry_points.txt")).read_text()
    assert "moso-fast = moso_fast.cli:main" in entry_points

    seen = probe(target, dependencies)
    assert Path(seen["package"]).parent == target / "moso_fast"
    assert_kernels_in(seen, target / "moso_fast" / "kernels")
    assert seen["top_level_kernels"] is None
    assert Path(seen["native"]["_cpu"]).parent == target / "moso_fast"
    if shutil.which("nvcc"):
        assert seen["native"]["_cuda"], seen["reason"]["_cuda"]
    else:
        assert "nvcc was not found" in seen["reason"]["_cuda"]
        assert "nvcc" in seen["how"]["_cuda"]


def test_sdist_is_complete_and_builds_a_pure_wheel(
    source: Path, dependencies: Path, tmp_path: Path
) -> None:
    sdist = built(build(source, "build_sdist", tmp_path, "auto"), tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    packed = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    wanted = {
        str(path.relative_to(ROOT))
        for name in ("benches", "csrc", "kernels", "moso_fast", "tests", "tools")
        for path in (ROOT / name).rglob("*")
        if path.is_file()
    }
    outputs = re.compile(r"__pycache__|\.so$|_build_info\.json$")
    assert {name for name in wanted if not outputs.search(name)} <= packed
    assert not {name for name in packed if outputs.search(name)}
    assert {"README.md", "LICENSE", "constraints.txt", "setup.py", "pyproject.toml"} <= packed

    done = build(unpacked, "build_wheel", tmp_path / "wheel", "none")
    wheel = built(done, tmp_path / "wheel")
    assert wheel.name.endswith("-py3-none-any.whl")
    target = install(wheel, tmp_path / "site")
    seen = probe(target, dependencies)
    assert_kernels_in(seen, target / "moso_fast" / "kernels")
    assert seen["native"] == {"_cpu": None, "_cuda": None}
    assert "MOSO_FAST_BUILD=none" in seen["reason"]["_cpu"]


@needs_cxx
@pytest.mark.parametrize("style", ["lenient", "strict"])
@pytest.mark.usefixtures("native_wheel")  # its objects are reused
def test_editable_install(source: Path, dependencies: Path, tmp_path: Path, style: str) -> None:
    settings = {"editable_mode": style}
    done = build(source, "build_editable", tmp_path / "out", "cpu", settings=settings)
    target = install(built(done, tmp_path / "out"), tmp_path / "site")
    seen = probe(target, dependencies)
    assert Path(seen["package"]).resolve() == source / "moso_fast" / "__init__.py"
    assert_kernels_in(seen, source / "kernels")
    assert Path(seen["native"]["_cpu"]).resolve().parent == source / "moso_fast"
    assert "MOSO_FAST_BUILD=cpu" in seen["reason"]["_cuda"]
    assert seen["info"]["built"] == ["_cpu"]
    assert seen["top_level_kernels"] is None


def test_editable_install_without_compiling_leaves_no_binary_behind(
    source: Path, dependencies: Path, tmp_path: Path
) -> None:
    stale = source / "moso_fast" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.write_bytes(b"what an earlier build left")
    done = build(source, "build_editable", tmp_path / "out", "none")
    seen = probe(install(built(done, tmp_path / "out"), tmp_path / "site"), dependencies)
    assert seen["info"]["mode"] == "none"
    assert seen["native"] == {"_cpu": None, "_cuda": None}
    assert "MOSO_FAST_BUILD=none" in seen["reason"]["_cpu"]


def test_uninstalled_tree_beside_another_kernels_package(
    dependencies: Path, tmp_path: Path
) -> None:
    tree, other = tmp_path / "tree", tmp_path / "other"
    copy_tree(tree)
    (other / "kernels").mkdir(parents=True)
    (other / "kernels" / "__init__.py").write_text("def get_kernel(): return 'theirs'\n")
    (other / "theirs.pth").write_text("import kernels; assert kernels.get_kernel() == 'theirs'\n")
    # The root first on sys.path, as `python -m pytest` has it; the .pth line then imports theirs.
    (other / "0_root.pth").write_text(f"import sys; sys.path.insert(0, {str(tree)!r})\n")
    seen = probe(other, dependencies)
    assert Path(seen["package"]).parent == tree / "moso_fast"
    assert_kernels_in(seen, tree / "kernels")
    assert seen["top_level_kernels"] == str(other / "kernels" / "__init__.py")
    assert "has not been built in this source tree" in seen["reason"]["_cpu"]
    assert "make build" in seen["how"]["_cpu"]


def test_without_compilers_the_install_is_pure_python_and_says_so(
    source: Path, dependencies: Path, tmp_path: Path
) -> None:
    done = build(source, "build_wheel", tmp_path, "auto", PATH=str(tmp_path))
    wheel = built(done, tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "moso_fast: installing pure Python, slower on a CPU: no C++ compiler" in done.stderr
    seen = probe(install(wheel, tmp_path / "site"), dependencies)
    assert seen["native"] == {"_cpu": None, "_cuda": None}
    assert "no C++ compiler was found" in seen["reason"]["_cpu"]
    assert "g++" in seen["how"]["_cpu"]


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


BROKEN_NVCC = (
    'case "$*" in *--list-gpu-code*) echo sm_90;; *) echo "x.cu: error: broken"; exit 1;; esac'
)


@pytest.mark.parametrize(
    ("mode", "programs", "env", "message"),
    [
        ("fast", {}, {}, "MOSO_FAST_BUILD='fast' is not one of auto, none, cpu, cuda"),
        ("cpu", {}, {}, "MOSO_FAST_BUILD=cpu cannot be met: no C++ compiler was found"),
        ("cuda", {}, {}, "MOSO_FAST_BUILD=cuda cannot be met: no C++ compiler was found"),
        ("cuda", {"c++": ""}, {}, "MOSO_FAST_BUILD=cuda cannot be met: nvcc was not found"),
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
            "MOSO_FAST_CUDA_ARCHITECTURES names '89', which is not one of 80 90a",
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
    monkeypatch.syspath_prepend(ROOT / "tools")
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
    monkeypatch.syspath_prepend(ROOT / "tools")
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
    monkeypatch.syspath_prepend(ROOT / "tools")
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
    monkeypatch.syspath_prepend(ROOT / "tools")
    from native_ninja import Ninja, add_cuda
    from native_plan import make_plan, write_info

    for name, text in (("c++", ""), ("nvcc", "echo sm_90")):
        script(tmp_path / "bin" / name, text)
    plan = make_plan({"PATH": str(tmp_path / "bin"), "MOSO_FAST_CUDA_DEBUG": value})
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
