"""Features streamed to a device: real copies between buffers of main memory, no GPU."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import closing

import pytest
import torch
from core_support import FIELDS, Case, chunk_rows, generator, random_case, score_with
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moso_fast.backends import choose
from moso_fast.core import engine, memory
from moso_fast.core.problem import Problem, build_problem
from moso_fast.core.streaming import CHUNK_BYTES, Feed, Lane, StreamedFeed, resident_chunks
from moso_fast.functional import explain, last_layer_stats


class EagerLane(Lane):
    """Copies at once, the earliest that a device could; checks what each copy waits for.

    A token is the number of marks set when it was made. A buffer may be overwritten after the
    mark that was set once its last chunk had been read.
    """

    lazy = False

    def __init__(self) -> None:
        self.marks = 0
        self.sent: list[tuple[int, int]] = []  # rows, marks waited for
        self.read_until: dict[int, int] = {}  # address -> marks when it was last read
        self.waits = 0

    def staging(self, shape, dtype) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    def buffer(self, shape, dtype) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def read(self, features: Tensor) -> None:
        """What a test's backend does with the features of a chunk."""
        self.read_until[features.data_ptr()] = self.marks + 1

    def send(self, source: Tensor, target: Tensor, after) -> object:
        assert after >= self.read_until.get(target.data_ptr(), 0), "overwrites what is being read"
        self.sent.append((len(source), after))
        target.copy_(source)
        return None

    def expect(self, token) -> None:
        self.waits += 1

    def wait(self, token) -> None:
        pass


class LazyLane(EagerLane):
    """Copies when somebody waits for it, the latest that a device could."""

    def send(self, source: Tensor, target: Tensor, after) -> object:
        self.sent.append((len(source), after))
        pending = [lambda: target.copy_(source)]
        self.all_pending = [*getattr(self, "all_pending", []), pending]
        return pending

    def expect(self, token) -> None:
        self.waits += 1
        self.wait(token)

    def wait(self, token) -> None:
        while token:
            token.pop()()


LANES = (EagerLane, LazyLane)


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


@pytest.mark.parametrize("lane_type", LANES)
def test_under_inference_mode(lane_type, streaming) -> None:
    """Buffers are the caller's, filled by a thread to which no mode of the caller comes."""
    case = random_case("ids", n=30)
    streaming(6, 8, lane_type)
    expected = score_with("torch", case)
    with torch.inference_mode():
        got = score_with("torch", case)
    for name in FIELDS:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


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


@pytest.fixture
def streaming(monkeypatch):
    """Make the engine stream every problem in chunks of some rows; returns the lanes used."""

    def set_up(resident_rows: int, step: int, lane_type=EagerLane) -> list[EagerLane]:
        lanes: list[EagerLane] = []

        def make_feed(problem, chunks, plan) -> Feed:
            lanes.append(lane_type())
            row = problem.dim * problem.features.dtype.itemsize
            return StreamedFeed(problem, chunks, lanes[-1], resident_rows * row)

        monkeypatch.setattr(engine, "make_feed", make_feed)
        monkeypatch.setattr(
            engine, "rows_at_a_time", lambda problem, plan, _: plan.chunk_size or step
        )
        return lanes

    return set_up


@pytest.mark.parametrize("lane_type", LANES)
@pytest.mark.parametrize("resident", [0, 16, 1000])
@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("kind", ["ids", "soft", "mse"])
def test_results_are_the_same_bits(kind, chunk_size, resident, lane_type, streaming) -> None:
    # Rows of 64 bytes: matrix products round by how their operands are aligned.
    case = random_case(kind, n=61, d=16, heads=2)
    streaming(0, 8)
    expected_engine = engine.make_feed
    engine.make_feed = lambda problem, chunks, plan: Feed(problem, chunks)
    try:
        expected = score_with("torch", case, chunk_size=chunk_size)
    finally:
        engine.make_feed = expected_engine
    lanes = streaming(resident, 8, lane_type)
    got = score_with("torch", case, chunk_size=chunk_size)
    assert len(lanes) == 1 and lanes[0].sent
    for name in FIELDS:
        pair = (getattr(got, name), getattr(expected, name))
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("chunk_size", [None, 6])
def test_sequences_and_excluded_rows(chunk_size, streaming) -> None:
    case = random_case("ids", n=30, cu_seqlens=torch.tensor([0, 4, 4, 17, 30]))
    case.features[5, 1] = float("nan")
    expected = score_with("torch", case, chunk_size=chunk_size, nonfinite="exclude")
    streaming(6, 13)
    got = score_with("torch", case, chunk_size=chunk_size, nonfinite="exclude")
    for name in FIELDS:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), equal_nan=True)


def test_bad_rows_are_named_and_empty_input_is_empty(streaming) -> None:
    streaming(0, 8)
    case = random_case("ids", n=30)
    case.features[21, 2] = float("inf")
    with pytest.raises(ValueError, match=r"^features\[21, 2\] is inf"):
        last_layer_stats(*case.args, backend="torch")
    empty = Case(case.features[:0], case.weight, case.labels[:0], case.bias)
    assert last_layer_stats(*empty.args, backend="torch").loss.shape == (0,)


def test_features_with_a_bad_row_are_not_sent_a_second_time(streaming, monkeypatch) -> None:
    """Although on a GPU everything else is judged at the end: the bus takes longer than a wait."""
    monkeypatch.setattr(Problem, "asynchronous", True)
    monkeypatch.setattr(Problem, "streamed", True)
    monkeypatch.setattr(memory, "resident_budget", lambda *given: 0)
    lanes = streaming(0, 8)
    case = random_case("ids", n=30)
    last_layer_stats(*case.args, backend="torch")
    case.features[21, 2] = float("inf")
    with pytest.raises(ValueError, match=r"^features\[21, 2\] is inf"):
        last_layer_stats(*case.args, backend="torch")
    assert [len(lane.sent) for lane in lanes] == [6, 4]


# What follows needs a device to be named, not to be there: fake tensors have one without memory.


def host_case(**moved):
    """Arguments with features in main memory and the head on a GPU."""
    arguments = dict(
        features=torch.zeros(6, 3), weight=torch.zeros(4, 3, device="cuda"),
        labels=torch.zeros(6, dtype=torch.long), bias=torch.zeros(4, device="cuda"),
    )  # fmt: skip
    return {**arguments, **moved}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_labels_may_lie_on_either_side(device: str) -> None:
    with FakeTensorMode():
        problem = build_problem(
            **host_case(labels=torch.zeros(6, dtype=torch.long, device=device)),
            sample_weight=torch.ones(6, device=device),
            cu_seqlens=torch.tensor([0, 6], device=device),
        )
        assert problem.streamed and problem.device.type == "cuda"
        assert problem.features.device.type == "cpu"
        for tensor in (problem.labels, problem.sample_weight, problem.cu_seqlens):
            assert tensor.device == problem.device
        assert problem.feature_rows(slice(0, 2)).device == problem.device
        assert not build_problem(
            torch.zeros(6, 3), torch.zeros(4, 3), torch.zeros(6, dtype=torch.long)
        ).streamed


@pytest.mark.parametrize(
    "moved, message",
    [
        ({"bias": "cpu"}, r"^bias must be on the device of weight \(cuda:0\), got cpu$"),
        ({"labels": "meta"}, r"^labels must be on the device of features \(cpu\) or of weight "
                             r"\(cuda:0\), got meta$"),
        ({"weight": "meta"}, r"^weight must be on the device of features \(cpu\), got meta$"),
        ({"features": "cuda", "weight": "cpu"},
         r"^weight must be on the device of features \(cuda:0\), got cpu$"),
    ],
)  # fmt: skip
def test_other_mixtures_are_refused(moved, message) -> None:
    with FakeTensorMode():
        arguments = host_case()
        for name, device in moved.items():
            like = arguments[name]
            arguments[name] = torch.zeros(like.shape, dtype=like.dtype, device=device)
        with pytest.raises(ValueError, match=message):
            build_problem(**arguments)


def test_the_operator_says_that_results_are_on_the_device_of_the_head() -> None:
    with FakeTensorMode():
        case = host_case()
        results = torch.ops.moso_fast.last_layer_stats(
            case["features"], case["weight"], case["labels"], case["bias"], None, None,
            "cross_entropy", 0.0, -100, "highest", "raise", "sample", "torch", None, None,
        )  # fmt: skip
        assert all(result.device.type == "cuda" for result in results)


def test_who_gets_it_and_how_it_is_explained(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (5 * 2**30, 2**33))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode():
        rows, dim = 3_000_000, 256
        case = host_case(
            features=torch.zeros(rows, dim), labels=torch.zeros(rows, dtype=torch.long),
            weight=torch.zeros(4, dim, device="cuda"),
        )  # fmt: skip
        problem = build_problem(**case)
        backend, reasons = choose(problem)
        assert backend.name == "torch", reasons
        with pytest.raises(ValueError, match="streams none to cuda:0"):
            choose(problem, "cpu")
        plan, step = memory.make_plan(problem, None), chunk_rows("torch", problem)
        assert step * dim * 4 <= CHUNK_BYTES
        # 0.8 of 5 GiB free, without the residuals and the room for a chunk's work.
        assert plan.resident_bytes == int(0.8 * 5 * 2**30) - rows * 4 * 4 - 3 * 2**30
        chunks = [slice(at, min(at + step, rows)) for at in range(0, rows, step)]
        stay = resident_chunks(problem, chunks, plan.resident_bytes) * step
        assert 0 < stay < rows
        text = explain(**case)
        assert f"features  in main memory, sent in chunks; {stay} of {rows} rows stay" in text
        # A fixed chunk asks for memory that does not grow with the rows.
        assert memory.make_plan(problem, 1000).resident_bytes == 0


def test_a_chunk_of_features_is_no_more_than_the_backend_takes() -> None:
    problem = build_problem(
        torch.randn(5, 3, generator=generator(0)), torch.zeros(2, 3), torch.zeros(5).long()
    )
    assert not problem.streamed
    assert memory.make_plan(problem, None).resident_bytes == 0
