"""One file with all that the processes of a run print, line by line as they print it."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path
from typing import IO

# What may come back from a machine: a failing compiler prints the whole of a kernel.
FILE_BYTES = 12 * 2**20
UNIT_BYTES = 256 * 2**10
LAST_LINES = 40


class Log:
    """Appends to ``path``; every thread may."""

    def __init__(self, path: Path, limit: int = FILE_BYTES) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", errors="replace")
        self._left = limit - path.stat().st_size
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        """Write one line and flush it; nothing once the file is full, which its last line says."""
        with self._lock:
            if self._left <= 0 or self._file.closed:
                return
            self._left -= len(line) + 1
            end = "" if self._left > 0 else "[the log is full: nothing more is kept]\n"
            self._file.write(f"{line}\n{end}")
            self._file.flush()

    def close(self) -> None:
        """Close the file; later lines are dropped."""
        with self._lock:
            self._file.close()


class Pump:
    """Copies a process's output into the log, under the name of what it is working on."""

    def __init__(self, stream: IO[bytes], log: Log) -> None:
        self._stream, self._log = stream, log
        self._name, self._written = "starting", 0
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def begin(self, name: str) -> None:
        """Give the lines from here on another name and an allowance of their own."""
        self._name, self._written = name, 0
        self._last.clear()

    def last(self) -> list[str]:
        """Return the last lines; complete once the process has ended."""
        return list(self._last)

    def join(self) -> None:
        """Wait for the end of the output, a second at most: a grandchild may hold it open."""
        self._thread.join(1.0)

    def _run(self) -> None:
        for raw in self._stream:
            line = raw.decode("utf-8", "replace").rstrip()
            if not line:
                continue
            self._last.append(line[:500])
            if self._written <= UNIT_BYTES:
                self._written += len(line)
                cut = " [more is not kept]" if self._written > UNIT_BYTES else ""
                self._log.write(f"[{self._name}] {line[:4000]}{cut}")
