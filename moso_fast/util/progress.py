"""One line of progress on stderr, where that is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS_BETWEEN_LINES = 0.2


@contextmanager
def progress_bar(
    description: str, total: int | None, enabled: bool = True
) -> Iterator[Callable[[], None]]:
    """Yield a function to call once per finished batch; rich draws the bar where it is installed.

    Nothing is written when ``enabled`` is False or stderr is no terminal.
    """
    if not enabled or not sys.stderr.isatty():
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError:
        yield from _plain_line(description, total)
        return
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


def _plain_line(description: str, total: int | None) -> Iterator[Callable[[], None]]:
    done, last, width = 0, 0.0, 0

    def advance() -> None:
        nonlocal done, last, width
        done += 1
        now = time.monotonic()
        if now - last < _SECONDS_BETWEEN_LINES and done != total:
            return
        last = now
        text = f"{description}: {done}" + ("" if total is None else f"/{total}") + " batches"
        width = max(width, len(text))
        print(f"\r{text.ljust(width)}", end="", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if width:
            print(f"\r{' ' * width}\r", end="", file=sys.stderr, flush=True)
