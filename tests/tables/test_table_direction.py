"""Which scores mean keep: said by the file itself, wherever it went, or assumed aloud."""

from __future__ import annotations

import hashlib
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


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("high", [True, False])
def test_a_file_alone_keeps_its_direction(tmp_path, suffix, high):
    table = table_of(higher_is_better=high)
    table.save(tmp_path / f"t{suffix}")
    if suffix == ".csv":
        (tmp_path / "t.csv").rename(tmp_path / "moved.csv")
    else:
        plain = pyarrow.parquet.read_table(tmp_path / "t.parquet").replace_schema_metadata(None)
        pyarrow.parquet.write_table(plain, tmp_path / "moved.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = ScoreTable.load(tmp_path / f"moved{suffix}")
    assert moved.higher_is_better is high and moved.provenance == {}
    assert torch.equal(select(moved, 2), select(table, 2))
    assert torch.equal(moved.scores, table.scores)
    with pytest.raises(
        ValueError, match=r"is a higher score better\? its column .* the caller says"
    ):
        ScoreTable.load(tmp_path / f"moved{suffix}", higher_is_better=not high)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_without_any_direction_high_is_assumed_aloud(tmp_path, suffix):
    if suffix == ".csv":
        (tmp_path / "t.csv").write_text("index,score\n4,1.5\n2,0.5\n")
    else:
        columns = pyarrow.table({"index": [4, 2], "score": [1.5, 0.5]})
        pyarrow.parquet.write_table(columns, tmp_path / "t.parquet")
    path = tmp_path / f"t{suffix}"
    with pytest.warns(
        UserWarning, match="does not say whether high or low scores mean keep"
    ) as seen:
        table = ScoreTable.load(path)
    assert seen[0].filename == __file__
    assert table.higher_is_better and select(table, 1).tolist() == [4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low = ScoreTable.load(path, higher_is_better=False)
    assert select(low, 1).tolist() == [2]


@pytest.mark.parametrize("high", [True, False])
def test_tables_of_the_first_release_still_load(tmp_path, high):
    """Their direction stood in the description alone, and csv and parquet had no column for it."""
    meta = {"version": 1, "higher_is_better": high, "provenance": {"seed": 3}}
    columns = {"index": np.array([4, 2]), "score": np.array([1.5, 0.1], dtype=np.float32)}
    fields = [pyarrow.field(n, pyarrow.array(v).type, nullable=False) for n, v in columns.items()]
    schema = pyarrow.schema(fields, metadata={b"moso_fast": json.dumps(meta).encode()})
    arrays = [pyarrow.array(v) for v in columns.values()]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays(arrays, schema=schema), tmp_path / "t.parquet"
    )
    text = b"index,score\n4,1.5\n2,0.100000001\n"
    (tmp_path / "t.csv").write_bytes(text)
    described = {"dtypes": {"index": "int64", "score": "float32"}}
    described |= {"sha256": hashlib.sha256(text).hexdigest(), **meta}
    (tmp_path / "t.csv.meta.json").write_text(json.dumps(described))
    np.savez(tmp_path / "t.npz", **columns, **{"@meta": np.array(json.dumps(meta))})
    for suffix in (".parquet", ".csv", ".npz"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = ScoreTable.load(tmp_path / f"t{suffix}")
        assert table.higher_is_better is high and table.provenance == {"seed": 3}
        assert table.index.tolist() == [4, 2] and table.scores.dtype == torch.float32
        assert table.scores.numpy().tobytes() == columns["score"].tobytes()


def test_a_description_with_an_unclear_direction_is_refused(tmp_path):
    table_of().save(tmp_path / "t.csv")
    beside = tmp_path / "t.csv.meta.json"
    described = json.loads(beside.read_text())
    beside.write_text(json.dumps({**described, "higher_is_better": "false"}))
    with pytest.raises(ValueError, match="higher_is_better is 'false', neither true nor false"):
        ScoreTable.load(tmp_path / "t.csv")
    beside.write_text(json.dumps({**described, "higher_is_better": False}))
    with pytest.raises(ValueError, match=r"its description says False, its column .* says True"):
        ScoreTable.load(tmp_path / "t.csv")
