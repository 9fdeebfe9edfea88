"""Columns and frames of pandas where tensors are meant, and tables that pandas wrote anew."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from moso_fast.tables.select import select
from moso_fast.tables.table import ScoreTable
from moso_fast.util.array_like import as_tensor

pandas = pytest.importorskip("pandas", reason="pandas is not installed")

GRID = np.arange(12, dtype=np.float32).reshape(3, 4)
CONVERTED = {
    "series": (pandas.Series([3, 1, 2], index=[7, 0, 5]), torch.int64, [3, 1, 2]),
    "filtered series": (pandas.Series([3.5, 1.5, 2.5]).iloc[[2, 0]], torch.float64, [2.5, 3.5]),
    "index": (pandas.Index([5, 4]), torch.int64, [5, 4]),
    "frame": (pandas.DataFrame({"a": [1.0, 2.0], "b": [3, 4]}), torch.float64, [[1, 3], [2, 4]]),
    "nullable": (pandas.Series([1, 2], dtype="Int32"), torch.int32, [1, 2]),
    "nullable frame": (
        pandas.DataFrame({"a": [1, 2], "b": [3, 4]}, dtype="Int64"),
        torch.int64,
        [[1, 3], [2, 4]],
    ),
    "categories of ids": (pandas.Series([3, 1, 3], dtype="category"), torch.int64, [3, 1, 3]),
    "extension array": (pandas.array([1.5, 2.5]), torch.float64, [1.5, 2.5]),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_columns_give_their_numbers_in_their_order(name):
    value, dtype, expected = CONVERTED[name]
    tensor = as_tensor("labels", value)
    assert tensor.dtype == dtype and torch.equal(tensor, torch.tensor(expected, dtype=dtype))


def test_missing_numbers_of_a_floating_point_column_are_nan():
    for kind in ("Float64", "float64"):
        tensor = as_tensor("scores", pandas.Series([1.0, None, 2.0], dtype=kind))
        assert tensor.dtype == torch.float64 and tensor.isnan().tolist() == [False, True, False]


def test_columns_share_their_memory():
    column = pandas.Series(np.arange(4.0))
    assert as_tensor("scores", column).data_ptr() == column.to_numpy().ctypes.data
    frame = pandas.DataFrame(GRID)
    assert as_tensor("features", frame).data_ptr() == frame.to_numpy().ctypes.data


def test_bfloat16_of_another_library_keeps_its_bits():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    values = np.array([1.0, -2.5, 3e38]).astype(bfloat16)
    tensor = as_tensor("features", values)
    assert (
        tensor.dtype == torch.bfloat16 and tensor.float().tolist() == values.astype("f4").tolist()
    )
    assert tensor.data_ptr() == values.ctypes.data


REFUSED = {
    "text column": (pandas.Series(["cat", None]), TypeError, "labels must hold numbers; it holds "),
    "categories of text": (pandas.Series(["cat"], dtype="category"), TypeError, "must hold number"),
    "missing id": (
        pandas.Series([1, None], dtype="Int64"),
        ValueError,
        "labels has a missing value at position 1 of Int64 numbers; drop or fill it",
    ),
    "text in a frame": (
        pandas.DataFrame({"a": [1.0], "name": ["cat"]}),
        TypeError,
        r"labels\['name'\] must hold numbers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_columns_without_numbers_are_refused_in_one_line(name):
    value, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        as_tensor("labels", value)
    assert "\n" not in str(caught.value)


def trips():
    """Ways of a table through pandas and back to a file that hold every row."""
    return {
        "csv with row numbers": (".csv", lambda d, path: d.to_csv(path)),
        "csv": (".csv", lambda d, path: d.to_csv(path, index=False)),
        "csv of Excel": (".csv", lambda d, path: d.to_csv(path, encoding="utf-8-sig")),
        "csv of a German Excel": (".csv", lambda d, path: d.to_csv(path, sep=";", decimal=",")),
        "csv by index": (".csv", lambda d, path: d.set_index("index").to_csv(path)),
        "csv twice": (".csv", _twice),
        "csv quoted": (".csv", lambda d, path: d.to_csv(path, quoting=1)),
        "csv of nullable columns": (".csv", lambda d, path: d.convert_dtypes().to_csv(path)),
        "parquet": (".parquet", lambda d, path: d.to_parquet(path)),
        "parquet by index": (".parquet", lambda d, path: d.set_index("index").to_parquet(path)),
        "parquet of nullable columns": (
            ".parquet",
            lambda d, path: d.convert_dtypes().to_parquet(path),
        ),
        "parquet of joined parts": (
            ".parquet",
            lambda d, path: pandas.concat([d.iloc[20:], d.iloc[:20]]).to_parquet(path),
        ),
    }


def _twice(frame, path):
    frame.to_csv(path)
    pandas.read_csv(path).to_csv(path)


@pytest.mark.parametrize("source", [".csv", ".parquet"])
@pytest.mark.parametrize("high", [True, False])
@pytest.mark.parametrize("name", trips())
def test_tables_come_back_from_pandas(tmp_path, name, high, source):
    draw = torch.Generator().manual_seed(2)
    table = ScoreTable(
        torch.randn(30, generator=draw),
        {"loss": torch.rand(30, generator=draw)},
        {"score": torch.randn(2, 30, generator=draw)},
        index=torch.randperm(90, generator=draw)[:30],
        higher_is_better=high,
    )
    table.scores[4] = torch.nan
    table.save(tmp_path / f"t{source}")
    read = pandas.read_csv if source == ".csv" else pandas.read_parquet
    frame = read(tmp_path / f"t{source}").sort_values("loss")
    suffix, write = trips()[name]
    write(frame, tmp_path / f"other{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ScoreTable.load(tmp_path / f"other{suffix}")
    mine, theirs = table.index.argsort(), found.index.argsort()
    assert found.higher_is_better is high and torch.equal(found.index[theirs], table.index[mine])
    assert not torch.equal(found.index, table.index)
    for one, other in (
        (found.scores, table.scores),
        (found.metrics["loss"], table.metrics["loss"]),
        (found.per_checkpoint["score"][1], table.per_checkpoint["score"][1]),
    ):
        torch.testing.assert_close(
            one[theirs].float(), other[mine], rtol=1e-7, atol=0, equal_nan=True
        )
    assert torch.equal(select(found, 7), select(table, 7))


def test_columns_of_pandas_are_scores_and_labels():
    frame = pandas.DataFrame({"score": [0.5, 2.0, 1.0, 3.0], "label": [0, 0, 1, 1]})
    kept = frame[frame.score > 0.6]
    assert select(kept.score, 1).tolist() == [2]  # a position, as for iloc
    assert select(kept["score"], 2, labels=kept["label"], balance="equal").tolist() == [0, 2]
    table = ScoreTable(kept["score"], {"loss": kept["score"]}, index=kept.index)
    assert select(table, 1).tolist() == [3]
    table.scores[0] = -1
    assert kept["score"].tolist() == [2.0, 1.0, 3.0]  # a table has memory of its own
