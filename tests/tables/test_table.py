"""The score table, its files and its concatenation."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch

from moso_fast.tables.table import METRICS, ScoreTable
from moso_fast.util import files

SUFFIXES = (".parquet", ".csv", ".npz")


def make_table(rows=50, depth=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        # Wide exponents: what decimal text has to bring back bit by bit.
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        values *= 10.0 ** torch.randint(-30, 30, shape, generator=generator)
        return values.to(dtype)

    scores = draw(rows)
    if rows >= 5:
        scores[0], scores[1], scores[2] = torch.nan, torch.inf, -torch.inf
        scores[3], scores[4] = -0.0, torch.finfo(dtype).smallest_normal / 4
    return ScoreTable(
        scores=scores,
        metrics={name: draw(rows) for name in METRICS},
        per_checkpoint={"alignment": draw(depth, rows), "score": draw(depth, rows)},
        index=torch.randperm(10 * rows + 1, generator=generator)[:rows],
        provenance={"formula": "moso", "seed": seed, "lr": [0.1, 1e-8], "name": "Größe"},
    )


def bits(values):
    array = values.contiguous().numpy()
    return array.dtype, array.shape, array.tobytes()


def assert_same(one, other):
    assert bits(one.scores) == bits(other.scores)
    assert torch.equal(one.index, other.index)
    for mine, theirs in (
        (one.metrics, other.metrics),
        (one.per_checkpoint, other.per_checkpoint),
    ):
        assert list(mine) == list(theirs)
        assert all(bits(mine[name]) == bits(theirs[name]) for name in mine)
    assert one.higher_is_better == other.higher_is_better
    assert one.provenance == other.provenance


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_files_bring_every_bit_back(tmp_path, suffix, dtype, rows):
    table = make_table(rows, dtype=dtype)
    table.higher_is_better = False
    path = tmp_path / f"scores{suffix}"
    assert table.save(path) == path
    assert_same(table, ScoreTable.load(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_float32_patterns_survive(tmp_path, suffix):
    patterns = torch.randint(0, 2**31 - 1, (20_000,), generator=torch.Generator().manual_seed(1))
    # A float32 whose shortest text, read as float64 and rounded again, is another float32.
    famous = np.array([7.038531e-26], dtype=np.float32).view(np.int32)
    patterns = torch.cat([patterns, torch.from_numpy(famous).long()]).to(torch.int32)
    values = patterns.view(torch.float32)
    values = values[~values.isnan()].clone()
    ScoreTable(values).save(tmp_path / f"t{suffix}")
    assert bits(ScoreTable.load(tmp_path / f"t{suffix}").scores) == bits(values)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_mixed_dtypes_and_odd_names_survive(tmp_path, suffix):
    table = ScoreTable(
        torch.rand(3),
        metrics={"file": torch.rand(3, dtype=torch.float64), "meta": torch.rand(3)},
        per_checkpoint={"alignment": torch.rand(12, 3)},
    )
    table.save(tmp_path / f"t{suffix}")
    assert_same(table, ScoreTable.load(tmp_path / f"t{suffix}"))


def test_csv_has_a_plain_header_and_reads_without_its_origin(tmp_path):
    table = make_table()
    table.save(tmp_path / "t.csv")
    header = (tmp_path / "t.csv").read_text().splitlines()[0].split(",")
    assert header[:3] == ["index", "score", "alignment"]
    assert header[-6:] == [f"{name}@{k}" for name in ("alignment", "score") for k in range(3)]
    (tmp_path / "t.csv.meta.json").unlink()
    bare = ScoreTable.load(tmp_path / "t.csv")
    assert bare.provenance == {} and bits(bare.scores) == bits(table.scores)


def test_csv_that_changed_is_not_given_a_wrong_origin(tmp_path):
    make_table().save(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open("a") as file:
        file.write("")
    ScoreTable.load(tmp_path / "t.csv")
    text = (tmp_path / "t.csv").read_text().splitlines()
    (tmp_path / "t.csv").write_text("\n".join(text[:-1]) + "\n")
    with pytest.raises(ValueError, match=r"changed since t\.csv\.meta\.json"):
        ScoreTable.load(tmp_path / "t.csv")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_write_leaves_the_old_file(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"t{suffix}"
    old = make_table(seed=1)
    old.save(path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_table(seed=2).save(path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_have_the_usual_permissions(tmp_path, suffix):
    make_table().save(tmp_path / f"t{suffix}")
    (tmp_path / "plain").write_text("")
    plain = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / f"t{suffix}").stat().st_mode == plain


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04rubbish", b"\xff\xfe\x00"])
def test_rubbish_is_refused_in_one_line(tmp_path, suffix, content):
    path = tmp_path / f"t{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a score table") as caught:
        ScoreTable.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_cut_off_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    make_table().save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"score table|changed since"):
        ScoreTable.load(path)


def test_foreign_files_say_what_is_missing(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="carries no moso_fast entry"):
        ScoreTable.load(tmp_path / "a.parquet")
    np.savez(tmp_path / "a.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match="the entry '@meta' is missing"):
        ScoreTable.load(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        ScoreTable.load(tmp_path / "b.npz")
    (tmp_path / "a.csv").write_text("index,loss\n0,1\n")
    with pytest.raises(ValueError, match="the column 'score' is missing"):
        ScoreTable.load(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("index,score\n0,high\n")
    with pytest.raises(ValueError, match="could not convert string"):
        ScoreTable.load(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("index,score,score@1\n0,1,1\n")
    with pytest.raises(ValueError, match=r"score@0 \.\. score@1 is missing"):
        ScoreTable.load(tmp_path / "c.csv")
    (tmp_path / "d.csv").write_text("index,score\n3,1\n3,2\n")
    with pytest.raises(ValueError, match="index 3 stands in the table twice"):
        ScoreTable.load(tmp_path / "d.csv")


def test_a_newer_version_is_refused(tmp_path):
    make_table().save(tmp_path / "t.csv")
    beside = tmp_path / "t.csv.meta.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"version": 99}))
    with pytest.raises(ValueError, match="version is 99, this release reads 1"):
        ScoreTable.load(tmp_path / "t.csv")


@pytest.mark.parametrize("name", ["t.txt", "t", "t.parquet.gz", "t.PARQUET"])
def test_unknown_suffix_lists_the_known_ones(tmp_path, name):
    with pytest.raises(ValueError, match=r"\.parquet, \.csv, \.npz"):
        make_table().save(tmp_path / name)
    with pytest.raises(ValueError, match=r"\.parquet, \.csv, \.npz"):
        ScoreTable.load(tmp_path / name)


def test_places_that_do_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder .* does not exist"):
        make_table().save(tmp_path / "no" / "t.npz")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        ScoreTable.load(tmp_path / "t.npz")
    (tmp_path / "t.npz").mkdir()
    with pytest.raises(IsADirectoryError, match="give a file name"):
        make_table().save(tmp_path / "t.npz")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "moso-fast\[table\]"'):
        make_table().save(tmp_path / "t.parquet")
    assert list(tmp_path.iterdir()) == []


def test_provenance_must_be_json(tmp_path):
    table = ScoreTable(torch.zeros(2), provenance={"what": object()})
    with pytest.raises(TypeError, match="provenance must be JSON-able"):
        table.save(tmp_path / "t.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"scores": [1, 2]},
            TypeError,
            "scores must be a float32 or float64 tensor; got torch.int",
        ),
        ({"scores": ["a", "b"]}, TypeError, r"scores must hold numbers; it holds text \('a' at"),
        ({"scores": torch.zeros(2).half()}, TypeError, "got torch.float16"),
        ({"scores": torch.zeros(2, 1)}, ValueError, r"scores must have shape \(N,\)"),
        ({"index": torch.zeros(3).long()}, ValueError, r"index must have shape \(2,\)"),
        ({"index": torch.tensor([1, 1])}, ValueError, "index 1 stands in the table twice"),
        ({"index": torch.tensor([-1, 1])}, ValueError, "index must not be negative; got -1"),
        ({"index": torch.zeros(2)}, TypeError, "index must hold integers"),
        ({"index": torch.tensor([1j, 2])}, TypeError, "index must hold integers, got torch.compl"),
        ({"index": torch.ones(2).bool()}, TypeError, "index must hold integers, got torch.bool"),
        ({"metrics": {"loss": torch.zeros(3)}}, ValueError, r"metrics\['loss'\] must have 2"),
        ({"metrics": {"a@b": torch.zeros(2)}}, ValueError, "cannot have the name 'a@b'"),
        ({"metrics": {"score": torch.zeros(2)}}, ValueError, "cannot have the name 'score'"),
        ({"metrics": {"index": torch.zeros(2)}}, ValueError, "cannot have the name 'index'"),
        ({"metrics": {"higher_is_better": torch.zeros(2)}}, ValueError, "cannot have the name 'hi"),
        ({"per_checkpoint": {"loss": torch.zeros(2)}}, ValueError, r"shape \(K, N\)"),
    ],
)
def test_tables_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        ScoreTable(**{"scores": torch.zeros(2), **arguments})


def test_column_and_repr():
    table = make_table()
    assert table.column("score") is table.scores
    assert table.column("el2n") is table.metrics["el2n"]
    with pytest.raises(ValueError, match="no column 'moso'; it has score, alignment"):
        table.column("moso")
    assert repr(table).startswith("ScoreTable(50 samples, 1 without a score, 3 checkpoints")
    assert len(table) == 50


def parts_of(table, *pieces):
    return [
        ScoreTable(
            table.scores[rows],
            {name: values[rows] for name, values in table.metrics.items()},
            {name: values[:, rows] for name, values in table.per_checkpoint.items()},
            table.index[rows],
            table.higher_is_better,
            {**table.provenance, "part": number},
        )
        for number, rows in enumerate(pieces)
    ]


def test_concat_puts_parts_together_again():
    table = make_table()
    order = table.index.argsort()
    whole = ScoreTable.concat(parts_of(table, slice(0, 17), slice(17, 18), slice(18, 50)))
    assert torch.equal(whole.index, table.index[order])
    assert bits(whole.scores) == bits(table.scores[order])
    assert all(bits(whole.metrics[n]) == bits(table.metrics[n][order]) for n in table.metrics)
    for name, values in table.per_checkpoint.items():
        assert bits(whole.per_checkpoint[name]) == bits(values[:, order])
    assert whole.provenance == {**table.provenance, "parts": [{"part": n} for n in range(3)]}


def test_concat_keeps_what_all_parts_have():
    one, other = parts_of(make_table(), slice(0, 20), slice(20, 50))
    del other.metrics["loss"]
    other.per_checkpoint["score"] = other.per_checkpoint["score"][:2]
    whole = ScoreTable.concat([one, other])
    assert "loss" not in whole.metrics and "el2n" in whole.metrics
    assert list(whole.per_checkpoint) == ["alignment"]


def test_concat_refuses_what_does_not_fit():
    one, other = parts_of(make_table(), slice(0, 20), slice(19, 50))
    with pytest.raises(ValueError, match=f"index {int(one.index[19])} stands in the table twice"):
        ScoreTable.concat([one, other])
    with pytest.raises(ValueError, match="at least one ScoreTable"):
        ScoreTable.concat([])
    one, other = parts_of(make_table(), slice(0, 20), slice(20, 50))
    other.higher_is_better = False
    with pytest.raises(ValueError, match="higher_is_better"):
        ScoreTable.concat([one, other])


@pytest.mark.parametrize("name", ["", *(f"a{mark}b" for mark in '@,/"\n\r')])
@pytest.mark.parametrize("kind", ["metrics", "per_checkpoint"])
def test_names_that_no_file_could_hold(kind, name):
    values = torch.zeros(2) if kind == "metrics" else torch.zeros(3, 2)
    with pytest.raises(ValueError, match=re.escape(f"{kind} cannot have the name {name!r}")):
        ScoreTable(torch.zeros(2), **{kind: {name: values}})
    allowed = ScoreTable(torch.zeros(2), **{kind: {"a b-c.d": values}})
    assert list(getattr(allowed, kind)) == ["a b-c.d"]


@pytest.mark.parametrize("name", ["index", "score", "higher_is_better"])
def test_values_per_checkpoint_may_have_any_name_of_a_column(tmp_path, name):
    """Their columns are name@0, name@1 ...: they cannot be taken for the column itself."""
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    table = ScoreTable(torch.zeros(2), per_checkpoint={name: values})
    for suffix in (".csv", ".npz", ".parquet"):
        back = ScoreTable.load(table.save(tmp_path / f"t{suffix}"))
        assert torch.equal(back.per_checkpoint[name], values)
