"""Peak memory, with processes and a GPU that do as they are told."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import queue
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_cases import HEAD

from moso_fast.bench import memory
from moso_fast.bench.providers.plain import PROVIDERS as PLAIN


def test_peak_of_the_allocator(monkeypatch) -> None:
    did = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: did.append((name, device)))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: did.append("before") or 300)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000)
    assert memory.allocator_peak(lambda: did.append("job"), "cuda:1") == 700
    wait, reset = ("synchronize", "cuda:1"), ("reset_peak_memory_stats", "cuda:1")
    assert did == [wait, reset, "before", "job", wait]


def test_peak_of_the_resident_memory(monkeypatch) -> None:
    did = []
    sizes = {"VmRSS": 300, "VmHWM": 1000}
    monkeypatch.setattr(memory, "_give_back", lambda: did.append("give back"))
    monkeypatch.setattr(memory, "_status", lambda field: did.append(field) or sizes[field])
    monkeypatch.setattr(Path, "write_text", lambda self, text: did.append((str(self), text)))
    assert memory.resident_peak(lambda: did.append("job")) == 700
    assert did == ["give back", "VmRSS", ("/proc/self/clear_refs", "5"), "job", "VmHWM"]
    sizes["VmHWM"] = 299  # what was freed meanwhile is no negative peak
    assert memory.resident_peak(lambda: None) == 0


def test_a_field_of_this_process(monkeypatch) -> None:
    text = "Name:\tpython\nVmRSSx:\t9 kB\nVmRSS:\t   12 kB\nVmHWM:\t  300 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda self: {"/proc/self/status": text}[str(self)])
    assert memory._status("VmRSS") == 12 * 1024 and memory._status("VmHWM") == 300 * 1024
    with pytest.raises(RuntimeError, match=r"^/proc/self/status has no VmSwap$"):
        memory._status("VmSwap")


def test_freed_memory_goes_back_to_the_system(monkeypatch) -> None:
    trimmed = []
    for libc in (types.SimpleNamespace(malloc_trim=trimmed.append), types.SimpleNamespace()):
        monkeypatch.setattr(ctypes, "CDLL", {None: libc}.get)
        memory._give_back()
    assert trimmed == [0]


class Child:
    """A process that runs in this one when it is started, or that does as it is told."""

    exitcode = 3

    def __init__(self, target=None, args=(), lives=0) -> None:
        self.target, self.args, self.lives, self.did = target, args, lives, []

    def start(self) -> None:
        self.did.append("start")
        self.target(*self.args)

    def is_alive(self) -> bool:
        self.lives -= 1
        return self.lives >= 0

    def kill(self) -> None:
        self.did.append("kill")

    def join(self) -> None:
        self.did.append("join")


def test_a_child_measures_the_second_run_of_the_job(monkeypatch, tmp_path) -> None:
    """In this process: the second run, on its threads, with what libraries print left out."""
    contexts, children, did, seen = [], [], [], {}

    def process(**options):
        children.append(Child(**options))
        return children[-1]

    context = types.SimpleNamespace(
        Queue=queue.Queue, Process=process, set_forkserver_preload=lambda names: did.append(names)
    )
    monkeypatch.setattr(
        multiprocessing, "get_context", lambda kind: contexts.append(kind) or context
    )
    monkeypatch.setattr(
        ctypes, "CDLL", lambda _: types.SimpleNamespace(mallopt=lambda *a: did.append(a))
    )
    monkeypatch.setattr(os, "dup2", lambda source, target: did.append(target))
    threads = torch.get_num_threads()
    honest = PLAIN[0].prepare

    def prepare(case, inputs):
        warnings.warn("not shown", stacklevel=1)
        job = honest(case, inputs)
        seen.update(rows=len(inputs.labels), threads=torch.get_num_threads(), runs=0)

        def run():
            seen["runs"] += 1
            return job()

        return run

    others = types.ModuleType("others")
    others.PROVIDERS = (PLAIN[1], replace(PLAIN[0], prepare=prepare))
    monkeypatch.setitem(sys.modules, "others", others)
    monkeypatch.setattr(memory, "resident_peak", lambda job: job() and 1000 + seen["runs"])
    try:
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            assert memory.peak_bytes_in_child(HEAD, 24, "naive", 3, 60.0, "others") == (1002, None)
            assert not shown
            peak, why = memory.peak_bytes_in_child(HEAD, 24, "absent", 3, 60.0, "others")
            assert peak is None and why == "failed: StopIteration: "
            long = replace(HEAD, name="long")
            others.PROVIDERS = (replace(PLAIN[0], prepare=lambda *_: 1 / 0),)
            peak, why = memory.peak_bytes_in_child(long, 24, "naive", 3, 60.0, "others")
            assert (peak, why) == (None, "failed: ZeroDivisionError: division by zero")
    finally:
        torch.set_num_threads(threads)
    assert contexts == ["forkserver"] * 3
    assert seen == {"rows": 24, "threads": 3, "runs": 2}
    # Preloaded is what a child needs; blocks of 256 KiB go back at once; stderr is file 2.
    preload = ["moso_fast.bench.memory", "moso_fast.bench.providers", "moso_fast.bench.inputs"]
    assert did[:3] == [preload, (-3, 2**18), 2]
    assert [child.did for child in children] == [["start", "join"]] * 3
    monkeypatch.setattr(sys, "platform", "darwin")
    nothing = (None, "peak memory is read from /proc, which only Linux has")
    assert memory.peak_bytes_in_child(HEAD, 24, "naive", 3, 60.0) == nothing


def test_a_long_reason_is_cut(monkeypatch) -> None:
    answer = queue.Queue()
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: types.SimpleNamespace(mallopt=lambda *a: None))

    def fails(case, rows):
        raise ValueError("x" * 300)

    monkeypatch.setattr("moso_fast.bench.inputs.make_inputs", fails)
    with warnings.catch_warnings():
        memory._child(HEAD, 24, "naive", torch.get_num_threads(), "unused", answer)
    assert answer.get_nowait() == (None, "failed: ValueError: " + "x" * 180)


def test_waiting_for_a_child(clock) -> None:
    class Answer:
        """Nothing at the first ``after`` looks, each of which waits as long as it is asked to."""

        def __init__(self, after):
            self.after, self.waited = after, []

        def get(self, timeout):
            self.waited.append(timeout)
            clock.now += timeout
            if len(self.waited) > self.after:
                return 7, None
            raise queue.Empty

    there = Answer(2)
    assert memory._wait(Child(lives=9), there, 60.0) == (7, None) and there.waited == [0.1] * 3
    # One that has ended may have answered last: one more look, a longer one.
    late = Answer(1)
    assert memory._wait(Child(lives=0), late, 60.0) == (7, None) and late.waited == [0.1, 0.2]
    dead = (None, "the process ended with exit code 3")
    assert memory._wait(Child(lives=1), Answer(9), 60.0) == dead
    slow = Answer(99)
    assert memory._wait(Child(lives=99), slow, 0.95) == (None, "not done within 1 s")
    assert len(slow.waited) == 10


def test_a_child_that_never_answers_is_killed(monkeypatch) -> None:
    child = Child(target=lambda *_: None, lives=9)
    context = types.SimpleNamespace(
        Queue=queue.Queue, Process=lambda **_: child, set_forkserver_preload=lambda _: None
    )
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    found = memory.peak_bytes_in_child(HEAD, 24, "naive", 1, 0.0)
    assert found == (None, "not done within 0 s") and child.did == ["start", "kill", "join"]
