"""The typer application and the translation of exceptions into exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from .bench import bench
from .demo import demo
from .doctor import doctor
from .prune import prune
from .report import report
from .score import score

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_INTERRUPTED = "interrupted; unfinished results were not written"

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
# typer carries click inside or beside it, depending on its version: find the base classes by name.
_USAGE_ERRORS: tuple[type[Exception], ...] = tuple(
    kind
    for kind in typer.BadParameter.__mro__
    if issubclass(kind, Exception) and kind.__name__ == "ClickException"
)

app = typer.Typer(
    name="moso-fast",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Exact MoSo scores: which training samples to keep.",
    epilog="Exit codes: 0 done, 2 bad input, 1 anything else, 130 interrupted. "
    "An existing output is replaced, whole or not at all.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from ..version import __version__

        print(f"moso-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (any position).")
    ] = False,
) -> None:
    pass


for _command in (score, prune, report, doctor, demo, bench):
    app.command()(_command)


def run(arguments: list[str]) -> int:
    """Run the application on ``arguments`` and return the exit code; errors take one line."""
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"] or ["--help"]
    try:
        code = app(arguments, prog_name="moso-fast", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # so do newer versions of typer tell of Ctrl-C
            return _report(_INTERRUPTED, INTERRUPTED, debug=False)
        return code if isinstance(code, int) else DONE
    except (KeyboardInterrupt, typer.Abort):
        return _report(_INTERRUPTED, INTERRUPTED, debug)
    except typer.Exit as done:
        return done.exit_code
    except BrokenPipeError:
        # The reader of a pipe has gone; without this Python complains again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except _USAGE_ERRORS as error:
        where = getattr(getattr(error, "ctx", None), "command_path", "moso-fast")
        message = f"{_one_line(_text_of(error))} (see {where} --help)"
        return _report(message, BAD_INPUT, debug)
    except Exception as error:  # every error gets its code here, and its traceback with --debug
        if is_bad_input(error):
            return _report(_one_line(_text_of(error)), BAD_INPUT, debug)
        kind = "" if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: "
        hint = "" if debug else " (--debug shows the traceback)"
        return _report(f"{kind}{_one_line(_text_of(error))}{hint}", FAILED, debug)


def is_bad_input(error: BaseException) -> bool:
    """Whether the input is to blame: files, or a ValueError or TypeError that this package raised.

    The same types from torch or from the user's own code are faults of the program.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, (ValueError, TypeError)):
        return False
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_code.co_filename.startswith(_PACKAGE)


def _text_of(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, _USAGE_ERRORS) and hasattr(error, "format_message"):
        return str(error.format_message())
    return str(error) or type(error).__name__


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _report(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"moso-fast: {message}", file=sys.stderr)
    return code
