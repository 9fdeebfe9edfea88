"""Score tables as .csv: written with a description beside them, read from whoever wrote them anew.

What pandas, polars, R or a spreadsheet make of a table is read: a byte-order mark, quotes, ``;``,
tab or ``|`` between the columns, ``sep=`` lines, decimal commas, a nameless column that counts
rows, empty cells (NaN), whole numbers written as 3.0, columns in another order. What could mean two
numbers is refused.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..util.files import atomic_path
from .cells import Layout, NamedColumns, read_cells
from .content import DIRECTION, NAMELESS, Columns, Content, check_names, damaged, not_a_table

_BLOCK_ROWS = 1 << 16
_DELIMITERS = (",", ";", "\t", "|")


def save_csv(path: Path, columns: Columns, text: str) -> None:
    """Write ``columns`` to ``path`` and ``text`` to the file beside it."""
    # 9 and 17 significant digits bring every float32 and float64 back bitwise; the shortest
    # float32 text would not, since readers round twice on the way through float64.
    digits = {"int64": "%d", "bool": "%d", "float32": "%.9g", "float64": "%.17g"}
    line = ",".join(digits[values.dtype.name] for values in columns.values()) + "\n"
    rows = len(columns["index"])
    with atomic_path(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(",".join(columns) + "\n")
            for start in range(0, rows, _BLOCK_ROWS):
                block = [v[start : start + _BLOCK_ROWS].tolist() for v in columns.values()]
                file.writelines(line % values for values in zip(*block, strict=True))
        description = {
            **json.loads(text),
            "dtypes": {n: v.dtype.name for n, v in columns.items() if n != DIRECTION},
            "sha256": _digest(temporary),
        }
        # The description goes first: a stop between the two leaves a pair that load() refuses.
        with atomic_path(_sidecar(path)) as beside:
            beside.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def load_csv(path: Path) -> Content:
    """Read a .csv file and, where there is one, the description beside it."""
    try:
        layout = _layout(path)
        text, dtypes = _csv_description(path)
        # A name that the description lists is a name, whatever it looks like.
        nameless = [n for n in layout.names if NAMELESS.fullmatch(n) and n not in dtypes]
        check_names(path, [n for n in layout.names if n not in nameless], nameless)
        columns, notes = _numbers(path, layout) or read_cells(path, layout, nameless)
    except (UnicodeDecodeError, csv.Error) as error:
        raise damaged(path, error) from error
    found: Columns = {}
    for name, values in columns:
        if name in nameless:
            continue
        if name == DIRECTION or name == "index":
            found[name] = values
        else:
            known = dtypes.get(name)
            found[name] = values.astype(known) if known else narrowest(values)
    return Content(found, text, notes)


def _layout(path: Path) -> Layout:
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        skip = 1
        # Tells a spreadsheet what stands between the columns.
        said = re.fullmatch(r'"?sep=(.)"?', first.rstrip("\r\n"))
        if said is not None:
            first, skip = file.readline(), 2
    delimiters = (said[1],) if said is not None else _DELIMITERS
    headers = {mark: _split(first, mark) for mark in delimiters}
    # A name may hold the other marks, so the one that yields the two that must be there counts.
    for mark, names in headers.items():
        if {"index", "score"} <= set(names):
            return Layout(mark, names, skip)
    longest = max(headers, key=lambda mark: len(headers[mark]))
    return Layout(longest, headers[longest], skip)


def _split(line: str, mark: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([line.rstrip("\r\n")], delimiter=mark), [])]


def _numbers(path: Path, layout: Layout) -> tuple[NamedColumns, list[str]] | None:
    """Columns of a file that holds plain numbers alone, fast; None for every other file."""
    kinds = [
        (f"f{number}", "i8" if name == "index" else "f8")
        for number, name in enumerate(layout.names)
    ]
    try:
        with warnings.catch_warnings():
            # Of an empty file, and of whole numbers written as 3.0, which older releases cut.
            warnings.simplefilter("error")
            data = np.loadtxt(
                path,
                dtype=kinds,
                delimiter=layout.delimiter,
                skiprows=layout.skip,
                ndmin=1,
                comments=None,
                encoding="utf-8-sig",
            )
    except (ValueError, Warning):
        return None  # read again, cell by cell: that says what is wrong and where
    return [(name, data[f"f{number}"].copy()) for number, name in enumerate(layout.names)], []


def narrowest(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """float32 for numbers that its 9 digits bring back, else as they are.

    A file without its description does not say its dtypes; nothing that it holds may be lost.
    """
    with np.errstate(over="ignore", under="ignore"):
        single = values.astype(np.float32)
    other = np.isfinite(values) & (single != values)
    if np.isinf(single[other]).any() or (single[other] == 0).any():
        return values
    if any(float(f"{value:.9g}") != value for value in values[other].tolist()):
        return values
    return single


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _csv_description(path: Path) -> tuple[str | None, dict[str, str]]:
    """Text and dtypes of the file beside a .csv; (None, {}) where there is none."""
    beside = _sidecar(path)
    if not beside.is_file():
        return None, {}
    try:
        description = json.loads(beside.read_text(encoding="utf-8"))
        dtypes = {str(name): str(kind) for name, kind in description.pop("dtypes").items()}
        digest = description.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise damaged(beside, error) from error
    if not set(dtypes.values()) <= {"int64", "float32", "float64"}:
        raise not_a_table(beside, f"unknown dtypes {sorted(set(dtypes.values()))}")
    if digest != _digest(path):
        raise ValueError(
            f"{path} has changed since {beside.name} was written beside it; "
            "delete that file to read the numbers without their origin"
        )
    return json.dumps(description), dtypes
