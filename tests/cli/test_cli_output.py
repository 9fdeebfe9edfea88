"""What the commands share: options, JSON, aligned text, tables and bars on a terminal."""

from __future__ import annotations

import io
import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from moso_fast.cli import _common
from moso_fast.tables.table import ScoreTable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch) -> Terminal:
    """Have both outputs be one terminal of 100 columns; inside a test, since pytest sets them."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


FACTS = {
    "a_name": 1234567,
    "short": 0.123456789,
    "yes": True,
    "no": False,
    "nested": {"min": -1.5, "of": [1, "two"]},
    "several": (1e9, None),
    "none": None,
    "path": Path("x/y"),
    "nan": math.nan,
}
LINES = """\
a name   1,234,567
short    0.123457
yes      yes
no       no
nested   min -1.5, of 1, two
several  1e+09, none
none     none
path     x/y
nan      nan
"""


def test_facts_as_json_as_lines_or_not_at_all(capsys) -> None:
    _common.emit(FACTS, as_json=False, quiet=False)
    assert capsys.readouterr().out == LINES
    for quiet in (False, True):
        _common.emit(FACTS, as_json=True, quiet=quiet)
        assert capsys.readouterr().out == (
            '{"a_name": 1234567, "short": 0.123456789, "yes": true, "no": false, "nested": '
            '{"min": -1.5, "of": [1, "two"]}, "several": [1000000000.0, null], "none": null, '
            '"path": "x/y", "nan": null}\n'
        )
    _common.emit(FACTS, as_json=False, quiet=True)
    _common.print_pairs({})
    assert capsys.readouterr().out == ""
    assert _common.jsonable({1: math.inf, None: torch.float32}) == {
        "1": None,
        "None": "torch.float32",
    }


COLUMNS, ROWS = ("name", "n", ""), [("long name", 12345, "[b]x"), ("b", 0.5, None), ("c", True, "")]


def test_a_table_is_aligned_text(capsys) -> None:
    _common.print_table(COLUMNS, ROWS)
    assert capsys.readouterr().out == (
        "name       n\nlong name  12,345  [b]x\nb          0.5     none\nc          yes\n"
    )
    _common.print_table(("a", "bc"), [])
    assert capsys.readouterr().out == "a  bc\n"
    with pytest.raises(ValueError, match="argument 2 is longer"):
        _common.print_table(("a",), [(1, 2)])


def test_a_table_on_a_terminal_is_drawn(monkeypatch) -> None:
    screen = terminal(monkeypatch)
    _common.print_table(COLUMNS, ROWS)
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    cells = [re.sub("[┃│]", " ", line).split() for line in text.splitlines()]
    assert cells[1] == ["name", "n"] and cells[3:6] == [
        ["long", "name", "12,345", "[b]x"], ["b", "0.5", "none"], ["c", "yes"],
    ]  # fmt: skip
    assert len(cells) == 7 and text.startswith("┏")


def test_a_bar_on_a_terminal_counts_and_says_what_it_is_at(monkeypatch) -> None:
    screen = terminal(monkeypatch)
    with _common.caption_bar("at first", 3, shown=True) as (show, advance):
        advance()
        show("then this")
        advance()
    text = screen.getvalue()
    assert "then this" in text and "2/3" in text and "at first" in text
    screen = terminal(monkeypatch)
    with _common.caption_bar("at first", 3, shown=False) as (show, advance):
        show("x")
        advance()
    assert screen.getvalue() == ""


def test_no_bar_where_nobody_looks(capsys) -> None:
    with _common.caption_bar("at first", 3, shown=True) as (show, advance):
        show("x")
        advance()
    assert capsys.readouterr() == ("", "")


def test_scores_in_a_few_words() -> None:
    found = _common.describe(torch.tensor([3.0, math.nan, -1.0, 7.0, math.nan, 4.0]))
    assert found == {"scored": 4, "unscored": 2, "score": {"min": -1.0, "median": 3.0, "max": 7.0}}
    assert _common.describe(torch.tensor([math.nan])) == {"scored": 0, "unscored": 1}


def test_the_rows_of_a_table_in_a_file_of_the_whole_data_set(tmp_path, monkeypatch) -> None:
    values, index = torch.tensor([5, 6, 7, 8]), torch.tensor([3, 0])
    assert _common.rows_of(values, index, "f", "flags").tolist() == [8, 5]
    assert _common.rows_of(values[:0], index[:0], "f", "flags").numel() == 0
    for given, found in ((values[:3], "3"), (torch.tensor(1), "a single number")):
        with pytest.raises(ValueError) as refused:
            _common.rows_of(given, index, "f.npy", "flags")
        assert str(refused.value) == (
            "f.npy must hold flags of the whole data set: the scores refer to index 3, the file "
            f"has {found}"
        )
    with pytest.raises(ValueError, match="refer to index 0, the file has a single number"):
        _common.rows_of(torch.tensor(1), torch.tensor([0]), "f.npy", "flags")
    np.save(tmp_path / "y.npy", np.array([4, 5, 6]))
    path = str(tmp_path / "y.npy")
    assert _common.labels_of(path, torch.tensor([2, 0])).tolist() == [6, 4]
    with pytest.raises(ValueError, match=r"y\.npy must hold labels of the whole data set"):
        _common.labels_of(path, torch.tensor([3]))


def test_the_table_of_a_command(tmp_path, monkeypatch, capsys) -> None:
    first, second = tmp_path / "a.npz", tmp_path / "b.npz"
    ScoreTable(torch.arange(2.0)).save(first)
    ScoreTable(torch.arange(3.0)).save(second)
    assert len(_common.load_table(first, None, "prune")) == 2
    assert len(_common.load_table(None, second, "prune")) == 3
    with pytest.raises(ValueError) as refused:
        _common.load_table(None, None, "report")
    assert str(refused.value) == "give the score table: moso-fast report SCORES ..."
    with pytest.raises(ValueError) as refused:
        _common.load_table(first, second, "prune")
    assert str(refused.value) == f"give the score table once: got {first} and --scores {second}"
    assert capsys.readouterr() == ("", "")
    plain = ScoreTable.load

    def warning(path):
        for _ in range(2):  # the same one twice is said twice, whatever filters are set
            warnings.warn("so so", UserWarning, stacklevel=1)
        return plain(path)

    monkeypatch.setattr(ScoreTable, "load", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _common.load_table(first, None, "prune")
    assert capsys.readouterr() == ("", "moso-fast: warning: so so\n" * 2)
