"""The process that runs units: it imports the layer, then takes unit after unit from its pipe.

After an error it ends, since one of the device stays with the process.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from ..pack import SITE


class Wrong(Exception):
    """A result that is not the right one: it gets no number."""


class Skipped(Exception):
    """What this machine cannot run, with the reason: no failure."""


def main(arguments: Sequence[str]) -> int:
    """Serve units of ``layer`` on the pipe whose file descriptor is given."""
    layer, descriptor = arguments
    die_with_parent()
    if SITE.is_dir():  # packages that this machine lacks; its own come first
        sys.path.append(str(SITE))
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{before}{os.pathsep}{SITE}" if before else str(SITE)
    serve(layer, Connection(int(descriptor)))
    return 0


def die_with_parent() -> None:
    """Have the system kill this process when the one that started it is gone (Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_child(command: Sequence[str], **options: Any) -> int:
    """Run a command that is killed with this process; return its exit code."""
    return subprocess.run(command, check=False, preexec_fn=die_with_parent, **options).returncode


def stream_child(command: Sequence[str], tell: Callable[[str], None], **options: Any) -> int:
    """Run a command as ``run_child`` does, print its output and have ``tell`` see every line."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=die_with_parent,
        **options,
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            tell(line.rstrip())
    return child.returncode


def serve(name: str, pipe: Connection) -> None:
    """Answer every unit by what it finds and how it ended, until the pipe is closed."""
    layer = importlib.import_module(name)
    pipe.send({"ready": True})

    def emit(**data: Any) -> None:
        pipe.send({"data": data})

    while True:
        try:
            unit = pipe.recv()
        except EOFError:
            return
        print(f"begun with {unit}", flush=True)
        try:
            layer.run(unit, emit)
        except Skipped as error:
            pipe.send({"outcome": "skipped", "why": str(error)})
            continue
        except Wrong as error:
            pipe.send({"outcome": "wrong", "why": str(error)})
            continue
        except BaseException as error:  # whatever it is, the next unit must not suffer from it
            traceback.print_exc()
            pipe.send({"outcome": "failed", "why": described(error)})
            return
        pipe.send({"outcome": "done", "why": ""})


def described(error: BaseException) -> str:
    """Class and first line of an error: Triton's and CUDA's go on for pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
