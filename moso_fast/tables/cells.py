"""The cells of a .csv file, one by one: what is a number, which, and what to say where none is."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .content import DIRECTION, not_a_table

_BLOCK_ROWS = 1 << 16
_MISSING = frozenset(("", "na", "n/a", "#n/a", "nan", "null", "none", "<na>"))
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_WORDS = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
# With these marks a spreadsheet may also group the digits of whole numbers by thousands.
_GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+", re.ASCII)
_WHOLE = re.compile(r"([+-]?\d+)([.,]0*)?", re.ASCII)
_TRUTH = {"true": 1.0, "false": 0.0}
_PLAIN = re.compile(r"[0-9+\-eE.,\n]*")  # many cells at once that Python's float reads alike

NamedColumns = list[tuple[str, npt.NDArray[Any]]]


class Layout(NamedTuple):
    """How a .csv file is written: what stands between its cells, its names, lines before data."""

    delimiter: str
    names: list[str]
    skip: int


class Column:
    """One column while its file is read: values so far, and what speaks for or against numbers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: list[npt.NDArray[Any]] = []
        self.numbers = 0
        self.text: tuple[int, str] | None = None  # line and content of the first that is none

    def whole(self) -> npt.NDArray[Any]:
        """All values."""
        kind = np.int64 if self.name == "index" else np.float64
        return np.concatenate(self.values) if self.values else np.empty(0, dtype=kind)


class Marks:
    """Which decimal marks a file uses, and where: one file uses one."""

    def __init__(self, path: Path, delimiter: str) -> None:
        self.path, self.delimiter = path, delimiter
        self.point: str | None = None  # the first number with a point, with a comma, and with a
        self.comma: str | None = None  # comma that cannot stand between thousands
        self.sure = False

    def note(self, cell: str, line: int) -> None:
        """Take note of a number with a mark in it."""
        if "." in cell:
            self.point = self.point or f"{cell} in line {line}"
            return
        if self.delimiter == ",":
            raise not_a_table(
                self.path,
                f"{cell!r} in line {line} has a comma within a number, in a file with commas "
                "between its columns; write points, or separate the columns by ';'",
            )
        self.comma = self.comma or f"{cell} in line {line}"
        self.sure = self.sure or _GROUPED.fullmatch(cell) is None

    def telling(self, cells: list[str], together: str) -> list[int]:
        """Find the numbers among ``cells`` that say more of the marks than is known so far."""
        found: list[int] = []
        if self.point is None and "." in together:
            found += [next(at for at, cell in enumerate(cells) if "." in cell)]
        if "," in together and not self.sure:
            with_comma = [at for at, cell in enumerate(cells) if "," in cell]
            certain = (at for at in with_comma if _GROUPED.fullmatch(cells[at]) is None)
            found += [next(certain, with_comma[0])]
        return found

    def check(self) -> None:
        """Raise where the marks of the whole file leave two readings."""
        if self.comma is None:
            return
        if self.point is not None:
            raise not_a_table(
                self.path,
                f"it has numbers with a decimal comma ({self.comma}) and with a point "
                f"({self.point}); write all with points and without marks between thousands",
            )
        if not self.sure:
            raise not_a_table(
                self.path,
                f"the comma of {self.comma} may be a decimal mark or stand between thousands, "
                "and no other number tells; write decimal points",
            )


def read_cells(path: Path, layout: Layout, nameless: list[str]) -> tuple[NamedColumns, list[str]]:
    """Read columns with their names, and notes on those that hold text and were left out.

    Raises
    ------
    ValueError
        A line of another length, text among numbers, numbers that can be read in two ways; with
        the line of the file, counted from 1.
    """
    columns = [Column(name) for name in layout.names]
    marks = Marks(path, layout.delimiter)
    width = len(columns)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=layout.delimiter)
        lines = ((reader.line_num, cells) for cells in reader)
        for _ in range(layout.skip):
            next(lines, None)
        full = ((line, cells) for line, cells in lines if any(map(str.strip, cells)))
        while block := list(itertools.islice(full, _BLOCK_ROWS)):
            for line, cells in block:
                if len(cells) != width:
                    raise not_a_table(path, _wrong_width(layout, line, len(cells)))
            numbers = [line for line, _ in block]
            for at, column in enumerate(columns):
                if column.name in nameless:
                    continue
                cells = [row[at].strip() for _, row in block]
                read = _read_index if column.name == "index" else _read_floats
                column.values.append(read(column, cells, numbers, marks))
    marks.check()
    kept, notes = [], []
    for column in columns:
        if column.name in nameless:
            continue
        if column.text is None:
            kept.append((column.name, column.whole()))
            continue
        line, cell = column.text
        if column.numbers or column.name in ("score", DIRECTION) or "@" in column.name:
            raise not_a_table(
                path,
                f"the column {column.name!r}: could not convert string {cell!r} in line {line} to "
                "a number",
            )
        notes.append(f"the column {column.name!r} holds text ({cell!r}) and was left out")
    return kept, notes


def _wrong_width(layout: Layout, line: int, found: int) -> str:
    hint = ""
    if layout.delimiter == "," and found > len(layout.names):
        hint = "; numbers with decimal commas need ';' between the columns"
    return f"line {line} has {found} cells for {len(layout.names)} columns{hint}"


def _read_floats(
    column: Column, cells: list[str], lines: list[int], marks: Marks
) -> npt.NDArray[Any]:
    together = "\n".join(cells)
    if _PLAIN.fullmatch(together) and all(cells):
        try:
            pointed = (cell.replace(",", ".") for cell in cells) if "," in together else cells
            plain = np.fromiter(map(float, pointed), np.float64, len(cells))
        except ValueError:  # such as "1e": the slow way finds it
            pass
        else:
            column.numbers += len(cells)
            for at in marks.telling(cells, together):
                marks.note(cells[at], lines[at])
            return plain
    values = np.full(len(cells), np.nan)
    for at, cell in enumerate(cells):
        if _NUMBER.fullmatch(cell):
            if "." in cell or "," in cell:
                marks.note(cell, lines[at])
            values[at] = float(cell.replace(",", "."))
            column.numbers += 1
        elif cell.lower() in _MISSING:
            continue
        elif _WORDS.fullmatch(cell):
            values[at] = float(cell)
            column.numbers += 1
        elif column.name == DIRECTION and cell.lower() in _TRUTH:
            values[at] = _TRUTH[cell.lower()]
        elif column.text is None:
            column.text = (lines[at], cell)
    return values


def _read_index(
    column: Column, cells: list[str], lines: list[int], marks: Marks
) -> npt.NDArray[Any]:
    values = np.empty(len(cells), dtype=np.int64)
    for at, cell in enumerate(cells):
        whole = _WHOLE.fullmatch(cell)
        zeros = "" if whole is None else whole[2] or ""
        # Three zeros behind a mark may be thousands; an exponent, a number that was rounded.
        if whole is None or len(zeros) == 4:
            raise not_a_table(
                marks.path,
                f"the index in line {lines[at]} must be a whole number in plain digits; it is "
                f"{cell!r}",
            )
        if zeros:
            marks.note(cell, lines[at])
        number = int(whole[1])
        if not -(2**63) <= number < 2**63:
            raise not_a_table(marks.path, f"the index {cell} in line {lines[at]} is beyond int64")
        values[at] = number
    return values
