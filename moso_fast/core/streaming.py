"""Features in main memory, heads on a GPU: chunks travel while the GPU works on others.

Where features lie on the device, a *feed* only walks the chunks. Where they do not, two buffers
on the device take turns: a worker thread copies the next chunk to page-locked memory and sends it
on a stream of its own, while the backend computes on the last one. Chunks that fit the memory
budget stay on the device and cross the bus once; the others cross it once a pass. The second pass
begins with what the first one left in the two buffers.

The order of the chunks changes no bit of the result: the gradient sums belong to the first pass,
which goes through the chunks in order, and alignments of different rows know nothing of each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .problem import Problem

# Bytes of one chunk of streamed features: long enough for the full rate of the bus.
CHUNK_BYTES = 2**28

_SLOTS = 2


class Lane(ABC):
    """How bytes get to a device, and who waits for whom; a token is a moment in a stream's work."""

    @abstractmethod
    def staging(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return main memory that can be sent from."""

    @abstractmethod
    def buffer(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Memory of the device."""

    @abstractmethod
    def mark(self) -> Any:
        """Token of all that the backend has launched so far."""

    @abstractmethod
    def send(self, source: Tensor, target: Tensor, after: Any) -> Any:
        """Start to copy ``source`` to the device once ``after`` has come; token of its arrival."""

    @abstractmethod
    def expect(self, token: Any) -> None:
        """Have what the backend launches from now on wait for ``token``."""

    @abstractmethod
    def wait(self, token: Any) -> None:
        """Wait here until ``token`` has come."""


class CudaLane(Lane):
    """Page-locked memory, a stream for the copies, events for tokens."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._work = torch.cuda.current_stream(device)  # the worker thread has another current one

    def staging(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Page-locked main memory."""
        return torch.empty(shape, dtype=dtype, pin_memory=True, device="cpu")

    def buffer(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Memory of the device."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    def mark(self) -> torch.cuda.Event:
        """Event in the backend's stream."""
        event = torch.cuda.Event()
        event.record(self._work)
        return event

    def send(self, source: Tensor, target: Tensor, after: Any) -> torch.cuda.Event:
        """Copy on the stream of the copies."""
        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            event.record(self._stream)
        return event

    def expect(self, token: Any) -> None:
        """Let the backend's stream wait."""
        self._work.wait_event(token)

    def wait(self, token: Any) -> None:
        """Let this thread wait."""
        if token is not None:
            token.synchronize()


class Feed:
    """Walks the chunks of features that lie where the backend reads them."""

    def __init__(self, problem: Problem, chunks: Sequence[slice]) -> None:
        self.problem = problem
        self.chunks = chunks

    def first_pass(self) -> Iterator[int]:
        """Yield the numbers of the chunks in order; a chunk's features are there meanwhile."""
        yield from range(len(self.chunks))

    def second_pass(self) -> Iterator[int]:
        """Yield the numbers of the chunks, in any order, once :meth:`first_pass` is through."""
        yield from range(len(self.chunks))

    def close(self) -> None:
        """Let go of threads and memory."""


@dataclass
class _Slot:
    """One of the two buffers on the device, and the chunk in it."""

    buffer: Tensor
    holds: int | None = None
    free: Any = None  # token: what was launched on its last chunk is done


class StreamedFeed(Feed):
    """Walks chunks of features in main memory; ``problem.feature_rows`` yields them on the device.

    ``resident_bytes`` of the device may hold chunks from the first pass to the second.
    """

    def __init__(
        self, problem: Problem, chunks: Sequence[slice], lane: Lane, resident_bytes: int
    ) -> None:
        super().__init__(replace(problem, upload=self._rows), chunks)
        self._features, self._lane = problem.features, lane
        self._number = {(rows.start, rows.stop): i for i, rows in enumerate(chunks)}
        longest = max((_length(rows) for rows in chunks), default=0)
        shape, dtype = (longest, problem.dim), problem.features.dtype
        fitting = resident_chunks(problem, chunks, resident_bytes)
        self._slots = [
            _Slot(lane.buffer(shape, dtype)) for _ in range(_SLOTS if fitting < len(chunks) else 0)
        ]
        end = chunks[fitting - 1].stop if fitting else 0
        self._kept = lane.buffer((end, problem.dim), dtype)
        # The memory may be what launched work still reads: the copies wait for that.
        self._begin = lane.mark()
        for slot in self._slots:
            slot.free = self._begin
        self._resident = range(fitting)
        self._staging: list[Tensor] = []
        if not problem.features.is_pinned():
            self._staging = [lane.staging(shape, dtype) for _ in range(_SLOTS)]
        self._sent: list[Any] = [None] * _SLOTS  # token of the last copy out of each staging buffer
        self._turn = 0
        self._arrivals: dict[int, Future[Any]] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="moso_fast-upload")

    def first_pass(self) -> Iterator[int]:
        """See :class:`Feed`."""
        yield from self._walk(list(range(len(self.chunks))), self._second_order())

    def second_pass(self) -> Iterator[int]:
        """See :class:`Feed`."""
        yield from self._walk(self._second_order(), [])

    def close(self) -> None:
        """Stop the worker and wait for the copies under way: their memory is about to go."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        for arrival in self._arrivals.values():
            if not arrival.cancelled() and arrival.exception() is None:
                self._lane.wait(arrival.result())
        self._arrivals.clear()
        # The problem refers to this feed and back: without this the memory would stay until the
        # garbage collector comes round to the two.
        self._slots.clear()
        self._staging.clear()
        self._kept = self._kept[:0].clone()

    def _second_order(self) -> list[int]:
        """Begin with what the first pass leaves in the slots, then the residents, then backwards.

        While the GPU works on the residents the slots are filled again.
        """
        streamed = list(range(len(self._resident), len(self.chunks)))[::-1]
        return [*streamed[:_SLOTS], *self._resident, *streamed[_SLOTS:]]

    def _walk(self, order: list[int], next_order: list[int]) -> Iterator[int]:
        ahead = [*order, *next_order]
        for position, number in enumerate(order):
            self._fetch(number, keep={number})
            self._fetch_ahead(ahead[position:])
            self._lane.expect(self._arrivals[number].result())
            yield number
            slot = self._slot_of(number)
            if slot is not None:
                slot.free = self._lane.mark()

    def _fetch_ahead(self, ahead: list[int]) -> None:
        """Send for the next chunk that is not on the device, if a slot can take it."""
        for position, number in enumerate(ahead):
            if number not in self._arrivals:
                self._fetch(number, keep=set(ahead[:position]))
                return

    def _fetch(self, number: int, keep: set[int]) -> None:
        """Send chunk ``number`` to its place, unless it is there or all slots hold ``keep``."""
        if number in self._arrivals:
            return
        rows = self.chunks[number]
        if number in self._resident:
            target, after = self._kept[rows], self._begin
        else:
            slot = next((s for s in self._slots if s.holds is None or s.holds not in keep), None)
            if slot is None:
                return
            if slot.holds is not None:
                del self._arrivals[slot.holds]
            slot.holds = number
            target, after = slot.buffer[: _length(rows)], slot.free
        turn, self._turn = self._turn, (self._turn + 1) % _SLOTS
        self._arrivals[number] = self._worker.submit(self._send, rows, target, after, turn)

    # The mode of the caller does not reach the worker, but what was allocated in it may only be
    # written in it; other memory may be, too.
    @torch.inference_mode()
    def _send(self, rows: slice, target: Tensor, after: Any, turn: int) -> Any:
        source = self._features[rows]
        if self._staging:
            self._lane.wait(self._sent[turn])
            source = self._staging[turn][: _length(rows)].copy_(source)
        self._sent[turn] = self._lane.send(source, target, after)
        return self._sent[turn]

    def _slot_of(self, number: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.holds == number), None)

    def _rows(self, rows: slice) -> Tensor:
        """Features of the chunk ``rows``, which the walk has just yielded."""
        number = self._number[rows.start, rows.stop]
        slot = self._slot_of(number)
        return self._kept[rows] if slot is None else slot.buffer[: _length(rows)]


def resident_chunks(problem: Problem, chunks: Sequence[slice], resident_bytes: int) -> int:
    """Return how many chunks, from the first on, may stay on the device: all, or what fits."""
    row = problem.dim * problem.features.dtype.itemsize
    return sum(rows.stop * row <= resident_bytes for rows in chunks)


def _length(rows: slice) -> int:
    return rows.stop - rows.start
