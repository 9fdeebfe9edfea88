"""What the commands of ``python -m benches`` share: their parser, and errors in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def parser(name: str, description: str | None, *, json: bool = True) -> argparse.ArgumentParser:
    """Return a parser for ``python -m benches NAME``, with ``--quiet`` and ``--json``."""
    made = argparse.ArgumentParser(
        prog=f"python -m benches {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if json:
        made.add_argument("--json", action="store_true", help="print the result as one JSON object")
    made.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no summary")
    return made


@contextmanager
def bad_input() -> Iterator[None]:
    """End with one line and exit code 2 where the block finds an argument or a file wrong.

    For the code that reads what the user gave and nothing more: elsewhere such an error is a
    fault of the program, and its traceback is wanted.
    """
    try:
        yield
    except OSError as error:
        _end(f"{error.filename}: {error.strerror}" if error.strerror else str(error))
    except ValueError as error:
        _end(str(error))


def _end(message: str) -> None:
    print(f"benches: {message}", file=sys.stderr)
    raise SystemExit(2)
