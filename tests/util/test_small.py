"""Devices by name, files that appear whole, progress on a terminal."""

from __future__ import annotations

import io
import os
import sys

import pytest
import torch

from moso_fast.util import progress
from moso_fast.util.devices import usable_device
from moso_fast.util.files import atomic_path, check_folder


def test_a_device_that_can_be_used():
    assert usable_device("cpu", "--device") == torch.device("cpu")
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(ValueError) as caught:
            usable_device(name, "--device")
        said = str(caught.value)
        assert said.startswith(f"--device {name} cannot be used here: ") and "\n" not in said
        assert len(said) > len(f"--device {name} cannot be used here: ")


def test_a_file_appears_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "a.b.csv"
    with atomic_path(str(path)) as temporary:
        assert temporary.parent == tmp_path and temporary.name.startswith(".a.b.")
        assert temporary.suffix == ".csv" and not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]
    before = os.umask(0o027)
    try:
        with atomic_path(path) as temporary:
            temporary.write_text("anew")
        assert path.stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "anew" and list(tmp_path.iterdir()) == [path]
    assert check_folder(str(path)) == path


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch):
    """Return a terminal without rich, and a clock that stands still until it is set.

    To be called in the test itself: pytest has its own stderr there, not yet in fixtures.
    """
    stream, clock = Terminal(), [100.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return stream, clock


def test_a_line_of_progress_without_rich(monkeypatch):
    stream, clock = terminal(monkeypatch)
    with progress.progress_bar("scoring", 10) as advance:
        advance()  # the first is shown at once
        clock[0] += 0.19
        advance()  # too soon
        clock[0] += 0.02
        advance()
        clock[0] += 0.2
        for _ in range(7):
            advance()  # the last of all is shown, however soon
    lines = ["scoring: 1/10 batches", "scoring: 3/10 batches", "scoring: 4/10 batches",
             "scoring: 10/10 batches"]  # fmt: skip
    assert stream.getvalue() == "".join(f"\r{line}" for line in lines) + f"\r{' ' * 22}\r"


def test_a_line_of_progress_of_unknown_length(monkeypatch):
    stream, clock = terminal(monkeypatch)
    with pytest.raises(KeyError), progress.progress_bar("a", None) as advance:
        for _ in range(2):
            clock[0] += 1
            advance()
        raise KeyError
    assert stream.getvalue() == "\ra: 1 batches\ra: 2 batches\r            \r"


def test_nothing_is_wiped_where_nothing_was_shown(monkeypatch):
    stream, _ = terminal(monkeypatch)
    with progress.progress_bar("a", 1):
        pass
    assert stream.getvalue() == ""


def test_no_progress_where_nobody_looks(monkeypatch):
    stream, _ = terminal(monkeypatch)
    with progress.progress_bar("a", 1, enabled=False) as advance:
        advance()
    assert stream.getvalue() == ""
    plain = io.StringIO()
    monkeypatch.setattr(sys, "stderr", plain)
    with progress.progress_bar("a", 1) as advance:
        advance()
    assert plain.getvalue() == ""


def test_rich_draws_the_bar_where_it_is_installed(monkeypatch):
    seen = []

    class Drawn(Terminal):
        def write(self, text: str) -> int:
            seen.append(text)
            return len(text)

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Drawn())
    with progress.progress_bar("scoring", 3) as advance:
        for _ in range(3):
            advance()
    text = "".join(seen)
    assert "scoring" in text and "3/3" in text
