"""In full, what is said of tables, and of their files of every kind."""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

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


def test_what_a_reader_is_told(tmp_path):
    (tmp_path / "t.csv").write_text("index,score,file,n\n4,1.5,a.png,1\n")
    with pytest.warns(UserWarning) as caught:
        ScoreTable.load(tmp_path / "t.csv")
    assert [str(one.message) for one in caught] == [
        f"{tmp_path}/t.csv: the column 'file' holds text ('a.png') and was left out",
        f"{tmp_path}/t.csv: the file does not say whether high or low scores mean keep, and high "
        "is assumed; a column 'higher_is_better' of 1 or 0 says it, or load(..., "
        "higher_is_better=...)",
    ]
    columns = {"index": [4], "score": [1.5], "higher_is_better": [True], "file": ["a"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    with pytest.warns(UserWarning) as caught:
        ScoreTable.load(tmp_path / "t.parquet")
    (one,) = caught
    assert str(one.message) == (
        f"{tmp_path}/t.parquet: the column 'file' holds string and was left out"
    )


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"a": [1]}, "its schema carries no moso_fast entry and the column 'index' is missing"),
        (
            {"__index_level_0__": [1], "score": [1.0]},
            "its schema carries no moso_fast entry and the column 'index' is missing; the column "
            "'__index_level_0__' counts rows of pandas: if it holds the data-set indices, give it "
            "the name 'index'",
        ),
        (
            {"index": [0, None], "score": [1.0, 2.0]},
            "the index holds int64 or missing values, no integers",
        ),
        ({"index": ["a"], "score": [1.0]}, "the index holds string or missing values, no integers"),
        ({"index": [0], "score": ["a"]}, "the column 'score' holds string, no numbers"),
        (
            {"index": [0], "score": [1.0], "a@0": ["x"]},
            "the column 'a@0' holds string, no numbers",
        ),
    ],
)
def test_parquet_files_that_are_unclear(tmp_path, columns, said):
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert error_of(ScoreTable.load, path) == f"{path} is not a score table: {said}"


def test_numbers_of_other_widths_in_parquet(tmp_path):
    """float16 and float32 become float32, all others float64, and each is written to."""
    kinds = {
        "h": pyarrow.float16(),
        "f": pyarrow.float32(),
        "d": pyarrow.float64(),
        "i": pyarrow.int8(),
    }
    columns = {
        name: pyarrow.array(np.array([1, 2], "f2")).cast(kind) for name, kind in kinds.items()
    }
    direction = pyarrow.array([False, False])
    whole = {"index": [5, 7], "score": columns["f"], **columns, "higher_is_better": direction}
    pyarrow.parquet.write_table(pyarrow.table(whole), tmp_path / "t.parquet")
    table = ScoreTable.load(tmp_path / "t.parquet")
    assert {name: str(v.dtype)[-2:] for name, v in table.metrics.items()} == {
        "h": "32",
        "f": "32",
        "d": "64",
        "i": "64",
    }
    for values in (*table.metrics.values(), table.scores, table.index):
        values += 1
    assert table.scores.tolist() == [2.0, 3.0] and not table.higher_is_better


def test_npz_files_that_are_unclear(tmp_path):
    path = tmp_path / "t.npz"
    meta = np.array(json.dumps({"version": 1, "higher_is_better": True, "provenance": {}}))
    whole = {"index": np.arange(2), "score": np.ones(2), "@meta": meta}
    np.savez(path, **whole)
    assert ScoreTable.load(path).scores.tolist() == [1.0, 1.0]
    for change, said in (
        ({"@meta": np.ones(1)}, "the entry '@meta' is missing"),
        ({"a": np.ones((2, 1))}, "the entry 'a' is no column of numbers"),
        ({"a": np.array(["x", "y"])}, "the entry 'a' is no column of numbers"),
        ({"a": np.array([True, False])}, "the entry 'a' is no column of numbers"),
        ({"a": np.ones(3)}, "metrics['a'] must have 2 values a row, as scores; got shape (3,)"),
        ({"@meta": np.array("{")}, None),
    ):
        np.savez(path, **{**whole, **change})
        found = error_of(ScoreTable.load, path)
        start = f"{path} is not a score table: "
        assert found.startswith(f"{start}its description is unreadable (Expecting") or (
            found == f"{start}{said}"
        )
    del whole["score"]
    np.savez(path, **whole)
    assert error_of(ScoreTable.load, path).endswith(": the column 'score' is missing")


def test_paths_and_libraries(tmp_path, monkeypatch):
    table = ScoreTable(torch.zeros(2))
    assert error_of(table.save, tmp_path / "t.TXT") == (
        "a score table is a .parquet, .csv, .npz file; got 't.TXT' (suffix '.TXT')"
    )
    gone = tmp_path / "t.csv"
    assert error_of(ScoreTable.load, gone, kind=FileNotFoundError) == (
        f"no score table at {gone}: there is no such file"
    )
    assert error_of(table.save, tmp_path / "a" / "t.csv", kind=FileNotFoundError) == (
        f"cannot write {tmp_path}/a/t.csv: the folder {tmp_path}/a does not exist"
    )
    gone.mkdir()
    assert error_of(table.save, gone, kind=IsADirectoryError) == (
        f"cannot write {gone}: it is a folder, give a file name"
    )
    odd = ScoreTable(torch.zeros(1), provenance={"a": {1}})
    assert error_of(odd.save, tmp_path / "t.npz", kind=TypeError) == (
        "provenance must be JSON-able: Object of type set is not JSON serializable"
    )
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert error_of(table.save, tmp_path / "t.parquet", kind=ModuleNotFoundError) == (
        '.parquet files need pyarrow: pip install "moso-fast[table]", or use .csv or .npz'
    )


def test_nothing_is_said_of_a_whole_table(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for suffix in ("csv", "npz", "parquet"):
            ScoreTable.load(ScoreTable(torch.zeros(2)).save(tmp_path / f"t.{suffix}"))


def test_tables_in_full():
    index = torch.tensor([3, 5])
    table = ScoreTable(
        torch.tensor([1.0, NAN]), {"loss": torch.ones(2)}, {"a": torch.ones(4, 2)}, index
    )
    assert repr(table) == ("ScoreTable(2 samples, 1 without a score, 4 checkpoints, metrics: loss)")
    assert repr(ScoreTable(torch.ones(1))) == (
        "ScoreTable(1 samples, 0 without a score, metrics: none)"
    )
    assert error_of(table.column, "x") == "the table has no column 'x'; it has score, loss"
    for arguments, kind, said in (
        ({"scores": [1]}, TypeError, "scores must be a float32 or float64 tensor; got torch.int64"),
        ({"scores": torch.ones(1, 2)}, ValueError, "scores must have shape (N,); got (1, 2)"),
        ({"per_checkpoint": {"a": torch.ones(2)}}, ValueError,
         "per_checkpoint['a'] must have shape (K, N); got (2,)"),
        ({"metrics": {"a": torch.ones(3)}}, ValueError,
         "metrics['a'] must have 2 values a row, as scores; got shape (3,)"),
        ({"index": [1]}, ValueError, "index must have shape (2,), as scores; got (1,)"),
        ({"index": [1.0, 2.0]}, TypeError, "index must hold integers, got torch.float64"),
        ({"index": [4, 4]}, ValueError, "index 4 stands in the table twice; it must be unique"),
        ({"index": [4, -2]}, ValueError, "index must not be negative; got -2"),
    ):  # fmt: skip
        assert error_of(ScoreTable, **{"scores": torch.ones(2), **arguments}, kind=kind) == said
    assert error_of(ScoreTable.concat, []) == ("tables must hold at least one ScoreTable; got none")
    low = ScoreTable(torch.ones(1), higher_is_better=False)
    assert error_of(ScoreTable.concat, [table, low]) == (
        "tables disagree in higher_is_better; concat needs one direction"
    )


def test_tables_put_together_keep_what_agrees():
    def part(number, **origin):
        return ScoreTable(torch.full((1,), float(number)), index=[number], provenance=origin,
                          higher_is_better=False)  # fmt: skip

    alone = ScoreTable.concat([part(3, seed=1)])
    assert alone.provenance == {"seed": 1} and not alone.higher_is_better
    whole = ScoreTable.concat(iter([part(3, seed=1, lr=2, a=0), part(1, seed=1, lr=3)]))
    assert whole.scores.tolist() == [1.0, 3.0] and whole.index.tolist() == [1, 3]
    assert whole.provenance == {"seed": 1, "parts": [{"lr": 2, "a": 0}, {"lr": 3}]}
