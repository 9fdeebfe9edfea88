"""The batches of a loader as the model is called with them, by hand: index, documents, hints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from moso_fast.sources.data.batches import SampleBatches
from moso_fast.sources.data.loaders import make_loader

X = torch.arange(12.0).reshape(6, 2)
Y = torch.arange(6) % 3


class Held(Dataset):
    """A data set that does not show its columns before it is read."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Takes(nn.Module):
    """Takes x, and idx too."""

    def forward(self, x: Tensor, idx: Any = None) -> Tensor:
        return x


class Plain(nn.Module):
    def forward(self, x: Tensor, position_ids: Any = None) -> Tensor:
        return x


def error_of(call: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments, **named)
    return str(caught.value)


def dicts(**columns: Any) -> list[dict[str, Any]]:
    return [
        {"x": X[k], "label": int(Y[k]), **{n: v[k] for n, v in columns.items()}} for k in range(6)
    ]


def test_an_index_of_a_dict_batch_is_taken_out_unless_the_model_takes_it() -> None:
    for name in ("idx", "index"):
        data = SampleBatches(make_loader(dicts(**{name: [9, 4, 2, 7, 1, 0]}), 3), Plain())
        batches = list(data)
        assert [batch.kwargs.keys() for batch in batches] == [{"x"}, {"x"}]
        assert data.index is not None and data.index.tolist() == [9, 4, 2, 7, 1, 0]
        assert data.indexed and data.rows == 6
    both = SampleBatches(make_loader(dicts(idx=range(6), index=range(6, 12)), 3), Takes())
    first = next(iter(both))
    assert first.kwargs["idx"].tolist() == [0, 1, 2]
    assert first.index is not None and first.index.tolist() == [6, 7, 8]
    none = SampleBatches(make_loader(dicts(idx=torch.rand(6)), 3), Takes())
    assert next(iter(none)).index is None and not none.indexed
    words = SampleBatches(make_loader(dicts(idx=list("abcdef")), 3), Takes(), columns=["x"])
    assert next(iter(words)).index is None, "text is no index"


def test_an_index_for_several_rows_of_each_sample() -> None:
    data = SampleBatches(DataLoader(TensorDataset(X, Y)), Plain())
    index = torch.tensor([5, 5, 3, 3])
    for batch in ((X[:4], Y[:4], index), {"x": X[:4], "label": Y[:4], "idx": index},
                  (index, ({"x": X[:4]}, Y[:4]))):  # fmt: skip
        found = data.split(batch, views=2)
        assert found.index is not None and found.index.tolist() == [5, 3]


def test_the_index_is_read_once() -> None:
    read = []

    class Counted(Held):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return super().__getitem__(index)

    data = SampleBatches(make_loader(Counted(dicts(idx=range(6))), 3), Plain())
    assert data.read_index() is None and not read, "none was seen to be there"
    data.split(next(iter(data.loader)))
    found = data.read_index()
    assert found is not None and found.tolist() == list(range(6)) and len(read) == 3 + 6
    assert data.read_index() is found and len(read) == 3 + 6


def test_more_inputs_than_the_forward_takes() -> None:
    data = SampleBatches(DataLoader(TensorDataset(X, Y)), nn.Linear(2, 3))
    assert error_of(data.split, ((X, X), Y)) == (
        "data: a batch ((a, b), label) calls the model with 2 inputs, and forward of Linear takes "
        "1; a sample with its index is (input, label, index)"
    )
    assert len(SampleBatches(data.loader, Takes()).split(((X, X), Y)).args) == 2
    own = SampleBatches(DataLoader([(X[0], 1)], collate_fn=lambda batch: batch), nn.Linear(2, 3))
    assert "calls the model with 2 inputs" in error_of(own.split, ([X[:, 0], X[:, 1]], Y))


def packed() -> dict[str, Tensor]:
    """Two documents, 0 1 and 2 3 4, and a third in the second row."""
    return {
        "x": torch.tensor([[3, 1, 2, 4, 5], [6, 7, 8, 9, 1]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]),
        "labels": torch.ones(2, 5).long(),
        "idx": torch.tensor([8, 3, 5]),
    }


def test_documents_are_taken_out_one_by_one() -> None:
    data = SampleBatches(DataLoader(Held([1, 2])), Plain())
    batch = data.split(packed())
    assert batch.samples == 3 and batch.index is not None
    pieces = data.apart(batch)
    assert data.packed and [piece.index.tolist() for piece in pieces] == [[8], [3], [5]]
    assert [piece.kwargs["x"].tolist() for piece in pieces] == [
        [[3, 1]],
        [[2, 4, 5]],
        [[6, 7, 8, 9, 1]],
    ]
    assert [piece.labels.shape for piece in pieces] == [(1, 2), (1, 3), (1, 5)]
    for piece in pieces:
        assert piece.documents is not None and not piece.documents.any() and piece.samples == 1
        assert piece.documents.shape == piece.labels.shape
        assert piece.documents.device == torch.device("cpu")
    without = packed()
    del without["idx"]
    assert all(piece.index is None for piece in data.apart(data.split(without)))
    plain = data.split((X, Y))
    assert data.apart(plain) == [plain]


def test_documents_stay_together_where_the_model_keeps_them_apart() -> None:
    ran = []

    def run(kwargs: dict[str, Tensor], leak: float = 0.0) -> Tensor:
        ran.append(1)
        tokens = kwargs["x"].double() if "x" in kwargs else kwargs["input_ids"].double()
        return (tokens + leak * tokens.sum(1, keepdim=True))[..., None]

    given = {**packed(), "input_ids": packed()["x"]}
    for leak, together in ((0.0, True), (1.0, False)):
        data = SampleBatches(DataLoader(Held([1, 2])), None)
        data.run = lambda kwargs, leak=leak: run(kwargs, leak)  # type: ignore[misc]
        batch = data.split(given)
        found = data.apart(batch)
        assert (found == [batch]) is together and len(found) == (1 if together else 3)
        before = len(ran)
        assert len(data.apart(batch)) == len(found) and len(ran) == before, "tried once"


def test_documents_beside_a_partition_by_the_rows() -> None:
    data = SampleBatches(DataLoader(Held([1, 2]), batch_size=1), Plain())
    data.by_row = True
    assert error_of(data.apart, data.split(packed())) == (
        "data: a row holds several documents, each of which is a sample, and partition= or index= "
        "was taken to go by the rows; give the rows as a list of dicts or as a Hugging Face data "
        "set, which show it beforehand"
    )
    # Where the loader lays a batch into one row, its samples are the documents.
    flat = SampleBatches(DataLoader(Held([1, 2, 3]), batch_size=3), Plain())
    flat.by_row = True
    row = {name: values[:1] for name, values in packed().items()}
    assert len(flat.apart(flat.split({**row, "idx": torch.tensor([4, 2])}))) == 2


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x", "position_ids"], True),
        (["cu_seqlens"], True),
        (["seq_idx", "labels"], True),
        (["x", "labels"], False),
        ([], False),
    ],
)
def test_rows_that_may_be_packed_show_it_by_their_columns(names: list, expected: bool) -> None:
    data = Held([1, 2])
    data.column_names = names  # type: ignore[attr-defined]
    assert SampleBatches(DataLoader(data)).may_be_packed() is expected


def test_a_loader_that_comes_in_another_order() -> None:
    class Turned(IterableDataset):
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            order = range(6) if self.passes == 1 else range(5, -1, -1)
            return iter([(X[k], Y[k], k) for k in order])

    data = SampleBatches(make_loader(Turned(), 3))
    list(data)
    assert error_of(list, data) == (
        "data: the loader yields the samples in another order (by their index) than in the pass "
        "before; it must give the same order every time"
    )

    class Without(Turned):
        def __iter__(self) -> Iterator[Any]:
            return ((x, y) for x, y, _ in super().__iter__())

    assert error_of(list, SampleBatches(make_loader(Without(), 3))) == (
        "data: the stream begins with other samples when it is read again, so that no sample keeps "
        "its number; turn its shuffling off, or let each sample bring its index: (input, label, "
        "index), or a column 'idx'"
    )


class Shuffler(IterableDataset):
    def __init__(self, *held: Any) -> None:
        self.held = held

    def __iter__(self) -> Iterator[Any]:
        return iter(self.held)


def test_a_stream_that_is_shuffled_needs_an_index() -> None:
    assert error_of(SampleBatches, DataLoader(Shuffler((X[0], 1)))) == (
        "data: the stream is shuffled (Shuffler), so that no sample keeps its number; score it "
        "before it is shuffled, or let each sample bring its index: (input, label, index), or a "
        "column 'idx'"
    )
    for stream in (Shuffler((X[0], 1, 7)), Shuffler({"x": X[0], "label": 1, "idx": 7}), Shuffler()):
        assert not SampleBatches(DataLoader(stream), Plain()).packed


def test_what_fails_in_the_forward_pass_says_how_to_mend_the_data() -> None:
    data = SampleBatches(DataLoader(TensorDataset(X, Y)))
    several, single = data.split((X, Y)), data.split((X[:1], Y[:1]))

    def fails(batch: Any, error: Exception) -> None:
        with data.forward_of(batch):
            raise error

    assert error_of(fails, single, IndexError("Dimension out of range\nand more")) == (
        "model: the forward lost a dimension in a batch of one sample (a .squeeze() without a "
        "dimension does that); choose a batch size that leaves no single sample, or give the data "
        "set itself instead of a loader (IndexError: Dimension out of range)"
    )
    with pytest.raises(RuntimeError, match=r"^other$"):
        fails(single, RuntimeError("other"))
    with data.forward_of(single):
        pass
    assert not data.was_larger
    with data.forward_of(several):
        pass
    assert data.was_larger
    said = error_of(fails, single, TypeError("other"))
    assert said.startswith("model: the forward failed in a batch of one sample, and not in larger")
    with pytest.raises(KeyError):
        fails(single, KeyError("other"))
