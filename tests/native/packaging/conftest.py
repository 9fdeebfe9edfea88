"""One copy of the tree for all packaging tests, so that the native sources are compiled once."""

from __future__ import annotations

import os
import site
import sysconfig
from pathlib import Path

import packaging_support as support
import pytest


@pytest.fixture(scope="session", autouse=True)
def _can_build() -> None:
    if not (support.ROOT / "setup.py").is_file():
        pytest.skip("needs the source tree")
    if os.name == "nt":
        pytest.skip("nothing native is built on Windows")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the source tree; build folders and objects in it are shared."""
    target = tmp_path_factory.mktemp("source") / "moso_fast"
    support.copy_tree(target)
    return target


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def native_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel, as `python -m build` makes it, of the modules whose compilers are here."""
    out = tmp_path_factory.mktemp("native")
    return support.built(support.build(source, "build_wheel", out, "auto"), out)
