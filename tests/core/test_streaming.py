"""Chunks of features streamed to a device: real copies in main memory, no GPU."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import closing

import pytest
import torch
from core_support import generator
from streaming_lanes import LANES, EagerLane
from torch import Tensor

from moso_fast.core import memory
from moso_fast.core.problem import build_problem
from moso_fast.core.streaming import Lane, StreamedFeed, resident_chunks


def feed_of(rows: int, step: int, resident: int, lane: Lane, dtype=torch.float32) -> StreamedFeed:
    features = torch.arange(3 * rows).reshape(rows, 3).to(dtype)
    problem = build_problem(features, torch.zeros(2, 3), torch.zeros(rows, dtype=torch.long))
    chunks = [slice(at, min(at + step, rows)) for at in range(0, rows, step)]
    return StreamedFeed(problem, chunks, lane, resident)


def walk(feed: StreamedFeed, lane: EagerLane) -> tuple[list[int], list[int]]:
    """Both passes, every chunk compared with what it should hold; the orders."""
    orders = []
    for steps in (feed.first_pass(), feed.second_pass()):
        orders.append([])
        for number in steps:
            rows = feed.chunks[number]
            got = feed.problem.feature_rows(rows)
            lane.read(got)
            assert torch.equal(got, feed.problem.features[rows]), number
            assert torch.equal(feed.problem.feature_rows(rows), got)  # as often as one likes
            orders[-1].append(number)
    return orders[0], orders[1]


@pytest.mark.parametrize("lane_type", LANES)
@pytest.mark.parametrize("resident", range(0, 10))
@pytest.mark.parametrize("rows, step", [(1, 1), (8, 8), (8, 4), (9, 4), (25, 3), (25, 5)])
def test_every_chunk_is_there_when_it_is_its_turn(rows, step, resident, lane_type) -> None:
    lane = lane_type()
    with closing(feed_of(rows, step, resident * step * 12, lane)) as feed:
        count = len(feed.chunks)
        fitting = min(resident, count)
        first, second = walk(feed, lane)
    assert first == list(range(count)) and sorted(second) == first
    # Once over the bus what stays; twice the others, but for the two that the slots still hold.
    streamed = count - fitting
    assert len(lane.sent) == fitting + streamed + max(0, streamed - 2)
    assert lane.waits == 2 * count
    assert not any(t.name.startswith("moso_fast-upload") for t in threading.enumerate())


def test_what_stays_is_what_fits() -> None:
    problem = build_problem(torch.zeros(10, 3), torch.zeros(2, 3), torch.zeros(10).long())
    chunks = [slice(0, 4), slice(4, 8), slice(8, 10)]
    found = [resident_chunks(problem, chunks, rows * 12) for rows in (0, 3, 4, 7, 8, 9, 10, 99)]
    assert found == [0, 0, 1, 1, 2, 2, 3, 3]


def test_device_memory_is_two_chunks_and_what_stays() -> None:
    taken = []

    class Counting(EagerLane):
        def buffer(self, shape, dtype):
            taken.append(shape[0])
            return super().buffer(shape, dtype)

    for resident, expected in ((0, [5, 5, 0]), (7 * 12, [5, 5, 5]), (25 * 12, [25])):
        taken.clear()
        feed_of(25, 5, resident, Counting()).close()
        assert taken == expected


def test_memory_goes_with_the_feed_not_with_the_garbage_collector() -> None:
    memory = []

    class Watched(EagerLane):
        def buffer(self, shape, dtype):
            memory.append(weakref.ref(found := super().buffer(shape, dtype).untyped_storage()))
            return torch.empty(0, dtype=dtype).set_(found, 0, shape)

        def staging(self, shape, dtype):
            return self.buffer(shape, dtype)

    gc.disable()
    try:
        lane = Watched()
        with closing(feed_of(25, 5, 7 * 12, lane)) as feed:
            walk(feed, lane)
        assert len(memory) == 5 and all(storage() is None for storage in memory)
    finally:
        gc.enable()


def test_the_next_chunk_travels_while_one_is_worked_on() -> None:
    sending = threading.Semaphore(0)

    class Watched(EagerLane):
        def send(self, source, target, after):
            token = super().send(source, target, after)
            sending.release()
            return token

    lane = Watched()
    with closing(feed_of(20, 4, 0, lane)) as feed:
        steps = feed.first_pass()
        for number in range(4):
            assert next(steps) == number
            # This one and the next have been sent although nobody has asked for the next.
            assert sending.acquire(timeout=10) and (number or sending.acquire(timeout=10))
        assert next(steps) == 4 and not sending.acquire(blocking=False)


def test_page_locked_features_are_sent_from_where_they_lie(monkeypatch) -> None:
    sources = []

    class Watched(EagerLane):
        def staging(self, shape, dtype):
            raise AssertionError("nothing to stage")

        def send(self, source, target, after):
            sources.append(source.data_ptr())
            return super().send(source, target, after)

    monkeypatch.setattr(Tensor, "is_pinned", lambda self, *device: True)
    lane = Watched()
    with closing(feed_of(9, 4, 0, lane)) as feed:
        walk(feed, lane)
        start = feed.problem.features.data_ptr()
    assert sources[:3] == [start, start + 4 * 12, start + 8 * 12]


def test_an_error_on_the_way_reaches_the_caller_and_leaves_no_thread() -> None:
    class Broken(EagerLane):
        def send(self, source, target, after):
            if len(self.sent) == 2:
                raise OSError("the disk is gone")
            return super().send(source, target, after)

    lane = Broken()
    gone = pytest.raises(OSError, match="the disk is gone")
    with gone, closing(feed_of(20, 4, 0, lane)) as feed:
        walk(feed, lane)
    with pytest.raises(KeyError), closing(feed_of(20, 4, 0, EagerLane())) as feed:
        for _ in feed.first_pass():
            raise KeyError("in the backend")
    assert not any(t.name.startswith("moso_fast-upload") for t in threading.enumerate())


def test_a_chunk_of_features_is_no_more_than_the_backend_takes() -> None:
    problem = build_problem(
        torch.randn(5, 3, generator=generator(0)), torch.zeros(2, 3), torch.zeros(5).long()
    )
    assert not problem.streamed
    assert memory.make_plan(problem, None).resident_bytes == 0
