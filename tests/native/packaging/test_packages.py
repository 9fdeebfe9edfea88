"""Wheel, sdist, editable and uninstalled trees: what they hold, and that it can be imported."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
import tarfile
from pathlib import Path

import pytest
from packaging_support import (
    CXX,
    FOLDERS,
    KERNELS,
    assert_kernels_in,
    build,
    built,
    copy_tree,
    install,
    probe,
    script,
)

needs_cxx = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
def test_sdist_is_complete_and_builds_a_pure_wheel(
    source: Path, dependencies: Path, tmp_path: Path
) -> None:
    sdist = built(build(source, "build_sdist", tmp_path, "auto"), tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    packed = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    wanted = {
        str(path.relative_to(source))
        for name in FOLDERS
        for path in (source / name).rglob("*")
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


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
@needs_cxx
@pytest.mark.usefixtures("native_wheel")  # its objects are reused
def test_nvcc_without_a_gpu_is_not_used_and_doctor_says_how(
    source: Path, dependencies: Path, tmp_path: Path
) -> None:
    script(tmp_path / "cuda" / "bin" / "nvcc", "echo sm_80 sm_90 sm_100")
    script(tmp_path / "bin" / "nvidia-smi", "echo No devices were found; exit 6")
    env = {"CUDA_HOME": str(tmp_path / "cuda"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    env |= {"PIP_BUILD_TRACKER": str(tmp_path), "MOSO_FAST_CUDA_ARCHITECTURES": ""}
    done = build(source, "build_wheel", tmp_path / "out", "auto", **env)
    seen = probe(install(built(done, tmp_path / "out"), tmp_path / "site"), dependencies)
    assert seen["native"]["_cpu"]
    assert seen["native"]["_cuda"] is None
    assert "nvcc was found but no GPU" in seen["reason"]["_cuda"]
    assert seen["how"]["_cuda"].startswith("run the installation again")
    assert seen["how"]["_cuda"].endswith("with MOSO_FAST_BUILD=cuda")
