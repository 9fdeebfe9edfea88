"""The command line ``moso-fast``: one file a command, exit codes 0, 1, 2 and 130.

0: done. 2: bad input, in one line that says what, where, and what would be right. 1: anything
else, in one line; ``--debug`` shows the traceback. 130: Ctrl-C. Results are written whole or not
at all, and an existing result is replaced.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["app", "main"]

_MISSING = 'moso-fast: the command line needs typer and rich: pip install "moso-fast[cli]"'


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Parameters
    ----------
    arguments
        Words after the program's name; None takes those of the process.
    """
    try:
        import rich  # noqa: F401  # typer of some versions runs without, ours prints tables with it
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        print(_MISSING, file=sys.stderr)
        return 1
    from ._app import run

    return run(sys.argv[1:] if arguments is None else arguments)


def __getattr__(name: str) -> Any:
    """Build ``app``, the typer application, when it is first asked for: it needs typer."""
    if name == "app":
        from ._app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
