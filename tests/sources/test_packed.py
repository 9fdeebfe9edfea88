"""Several documents in a row of tokens: each is a sample, scored as if it stood alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from moso_fast import MoSoScorer
from moso_fast.sources.data.packed import alone, find_documents, mixes_documents
from moso_fast.tables.table import ScoreTable

VOCABULARY, WIDTH = 30, 8
LENGTHS = (5, 3, 7, 2, 1, 6, 4, 9, 1, 3, 8)
PACKS = ([0, 1], [2, 3, 4], [5, 6], [7, 8], [9, 10])
GRADIENTS = ["last_layer", "full"]


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


class Model(nn.Module):
    """Each token sees the mean of what comes before it; counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(64, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.forwards = 0

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def logits(self, input_ids: Tensor, positions: Tensor, seen: Tensor) -> dict[str, Tensor]:
        self.forwards += 1
        hidden = self.embed(input_ids) + self.place(positions)
        weights = seen / seen.sum(-1, keepdim=True)
        return {"logits": self.lm_head(torch.tanh(weights @ hidden))}


def causal(length: int) -> Tensor:
    return torch.ones(length, length).tril()


class KeepsApart(Model):
    """Tells documents by their positions, as attention with block masks does."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> dict[str, Tensor]:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        begins = torch.ones_like(position_ids)
        begins[:, 1:] = (position_ids.diff() != 1).long()
        number = begins.cumsum(1)
        same = (number[:, :, None] == number[:, None]).float()
        return self.logits(input_ids, position_ids, same * causal(input_ids.shape[1]))


class SeesAll(Model):
    """Attends over the whole row, whatever the positions say."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> dict[str, Tensor]:
        places = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        if position_ids is not None:
            places = position_ids
        return self.logits(
            input_ids, places, causal(input_ids.shape[1]).expand(len(places), -1, -1)
        )


class CountsThrough(KeepsApart):
    """Keeps documents apart, but counts positions through the whole row."""

    def logits(self, input_ids: Tensor, positions: Tensor, seen: Tensor) -> dict[str, Tensor]:
        places = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        return super().logits(input_ids, places, seen)


MODELS = [KeepsApart, SeesAll, CountsThrough]


def score(model: nn.Module, data: Any, gradient: str = "last_layer", **call: Any) -> ScoreTable:
    options: dict[str, Any] = {"shift_labels": True, "progress": False, "batch_size": 4}
    if gradient == "full":
        options |= {"gradient": "full", "scope": ["lm_head"]}
    return MoSoScorer(model, **options).score(data, **call)


def one_by_one() -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.tensor(d), "labels": torch.tensor(d)} for d in documents()]


def lone(model: nn.Module) -> Tensor:
    """Scores of documents that the model sees one at a time; NaN where there is but one token."""
    several = [d for d in one_by_one() if len(d["labels"]) > 1]
    found = score(model, DataLoader(several, batch_size=1)).scores
    result = torch.full((len(LENGTHS),), torch.nan)
    result[torch.tensor([n > 1 for n in LENGTHS])] = found
    return result


def flattened(*keys: str, start: int = 0) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:
    """Make a collate_fn that lays a batch into one row, as DataCollatorWithFlattening does."""

    def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = [s["input_ids"] for s in samples]
        sizes = torch.tensor([len(one) for one in ids])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).int()
        labels = [torch.cat([torch.tensor([-100]), s["labels"][1:]]) for s in samples]
        numbers = torch.arange(len(ids)).repeat_interleave(sizes)[None]
        entries = {
            "position_ids": torch.cat([start + torch.arange(len(one)) for one in ids])[None],
            "seq_idx": numbers.int(),
            "cu_seq_lens_q": offsets,
            "cu_seqlens": offsets.long(),
            "max_length_q": int(sizes.max()),
        }
        chosen = {key: entries[key] for key in keys}
        return {"input_ids": torch.cat(ids)[None], "labels": torch.cat(labels)[None], **chosen}

    return collate


def rows(padded_position: int = 0, mask: bool = False) -> list[dict[str, Tensor]]:
    """Rows of fixed length with two or three documents each."""
    texts, result = documents(), []
    for pack in PACKS:
        ids = [token for k in pack for token in texts[k]]
        places = [place for k in pack for place in range(len(texts[k]))]
        rest = 14 - len(ids)
        row = {
            "input_ids": ids + [0] * rest,
            "labels": ids + [-100] * rest,
            "position_ids": places + [padded_position] * rest,
        }
        if mask:
            row["attention_mask"] = [1] * len(ids) + [0] * rest
        result.append({name: torch.tensor(values) for name, values in row.items()})
    return result


class Rows(Dataset):
    """A data set that does not show what its rows hold before they are read."""

    def __init__(self, held: list[dict[str, Tensor]]) -> None:
        self.held = held

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.held[index]


def flat_loader(*keys: str, **options: int) -> DataLoader:
    return DataLoader(one_by_one(), batch_size=4, collate_fn=flattened(*keys, **options))  # type: ignore[arg-type]


FORMS: dict[str, Callable[[], Any]] = {
    "positions": lambda: flat_loader("position_ids"),
    "offsets beside them": lambda: flat_loader("position_ids", "cu_seq_lens_q", "max_length_q"),
    "numbers beside them": lambda: flat_loader("position_ids", "seq_idx"),
    "offsets alone": lambda: flat_loader("cu_seqlens"),
    "numbers alone": lambda: flat_loader("seq_idx"),
    "all": lambda: flat_loader("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seqlens"),
    "rows": rows,
    "rows, other padding": lambda: rows(padded_position=1),
    "rows with a mask": lambda: rows(mask=True),
    "rows of a loader": lambda: DataLoader(rows(), batch_size=2),
    "one row a batch": lambda: DataLoader(rows(), batch_size=1),
    "rows of a data set": lambda: Rows(rows()),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:data. .* left out")
def test_packed_documents_are_scored_as_if_alone(
    form: str, kind: type[Model], gradient: str
) -> None:
    table = score(kind(), FORMS[form](), gradient)
    assert table.index.tolist() == list(range(len(LENGTHS)))
    torch.testing.assert_close(table.scores, lone(kind()), rtol=1e-4, atol=1e-6, equal_nan=True)
    assert table.scores.isnan().tolist() == [n == 1 for n in LENGTHS]


def test_positions_that_do_not_begin_at_nought() -> None:
    """Models like RoBERTa count from 2."""
    table = score(KeepsApart(), flat_loader("position_ids", start=2))
    shifted = [{**d, "position_ids": 2 + torch.arange(len(d["labels"]))} for d in one_by_one()]
    several = DataLoader([d for d in shifted if len(d["labels"]) > 1], batch_size=1)
    expected = score(KeepsApart(), several).scores
    torch.testing.assert_close(table.scores[~table.scores.isnan()], expected, rtol=1e-4, atol=1e-6)


def test_documents_stay_together_where_the_model_keeps_them_apart() -> None:
    """Three batches, and a few trials at the first; the others are run one document at a time."""
    model = KeepsApart()
    score(model, flat_loader("position_ids"))
    assert model.forwards <= 3 + 6
    for kind in (SeesAll, CountsThrough):
        model = kind()
        score(model, flat_loader("position_ids"))
        assert model.forwards >= len(LENGTHS)


@pytest.mark.parametrize("leak", [0.0, 1e-6])
def test_a_neighbour_may_not_change_a_bit(leak: float) -> None:
    """Less than rounding explains would do as well, if the tokens around did not show it."""
    packed = {"input_ids": torch.tensor([[3, 5, 2, 4, 9, 1]])}
    documents = torch.tensor([[0, 0, 1, 1, 1, 2]])

    def run(kwargs: dict[str, Tensor]) -> Tensor:
        ids = kwargs["input_ids"].double()
        return (ids + leak * ids.mean(1, keepdim=True))[..., None]

    labels = torch.ones(1, 6).long()
    assert mixes_documents(run, packed, labels, documents) == (leak > 0)
    assert mixes_documents(run, {"input_ids": torch.ones(1, 6)}, labels, documents), (
        "nothing to see"
    )
    assert mixes_documents(run, {"x": packed["input_ids"]}, labels, documents), "no tokens"
    assert mixes_documents(lambda kwargs: 1, packed, labels, documents), "no logits"


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("given", ["ids", 2])
def test_partition_of_documents(given: Any, gradient: str) -> None:
    ids = torch.arange(len(LENGTHS)) % 2 if given == "ids" else given
    packed = score(KeepsApart(), rows(), gradient, partition=ids)
    flat = score(KeepsApart(), flat_loader("position_ids"), gradient, partition=ids)
    torch.testing.assert_close(packed.scores, flat.scores, rtol=1e-4, atol=1e-6, equal_nan=True)
    message = "a row holds several documents" if given == 2 else "shape \\(5,\\), got \\(11,\\)"
    with pytest.raises(ValueError, match=message):
        score(KeepsApart(), Rows(rows()), gradient, partition=ids)


def entry(positions: list[list[int]], labels: list[list[int]], mask: Any = None) -> Any:
    entries = {"position_ids": torch.tensor(positions)}
    if mask is not None:
        entries["attention_mask"] = torch.tensor(mask)
    return entries, torch.tensor(labels)


# Rows that hold one sample each, though their positions do not only count up.
@pytest.mark.parametrize(
    ("entries", "labels"),
    [
        entry([[0, 1, 2, 3], [0, 1, 2, 3]], [[1, 2, 3, 4], [1, 2, 3, 4]]),
        entry([[0, 1, 0, 0], [0, 1, 2, 3]], [[1, 2, -100, -100], [1, 2, 3, 4]]),
        entry([[0, 1, 1, 1], [0, 1, 2, 3]], [[1, 2, -100, -100], [1, 2, 3, 4]]),
        entry([[0, 0, 0, 1], [0, 1, 2, 3]], [[-100, -100, 3, 4], [1, 2, 3, 4]]),
        entry([[1, 1, 0, 1], [0, 1, 2, 3]], [[-100, -100, 3, 4], [1, 2, 3, 4]]),
        entry([[0, 0, 0, 1]], [[7, 7, 3, 4]], [[0, 0, 1, 1]]),
        entry([[0, 0, 0, 0], [0, 0, 0, 0]], [[1, 2, 3, 4], [1, 2, 3, 4]]),
        entry([[0, 0, 1, 1], [0, 1, 1, 2]], [[1, 2, 3, 4], [1, 2, 3, 4]]),
        entry([[5, 3, 1, 0], [2, 2, 2, 2]], [[1, 2, 3, 4], [1, 2, 3, 4]]),
        ({"position_ids": torch.zeros(3, 2, 4).long()}, torch.zeros(2, 4).long()),
        ({"position_ids": torch.tensor([0, 1, 0, 1])}, torch.tensor([0, 1, 1, 0])),
        ({"position_ids": torch.tensor([[0.0, 1.0, 0.0, 1.0]])}, torch.zeros(1, 4).long()),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, torch.rand(1, 4)),
        ({"cu_seqlens": torch.tensor([0, 4])}, torch.zeros(1, 4).long()),
        ({"input_ids": torch.zeros(1, 4).long()}, torch.zeros(1, 4).long()),
    ],
)
def test_rows_that_are_not_packed(entries: dict, labels: Tensor) -> None:
    assert find_documents(entries, labels) is None


@pytest.mark.parametrize(
    ("entries", "labels", "expected", "options"),
    [
        (*entry([[0, 1, 0, 1]], [[1, 2, 3, 4]]), [[0, 0, 1, 1]], {}),
        (*entry([[2, 3, 2, 3]], [[1, 2, 3, 4]]), [[0, 0, 1, 1]], {}),
        (*entry([[0, 1, 0, 1, 0]], [[1, 2, 3, 4, -100]]), [[0, 0, 1, 1, -1]], {}),
        (*entry([[0, 1, 0, 1, 0]], [[1, 2, 3, 4, -100]]), [[0, 0, 1, 1, 2]], {"flattened": True}),
        (*entry([[0, 1, 0, 1, 0]], [[1, 2, 3, 4, -5]]), [[0, 0, 1, 1, -1]], {"ignore_index": -5}),
        (*entry([[0, 1, 0, 1]] * 2, [[1, 2, 3, 4]] * 2), [[0, 0, 1, 1], [2, 2, 3, 3]], {}),
        (*entry([[0, 1, 0, 1, 9]], [[1, 2, 3, 4, 5]], [[1, 1, 1, 1, 0]]), [[0, 0, 1, 1, -1]], {}),
        ({"seq_idx": torch.tensor([[0, 0, 1, -1]])}, torch.zeros(1, 4).long(), [[0, 0, 1, -1]], {}),
        (
            {"cu_seqlens": torch.tensor([0, 1, 3])},
            torch.tensor([[1, 2, 3, -100]]),
            [[0, 1, 1, -1]],
            {},
        ),
    ],
)
def test_rows_that_are_packed(entries: dict, labels: Tensor, expected: list, options: dict) -> None:
    found = find_documents(entries, labels, **options)
    assert found is not None and found.tolist() == expected


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"cu_seqlens": [0, 2, 9]}, "cu_seqlens ends at 9, but the batch has 4 tokens"),
        ({"cu_seqlens": [0, 3]}, "cu_seqlens ends at 3, but the batch has 4 tokens"),
        ({"cu_seqlens": [0, 3, 2, 4]}, "cu_seqlens must rise from 0, got"),
        ({"cu_seq_lens_q": [1, 2, 4]}, "cu_seq_lens_q must rise from 0, got"),
        (
            {"cu_seqlens": [0, 2, 4], "seq_idx": [[0, 1, 1, 1]]},
            "cu_seqlens and seq_idx disagree where a document begins",
        ),
        (
            {"seq_idx": [[0, 1, 1, 1]], "position_ids": [[0, 1, 0, 1]]},
            "position_ids and seq_idx disagree where a document begins",
        ),
    ],
)
def test_descriptions_that_do_not_fit(entries: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_documents({k: torch.tensor(v) for k, v in entries.items()}, torch.ones(1, 4).long())


def test_one_document_alone() -> None:
    packed = {
        "input_ids": torch.arange(8).view(2, 4),
        "position_ids": torch.tensor([[0, 1, 0, 1]]),
        "cu_seqlens": torch.tensor([0, 2, 4, 6, 8]),
        "seq_idx": torch.zeros(2, 4),
        "scale": 2.0,
    }
    found = torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]])
    kwargs, labels = alone(packed, torch.arange(8).view(2, 4), found, 3)
    assert kwargs.keys() == {"input_ids", "position_ids", "scale"}
    assert kwargs["input_ids"].tolist() == labels.tolist() == [[6, 7]]
    assert kwargs["position_ids"].tolist() == [[0, 1]]


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_flattening_by_a_batch_sampler(gradient: str) -> None:
    """Its batches are of several samples, whatever ``batch_size`` of the loader says."""
    numbers = list(range(len(LENGTHS)))
    for batches in (BatchSampler(SequentialSampler(numbers), 4, False), [numbers[:3], numbers[3:]]):
        loader = DataLoader(
            one_by_one(),  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=flattened("position_ids"),
        )
        call = {"partition": torch.arange(len(LENGTHS)) % 2, "index": [n + 7 for n in numbers]}
        table = score(KeepsApart(), loader, gradient, **call)
        expected = score(KeepsApart(), flat_loader("position_ids"), gradient, **call)
        torch.testing.assert_close(
            table.scores, expected.scores, rtol=1e-4, atol=1e-6, equal_nan=True
        )
        assert table.index.tolist() == call["index"]
