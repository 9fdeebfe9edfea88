"""The memory of the features, which of their rows belong to a sample, and what a batch shows."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from feature_cases import Items, Stream, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from moso_fast.core.errors import DataError
from moso_fast.scoring import features as features_module
from moso_fast.scoring.features import FeatureCapture, Features
from moso_fast.sources.data.batches import make_loader
from moso_fast.sources.find_head import find_head


def capture(model: nn.Module, data: Any, batch_size: int = 4, **options: Any) -> FeatureCapture:
    name, head = find_head(model)
    loader = data if isinstance(data, DataLoader) else make_loader(data, batch_size)
    return FeatureCapture(model, name, head, loader, **options)


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every cache that is allocated."""
    rows: list[int] = []
    allocate = FeatureCapture._allocate

    def noting(self: FeatureCapture, value: Tensor, count: int) -> Tensor:
        rows.append(count)
        return allocate(self, value, count)

    monkeypatch.setattr(FeatureCapture, "_allocate", noting)
    return rows


class Tokens(Dataset):
    """Sequences of three tokens, of which the later samples have more that count."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        labels = torch.where(torch.arange(3) < self.counts[index], torch.arange(3) % 2, -100)
        return 10.0 * index + torch.arange(9.0).view(3, 3), labels


class Streamed(IterableDataset):
    def __init__(self, base: Dataset) -> None:
        self.base = base

    def __iter__(self) -> Iterator[Any]:
        return (self.base[k] for k in range(len(self.base)))


@pytest.mark.parametrize(
    ("data", "batch_size", "caches", "rows"),
    [
        (Items(), 4, [6], 6),  # as many as there are samples
        (Items(), 100, [6], 6),
        (Stream(), 4, [4, 8], 6),  # one batch, then twice as many
        (Stream(), 1, [1, 2, 4, 8], 6),
        (Tokens([2, 2, 2, 2]), 2, [8], 8),  # as many a batch as in the first one
        (Tokens([3, 3, 3, 3, 3]), 2, [12, 24], 15),  # batches of two and three
        (Tokens([1, 1, 3, 3]), 2, [4, 8], 8),
        (Tokens([1, 3, 3, 3]), 1, [4, 8, 16], 10),
        (Streamed(Tokens([1, 3, 3, 3])), 1, [1, 4, 8, 16], 10),
    ],
)
def test_how_the_cache_grows(
    data: Any, batch_size: int, caches: list[int], rows: int, allocated: list[int]
) -> None:
    runner = capture(net(fc=nn.Linear(3, 2)), data, batch_size)
    found = runner.run()
    assert allocated == caches and len(found.features) == rows
    base = getattr(data, "base", data)
    inputs = list(base) if isinstance(base, Stream) else [base[k] for k in range(len(base))]
    wanted = [x[y != -100] if x.dim() == 2 else x[None] for x, y in inputs]
    assert torch.equal(found.features, torch.cat(wanted))
    again = runner.run()
    assert torch.equal(again.features, torch.cat(wanted))
    assert allocated == caches, "the second pass writes to the same memory"


def stand_in(kind: str, dtype: torch.dtype, dim: int = 5) -> Any:
    """What is asked of features: where they lie, and their form."""
    return SimpleNamespace(device=torch.device(kind), dtype=dtype, shape=(3, dim))


@pytest.mark.parametrize(
    ("cache", "dtype", "kept"),
    [
        ("auto", torch.float32, torch.float32),
        ("auto", torch.float64, torch.float64),
        ("auto", torch.float16, torch.float16),
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.int32, torch.float32),
        ("float32", torch.float64, torch.float32),
        ("bfloat16", torch.float64, torch.bfloat16),
    ],
)
def test_the_dtype_of_the_cache(cache: str, dtype: torch.dtype, kept: torch.dtype) -> None:
    runner = capture(net(fc=nn.Linear(5, 2)), Items(), cache=cache)
    made = runner._allocate(stand_in("cpu", dtype), 7)
    assert (made.shape, made.dtype, made.device.type) == ((7, 5), kept, "cpu")


@pytest.mark.parametrize(("rows", "on_gpu"), [(3000, True), (3001, False)])
def test_a_cache_that_would_take_most_of_a_gpu_lies_in_main_memory(
    rows: int, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 5 numbers in float32: 3000 are 60,000 bytes, 0.6 of what is free there."""
    runner = capture(net(fc=nn.Linear(5, 2)), Items())
    made: list[tuple[Any, dict[str, Any]]] = []
    device = torch.device("cuda", 1)
    free = {device: (100_000, 10**9)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: free[where])
    monkeypatch.setattr(
        features_module.torch, "empty", lambda shape, **options: made.append((shape, options))
    )
    value = SimpleNamespace(device=device, dtype=torch.float32, shape=(3, 5))
    runner._allocate(value, rows)  # type: ignore[arg-type]
    where = {"device": device} if on_gpu else {"pin_memory": True, "device": "cpu"}
    assert made == [((rows, 5), {"dtype": torch.float32, **where})]


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({}, "cpu"),
        ({"parameter": "meta"}, "meta"),
        ({"buffer": "meta"}, "meta"),
        ({"parameter": "cpu", "buffer": "meta"}, "cpu"),
    ],
)
def test_where_a_model_runs_unless_told(tensors: dict[str, str], kind: str) -> None:
    model, fc = nn.Module(), nn.Linear(3, 2)
    if "parameter" in tensors:
        model.p = nn.Parameter(torch.zeros(1, device=tensors["parameter"]))
    if "buffer" in tensors:
        model.register_buffer("b", torch.zeros(1, device=tensors["buffer"]))
    loader = make_loader(Items(), 4)
    assert FeatureCapture(model, "fc", fc, loader).device == torch.device(kind)
    told = torch.device("cpu", 0)
    assert FeatureCapture(model, "fc", fc, loader, device=told).device == told


def test_inputs_go_where_the_model_runs_and_in_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(fc=nn.Linear(3, 2)).double()
    runner = capture(model, Items(), dtype=torch.float64, device=torch.device("cpu", 0))
    moved: list[Any] = []
    to_device = features_module.to_device

    def noting(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
        moved.append((device, dtype))
        return to_device(value, device, dtype)

    monkeypatch.setattr(features_module, "to_device", noting)
    runner.run()
    with runner.inputs.one_pass():
        outputs = runner._outputs({"input": torch.ones(2, 3)})
    assert torch.equal(outputs, model(torch.ones(2, 3).double()))
    assert moved == [(torch.device("cpu", 0), torch.float64)] * 3


def test_which_samples_count() -> None:
    ids = torch.tensor([0, -1, 2, -1, -1, 1, -1])
    rows = Features(torch.zeros(7, 2), ids, None)
    assert rows.samples == 7
    assert rows.counted(-1).tolist() == [True, False, True, False, False, True, False]
    tokens = Features(torch.zeros(7, 2), ids, torch.tensor([0, 2, 3, 5, 7]))
    assert tokens.samples == 4
    assert tokens.counted(-1).tolist() == [True, True, False, True]
    assert tokens.counted(2).tolist() == [True, False, True, True]
    targets = Features(torch.zeros(7, 2), torch.zeros(7, 3), torch.tensor([0, 2, 7]))
    counted = targets.counted(0)
    assert (counted.dtype, counted.tolist()) == (torch.bool, [True, True])


@pytest.mark.parametrize(
    ("row", "sample", "token"), [(0, 0, 0), (1, 0, 1), (2, 1, 0), (4, 2, 1), (6, 3, 1)]
)
def test_errors_speak_of_samples_and_their_tokens(row: int, sample: int, token: int) -> None:
    found = DataError("features[{row}, {column}] is {value}", row=row, column=1, value=9.0)
    tokens = Features(torch.zeros(7, 2), torch.zeros(7).long(), torch.tensor([0, 2, 3, 5, 7]))
    told = tokens.of_a_sample(found)
    assert (told.row, told.column, told.value) == (sample, 1, 9.0)
    assert str(told) == (
        f"token {token} of those that count in sample {sample}: features[{sample}, 1] is 9.0"
    )
    assert Features(torch.zeros(7, 2), torch.zeros(7).long(), None).of_a_sample(found) is found


def test_features_of_another_width() -> None:
    runner = capture(net(fc=nn.Linear(3, 2)), Items())
    runner._rows = 4
    runner._cache = torch.zeros(4, 3)
    with pytest.raises(ValueError) as caught:
        runner._reserve(torch.zeros(2, 5), 6)
    assert str(caught.value) == "head 'fc' got inputs of different widths"
    runner._rows = 0  # of an earlier pass: a cache that does not fit is made anew
    runner._reserve(torch.zeros(2, 5), 2)
    assert runner._cache.shape == (6, 5)


def test_nothing_to_score() -> None:
    for data in (TensorDataset(torch.zeros(0, 3), torch.zeros(0).long()), Streamed(Tokens([]))):
        with pytest.raises(ValueError, match=r"^data holds no samples$"):
            capture(net(fc=nn.Linear(3, 2)), data).run()


def test_other_labels_in_a_later_pass() -> None:
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    runner = capture(net(fc=nn.Linear(3, 2)), TensorDataset(torch.randn(6, 3), labels))
    runner.run()
    runner.run()
    labels[5] = 1
    with pytest.raises(ValueError) as caught:
        runner.run()
    assert str(caught.value) == (
        "data: the loader yields other labels in this pass than in the one before; it must give "
        "the same samples in the same order every time"
    )


class Pixels(nn.Module):
    """A label for every pixel: a convolution of one pixel as head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_pixels_are_the_tokens_of_an_image() -> None:
    torch.manual_seed(0)
    model, x = Pixels(), torch.randn(5, 1, 4, 3)
    labels = torch.arange(60).view(5, 4, 3) % 2
    labels[1, 2:] = -100
    found = FeatureCapture(
        model, "head", model.head, make_loader(TensorDataset(x, labels), 2)
    ).run()
    rows = model.body(x).detach().permute(0, 2, 3, 1)
    torch.testing.assert_close(found.features, rows[labels != -100])
    assert torch.equal(found.labels, labels[labels != -100])
    assert found.cu_seqlens.tolist() == [0, 12, 18, 30, 42, 54]


@pytest.mark.parametrize("column", [False, True])
def test_labels_of_tokens_may_stand_in_a_column(column: bool) -> None:
    data = Tokens([3, 1, 2, 3])
    items = [(x, y[:, None] if column else y) for x, y in map(data.__getitem__, range(4))]
    found = capture(net(fc=nn.Linear(3, 2)), items, 2).run()
    assert found.labels.tolist() == [0, 1, 0, 0, 0, 1, 0, 1, 0]
    assert found.cu_seqlens.tolist() == [0, 3, 4, 6, 9]


class Alone(nn.Module):
    """Features that depend on the place in a batch of two, by so much."""

    def __init__(self, by: float, bad: bool = False) -> None:
        super().__init__()
        self.fc, self.by, self.bad, self.sizes = nn.Linear(3, 2), by, bad, []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) == 2 and torch.equal(x[0], x[1]):
            x = x * torch.tensor([[1.0], [1 + self.by]])
        if self.bad:
            x = torch.where(x == x.max(), torch.nan, x)
        return self.fc(x)


@pytest.mark.parametrize(
    ("by", "bad", "sizes"),
    [
        (0.0, False, [4, 2]),
        (0.0, True, [4, 2]),
        (0.015, False, [4, 2]),
        (-0.015, False, [4, 2]),
        (0.03, False, [4, 2, 1]),
        (-0.03, False, [4, 2, 1]),
    ],
)
def test_when_a_last_sample_is_taken_from_a_batch_of_two(
    by: float, bad: bool, sizes: list[int]
) -> None:
    """Where both of its rows are alike, up to a hundredth of a number and of the largest one."""
    torch.manual_seed(0)
    x = torch.rand(5, 3) + 1
    x[4] = torch.tensor([2.0, 2.0, 2.0]) if not bad else torch.tensor([1.0, 2.0, 3.0])
    model = Alone(by, bad)
    data = DataLoader(TensorDataset(x, torch.arange(5) % 2), batch_size=4)
    found = capture(model, data).run()
    assert model.sizes == sizes
    wanted = torch.tensor([1.0, 2.0, torch.nan]) if bad else x[4]
    torch.testing.assert_close(found.features[4], wanted, rtol=0, atol=0, equal_nan=True)
