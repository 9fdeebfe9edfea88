"""benches/gpu/pack.py and build.py: what is built before a GPU is there, and what is refused."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tarfile
from typing import Any

import pytest
from gpu_check_support import ROOT, SUPPORT, environment


@pytest.fixture
def pack() -> Any:
    return importlib.import_module("benches.gpu.pack")


@pytest.fixture
def build() -> Any:
    return importlib.import_module("benches.gpu.build")


def test_an_interpreter_is_asked_for_its_suffix(pack) -> None:
    suffix = pack.extension_suffix(sys.executable)
    assert suffix == importlib.import_module("sysconfig").get_config_var("EXT_SUFFIX")


def test_an_interpreter_that_cannot_serve_is_refused(pack, tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"^gpu-pack: python0\.1 cannot be run .*--python names"):
        pack.main(["--python", "python0.1"])
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho \'[".cpython-312-x86_64-linux-gnu.so", "/nowhere"]\'\n')
    bare.chmod(0o755)
    with pytest.raises(SystemExit, match=r"has no headers: /nowhere/Python\.h is missing"):
        pack.main(["--python", str(bare)])


@pytest.mark.exhaustive
def test_the_archive_is_the_checkout_and_what_was_built(pack, monkeypatch, tmp_path) -> None:
    if not (pack.ROOT / ".git").exists():
        pytest.skip("no checkout of git: the archive holds what git tracks")
    folder = pack.ROOT / "build" / f"test-gpu-pack-{tmp_path.name}"
    folder.mkdir(parents=True)
    try:
        monkeypatch.setattr(pack, "FOLDER", folder)
        (folder / "commit").write_text("abc\n")
        archive = pack.write_archive([folder / "commit", folder / "absent"])
        with tarfile.open(archive) as file:
            names = {info.name for info in file}
            assert all(info.uid == 0 and not info.uname for info in file)
        assert f"moso_fast/build/{folder.name}/commit" in names
        wanted = ("Makefile", "kernels/tiles.py", "moso_fast/scorer.py", "tests/conftest.py")
        assert {f"moso_fast/{name}" for name in wanted} <= names
        assert not any(".git/" in name or "__pycache__" in name for name in names)
        monkeypatch.setattr(pack, "MOST_BYTES", 10_000)
        with pytest.raises(SystemExit, match="MiB, more than"):
            pack.write_archive([])
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@pytest.mark.parametrize(
    "capability, architecture", [("9.0", "90a"), ("8.6", "80"), ("10.0", "100"), ("12.0", None)]
)
def test_a_build_is_for_this_gpu_alone_and_must_have_cuda(build, capability, architecture) -> None:
    found = build.environment(capability, {"PATH": "x"})
    assert found["MOSO_FAST_BUILD"] == "cuda" and found["PATH"] == "x"
    assert found.get("MOSO_FAST_CUDA_ARCHITECTURES") == architecture
    chosen = build.environment(capability, {"MOSO_FAST_CUDA_ARCHITECTURES": "80 90a"})
    assert chosen["MOSO_FAST_CUDA_ARCHITECTURES"] == "80 90a"


def test_nothing_is_built_without_a_gpu_or_where_it_is_there(build, monkeypatch, tmp_path) -> None:
    def never(*given: Any, **options: Any) -> Any:
        raise AssertionError("nothing may be run")

    monkeypatch.setattr(build.subprocess, "run", never)
    monkeypatch.setattr(build, "SOURCE", tmp_path / "source")
    monkeypatch.setattr(build, "module_path", lambda name: tmp_path / name)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.build_where_missing() is None
    (tmp_path / "_cuda").touch()
    monkeypatch.setattr(build, "capability", lambda: "9.0")
    assert build.build_where_missing() is None
    (tmp_path / "source").write_text("another\n")
    assert build.build_where_missing() == (
        "csrc/cuda has changed since `make gpu-pack`, whose module is still the old one"
    )
    (tmp_path / "source").write_text(build.fingerprint((build.CUDA,)) + "\n")
    assert build.build_where_missing() is None


def test_programs_of_the_toolkit_are_found_off_the_path(build, monkeypatch, tmp_path) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.cuda_program("ncu-of-a-test") is None
    program = tmp_path / "cuda" / "bin" / "ncu-of-a-test"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert build.cuda_program("ncu-of-a-test") == str(program)


@pytest.mark.parametrize("version", ["76.1.0", "none"])
def test_old_setuptools_are_named(version, build, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(build, "module_path", lambda name: tmp_path / name)
    monkeypatch.setattr(build, "capability", lambda: "9.0")
    monkeypatch.setattr(build, "_installed", lambda name: version != "none")
    monkeypatch.setattr(build.metadata, "version", lambda name: version)
    fault = build.build_where_missing()
    assert fault.startswith(f"setuptools {version} cannot build this package, which needs 77")


def test_a_build_that_fails_or_hangs_is_said(build, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(build, "module_path", lambda name: tmp_path / name)
    monkeypatch.setattr(build, "capability", lambda: "9.0")
    asked = {}

    def fail(command: list[str], **options: Any) -> Any:
        asked.update(options["env"])
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(build.subprocess, "run", fail)
    assert build.build_where_missing() == "the build ended with exit code 1"
    assert asked["MOSO_FAST_BUILD"] == "cuda"

    def hang(command: list[str], **options: Any) -> Any:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(build.subprocess, "run", hang)
    assert build.build_where_missing() == "not built within 400 s"


def test_a_failed_build_fails_the_check_and_costs_no_stage(tmp_path) -> None:
    script = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from benches.gpu.check import main as check\n"
        "check.LAYER = 'fake_gpu_layer'\n"
        "check.build_where_missing = lambda: 'the build ended with exit code 1'\n"
        "sys.exit(check.main(sys.argv[1:], check.LAYER))"
    )
    command = [sys.executable, "-c", script, "--out", str(tmp_path), "--stage", "smoke"]
    done = subprocess.run(
        command, env=environment(tmp_path, {}), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "FAILED build: failed: the build ended with exit code 1" in done.stdout
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    outcomes = {each["unit"]: each["outcome"] for each in report["results"]}
    assert outcomes.pop("build") == "failed" and set(outcomes.values()) == {"done"}


def test_packages_of_the_pack_are_found_behind_the_machines_own(monkeypatch, tmp_path) -> None:
    """A package that is there twice is the machine's; the pack's serve children as well."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "only_in_the_pack.py").write_text("")
    (site / "json.py").write_text("raise ImportError('not this one')")
    script = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(SUPPORT)!r}]\n"
        "from pathlib import Path\n"
        "from benches.gpu.check import worker\n"
        f"worker.SITE = Path({str(site)!r})\n"
        "worker.serve = lambda layer, pipe: None\n"
        "worker.Connection = lambda descriptor: None\n"
        "worker.main(['layer', '0'])\n"
        "import json, only_in_the_pack\n"
        "worker.run_child([sys.executable, '-c', 'import only_in_the_pack; print(1)'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "1", done.stderr
