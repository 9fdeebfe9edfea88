"""One copy of the tree for all packaging tests, so that the native sources are compiled once.

Processes of pytest-xdist share it, one test at a time.
"""

from __future__ import annotations

import os
import site
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import packaging_support as support
import pytest
from filelock import FileLock


@pytest.fixture(scope="session", autouse=True)
def _can_build() -> None:
    if not (support.ROOT / "setup.py").is_file():
        pytest.skip("needs the source tree")
    if os.name == "nt":
        pytest.skip("nothing native is built on Windows")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of this run that all its processes see."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "packaging"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def lock(shared: Path) -> FileLock:
    return FileLock(shared / "lock")


@pytest.fixture(autouse=True)
def _alone(lock: FileLock) -> Iterator[None]:
    with lock:
        yield


@pytest.fixture(scope="session")
def source(shared: Path, lock: FileLock) -> Path:
    """Return a copy of the source tree; build folders and objects in it are shared."""
    target = shared / "source" / "moso_fast"
    with lock:
        if not target.exists():
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
def native_wheel(source: Path, shared: Path, lock: FileLock) -> Path:
    """Return a wheel, as `python -m build` makes it, of the modules whose compilers are here."""
    out = shared / "native"
    with lock:
        if not list(out.glob("*.whl")):
            support.built(support.build(source, "build_wheel", out, "auto"), out)
    (wheel,) = out.glob("*.whl")
    return wheel
