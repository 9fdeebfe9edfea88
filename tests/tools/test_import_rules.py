"""The rule against import cycles that tools/import_rules.py adds to import-linter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason='the import contracts need pip install -e ".[dev]"')
ROOT = Path(__file__).resolve().parents[2]
CONTRACT = """
[tool.importlinter]
root_package = "package"
contract_types = ["no_cycles: tools.import_rules.NoCycles"]

[[tool.importlinter.contracts]]
name = "No cycles"
type = "no_cycles"
"""
# Files of a package, and the modules that import each other in it.
FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import x\ny = 1"
PACKAGES = {
    "one way": ({"a.py": "from . import b", "b.py": "import os", "c.py": "from .a import b"}, ()),
    "in a function": (
        {
            "a.py": "def f():\n    from . import b",
            "b.py": "from . import c",
            "c.py": "import package.a",
        },
        ("a", "b", "c"),
    ),
    "for types": ({"a.py": "from .b import y\nx = 1", "b.py": FOR_TYPES}, ("a", "b")),
    "with the package around": (
        {"__init__.py": "from .a import f\nv = 1", "a.py": "def f():\n    from . import v"},
        ("a",),
    ),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_no_cycles(tmp_path: Path, name: str) -> None:
    files, cycle = PACKAGES[name]
    folder = tmp_path / "package"
    folder.mkdir()
    for file, text in {"__init__.py": "", **files}.items():
        (folder / file).write_text(text + "\n")
    (tmp_path / "pyproject.toml").write_text(CONTRACT)
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == (1 if cycle else 0), run.stdout + run.stderr
    assert ("No cycles KEPT" in run.stdout) == (not cycle)
    listed = run.stdout.partition("These modules import each other:")[2]
    assert all(f"package.{module}" in listed for module in cycle)
