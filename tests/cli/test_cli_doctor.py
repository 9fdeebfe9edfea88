"""`moso-fast doctor`: the backends it knows, and the installations it calls broken."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from cli_support import run

import moso_fast


def test_doctor_knows_every_backend(capsys):
    facts = json.loads(run(capsys, "doctor --json").out)
    assert set(facts["backends"]) == set(moso_fast.backends())
    assert facts["backends"]["torch"]["available"] and facts["problems"] == []
    for entry in facts["backends"].values():
        assert entry["reason"] and (entry["available"] or entry["how"])
    assert facts["packages"]["torch"] and facts["moso_fast"]["version"] == moso_fast.__version__
    text = run(capsys, "doctor").out
    assert all(name in text for name in facts["backends"]) and torch.__version__ in text


def test_doctor_finds_nvcc_where_the_build_does(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho release 13.0\n")
    nvcc.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH", "PATH"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    doctor = importlib.import_module("moso_fast.cli.doctor")
    monkeypatch.setattr(doctor, "_USUAL_NVCC", str(nvcc))
    assert doctor._nvcc() == f"{nvcc} (release 13.0)"


def test_doctor_fails_where_the_installation_is_broken(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "moso_fast.scorer", None)
    result = run(capsys, "doctor", code=1)
    assert "BROKEN  moso_fast.scorer cannot be imported" in result.out


def test_doctor_names_a_module_that_is_there_and_cannot_be_loaded(capsys, monkeypatch):
    """Not one that was not built: that is no fault of the installation."""
    native = importlib.import_module("moso_fast.util.native")
    absent = native.NativeModule(None, "moso_fast._cuda has not been built", "install a compiler")
    broken = native.NativeModule(None, "moso_fast._cpu cannot be loaded: no symbol", "build again")
    monkeypatch.setattr(native, "load_native", lambda name: absent)
    assert json.loads(run(capsys, "doctor --json").out)["problems"] == []
    monkeypatch.setattr(native, "load_native", {"_cpu": broken, "_cuda": absent}.get)
    facts = json.loads(run(capsys, "doctor --json", code=1).out)
    assert facts["problems"] == ["moso_fast._cpu cannot be loaded: no symbol; build again"]
    assert "BROKEN  moso_fast._cpu cannot be loaded" in run(capsys, "doctor", code=1).out


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("libstdc++.so.6: no such version"), "cannot be loaded: libstdc++.so.6: no"),
        (ModuleNotFoundError("no module 'x'", name="x"), "cannot be loaded: no module 'x'"),
        (ModuleNotFoundError("no such", name="moso_fast._cpu"), None),
    ],
)
def test_a_broken_native_module_is_told_from_one_that_is_absent(monkeypatch, error, reason):
    native = importlib.import_module("moso_fast.util.native")

    def fails(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", fails)
    found = native.load_native.__wrapped__("_cpu")
    assert found.module is None and found.how
    assert ("cannot be loaded" in found.reason) == (reason is not None)
    assert reason is None or f"moso_fast._cpu {reason}" in found.reason
