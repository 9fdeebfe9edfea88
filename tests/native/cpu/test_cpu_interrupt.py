"""A long native pass ends soon after a signal whose handler raises, as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from core_support import needs_cpu

from moso_fast import last_layer_stats, moso_scores

pytestmark = [
    needs_cpu,
    pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs signals"),
]


class Told(Exception):
    """What the handler raises."""


@pytest.fixture
def handled() -> Iterator[list[float]]:
    """When the handler ran."""
    times: list[float] = []

    def tell(*_: object) -> None:
        times.append(time.monotonic())
        raise Told

    before = signal.signal(signal.SIGUSR1, tell)
    yield times
    signal.signal(signal.SIGUSR1, before)


def job(rows: int, dim: int, classes: int) -> tuple[torch.Tensor, ...]:
    """Rows that share one row's memory: as much work as any."""
    weight = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0)) / dim
    return torch.ones(1, dim).expand(rows, dim), weight, torch.arange(rows) % classes


# Seconds of work on any processor, in every kind of kernel.
@pytest.mark.quick(1)
@pytest.mark.parametrize(("chunks", "threads"), [(None, 1), (None, 2), (1, 2)])
@pytest.mark.parametrize("size", [(500_000, 4096, 16), (400_000, 512, 200), (20_000, 1000, 5000)])
def test_a_long_call_ends_soon_after_a_signal(size, threads, chunks, handled) -> None:
    arguments, before = job(*size), torch.get_num_threads()
    torch.set_num_threads(threads)
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGUSR1)

    timer = threading.Timer(0.3, send)
    timer.start()
    try:
        with pytest.raises(Told):
            last_layer_stats(
                *arguments, backend="cpu", chunk_size=None if chunks is None else size[0]
            )
        ended = time.monotonic()
    finally:
        timer.cancel()
        torch.set_num_threads(before)
    assert handled and ended - sent[0] < 1.0
    # The next call knows nothing of it.
    small = job(50, 8, 3)
    assert torch.equal(moso_scores(*small, backend="cpu"), moso_scores(*small, backend="cpu"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [(500_000, 4096, 16), (400_000, 512, 200)])
def test_no_thread_waits_for_work_that_nobody_does(size, handled) -> None:
    """Threads wait for each other's sums, whenever the signal comes."""
    arguments, before = job(*size), torch.get_num_threads()
    try:
        for number in range(24):
            torch.set_num_threads(2 + number % 3)
            timer = threading.Timer(0.05 + 0.005 * number, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            with pytest.raises(Told):
                last_layer_stats(*arguments, backend="cpu")
            timer.join()
    finally:
        torch.set_num_threads(before)
    assert len(handled) == 24


def test_a_handler_that_returns_ends_nothing() -> None:
    """And runs while the call goes on, not after it."""
    times: list[float] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: times.append(time.monotonic()))
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        start = time.monotonic()
        scores = moso_scores(*job(150_000, 2048, 16), backend="cpu")
        end = time.monotonic()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert len(scores) == 150_000 and scores.isfinite().all()
    if end - start > 0.5:  # else a fast machine was done before
        assert start < times[0] < end


def test_a_call_on_another_thread_goes_on(handled) -> None:
    """Python handles signals on the main thread, which is free to."""
    found: list[torch.Tensor] = []
    worker = threading.Thread(
        target=lambda: found.append(moso_scores(*job(100_000, 2048, 16), backend="cpu"))
    )
    worker.start()
    with pytest.raises(Told):
        os.kill(os.getpid(), signal.SIGUSR1)
        worker.join(10)
    worker.join()
    assert len(found) == 1 and found[0].isfinite().all()
