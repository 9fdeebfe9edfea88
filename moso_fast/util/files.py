"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` where its folder exists and it is no folder itself, else raise OSError."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder, give a file name")
    return path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block ends well.

    The name keeps the suffix of ``path``. After an exception (Ctrl-C included) the temporary file
    is removed and whatever stood at ``path`` before still stands there.

    Raises
    ------
    OSError
        The folder of ``path`` does not exist, or ``path`` is a folder.
    """
    path = check_folder(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    temporary = Path(name)
    try:
        os.close(handle)
        yield temporary
        # mkstemp gives 0600; a result file should be readable as any other that one writes.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
