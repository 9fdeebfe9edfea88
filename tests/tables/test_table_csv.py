"""Score tables in .csv files that pandas, polars or a spreadsheet wrote anew, or a human."""

from __future__ import annotations

import hashlib
import json
import warnings

import numpy as np
import pytest
import torch
from table_cases import table_of

from moso_fast.tables import cells, csv_files
from moso_fast.tables.table import ScoreTable

NAN = float("nan")
HEADER = "index,score,loss,higher_is_better"

# What is read: text of the file -> index, scores, losses; all of these say high = keep.
READ = {
    "plain": (f"{HEADER}\n6,0.5,1,1\n0,-2,3e-05,1\n", [6, 0], [0.5, -2.0], [1.0, 3e-05]),
    "row numbers of pandas": (
        ",index,score,loss,higher_is_better\n1,6,0.5,1.0,True\n0,0,-2.0,2.0,True\n",
        [6, 0],
        [0.5, -2.0],
        [1.0, 2.0],
    ),
    "row numbers of pandas twice": (
        ",Unnamed: 0,index,score,loss,higher_is_better\n0,1,6,0.5,1,1\n",
        [6],
        [0.5],
        [1.0],
    ),
    "row numbers in fast files": (f",{HEADER}\n3,6,0.5,1,1\n4,7,1,1,1\n", [6, 7], [0.5, 1], [1, 1]),
    "byte-order mark": (f"\ufeff{HEADER}\n6,0.5,1,1\n", [6], [0.5], [1.0]),
    "semicolons": (f"{HEADER}\n6,0.5,1,1\n".replace(",", ";"), [6], [0.5], [1.0]),
    "tabs": (f"{HEADER}\n6,0.5,1,1\n".replace(",", "\t"), [6], [0.5], [1.0]),
    "sep line of Excel": ("sep=;\n" + f"{HEADER}\n6,0.5,1,1\n".replace(",", ";"), [6], [0.5], [1]),
    "lines of Windows": (f"{HEADER}\r\n6,0.5,1,1\r\n", [6], [0.5], [1.0]),
    "everything quoted": (
        '"index","score","loss","higher_is_better"\n"6","0.5","1","1"\n',
        [6],
        [0.5],
        [1.0],
    ),
    "decimal commas": (
        "index;score;loss;higher_is_better\n6;0,5;1,25;1\n7;-2;3,1E-05;1\n",
        [6, 7],
        [0.5, -2.0],
        [1.25, 3.1e-05],
    ),
    "spaces": ("index, score, loss, higher_is_better\n 6, 0.5 , 1, 1\n", [6], [0.5], [1.0]),
    "empty cells": (f"{HEADER}\n6,,1,1\n7,0.5,,1\n8,NA,nan,1\n", [6, 7, 8], [NAN, 0.5, NAN],
                    [1, NAN, NAN]),
    "infinite": (f"{HEADER}\n6,inf,-Infinity,1\n7,1,,1\n", [6, 7], [np.inf, 1], [-np.inf, NAN]),
    "index of floats": (f"{HEADER}\n6.0,0.5,1,1.0\n12.0,1,1,1.0\n", [6, 12], [0.5, 1], [1, 1]),
    "other order": ("loss,higher_is_better,score,index\n1,1,0.5,6\n", [6], [0.5], [1.0]),
    "blank lines": (f"{HEADER}\n\n6,0.5,1,1\n\n,,,\n", [6], [0.5], [1.0]),
    "direction in words": (f"{HEADER}\n6,0.5,1,TRUE\n", [6], [0.5], [1.0]),
    "trailing mark": (f"{HEADER},\n6,0.5,1,1,\n", [6], [0.5], [1.0]),
}  # fmt: skip


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", READ)
def test_files_written_anew_are_read(tmp_path, name, low):
    text, index, scores, losses = READ[name]
    if low:  # the last cell of every row but the header says so
        text = _turned(text)
    (tmp_path / "t.csv").write_bytes(text.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = ScoreTable.load(tmp_path / "t.csv")
    assert table.index.tolist() == index and list(table.metrics) == ["loss"]
    assert table.higher_is_better is not low
    for found, expected in ((table.scores, scores), (table.metrics["loss"], losses)):
        assert found.dtype == torch.float32
        expected = torch.tensor(expected, dtype=torch.float32)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def _turned(text):
    """Say 0 where the column of the direction says 1."""
    skip = 2 if text.startswith("sep=") else 1
    lines = text.splitlines(keepends=True)
    mark = max(",;\t", key=lines[skip - 1].count)
    at = [name.strip('" \r\n') for name in lines[skip - 1].split(mark)].index("higher_is_better")
    for number, line in enumerate(lines[skip:], skip):
        cells = line.split(mark)
        if len(cells) > at and cells[at].strip():
            for yes, no in (("1.0", "0.0"), ("1", "0"), ("True", "False"), ("TRUE", "FALSE")):
                if yes in cells[at]:
                    cells[at] = cells[at].replace(yes, no)
                    break
        lines[number] = mark.join(cells)
    return "".join(lines)


REFUSED = {
    "comma twice": (f"{HEADER}\n6,0,5,1,1\n", "line 2 has 5 cells for 4 columns; numbers with dec"),
    "short line": (f"{HEADER}\n6,0.5,1,1\n7,1,1\n", "line 3 has 3 cells for 4 columns"),
    "long line behind row numbers": (f",{HEADER}\n0,6,1,1,1\n1,7,1,1,1,9\n", "line 3 has 6 cells"),
    "quoted comma": (f'{HEADER}\n6,"0,5",1,1\n', "'0,5' in line 2 has a comma within a number"),
    "thousands": (f'{HEADER}\n6,"1,500",1,1\n', "'1,500' in line 2 has a comma within a number"),
    "two marks": ("index;score\n6;1.234,5\n", "could not convert string '1.234,5' in line 2"),
    "both marks": (
        "index;score;loss\n6;0,5;1\n7;1;2.5\n",
        r"decimal comma \(0,5 in line 2\) and with a point \(2.5 in line 3\)",
    ),
    "comma or thousands": ("index;score\n6;1,500\n7;2,250\n", "comma of 1,500 in line 2 may be"),
    "index in thousands": ("index;score\n1.000;0,5\n", "index in line 2 must be a whole number"),
    "index rounded": (f"{HEADER}\n1.2E+05,0.5,1,1\n", "whole number in plain digits; it is '1.2E"),
    "index with a fraction": (f"{HEADER}\n6.5,0.5,1,1\n", "must be a whole number"),
    "index empty": (f"{HEADER}\n,0.5,1,1\n", "the index in line 2 must be a whole number"),
    "index of text": (f"{HEADER}\na.png,0.5,1,1\n", "in plain digits; it is 'a.png'"),
    "index too large": (f"{HEADER}\n9223372036854775808,1,1,1\n", "beyond int64"),
    "index twice": (f"{HEADER}\n6,0.5,1,1\n7,1,1,1\n6,1,1,1\n", "index 6 stands in the table tw"),
    "index negative": (f"{HEADER}\n-1,0.5,1,1\n", "index must not be negative"),
    "index nameless": (",score\n6,0.5\n", "'index' is missing; the column '' counts rows"),
    "column twice": ("index,score,score\n6,0.5,1\n", "a column stands there twice: 'score'"),
    "text for a score": (f"{HEADER}\n6,high,1,1\n", "'score': could not convert string 'high'"),
    "text among numbers": (
        f"{HEADER}\n6,1,1,1\n7,1,#DIV/0!,1\n",
        "'loss': could not convert string '#DIV/0!' in line 3 to a number",
    ),
    "underscores": (f"{HEADER}\n6,1_000,1,1\n", "could not convert string '1_000'"),
    "percent": (f"{HEADER}\n6,50%,1,1\n", "could not convert string '50%'"),
    "both directions": (f"{HEADER}\n6,1,1,1\n7,1,1,0\n", "tables of opposite direction were"),
    "direction missing in a row": (f"{HEADER}\n6,1,1,1\n7,1,1,\n", "no value in some rows"),
    "direction of 2": (f"{HEADER}\n6,1,1,2\n", "'higher_is_better' must hold 1 or 0; it holds 2"),
    "direction of text": (f"{HEADER}\n6,1,1,yes\n", "could not convert string 'yes'"),
    "checkpoint dropped": ("index,score,loss@1\n6,1,1\n", r"loss@0 \.\. loss@1 is missing"),
    "not UTF-8": (HEADER.encode() + b"\n6,1,1,\xff\n", "is not a score table, or is damaged"),
    "UTF-16": (f"{HEADER}\n6,1,1,1\n".encode("utf-16"), "is not a score table, or is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_mean_something_else_is_refused_in_one_line(tmp_path, name):
    text, message = REFUSED[name]
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message) as caught:
        warnings.simplefilter("error")  # nothing is said of a file that is refused anyway
        ScoreTable.load(tmp_path / "t.csv")
    assert "\n" not in str(caught.value) and str(tmp_path / "t.csv") in str(caught.value)


def test_columns_of_text_are_left_out_with_a_warning(tmp_path):
    (tmp_path / "t.csv").write_text(f"{HEADER},file\n6,0.5,1,1,a.png\n7,1,1,1,b.png\n")
    with pytest.warns(
        UserWarning, match=r"t.csv: the column 'file' holds text \('a.png'\) and was"
    ):
        table = ScoreTable.load(tmp_path / "t.csv")
    assert list(table.metrics) == ["loss"]


@pytest.mark.exhaustive
def test_many_rows_are_read_block_by_block(tmp_path):
    rows = 140_000
    lines = [f"{2 * i};{i / 8:.3f}".replace(".", ",") for i in range(rows)]
    lines[70_000] = "140000;"
    (tmp_path / "t.csv").write_text("index;score\n" + "\n".join(lines) + "\n")
    table = ScoreTable.load(tmp_path / "t.csv", higher_is_better=True)
    expected = torch.arange(rows) / 8
    expected[70_000] = NAN
    torch.testing.assert_close(table.scores, expected, rtol=0, atol=1e-3, equal_nan=True)
    assert torch.equal(table.index, 2 * torch.arange(rows))
    (tmp_path / "t.csv").write_text("index;score\n" + "\n".join(lines) + "\n5,5;1\n")
    with pytest.raises(ValueError, match="the index in line 140002 must be a whole number"):
        ScoreTable.load(tmp_path / "t.csv", higher_is_better=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_csv_alone_loses_no_digit(tmp_path, dtype):
    table = table_of(rows=200, dtype=dtype)
    table.save(tmp_path / "t.csv")
    (tmp_path / "t.csv.meta.json").unlink()
    alone = ScoreTable.load(tmp_path / "t.csv")
    for one, other in (
        (alone.scores, table.scores),
        (alone.metrics["loss"], table.metrics["loss"]),
        (alone.per_checkpoint["score"], table.per_checkpoint["score"]),
    ):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("value", ["1e300", "1e-60", "0.12345678901"])
def test_numbers_that_float32_cannot_hold_stay_float64(tmp_path, value):
    (tmp_path / "t.csv").write_text(f"{HEADER}\n6,0.5,{value},1\n7,0.1,1,1\n")
    table = ScoreTable.load(tmp_path / "t.csv")
    assert table.metrics["loss"].dtype == torch.float64 and table.scores.dtype == torch.float32
    assert table.metrics["loss"][0] == float(value)


@pytest.mark.parametrize("rows", [3, 4, 9, 11])
@pytest.mark.parametrize("missing", [False, True])
def test_files_longer_than_a_block(tmp_path, monkeypatch, rows, missing):
    """No row is lost or read twice where blocks of rows meet, written and read cell by cell."""
    monkeypatch.setattr(csv_files, "_BLOCK_ROWS", 3)
    monkeypatch.setattr(cells, "_BLOCK_ROWS", 3)
    scores = torch.arange(rows) / 7
    table = ScoreTable(scores, {"loss": -scores}, index=torch.arange(rows) * 5)
    path = table.save(tmp_path / "t.csv")
    if missing:  # an empty cell in the last row makes the reader go through every cell
        text = path.read_text().splitlines()
        text[-1] = f"{5 * rows - 5},,1.5,1"
        path = tmp_path / "by_hand.csv"
        path.write_text("\n".join(text) + "\n")
        table.scores[-1], table.metrics["loss"][-1] = NAN, 1.5
    back = ScoreTable.load(path)
    assert back.index.tolist() == table.index.tolist()
    for one, other in ((back.scores, table.scores), (back.metrics["loss"], table.metrics["loss"])):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_the_digest_covers_the_whole_file(tmp_path):
    """A file of several blocks of reading, changed in its last byte, is not that of before."""
    path = ScoreTable(torch.rand(80_000, dtype=torch.float64)).save(tmp_path / "t.csv")
    content = path.read_bytes()
    assert len(content) > 2 << 20
    stated = json.loads((tmp_path / "t.csv.meta.json").read_text())["sha256"]
    assert stated == hashlib.sha256(content).hexdigest()
    path.write_bytes(content[:-2] + b"0\n")
    with pytest.raises(ValueError, match=r"has changed since t\.csv\.meta\.json was written"):
        ScoreTable.load(path)
