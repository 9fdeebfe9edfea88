"""Runs units in processes of their own: each under a limit, none able to take another along.

Processes that have imported everything but not touched the GPU wait for the next unit, so that
starting one costs nothing while another is measured.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from .log import Log, Pump
from .sources import ROOT

STARTUP = 30.0  # seconds that importing torch, Triton and the package may take
SHORTEST = 2.0  # no unit is begun with less time than this
SOUND = ("done", "wrong", "skipped")  # outcomes that leave the process as it was
_REAPED = 5.0  # seconds that a killed process gets to be gone

Unit = Mapping[str, Any]  # "stage", "key" and "limit" (seconds) at least
Tell = Callable[[Unit, str, dict[str, Any]], None]  # "data" or "outcome"


class Worker:
    """One process that runs units, one after the other."""

    def __init__(self, layer: str, log: Log) -> None:
        self.pipe, theirs = Pipe()
        self.ready = False
        command = [sys.executable, "-u", "-m", "benches.gpu", "worker", layer]
        self.process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            cwd=ROOT,  # where Python finds the package `benches`
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children can be killed with it
        )
        theirs.close()
        assert self.process.stdout is not None
        self.output = Pump(self.process.stdout, log)

    def send(self, unit: Unit) -> None:
        """Hand over a unit; a process that is gone is found out when its answer is read."""
        self.output.begin(unit["key"])
        try:
            self.pipe.send(dict(unit))
        except OSError:
            return

    def kill(self) -> None:
        """Kill it with its children, without waiting for that."""
        # Also where the process itself is gone: a child left on the GPU would share it.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> int | None:
        """Kill it with its children; return its exit code, None where it will not go."""
        self.kill()
        try:
            code = self.process.wait(_REAPED)
        except subprocess.TimeoutExpired:
            return None
        self.output.join()
        return code

    def ended(self) -> str:
        """Say how a process went that closed its pipe by itself."""
        try:
            code = self.process.wait(_REAPED)
        except subprocess.TimeoutExpired:
            return "closed its pipe and stayed"
        return _signal(code) if code < 0 else f"exit code {code}"


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def end_all(workers: Iterable[Worker]) -> None:
    """End all at once: to free a GPU's memory takes a process a part of a second."""
    ending = list(workers)
    for worker in ending:
        worker.kill()
    for worker in ending:
        worker.end()


class Crew:
    """Starts processes, and keeps ``spares`` of them waiting with everything imported."""

    def __init__(self, layer: str, log: Log, spares: int) -> None:
        self._layer, self._log, self._spares = layer, log, spares
        self._waiting: deque[Worker] = deque()

    def take(self, more: int = 0) -> Worker:
        """Return the process that has waited longest; ``more``: how many will be asked for soon."""
        worker = self._waiting.popleft() if self._waiting else Worker(self._layer, self._log)
        while len(self._waiting) < min(self._spares, more):
            self._waiting.append(Worker(self._layer, self._log))
        return worker

    def prepare(self, count: int) -> None:
        """Start ``count`` processes now, for a stage that will take them all."""
        self._waiting += [Worker(self._layer, self._log) for _ in range(count)]

    def close(self) -> None:
        """End those that wait."""
        end_all(self._waiting)
        self._waiting.clear()


@dataclass
class _Job:
    unit: Unit
    worker: Worker
    begun: float
    expires: float


def run(
    units: Iterable[Unit],
    crew: Crew,
    tell: Tell,
    deadline: float,
    *,
    workers: int = 1,
    reuse: bool = False,
    begin_until: float = float("inf"),
    refuse: Callable[[Unit], str | None] = lambda unit: None,
) -> None:
    """Run every unit, ``workers`` at a time, until ``deadline`` (of time.monotonic).

    ``reuse``: a process takes the next unit, unless an error may have stayed with it; otherwise
    every unit has a fresh one. Nothing is begun after ``begin_until``; what runs then has its time
    all the same. ``refuse`` says why a unit is not to be run. ``tell`` gets what a unit finds as
    it comes, and always one outcome: "done", "wrong", "failed" and "skipped" from the unit,
    "died", "hung", "late" and what is refused, as "skipped", from here.
    """
    waiting, idle = deque(units), list[Worker]()
    busy: dict[Connection, _Job] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                unit, now = waiting.popleft(), time.monotonic()
                reason = refuse(unit)
                if reason is not None:
                    tell(unit, "outcome", _outcome("skipped", reason, 0.0))
                    continue
                if deadline - now < SHORTEST or now >= begin_until:
                    tell(unit, "outcome", _outcome("late", "the time is up", 0.0))
                    continue
                worker = idle.pop() if idle else crew.take(len(waiting))
                worker.send(unit)
                limit = unit["limit"] + (0.0 if worker.ready else STARTUP)
                busy[worker.pipe] = _Job(unit, worker, now, now + limit)
            if not busy:
                break
            nearest = min(min(job.expires for job in busy.values()), deadline)
            for pipe in wait(list(busy), max(0.0, nearest - time.monotonic())):
                assert isinstance(pipe, Connection)
                if _listen(busy[pipe], tell):
                    job = busy.pop(pipe)
                    if job.worker.process.poll() is None and reuse and job.unit.get("_sound"):
                        idle.append(job.worker)
                    else:
                        job.worker.end()
            for pipe, job in list(busy.items()):
                if time.monotonic() >= min(job.expires, deadline):
                    del busy[pipe]
                    _expire(job, deadline, tell)
    finally:
        end_all([*idle, *(job.worker for job in busy.values())])


def _outcome(outcome: str, why: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {"outcome": outcome, "why": why, "seconds": seconds, **more}


def _listen(job: _Job, tell: Tell) -> bool:
    """Pass on one message; return whether the unit has ended."""
    worker = job.worker
    try:
        message = worker.pipe.recv()
    except (EOFError, OSError):
        how = worker.ended()
        worker.output.join()
        last = worker.output.last()
        why = f"{how}; last line: {last[-1]}" if last else how
        tell(job.unit, "outcome", _outcome("died", why, time.monotonic() - job.begun))
        return True
    if "ready" in message:
        worker.ready = True
        job.begun = time.monotonic()
        job.expires = job.begun + job.unit["limit"]
        return False
    if "data" in message:
        tell(job.unit, "data", message["data"])
        return False
    seconds = time.monotonic() - job.begun
    job.unit = {**job.unit, "_sound": message["outcome"] in SOUND}
    tell(job.unit, "outcome", _outcome(message["outcome"], message["why"], seconds))
    return True


def _expire(job: _Job, deadline: float, tell: Tell) -> None:
    """End a unit that has used up its time, or the run's."""
    seconds = time.monotonic() - job.begun
    code = job.worker.end()
    if time.monotonic() >= deadline and job.expires > deadline:
        found = _outcome("late", f"cut short after {seconds:.0f} s: the time was up", seconds)
    else:
        where = "" if job.worker.ready else " while it imported the package"
        last = job.worker.output.last()
        said = f"; last line: {last[-1]}" if last else ""
        found = _outcome("hung", f"not done within {seconds:.1f} s{where}{said}", seconds)
    if code is None:
        found["why"] += "; it cannot be killed"
    tell(job.unit, "outcome", found)
