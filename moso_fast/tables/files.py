"""Reading and writing a ScoreTable: one column a statistic, whatever the format.

The direction (does a high or a low score mean keep?) stands in the description of a file, and in
.parquet and .csv also in the column ``higher_is_better``, 1 or 0 in every row: descriptions are
lost where pandas, polars or a spreadsheet write the file anew, or where a .csv is moved without
the file beside it. A column comes through all of these, and through sorting and filtering; a
comment or another first line would break whoever reads the file, and be dropped by them too.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..util.files import atomic_path, check_folder
from .content import DIRECTION, Columns, Content, Stored, check_names, damaged, not_a_table
from .csv_files import load_csv, save_csv
from .parquet_files import load_parquet, save_parquet

SUFFIXES = (".parquet", ".csv", ".npz")
VERSION = 1
_NPZ_META = "@meta"  # no column can have this name


def save(stored: Stored, path: Path) -> Path:
    """Write a table in the format that the suffix of ``path`` names."""
    suffix = _suffix(path)
    meta = {
        "version": VERSION,
        "higher_is_better": stored.higher_is_better,
        "provenance": stored.provenance,
    }
    try:
        text = json.dumps(meta)
    except (TypeError, ValueError) as error:
        raise TypeError(f"provenance must be JSON-able: {error}") from error
    # Nobody writes an .npz anew without its description: there the direction is safe.
    columns = stored.columns(with_direction=suffix != ".npz")
    check_folder(path)
    {".parquet": save_parquet, ".csv": save_csv, ".npz": _save_npz}[suffix](path, columns, text)
    return path


def load(path: Path, higher_is_better: bool | None = None) -> Stored:
    """Read the table at ``path``; ``higher_is_better`` is what the caller says of it."""
    suffix = _suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"no score table at {path}: there is no such file")
    content = {".parquet": load_parquet, ".csv": load_csv, ".npz": _load_npz}[suffix](path)
    described, provenance = _description(path, content.text)
    said = {
        "its description": described,
        f"its column {DIRECTION!r}": _column_direction(path, content),
        "the caller": higher_is_better,
    }
    direction = _one_direction(path, {who: word for who, word in said.items() if word is not None})
    if direction is None:
        direction = True
        content.notes.append(
            f"the file does not say whether high or low scores mean keep, and high is assumed; "
            f"a column {DIRECTION!r} of 1 or 0 says it, or load(..., {DIRECTION}=...)"
        )
    stored = Stored.of_columns(path, content.columns, direction, provenance)
    stored.notes = content.notes
    return stored


def _suffix(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"a score table is a {', '.join(SUFFIXES)} file; got {path.name!r} "
            f"(suffix {path.suffix!r})"
        )
    return path.suffix


def _description(path: Path, text: str | None) -> tuple[bool | None, dict[str, Any]]:
    """Direction and provenance of a description; (None, {}) where there is none."""
    if text is None:
        return None, {}
    try:
        meta = json.loads(text)
        known = meta["version"] == VERSION
        direction, provenance = meta["higher_is_better"], dict(meta["provenance"])
        if not isinstance(direction, bool):
            raise TypeError(f"higher_is_better is {direction!r}, neither true nor false")
    except (ValueError, TypeError, KeyError) as error:
        raise not_a_table(path, f"its description is unreadable ({error})") from error
    if not known:
        raise not_a_table(path, f"its version is {meta['version']}, this release reads {VERSION}")
    return direction, provenance


def _column_direction(path: Path, content: Content) -> bool | None:
    """Take the column of the direction out of ``content``: what it says, None without a row."""
    values = content.columns.pop(DIRECTION, None)
    if values is None or not values.size:
        return None
    different = np.unique(values.astype(np.float64))  # NaN where a cell is empty
    if not np.isin(different, (0.0, 1.0)).all():
        wrong = different[~np.isin(different, (0.0, 1.0))][0]
        found = "no value in some rows" if np.isnan(wrong) else f"{wrong:g}"
        raise not_a_table(path, f"the column {DIRECTION!r} must hold 1 or 0; it holds {found}")
    if different.size > 1:
        raise not_a_table(
            path,
            f"the column {DIRECTION!r} holds 1 and 0: tables of opposite direction were joined; "
            "negate the scores of one of them",
        )
    return bool(different[0])


def _one_direction(path: Path, said: dict[str, bool]) -> bool | None:
    """Return the direction that all who ``said`` one agree on; None where nobody did."""
    if len(set(said.values())) > 1:
        words = ", ".join(f"{who} says {word}" for who, word in said.items())
        raise ValueError(f"{path}: is a higher score better? {words}; correct what is wrong")
    return next(iter(said.values()), None)


def _save_npz(path: Path, columns: Columns, text: str) -> None:
    # Not np.savez: it takes the columns as keyword arguments, and cannot have one named "file".
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, values in {_NPZ_META: np.array(text), **columns}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, values, allow_pickle=False)


def _load_npz(path: Path) -> Content:
    try:
        with np.load(path, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise damaged(path, error) from error
    meta = columns.pop(_NPZ_META, None)
    if meta is None or meta.dtype.kind != "U":
        raise not_a_table(path, f"the entry {_NPZ_META!r} is missing")
    for name, values in columns.items():
        if values.dtype.kind not in "fi" or values.ndim != 1:
            raise not_a_table(path, f"the entry {name!r} is no column of numbers")
    check_names(path, list(columns))
    return Content(columns, str(meta))
