"""How a run of the command line ends: the code and the one line of every kind of error."""

from __future__ import annotations

import os
import sys

import pytest
import typer

import moso_fast.cli
from moso_fast.cli import _app, main
from moso_fast.core import formulas


@pytest.fixture
def ends(monkeypatch, capsys):
    """Return a function that runs an application which does as told: code, stdout, stderr."""

    def run(does, words=("doctor",)):
        def app(arguments, prog_name, standalone_mode):
            assert prog_name == "moso-fast" and standalone_mode is False
            asked.append(arguments)
            if isinstance(does, BaseException):
                raise does
            return does() if callable(does) else does

        asked = run.asked = []
        monkeypatch.setattr(_app, "app", app)
        code = _app.run(list(words))
        return code, *capsys.readouterr()

    return run


INTERRUPTED = "moso-fast: interrupted; unfinished results were not written\n"


def test_codes_of_ends_without_an_error(ends) -> None:
    assert ends(None) == (0, "", "")
    assert ends("text") == (0, "", "") and ends(7) == (7, "", "")
    assert ends(130) == (130, "", INTERRUPTED)
    assert ends(130, ["--debug"]) == (130, "", INTERRUPTED)
    assert ends(typer.Exit(3)) == (3, "", "")
    for error in (KeyboardInterrupt(), typer.Abort()):
        assert ends(error) == (130, "", INTERRUPTED)
        code, _, text = ends(error, ["--debug"])
        assert code == 130 and text.startswith("Traceback") and text.endswith(INTERRUPTED)


def test_words_reach_the_application_without_debug(ends) -> None:
    for words, expected in (
        (["score", "--debug", "-o", "x"], ["score", "-o", "x"]),
        ([], ["--help"]),
        (["--debug"], ["--help"]),
    ):
        ends(None, words)
        assert ends.asked == [expected]


def test_words_of_the_process_are_taken_where_none_are_given(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(_app, "run", lambda words: seen.append(words) or 5)
    monkeypatch.setattr(sys, "argv", ["moso-fast", "doctor", "--json"])
    assert main() == 5 and main(["score"]) == 5 and main([]) == 5
    assert seen == [["doctor", "--json"], ["score"], []]


def refusing():
    formulas.check_formula("x")  # a ValueError that the package raises


def users_own():
    raise ValueError("theirs\n in two   lines")


def wrong_type():
    raise TypeError("theirs")


class Empty(Exception):
    pass


def test_the_one_line_of_every_error(ends) -> None:
    hint = " (--debug shows the traceback)\n"
    code, out, text = ends(refusing)
    assert (code, out) == (2, "") and text.startswith("moso-fast: formula must be one of moso")
    assert "ValueError" not in text and text.count("\n") == 1
    for does, line in (
        (users_own, f"ValueError: theirs in two lines{hint}"),
        (wrong_type, f"TypeError: theirs{hint}"),
        (RuntimeError("x"), f"RuntimeError: x{hint}"),
        (Empty(), f"Empty: Empty{hint}"),
        (ModuleNotFoundError("the demo needs y"), f"the demo needs y{hint}"),
    ):
        assert ends(does) == (1, "", f"moso-fast: {line}")
        code, out, text = ends(does, ["--debug"])
        assert (code, out) == (1, "") and text.startswith("Traceback (most recent call last)")
        assert text.endswith(f"\nmoso-fast: {line.removesuffix(hint)}\n")
    for error, line in (
        (OSError(28, "No space left", "o.npz"), "o.npz: No space left"),
        (FileNotFoundError(2, "No such file"), "[Errno 2] No such file"),
        (OSError("in words"), "in words"),
        (OSError(), "OSError"),
    ):
        assert ends(error) == (2, "", f"moso-fast: {line}\n")
        assert ends(error, ["--debug"])[2].startswith("Traceback")
    # An error that was never raised has no place that could be the package's.
    assert not _app.is_bad_input(ValueError("x")) and _app.is_bad_input(OSError())
    assert not _app.is_bad_input(KeyError("x"))


def test_wrong_usage_points_to_the_help_of_its_command(ends) -> None:
    class Context:
        command_path = "moso-fast score"

    error = typer.BadParameter("no\nsuch thing")
    assert ends(error) == (
        2,
        "",
        "moso-fast: Invalid value: no such thing (see moso-fast --help)\n",
    )
    error.ctx = Context()
    line = "Invalid value: no such thing (see moso-fast score --help)\n"
    assert ends(error) == (2, "", f"moso-fast: {line}")
    assert ends(error, ["--debug"])[2].startswith("Traceback")


def test_a_reader_that_has_gone(ends, monkeypatch) -> None:
    """Nothing more can be said, and Python's own complaint at the end goes nowhere."""
    did = []
    monkeypatch.setattr(os, "open", lambda *given: did.append(given) or 99)
    monkeypatch.setattr(os, "dup2", lambda *given: did.append(given))
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    assert ends(BrokenPipeError()) == (1, "", "")
    assert did == [(os.devnull, os.O_WRONLY), (99, 1)]


def test_a_package_that_is_missing_for_another_reason_is_no_matter_of_the_extra(
    monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main(["doctor"]) == 1
    assert capsys.readouterr() == (
        "",
        'moso-fast: the command line needs typer and rich: pip install "moso-fast[cli]"\n',
    )
    import builtins

    honest = builtins.__import__

    def lacking(name, *rest):
        if name == "typer":
            raise ModuleNotFoundError("no click", name="click")
        return honest(name, *rest)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(ModuleNotFoundError, match="no click"):
        main(["doctor"])


def test_other_names_are_not_there() -> None:
    assert moso_fast.cli.app is _app.app
    with pytest.raises(AttributeError) as refused:
        moso_fast.cli.nothing  # noqa: B018
    assert str(refused.value) == "module 'moso_fast.cli' has no attribute 'nothing'"
