"""Score tables in .parquet files that pandas or polars wrote anew."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from table_cases import table_of

from moso_fast.tables.select import select
from moso_fast.tables.table import ScoreTable

NAN = float("nan")


def anew(path, changes=None, drop=(), metadata=None):
    """Write a table's parquet file as pandas does: nulls for NaN, no description of ours."""
    columns = pyarrow.parquet.read_table(path)
    data = {name: columns.column(name) for name in columns.column_names if name not in drop}
    data |= changes or {}
    new = pyarrow.table(data)
    pyarrow.parquet.write_table(new.replace_schema_metadata(metadata), path)


ROWS = 6
PARQUET = {
    "row numbers of pandas": {"__index_level_0__": [5, 4, 3, 2, 1, 0]},
    "small integers": {"index": pyarrow.array(range(0, 18, 3), pyarrow.int32())},
    "unsigned integers": {"index": pyarrow.array(range(0, 18, 3), pyarrow.uint64())},
    "index of floats": {"index": [float(i) for i in range(0, 18, 3)]},
    "direction as a number": {"higher_is_better": [0.0] * ROWS},
    "direction as an integer": {"higher_is_better": pyarrow.array([0] * ROWS, pyarrow.int8())},
    "decimals": {"note": pyarrow.array(range(ROWS)).cast(pyarrow.decimal128(25, 2))},
    "integers": {"note": pyarrow.array(range(ROWS), pyarrow.int16())},
    "half precision": {"note": pyarrow.array(np.arange(ROWS, dtype=np.float16))},
    "missing": {"note": [None, 1.0, None, 2.0, 3.0, 4.0]},
}


@pytest.mark.parametrize("name", PARQUET)
def test_parquet_written_anew_is_read(tmp_path, name):
    table = table_of(ROWS, higher_is_better=False)
    table.scores[2] = NAN
    path = table.save(tmp_path / "t.parquet")
    metadata = {b"pandas": b'{"index_columns": ["__index_level_0__"]}'}
    anew(path, {"score": _with_nulls(table.scores), **PARQUET[name]}, metadata=metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ScoreTable.load(path)
    assert found.higher_is_better is False and torch.equal(found.index, table.index)
    torch.testing.assert_close(found.scores, table.scores, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.metrics["loss"], table.metrics["loss"])
    assert torch.equal(found.per_checkpoint["score"], table.per_checkpoint["score"])
    note = PARQUET[name].get("note")
    assert set(found.metrics) == {"loss"} | ({"note"} if note is not None else set())
    if note is not None:
        given = [NAN if v is None else float(v) for v in pyarrow.array(note).to_pylist()]
        expected = torch.tensor(given, dtype=found.metrics["note"].dtype)
        torch.testing.assert_close(found.metrics["note"], expected, equal_nan=True)


def _with_nulls(values):
    return pyarrow.array(values.numpy(), mask=values.isnan().numpy())


def notes_of_pandas(name, *limits):
    counted = dict(zip(("start", "stop", "step"), limits, strict=True), kind="range", name=name)
    return {b"pandas": json.dumps({"index_columns": [counted]}).encode()}


def test_an_index_that_pandas_keeps_as_a_range_is_read(tmp_path):
    """As ``set_index("index")`` leaves one of evenly spaced numbers."""
    table = table_of(ROWS)
    path = table.save(tmp_path / "t.parquet")
    anew(path, drop=("index",), metadata=notes_of_pandas("index", 0, 3 * ROWS, 3))
    found = ScoreTable.load(path)
    assert torch.equal(found.index, table.index) and torch.equal(found.scores, table.scores)
    for notes in (
        notes_of_pandas("index", 0, 3 * ROWS + 3, 3),  # of more rows than are left
        notes_of_pandas(None, 0, 3 * ROWS, 3),
        {b"pandas": b"{}"},
        {b"pandas": b"rubbish"},
    ):
        plain = pyarrow.parquet.read_table(path).replace_schema_metadata(notes)
        pyarrow.parquet.write_table(plain, tmp_path / "other.parquet")
        with pytest.raises(ValueError, match="the column 'index' is missing"):
            ScoreTable.load(tmp_path / "other.parquet")


PARQUET_REFUSED = {
    "index missing": ({"__index_level_0__": [0] * ROWS}, ("index",), "no moso_fast entry and the"),
    "index with a hole": ({"index": [0, 1, 2, 3, 4, None]}, (), "the index holds int64 or missing"),
    "index with a fraction": ({"index": [0.5, 1, 2, 3, 4, 5]}, (), "the index holds no whole num"),
    "index too large": (
        {"index": pyarrow.array([0, 1, 2, 3, 4, 2**63], pyarrow.uint64())},
        (),
        "the index holds no whole numbers",
    ),
    "index twice": ({"index": [0, 1, 2, 3, 4, 4]}, (), "index 4 stands in the table twice"),
    "index of text": ({"index": list("abcdef")}, (), "the index holds string"),
    "index of truth": ({"index": [True] * ROWS}, (), "the index holds bool"),
    "scores of text": ({"score": list("abcdef")}, (), "the column 'score' holds string, no num"),
    "checkpoint of text": ({"score@0": list("abcdef")}, (), "the column 'score@0' holds string"),
    "direction of text": ({"higher_is_better": ["y"] * ROWS}, (), "'higher_is_better' holds str"),
    "direction missing": (
        {"higher_is_better": [True] * 5 + [None]},
        (),
        "must hold 1 or 0; it holds no value in some rows",
    ),
    "both directions": ({"higher_is_better": [True] * 5 + [False]}, (), "of opposite direction"),
    "checkpoint dropped": ({}, ("score@0",), r"a column of score@0 \.\. score@1 is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARQUET_REFUSED)
def test_parquet_that_is_unclear_is_refused_in_one_line(tmp_path, name):
    changes, drop, message = PARQUET_REFUSED[name]
    path = table_of(ROWS).save(tmp_path / "t.parquet")
    anew(path, changes, drop)
    with pytest.raises(ValueError, match=message) as caught:
        ScoreTable.load(path)
    assert "\n" not in str(caught.value)


def test_parquet_columns_without_numbers_are_left_out_with_a_warning(tmp_path):
    path = table_of(ROWS).save(tmp_path / "t.parquet")
    anew(path, {"file": list("abcdef")})
    with pytest.warns(UserWarning, match="the column 'file' holds string and was left out"):
        assert list(ScoreTable.load(path).metrics) == ["loss"]


def test_rows_sorted_and_left_out_keep_their_indices(tmp_path):
    table = table_of(ROWS)
    path = table.save(tmp_path / "t.parquet")
    columns = pyarrow.parquet.read_table(path)
    kept = table.scores.argsort()[1:]
    pyarrow.parquet.write_table(columns.take(kept.tolist()), path)
    found = ScoreTable.load(path)
    assert torch.equal(found.index, table.index[kept])
    assert select(found, 2).tolist() == select(table, 2).tolist()


@pytest.mark.parametrize("suffix", ["parquet", "csv", "npz"])
def test_metrics_named_like_a_nameless_column_of_pandas(tmp_path, suffix):
    """What we wrote under such a name comes back; what pandas wrote is still left aside."""
    table = table_of(ROWS)
    names = ["Unnamed: 1", "__index_level_0__"]
    table.metrics |= {name: torch.rand(ROWS) for name in names}
    path = table.save(tmp_path / f"t.{suffix}")
    found = ScoreTable.load(path)
    assert list(found.metrics) == ["loss", *names]
    for name in names:
        assert torch.equal(found.metrics[name], table.metrics[name])
    if suffix == "parquet":
        anew(path)
        assert list(ScoreTable.load(path).metrics) == ["loss"]
