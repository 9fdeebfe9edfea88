"""The parts that a scoring run is made of, each by itself."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scorer_cases import CLASSES, N, SmallNet, checkpoints_of, images, trained
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from moso_fast.core.logit_map import LogitMap
from moso_fast.scoring import job as job_module
from moso_fast.scoring import last_layer
from moso_fast.scoring.features import Features
from moso_fast.scoring.head.weights import HeadReading
from moso_fast.scoring.last_layer import HeadGroup, LastLayerJob, joined
from moso_fast.scoring.noise import cancellation, warn_if_noise
from moso_fast.scoring.parts import PartStats
from moso_fast.scoring.run import make_job
from moso_fast.scoring.settings import Call, ScoredModel, Settings

NAN = float("nan")


def job_of(settings: Settings, **call: Any) -> Any:
    torch.manual_seed(0)
    model = ScoredModel.of(SmallNet(), None, settings)
    return make_job(model, settings, Call(**{"data": images(), **call}))


def test_how_much_of_the_terms_is_left() -> None:
    """By hand: a score is (N a - q) / (N - 1), its terms are of size q / (N - 1)."""
    fields = {
        "alignment": torch.tensor([2.0, 1.0, NAN, 4.0]),
        "grad_sqnorm": torch.tensor([4.0, 6.0, NAN, 3.0]),
    }
    # Of three samples that count: |3 * 2 - 4| / 2 = 1, |3 - 6| / 2 = 1.5, |12 - 3| / 2 = 4.5.
    assert cancellation(fields, {0: 3}, None) == pytest.approx(3 / 1.5)
    # 4 / 2 = 2 by 1, 6 / 2 = 3 by 1.5, 1.5 by 4.5: 2, 2, 1/3.
    two = torch.tensor([7, 7, 9, 9])
    # Of two in part 7: |2 * 2 - 4| / 1 = 0 and |2 - 6| = 4; of four in 9: |16 - 3| / 3.
    ratios = sorted([4 / 1e-300, 6 / 4, 3 / 13])
    assert cancellation(fields, {7: 2, 9: 4}, two) == pytest.approx(ratios[1])
    nothing = {name: torch.full((2,), NAN) for name in fields}
    assert cancellation(nothing, {0: 5}, None) == 0.0


@pytest.mark.parametrize(
    ("ratio", "said"), [(100.0, None), (101.0, (101, 2)), (1234.0, (1234, 25)), (1e9, (10**9, 100))]
)
def test_what_is_said_of_rounding(ratio: float, said: tuple[int, int] | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_noise(ratio)
    assert len(caught) == (said is not None)
    if said is not None:
        assert str(caught[0].message) == (
            f"precision='medium': the scores are differences of terms {said[0]} times their size "
            f"(many classes, few samples of each), so about {said[1]}% of each may be rounding; "
            "precision='high' or 'highest' scores them exactly"
        )


@pytest.mark.parametrize(
    ("precision", "used", "backend", "formula", "warned"),
    [
        (None, "medium", "cpu", "moso", True),
        ("medium", "highest", "cpu", "one_step", True),
        (None, "high", "cpu", "moso", False),
        ("high", "medium", "cpu", "moso", False),
        (None, "medium", "torch", "moso", False),  # which computes in float32
        (None, "medium", "cpu", "alignment", False),  # which is no difference
    ],
)
def test_when_rounding_is_spoken_of(
    precision: str | None, used: str, backend: str, formula: str, warned: bool
) -> None:
    job = job_of(Settings(precision=precision), formula=formula)
    job.precision = used

    def group(alignment: float, backend: str) -> PartStats:
        # The last checkpoint of a group is looked at.
        found = PartStats(
            {"alignment": torch.full((N,), a), "grad_sqnorm": torch.full((N,), 1.0)}
            for a in (9.0, alignment)
        )
        found.counts, found.backend = {0: N}, backend
        return found

    near = (1 + 1 / 250) / N  # what is left of the score is a 250th of its terms
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        job.warn_if_noise([group(1.0, backend), group(near, backend), group(near, "torch")])
    assert len(caught) == warned
    assert not warned or "terms 250 times" in str(caught[0].message)


def features_of(dtype: torch.dtype = torch.float32) -> Features:
    rows = torch.tensor([[1.0, -2.0], [0.5, 4.0]], dtype=dtype)
    return Features(rows, torch.tensor([0, 1]), None)


def test_heads_of_a_group() -> None:
    features = features_of()
    group = HeadGroup(3, features)
    assert (group.first, group.notes, group.input_scale, group.logit_map) == (3, {}, 1.0, None)
    assert group.inputs() is features.features
    one = HeadReading(torch.ones(3, 2), torch.zeros(3), output_scale=0.5)
    group.add(one, "a")
    weight, bias = group.stacked()
    assert weight is one.weight and bias is one.bias
    group.add(HeadReading(2 * torch.ones(3, 2), torch.ones(3)), "b")
    weight, bias = group.stacked()
    assert weight.tolist() == [[[1.0, 1.0]] * 3, [[2.0, 2.0]] * 3]
    assert bias is not None and bias.tolist() == [[0.0] * 3, [1.0] * 3]
    assert (group.digests, group.scales) == (["a", "b"], [0.5, 1.0])
    assert group.to_logits() == {"logit_map": None, "logit_scale": [0.5, 1.0]}
    without = HeadGroup(0, features)
    for count in (1, 2):
        without.add(HeadReading(torch.ones(3, 2), None), "c")
        weight, bias = without.stacked()
        assert weight.shape == ((3, 2) if count == 1 else (2, 3, 2)) and bias is None


def test_maps_of_a_group() -> None:
    def map_of(kind: str, *values: float) -> LogitMap:
        return LogitMap(kind, tuple(torch.tensor(v, dtype=torch.float64) for v in values))

    cap, factor = map_of("tanh", 2.0, 0.5), map_of("scale", 4.0)
    for found, wanted in (
        (cap, {"logit_map": cap, "logit_scale": [0.5, 3.0]}),
        (factor, {"logit_scale": [2.0, 12.0]}),
    ):
        group = HeadGroup(0, features_of(), 1.0, found, {"logits": "x"})
        for scale in (0.5, 3.0):
            group.add(HeadReading(torch.ones(3, 2), None, output_scale=scale), "")
        assert group.to_logits() == wanted
        assert group.notes == {"logits": "x"}


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_a_factor_on_the_features(dtype: torch.dtype, wide: torch.dtype) -> None:
    inputs = HeadGroup(0, features_of(dtype), 0.3).inputs()
    assert inputs.dtype == wide
    assert torch.equal(inputs, torch.tensor([[1.0, -2.0], [0.5, 4.0]], dtype=wide) * 0.3)


@pytest.mark.parametrize(("limit", "full"), [(72, False), (71, True)])
def test_when_a_group_is_full(limit: int, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third head of six numbers of four bytes makes it 72 bytes."""
    monkeypatch.setattr(last_layer, "_HEADS_BYTES", limit)
    group = HeadGroup(0, features_of())
    for _ in range(2):
        group.add(HeadReading(torch.ones(3, 2), None), "")
    assert group.full() is full


def test_facts_of_all_groups_in_one() -> None:
    assert joined([]) == joined([{}]) == {"logits": "the head's output"}
    assert joined([{"logits": "a"}, {"logits": "b"}, {"logits": "a"}]) == {"logits": "a; b"}
    assert joined([{"logits": "a"}, {}]) == {"logits": "a; the head's output"}
    assert joined([{}, {"rows": "some"}, {}]) == {"logits": "the head's output", "rows": "some"}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([images()[k] for k in range(N)])


@pytest.mark.parametrize(
    ("gradient", "data", "checkpoints", "total"),
    [
        ("last_layer", images(), None, 3),
        ("last_layer", images(), 2, 6),
        ("last_layer", Stream(), 2, None),
        ("last_layer", images(), "generator", None),
        ("full", images(), None, 6),
        ("full", images(), 2, 12),
        ("full", Stream(), None, None),
    ],
)
@pytest.mark.parametrize("progress", [True, False])
def test_steps_of_the_bar(
    gradient: str,
    data: Any,
    checkpoints: Any,
    total: int | None,
    progress: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches, of 8 of 23 samples, by checkpoints and by the passes over each."""
    bars: list[Any] = []
    steps: list[None] = []

    @contextlib.contextmanager
    def bar(*arguments: Any) -> Iterator[Any]:
        bars.append(arguments)
        yield lambda: steps.append(None)

    monkeypatch.setattr(job_module, "progress_bar", bar)
    given = checkpoints
    if checkpoints is not None:
        given = checkpoints_of(trained(SmallNet()))[:2]
        given = iter(given) if checkpoints == "generator" else given
    settings = Settings(gradient=gradient, batch_size=8, progress=progress)
    with torch.no_grad():
        job_of(settings, data=data, checkpoints=given).run()
    assert bars == [("scoring", total, progress)]
    assert total is None or len(steps) == total


def test_what_was_chosen_reaches_who_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu", 0)
    chosen: dict[str, Any] = {"device": device, "dtype": torch.float64, "ignore_index": -7}
    job = job_of(
        Settings(
            **chosen,
            backend="torch",
            chunk_size=5,
            feature_cache="bfloat16",
            loss="mse",
            batch_size=6,
        )
    )
    assert isinstance(job, LastLayerJob)
    capture = job.capture
    assert (capture.device, capture.dtype, capture.loss) == (device, torch.float64, "mse")
    assert (capture.cache_dtype, capture.ignore_index) == (torch.bfloat16, -7)
    assert capture.shift is job.shift and capture.samples is job.data
    assert (job.shift.model, job.shift.ignore_index) == (job.model.network, -7)
    assert [len(batch[0]) for batch in job.loader] == [6, 6, 6, 5]
    assert (job.weights.device, job.weights.dtype) == (device, torch.float64)

    job = job_of(Settings(backend="torch", chunk_size=5), partition=2)
    asked: list[Any] = []
    part_stats = last_layer.part_stats

    def noting(problem: Any, **options: Any) -> PartStats:
        asked.append(options)
        return part_stats(problem, **options)

    monkeypatch.setattr(last_layer, "part_stats", noting)
    with torch.no_grad():
        job.run()
    ((options,),) = (asked,)
    assert (options["backend"], options["chunk_size"]) == ("torch", 5)
    assert options["partition"] is job.ids

    whole = job_of(
        Settings(
            **chosen,
            gradient="full",
            chunk_size=5,
            nonfinite="exclude",
            autocast=torch.float16,
            label_smoothing=0.2,
            per="sample",
        )
    )
    engine, network = whole.engine, whole.engine.network
    assert (network.device, network.dtype) == (device, torch.float64)
    assert network.autocast == torch.float16
    assert (network.loss.ignore_index, network.loss.label_smoothing) == (-7, 0.2)
    assert network.loss.per == "sample"
    assert network.model is whole.model.network
    assert whole.precision == "highest" and engine is not None


def test_weights_are_copied_to_where_they_are_scored() -> None:
    job = job_of(Settings())
    reading = HeadReading(torch.ones(3, 2), torch.ones(3))
    there = SimpleNamespace(features=torch.zeros(2, 2, device="meta"))
    own = job._own(reading, there)
    assert own.weight.device.type == own.bias.device.type == "meta"


def test_a_head_without_a_number_of_classes_is_checked_later() -> None:
    model = nn.Sequential(nn.Conv2d(1, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    given = Settings(class_weight=[1.0] * 3)
    scored = ScoredModel.of(model, None, given)
    call = Call(data=images()).checked("last_layer")
    job = make_job(scored, given, call)
    with pytest.raises(
        ValueError, match=r"class_weight must have one entry per class, shape \(4,\)"
    ):
        job.run()
