"""How packed documents are told apart, cut out, and how a model that mixes them is found out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moso_fast.sources.data.packed import alone, find_documents, mixes_documents

IDS = torch.tensor([[3, 5, 2, 4, 9, 1]])
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2]])
LABELS = torch.ones(1, 6).long()
ONES = torch.ones(1, 4).long()


def reads(leak: float = 0.0, dtype: torch.dtype = torch.float64, name: str = "input_ids") -> Any:
    """Make a model whose logits are the tokens, and by ``leak`` their place in the row."""

    def run(kwargs: dict[str, Tensor]) -> Tensor:
        tokens = kwargs[name].double().reshape(*kwargs[name].shape[:2], -1).sum(2)
        places = torch.arange(tokens.shape[1])
        return (tokens * (1 + leak * places))[..., None].to(dtype)

    return run


@pytest.mark.parametrize(
    ("dtype", "leak", "mixed"),
    [
        # The document begins at 2: its tokens 2, 4, 9 are off by 2 leak of the largest.
        (torch.float64, 0.4e-4, False),
        (torch.float64, 0.6e-4, True),
        (torch.float32, 0.6e-4, True),
        (torch.float16, 0.01, False),
        (torch.float16, 0.03, True),
        (torch.bfloat16, 0.01, False),
        (torch.bfloat16, 0.03, True),
    ],
)
def test_a_document_is_that_of_itself_alone_up_to_rounding(
    dtype: torch.dtype, leak: float, mixed: bool
) -> None:
    assert mixes_documents(reads(leak, dtype), {"input_ids": IDS}, LABELS, DOCUMENTS) is mixed


def test_vectors_in_place_of_tokens() -> None:
    vectors = torch.arange(30.0).reshape(1, 6, 5)
    run = reads(name="inputs_embeds")

    def spread(kwargs: dict[str, Tensor]) -> Tensor:
        return run(kwargs) + kwargs["inputs_embeds"].sum()

    for tokens in ({}, {"input_ids": torch.ones(1, 3)}, {"input_ids": None}):
        kwargs = {**tokens, "inputs_embeds": vectors}
        assert mixes_documents(run, kwargs, LABELS, DOCUMENTS) is False
        assert mixes_documents(spread, kwargs, LABELS, DOCUMENTS) is True


def test_only_the_tokens_of_others_are_exchanged() -> None:
    """Within the range of the tokens that are there: 1 to 9 become 9 to 1."""
    seen = []

    def run(kwargs: dict[str, Tensor]) -> Tensor:
        seen.append(kwargs["input_ids"].tolist())
        return kwargs["input_ids"].double()[..., None]

    two = torch.cat([torch.full((1, 6), 7), IDS])
    documents = torch.cat([torch.zeros(1, 6).long(), 1 + DOCUMENTS])
    assert mixes_documents(run, {"input_ids": two}, LABELS.expand(2, 6), documents) is False
    # The second row is the first with two documents; of it the second is looked at.
    assert seen == [two.tolist(), [[3] * 6, [7, 5, 2, 4, 9, 9]], [[2, 4, 9]]]


@pytest.mark.parametrize(
    ("form", "mixed"),
    [
        (lambda logits: logits, False),
        (lambda logits: {"logits": logits}, False),
        (lambda logits: SimpleNamespace(logits=logits), False),
        (lambda logits: {"x": logits}, True),
        (lambda logits: logits[..., 0], True),
        (lambda logits: logits[:, 1:], True),
        (lambda logits: SimpleNamespace(logits=3), True),
    ],
)
def test_logits_where_models_have_them(form: Any, mixed: bool) -> None:
    run = reads()
    found = mixes_documents(lambda k: form(run(k)), {"input_ids": IDS}, LABELS, DOCUMENTS)
    assert found is mixed


def test_logits_of_a_document_alone_must_be_there_too() -> None:
    run = reads()

    def only_whole_rows(kwargs: dict[str, Tensor]) -> Any:
        return run(kwargs) if kwargs["input_ids"].shape[1] == 6 else None

    assert mixes_documents(only_whole_rows, {"input_ids": IDS}, LABELS, DOCUMENTS) is True


def test_neighbours_that_cannot_be_exchanged_show_nothing() -> None:
    """All tokens around are in the middle of the range, and stay what they are."""
    tokens = torch.tensor([[5, 5, 1, 9, 5, 5]])
    assert mixes_documents(reads(), {"input_ids": tokens}, LABELS, DOCUMENTS) is True


def test_cutting_a_document_out() -> None:
    packed = {
        "input_ids": torch.arange(12).view(2, 6),
        "embeds": torch.arange(24).view(2, 6, 2),
        "position_ids": torch.arange(6)[None],
        "other": torch.arange(10).view(2, 5),
        "vector": torch.arange(6),
        "flag": True,
        **{name: 1 for name in ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens", "cu_seq_lens")},
        **{name: 1 for name in ("cu_seq_lens_k", "cu_seqlens_k", "max_length_q", "max_length_k")},
        **{"max_seqlen": 1, "seq_idx": 1},
    }
    documents = torch.tensor([[0, 0, 1, 1, 1, -1], [2, 3, 3, 3, 3, 3]])
    kwargs, labels = alone(packed, packed["input_ids"], documents, 3)
    assert list(kwargs) == ["input_ids", "embeds", "position_ids", "other", "vector", "flag"]
    assert kwargs["input_ids"].tolist() == labels.tolist() == [[7, 8, 9, 10, 11]]
    assert kwargs["embeds"].tolist() == [[[14, 15], [16, 17], [18, 19], [20, 21], [22, 23]]]
    assert kwargs["position_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert kwargs["other"] is packed["other"] and kwargs["vector"] is packed["vector"]
    kwargs, labels = alone(packed, packed["input_ids"], documents, 1)
    assert labels.tolist() == [[2, 3, 4]] and kwargs["position_ids"].tolist() == [[2, 3, 4]]


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens", "cu_seq_lens"])
def test_offsets_by_every_name(name: str) -> None:
    found = find_documents({name: torch.tensor([0, 1, 4], dtype=torch.int32)}, ONES)
    assert found is not None and found.tolist() == [[0, 1, 1, 1]]
    over_rows = find_documents({name: torch.tensor([0, 1, 3, 4])}, torch.ones(2, 2).long())
    # Rows begin documents anew, whatever the offsets say.
    assert over_rows is not None and over_rows.tolist() == [[0, 1], [2, 3]]
    for other in (torch.tensor([0.0, 1.0, 4.0]), torch.tensor([[0, 1, 4]]), [0, 1, 4]):
        assert find_documents({name: other}, ONES) is None


@pytest.mark.parametrize(
    ("entries", "labels", "message"),
    [
        (
            {"cu_seqlens": [0, *range(9, 0, -1)]},
            [[1] * 20],
            "data: cu_seqlens must rise from 0, got [0, 9, 8, 7, 6, 5, 4, 3]",
        ),
        ({"cu_seqlens": [0, 2, 2, 4]}, [[1] * 4], "must rise from 0, got [0, 2, 2, 4]"),
        ({"cu_seqlens": [0]}, [[1] * 4], "data: cu_seqlens must rise from 0, got [0]"),
        (
            {"cu_seq_lens_q": [0, 2]},
            [[1, 1, -100, 1]],
            "data: cu_seq_lens_q ends at 2, but the batch has 4 tokens",
        ),
        (
            {"cu_seqlens": [0, 2, 4], "position_ids": [[0, 1, 2, 0]]},
            [[1] * 4],
            "data: cu_seqlens and position_ids disagree where a document begins",
        ),
    ],
)
def test_what_is_said_of_descriptions_that_do_not_fit(
    entries: Any, labels: Any, message: str
) -> None:
    given = {name: torch.tensor(values) for name, values in entries.items()}
    with pytest.raises(ValueError) as caught:
        find_documents(given, torch.tensor(labels))
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize(
    ("entries", "labels", "flattened", "expected"),
    [
        # Two tokens are the fewest of which two documents could be.
        ({"seq_idx": [[0, 1]]}, [[1, 1]], False, [[0, 1]]),
        ({"seq_idx": [[0]]}, [[1]], False, None),
        # Numbers for one row hold for all, and -1 ends a document.
        ({"seq_idx": [0, 0, 1, 1]}, [[1] * 4] * 2, False, [[0, 0, 1, 1], [2, 2, 3, 3]]),
        ({"seq_idx": [[4, -1, 4, 4]]}, [[1] * 4], False, [[0, -1, 1, 1]]),
        ({"seq_idx": [[0, 1, 1]]}, [[1] * 4], False, None),
        # One document in each of two rows is no packing; two in one row beside an empty row are.
        ({"seq_idx": [[0, 0], [1, 1]]}, [[1, 1]] * 2, False, None),
        ({"seq_idx": [[0, 1], [-1, -1]]}, [[1, 1]] * 2, False, [[0, 1], [-1, -1]]),
        # Positions: documents must begin at the same number, and not all be single tokens.
        ({"position_ids": [[0, 1, 3, 4]]}, [[1] * 4], False, None),
        ({"position_ids": [[5, 5, 5, 5]]}, [[1] * 4], False, None),
        ({"position_ids": [[5, 6, 5, 5]]}, [[1] * 4], False, [[0, 0, 1, 2]]),
        # Single tokens without a label at the ends are padding, in the middle they are documents.
        (
            {"position_ids": [[0, 0, 0, 1, 0, 0, 1, 0]]},
            [[-100, -100, 1, 1, -100, 1, 1, -100]],
            False,
            [[-1, -1, 0, 0, 1, 2, 2, -1]],
        ),
        (
            {"position_ids": [[0, 0, 0, 1, 0]]},
            [[-100, -100, 1, 1, -100]],
            True,
            [[0, 1, 2, 2, 3]],
        ),
        # A mask says what is used, where it has the shape of the labels.
        (
            {"position_ids": [[0, 1, 0, 1, 2]], "attention_mask": [[1, 1, 1, 1, 0]]},
            [[1] * 5],
            False,
            [[0, 0, 1, 1, -1]],
        ),
        (
            {"position_ids": [[0, 1, 0, 1, 2]], "attention_mask": [[1, 1, 1, 1]]},
            [[1] * 5],
            False,
            [[0, 0, 1, 1, 1]],
        ),
        (
            {"position_ids": [[0, 1, 2, 3]], "attention_mask": [[1, 1, 0, 1]]},
            [[1] * 4],
            False,
            None,
        ),
    ],
)
def test_documents_by_numbers_and_positions(
    entries: Any, labels: Any, flattened: bool, expected: Any
) -> None:
    given = {name: torch.tensor(values) for name, values in entries.items()}
    found = find_documents(given, torch.tensor(labels), flattened)
    assert (None if found is None else found.tolist()) == expected
