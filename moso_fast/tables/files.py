"""Reading and writing a ScoreTable: one column a statistic, whatever the format.

The direction (does a high or a low score mean keep?) stands in the description of a file, and in
.parquet and .csv also in the column ``higher_is_better``, 1 or 0 in every row: descriptions are
lost where pandas, polars or a spreadsheet write the file anew, or where a .csv is moved without
the file beside it. A column comes through all of these, and through sorting and filtering; a
comment or another first line would break whoever reads the file, and be dropped by them too.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..util.files import atomic_path, check_folder

if TYPE_CHECKING:
    from .table import ScoreTable

SUFFIXES = (".parquet", ".csv", ".npz")
VERSION = 1
DIRECTION = "higher_is_better"  # no metric can have this name
_NPZ_META = "@meta"  # no column can have this name

Columns = dict[str, npt.NDArray[Any]]


@dataclass
class Content:
    """What a file holds: columns, the JSON text that describes them, what was left out and why."""

    columns: Columns
    text: str | None
    notes: list[str] = field(default_factory=list)


def save(table: ScoreTable, path: Path) -> Path:
    """Write ``table`` in the format that the suffix of ``path`` names."""
    from .csv_files import save_csv
    from .parquet_files import save_parquet

    suffix = _suffix(path)
    meta = {
        "version": VERSION,
        "higher_is_better": table.higher_is_better,
        "provenance": table.provenance,
    }
    try:
        text = json.dumps(meta)
    except (TypeError, ValueError) as error:
        raise TypeError(f"provenance must be JSON-able: {error}") from error
    columns: Columns = {"index": table.index.numpy(), "score": table.scores.numpy()}
    columns |= {name: values.numpy() for name, values in table.metrics.items()}
    if suffix != ".npz":  # nobody writes one anew without its description
        columns[DIRECTION] = np.full(len(table), table.higher_is_better, dtype=np.bool_)
    for name, values in table.per_checkpoint.items():
        columns |= {f"{name}@{k}": row.numpy() for k, row in enumerate(values)}
    check_folder(path)
    {".parquet": save_parquet, ".csv": save_csv, ".npz": _save_npz}[suffix](path, columns, text)
    return path


def load(path: Path, higher_is_better: bool | None = None) -> ScoreTable:
    """Read the table at ``path``; ``higher_is_better`` is what the caller says of it."""
    from .csv_files import load_csv
    from .parquet_files import load_parquet

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
    table = _from_columns(path, content.columns, direction, provenance)
    for note in content.notes:
        warnings.warn(f"{path}: {note}", stacklevel=3)
    return table


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


def _from_columns(
    path: Path, columns: Columns, direction: bool, provenance: dict[str, Any]
) -> ScoreTable:
    from .table import ScoreTable

    metrics: dict[str, torch.Tensor] = {}
    checkpoints: dict[str, dict[int, npt.NDArray[Any]]] = {}
    for name, values in columns.items():
        if name in ("index", "score"):
            continue
        base, mark, number = name.partition("@")
        if not mark:
            metrics[name] = torch.from_numpy(values)
        elif number.isdecimal():
            checkpoints.setdefault(base, {})[int(number)] = values
        else:
            raise not_a_table(path, f"the column {name!r} is unknown")
    for base, rows in checkpoints.items():
        if sorted(rows) != list(range(len(rows))):
            raise not_a_table(path, f"a column of {base}@0 .. {base}@{max(rows)} is missing")
    try:
        return ScoreTable(
            scores=torch.from_numpy(columns["score"]),
            metrics=metrics,
            per_checkpoint={
                base: torch.from_numpy(np.stack([rows[k] for k in range(len(rows))]))
                for base, rows in checkpoints.items()
            },
            index=torch.from_numpy(columns["index"]),
            higher_is_better=direction,
            provenance=provenance,
        )
    except (ValueError, TypeError) as error:
        raise not_a_table(path, str(error)) from error


def check_names(path: Path, names: list[str], nameless: Sequence[str] = (), why: str = "") -> None:
    """Raise unless ``names`` hold what a table needs, each once; ``nameless`` were left out.

    ``why`` begins the message where something is missing.
    """
    for name in ("index", "score"):
        if name not in names:
            hint = ""
            if name == "index" and nameless:
                hint = (
                    f"; the column {nameless[0]!r} counts rows of pandas: if it holds the "
                    "data-set indices, give it the name 'index'"
                )
            raise not_a_table(path, f"{why}the column {name!r} is missing{hint}")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise not_a_table(path, f"a column stands there twice: {twice[0]!r}")


def not_a_table(path: Path, reason: str) -> ValueError:
    """Return the error for a file that can be read and is no score table."""
    return ValueError(f"{path} is not a score table: {reason}")


def damaged(path: Path, error: Exception) -> ValueError:
    """Return the error for a file that cannot be read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{path} is not a score table, or is damaged: {reason}")


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
