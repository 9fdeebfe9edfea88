"""The command line as a whole: version and help, its exit codes, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from cli_support import SCORE, run
from typer.testing import CliRunner

import moso_fast


def spawn(arguments, folder, **options):
    """Run the command in a process of its own, from the package under test."""
    root = str(Path(moso_fast.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(
        [sys.executable, "-m", "moso_fast.cli", *arguments.split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_version_and_help(capsys):
    assert run(capsys, "--version").out == f"moso-fast {moso_fast.__version__}\n"
    for words in ([], ["--help"]):
        text = run(capsys, words).out
        assert all(name in text for name in ("score", "prune", "report", "doctor", "demo"))
    for command in ("score", "prune", "report", "doctor", "demo"):
        assert "--json" in run(capsys, [command, "--help"]).out


def test_app_is_a_typer_application():
    from moso_fast.cli import app

    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and moso_fast.__version__ in result.output


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_typer_or_rich_the_extra_is_named(capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = run(capsys, "doctor", code=1)
    assert 'pip install "moso-fast[cli]"' in result.err and result.err.count("\n") == 1


def test_other_faults_give_1_and_a_traceback_on_request(folder, capsys):
    words = "score --model cli_user_module:faulty --data cli_user_module:data -o o.npz"
    error = run(capsys, words, code=1).err
    assert error == (
        "moso-fast: ValueError: the user's own fault in two lines (--debug shows the traceback)\n"
    )
    error = run(capsys, words + " --debug", code=1).err
    assert "Traceback" in error and "in faulty" in error
    assert not Path("o.npz").exists()


@pytest.mark.exhaustive
def test_exit_codes_reach_the_shell(folder):
    bad = spawn(SCORE + " --formula x", folder)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("moso-fast: formula must be") and bad.stderr.count("\n") == 1
    good = spawn(SCORE, folder)
    assert good.returncode == 0 and good.stderr == "" and "o.parquet" in good.stdout


@pytest.mark.exhaustive
@pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="needs signals")
def test_ctrl_c_gives_130_and_leaves_nothing(folder):
    source = "--model cli_user_module:net --data cli_user_module:interrupting"
    # A test run in a shell's background inherits that SIGINT is ignored.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    result = spawn(f"score {source} -o o.npz", folder, preexec_fn=listen)
    assert result.returncode == 130
    # Some versions of click end the line of the terminal's ^C themselves.
    assert result.stderr.lstrip("\n") == (
        "moso-fast: interrupted; unfinished results were not written\n"
    )
    assert not (folder / "o.npz").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.exhaustive
def test_a_closed_pipe_is_no_traceback(folder):
    read_end, write_end = os.pipe()
    os.close(read_end)
    root = str(Path(moso_fast.__file__).resolve().parents[1])
    try:
        result = subprocess.run(
            [sys.executable, "-m", "moso_fast.cli", "doctor"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": root},
            timeout=120,
        )
    finally:
        os.close(write_end)
    assert result.returncode == 1 and result.stderr == b""
