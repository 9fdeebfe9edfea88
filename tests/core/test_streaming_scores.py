"""Scores of features that are streamed: the same bits, the same errors, no GPU."""

from __future__ import annotations

import pytest
import torch
from core_support import FIELDS, Case, chunk_rows, needs_cpu, random_case, score_with
from streaming_lanes import LANES, EagerLane
from torch._subclasses.fake_tensor import FakeTensorMode

from moso_fast.backends import choose
from moso_fast.core import engine, memory
from moso_fast.core.problem import Problem, build_problem
from moso_fast.core.streaming import CHUNK_BYTES, Feed, StreamedFeed, resident_chunks
from moso_fast.functional import explain, last_layer_stats


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
def test_under_inference_mode(lane_type, streaming) -> None:
    """Buffers are the caller's, filled by a thread to which no mode of the caller comes."""
    case = random_case("ids", n=30)
    streaming(6, 8, lane_type)
    expected = score_with("torch", case)
    with torch.inference_mode():
        got = score_with("torch", case)
    for name in FIELDS:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


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


@needs_cpu
def test_the_cpu_backend_streams_nothing_to_a_gpu() -> None:
    with FakeTensorMode():
        case = host_case(
            features=torch.zeros(5, 4), labels=torch.zeros(5, dtype=torch.long),
            weight=torch.zeros(4, 4, device="cuda"),
        )  # fmt: skip
        with pytest.raises(ValueError, match="streams none to cuda:0"):
            choose(build_problem(**case), "cpu")


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
