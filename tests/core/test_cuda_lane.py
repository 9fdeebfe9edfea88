"""The lane to a GPU, with streams and events that write down what is asked of them: no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch

from moso_fast.core import engine
from moso_fast.core.passes import Plan
from moso_fast.core.streaming import CudaLane, Feed, StreamedFeed

DEVICE = torch.device("cuda", 1)


class Cuda:
    """What the lane asks of torch.cuda, in its order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.current = "nobody"
        names = count(1)
        cuda = self

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_event(self, event: Event) -> None:
                cuda.asked.append((self.name, "waits for", event.name))

        class Event:
            def __init__(self) -> None:
                self.name = f"event {next(names)}"

            def record(self, stream: Stream) -> None:
                cuda.asked.append((stream.name, "records", self.name))

            def synchronize(self) -> None:
                cuda.asked.append(("host", "waits for", self.name))

        @contextmanager
        def stream(chosen: Stream) -> Iterator[None]:
            before, cuda.current = cuda.current, chosen.name
            yield
            cuda.current = before

        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "Stream", lambda device: Stream(f"copies of {device}"))
        patch.setattr(torch.cuda, "current_stream", lambda device: Stream(f"work of {device}"))
        patch.setattr(torch.cuda, "stream", stream)

    def taken(self) -> list[Any]:
        """What was asked since the last time."""
        asked, self.asked = self.asked, []
        return asked


class Target:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def copy_(self, source: Any, non_blocking: bool = False) -> None:
        self.cuda.asked.append((self.cuda.current, "copies", source, non_blocking))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_a_copy_waits_for_the_work_and_the_work_for_the_copy(cuda) -> None:
    lane = CudaLane(DEVICE)
    free = lane.mark()
    assert cuda.taken() == [("work of cuda:1", "records", "event 1")]
    arrived = lane.send("chunk", Target(cuda), free)  # type: ignore[arg-type]
    assert cuda.taken() == [
        ("copies of cuda:1", "waits for", "event 1"),
        ("copies of cuda:1", "copies", "chunk", True),
        ("copies of cuda:1", "records", "event 2"),
    ]
    assert cuda.current == "nobody"  # the stream of the caller is as it was
    lane.expect(arrived)
    lane.wait(arrived)
    assert cuda.taken() == [("work of cuda:1", "waits for", "event 2"),
                            ("host", "waits for", "event 2")]  # fmt: skip


def test_nothing_to_wait_for(cuda) -> None:
    lane = CudaLane(DEVICE)
    lane.wait(None)
    assert cuda.taken() == []
    lane.send("chunk", Target(cuda), None)  # type: ignore[arg-type]
    assert cuda.taken() == [
        ("copies of cuda:1", "copies", "chunk", True),
        ("copies of cuda:1", "records", "event 1"),
    ]


def test_memory_is_page_locked_here_and_plain_on_the_device(cuda, monkeypatch) -> None:
    lane, asked = CudaLane(DEVICE), []
    monkeypatch.setattr(torch, "empty", lambda *shape, **more: asked.append((shape, more)))
    lane.staging((3, 5), torch.bfloat16)
    lane.buffer((4, 5), torch.float16)
    assert asked == [
        (((3, 5),), {"dtype": torch.bfloat16, "pin_memory": True, "device": "cpu"}),
        (((4, 5),), {"dtype": torch.float16, "device": DEVICE}),
    ]


@pytest.mark.parametrize("streamed", [False, True])
def test_which_feed_a_job_gets(streamed, monkeypatch) -> None:
    made = []

    class Problem:
        device = DEVICE

    Problem.streamed = streamed  # type: ignore[attr-defined]
    monkeypatch.setattr(engine, "CudaLane", lambda device: ("lane", device))
    monkeypatch.setattr(engine, "StreamedFeed", lambda *given: made.append(given) or "streamed")
    problem: Any = Problem()
    chunks, plan = [slice(0, 4)], Plan(None, True, 100, 200, 300)
    feed = engine.make_feed(problem, chunks, plan)
    if streamed:
        assert feed == "streamed" and made == [(problem, chunks, ("lane", DEVICE), 300)]
        return
    assert type(feed) is Feed and not isinstance(feed, StreamedFeed) and not made
    assert (feed.problem, feed.chunks) == (problem, chunks)
    assert list(feed.first_pass()) == list(feed.second_pass()) == [0]
