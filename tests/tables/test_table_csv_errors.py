"""In full, what is said of .csv files that are unclear, and limits to the last digit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moso_fast.tables.csv_files import narrowest
from moso_fast.tables.table import ScoreTable

NAN = float("nan")
HEADER = "index,score,loss,higher_is_better"


def error_of(call, *arguments, kind=ValueError, **named):
    with pytest.raises(kind) as caught:
        call(*arguments, **named)
    return str(caught.value)


def said_of(path, text):
    path.write_bytes(text.encode())
    return error_of(ScoreTable.load, path).removeprefix(f"{path} is not a score table: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            f"{HEADER}\n6,0,5,1,1\n",
            "line 2 has 5 cells for 4 columns; numbers with decimal commas need ';' between the "
            "columns",
        ),
        (f"{HEADER}\n\n6,1,1,1\n7,1,1\n", "line 4 has 3 cells for 4 columns"),
        ("index;score\n6;1;1\n", "line 2 has 3 cells for 2 columns"),
        (
            f'{HEADER}\n5,1,1,1\n6,"0,5",1,1\n',
            "'0,5' in line 3 has a comma within a number, in a file with commas between its "
            "columns; write points, or separate the columns by ';'",
        ),
        (
            "index;score;loss\n6;0,5;1,5\n7;1.25;2.5\n8;1.75;1\n",
            "it has numbers with a decimal comma (0,5 in line 2) and with a point (1.25 in line "
            "3); write all with points and without marks between thousands",
        ),
        (
            "index;score\n6;1,500\n7;2,250\n",
            "the comma of 1,500 in line 2 may be a decimal mark or stand between thousands, and no "
            "other number tells; write decimal points",
        ),
        (
            f"{HEADER}\n6.5,1,1,1\n",
            "the index in line 2 must be a whole number in plain digits; it is '6.5'",
        ),
        (
            "index;score\n6,0;0,5\n1,000;0,5\n",
            "the index in line 3 must be a whole number in plain digits; it is '1,000'",
        ),
        (
            f"{HEADER}\n6,1,1,1\n7,1,x,1\n8,y,1,1\n",
            "the column 'score': could not convert string 'y' in line 4 to a number",
        ),
        (
            "index,score,loss@0\n6,1,a\n",
            "the column 'loss@0': could not convert string 'a' in line 2 to a number",
        ),
        ("index,score,loss@x\n6,1,1\n", "the column 'loss@x' is unknown"),
        ("index,score,a@0,a@3\n6,1,1,1\n", "a column of a@0 .. a@3 is missing"),
        ("index,loss\n6,1\n", "the column 'score' is missing"),
        (
            "Unnamed: 0,score\n6,1\n",
            "the column 'index' is missing; the column 'Unnamed: 0' counts rows of pandas: if it "
            "holds the data-set indices, give it the name 'index'",
        ),
        ("a,,\n6,1,1\n", "the column 'index' is missing; the column '' counts rows of pandas: if "
         "it holds the data-set indices, give it the name 'index'"),
        ("index,score,a,a\n6,1,1,1\n", "a column stands there twice: 'a'"),
        (
            f"{HEADER}\n6,1,1,1\n7,1,1,0.5\n",
            "the column 'higher_is_better' must hold 1 or 0; it holds 0.5",
        ),
        (
            f"{HEADER}\n6,1,1,1\n7,1,1,\n",
            "the column 'higher_is_better' must hold 1 or 0; it holds no value in some rows",
        ),
        (
            f"{HEADER}\n6,1,1,1\n7,1,1,0\n",
            "the column 'higher_is_better' holds 1 and 0: tables of opposite direction were "
            "joined; negate the scores of one of them",
        ),
        (f"{HEADER}\n9223372036854775808,1,1,1\n",
         "the index 9223372036854775808 in line 2 is beyond int64"),
        (f"{HEADER}\n7,1,1,1\n-9223372036854775809,1,1,1\n",
         "the index -9223372036854775809 in line 3 is beyond int64"),
        (f'{HEADER}\n"-9223372036854775808",1,1,1\n',
         "index must not be negative; got -9223372036854775808"),
    ],
)  # fmt: skip
def test_csv_files_that_are_unclear(tmp_path, text, said):
    assert said_of(tmp_path / "t.csv", text) == said


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1,5", "2,250"], [1.5, 2.25]),  # one that cannot be thousands tells of the others
        (["1,250", "0,250"], [1.25, 0.25]),
        (["2,250", "12,25"], [2.25, 12.25]),
        (["1,250", "1234,250"], [1.25, 1234.25]),
        (["1,5", "1e3"], [1.5, 1000.0]),
        ([",5", "1,"], [0.5, 1.0]),
        (["+1,5E-2", "-1,5"], [0.015, -1.5]),
    ],
)
def test_decimal_commas_where_one_number_tells(tmp_path, cells, values):
    """Read as a block of plain numbers, or cell by cell where one is empty; in any order."""
    path, numbers = tmp_path / "t.csv", list(zip(cells, values, strict=True))
    for rows in (numbers, numbers[::-1], [*numbers, ("", NAN)], [("", NAN), *numbers]):
        lines = [f"{k};{cell}" for k, (cell, _) in enumerate(rows)]
        path.write_text("\n".join(["index;score", *lines, ""]))
        found = ScoreTable.load(path, higher_is_better=True).scores
        expected = torch.tensor([value for _, value in rows], dtype=found.dtype)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("empty", ["", "na", "N/A", "#N/A", "NaN", "null", "None", "<NA>", "+nan"])
def test_cells_without_a_number(tmp_path, empty):
    (tmp_path / "t.csv").write_text(f"index,score\n3,{empty}\n4,-Infinity\n5,+inf\n")
    scores = ScoreTable.load(tmp_path / "t.csv", higher_is_better=True).scores
    assert scores[0].isnan() and scores[1:].tolist() == [-np.inf, np.inf]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_marks_between_the_columns(tmp_path, mark):
    for lead in ("", f"sep={mark}\n", f'"sep={mark}"\r\n'):
        text = lead + f"index{mark}score{mark}x y\n3{mark}0.5{mark}7\n"
        (tmp_path / "t.csv").write_text(text)
        table = ScoreTable.load(tmp_path / "t.csv", higher_is_better=True)
        assert table.scores.tolist() == [0.5] and table.metrics["x y"].tolist() == [7.0]
    # The name of a column may hold the other marks.
    (tmp_path / "t.csv").write_text("index|score|a;b;c;d\n3|0.5|7\n")
    assert list(ScoreTable.load(tmp_path / "t.csv", higher_is_better=True).metrics) == ["a;b;c;d"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0.1, NAN, np.inf, 2.5], np.float32),  # 9 digits bring them back
        ([0.100000001, 0.0], np.float32),
        ([0.1 + 1e-12, 0.5], np.float64),
        ([0.1, 0.12345678901], np.float64),
        ([1e38, 1.0], np.float32),
        ([1e39, 1.0], np.float64),
        ([1e-50, 1.0], np.float64),
        ([1e-45, -1.0], np.float32),
        ([], np.float32),
    ],
)
def test_what_a_csv_without_its_description_keeps(values, kind):
    given = np.array(values, dtype=np.float64)
    found = narrowest(given)
    assert found.dtype == kind and (kind is np.float32 or found is given)
    np.testing.assert_allclose(found, given, rtol=1e-6, atol=1e-45)


def test_descriptions_beside_a_csv(tmp_path):
    table = ScoreTable(torch.rand(3), {"loss": torch.rand(3, dtype=torch.float64)})
    path, beside = table.save(tmp_path / "t.csv"), tmp_path / "t.csv.meta.json"
    stated = json.loads(beside.read_text())
    assert stated["dtypes"] == {"index": "int64", "score": "float32", "loss": "float64"}
    assert path.read_text().splitlines()[0] == "index,score,loss,higher_is_better"
    for change, said in (
        (
            {"dtypes": {"score": "float16", "a": "int8"}},
            f"{beside} is not a score table: unknown dtypes ['float16', 'int8']",
        ),
        (
            {"sha256": "0"},
            f"{path} has changed since t.csv.meta.json was written beside it; delete that file to "
            "read the numbers without their origin",
        ),
        ({"version": 2}, f"{path} is not a score table: its version is 2, this release reads 1"),
        (
            {"higher_is_better": 1},
            f"{path} is not a score table: its description is unreadable (higher_is_better is 1, "
            "neither true nor false)",
        ),
        (
            {"higher_is_better": False},
            f"{path}: is a higher score better? its description says False, its column "
            "'higher_is_better' says True; correct what is wrong",
        ),
    ):
        beside.write_text(json.dumps({**stated, **change}))
        assert error_of(ScoreTable.load, path) == said
    for lacking in ("dtypes", "sha256"):
        beside.write_text(json.dumps({k: v for k, v in stated.items() if k != lacking}))
        said = f"{beside} is not a score table, or is damaged: '{lacking}'"
        assert error_of(ScoreTable.load, path) == said
    for lacking in ("version", "higher_is_better", "provenance"):
        beside.write_text(json.dumps({k: v for k, v in stated.items() if k != lacking}))
        assert error_of(ScoreTable.load, path) == (
            f"{path} is not a score table: its description is unreadable ('{lacking}')"
        )
    for content in ("null", "{", "[]", '{"dtypes": 3}'):
        beside.write_text(content)
        said = error_of(ScoreTable.load, path)
        assert said.startswith(f"{beside} is not a score table, or is damaged: ")
    beside.write_text(json.dumps(stated))
    assert error_of(ScoreTable.load, path, higher_is_better=False) == (
        f"{path}: is a higher score better? its description says True, its column "
        "'higher_is_better' says True, the caller says False; correct what is wrong"
    )
    assert ScoreTable.load(path, higher_is_better=True).metrics["loss"].dtype == torch.float64
