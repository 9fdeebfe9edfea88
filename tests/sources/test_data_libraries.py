"""Data sets of Hugging Face and models of transformers, whose batches have habits of their own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scorer_cases import paper_score
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moso_fast import MoSoScorer
from moso_fast.tables.table import ScoreTable

hf = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.models

N, LENGTH = 9, 5
GRADIENTS = ["last_layer", "full"]
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 20, (N, LENGTH), generator=GENERATOR)
IDS[:, -1] = 2  # BART's classifier reads the end of the sentence
LABELS = torch.randint(3, (N,), generator=GENERATOR)
TARGETS = torch.randint(3, 20, (N, 4), generator=GENERATOR)
TARGETS[torch.arange(N) % 3 == 1, 2:] = -100
SMALL = {
    "vocab_size": 20,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}


def told(scorer: MoSoScorer, data: Any, **call: Any) -> tuple[ScoreTable, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = scorer.score(data, **call)
    return table, [str(one.message) for one in caught if "data: " in str(one.message)]


def scores(model: nn.Module, head: nn.Module, losses: Any) -> Tensor:
    """Scores of a head by one backward pass a sample, in float64, of the loss that is given."""
    names = {id(p): n for n, p in model.named_parameters()}
    wanted = [names[id(p)] for p in head.parameters()]
    double = copy.deepcopy(model).double().eval()
    parameters = [p for n, p in double.named_parameters() if n in wanted]
    rows = []
    for k in range(N):
        grads = torch.autograd.grad(losses(double, k), parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return paper_score(torch.stack(rows))


def bert() -> tuple[nn.Module, nn.Module, str]:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config)
    return model, model.classifier, "classifier"


def bart() -> tuple[nn.Module, nn.Module, str]:
    torch.manual_seed(0)
    config = transformers.BartConfig(**SMALL, num_labels=3, eos_token_id=2)
    model = transformers.BartForSequenceClassification(config)
    return model, model.classification_head.out_proj, "classification_head.out_proj"


def table_of(**more: list[Any]) -> Any:
    return hf.Dataset.from_dict({"label": LABELS.tolist(), "input_ids": IDS.tolist(), **more})


NUMBERED = {"idx": list(range(100, 100 + N)), "text": ["a"] * N}

FORMS: dict[str, Any] = {
    "no format": lambda d: d,
    "torch": lambda d: d.with_format("torch"),
    "numpy": lambda d: d.with_format("numpy"),
    "some columns": lambda d: d.with_format("torch", columns=["input_ids", "label", "idx"]),
    "loader": lambda d: DataLoader(d, batch_size=4),
    "loader of tensors": lambda d: DataLoader(d.with_format("torch"), batch_size=4),
    "stream": lambda d: d.to_iterable_dataset(num_shards=3),
    "stream of tensors": lambda d: d.to_iterable_dataset(num_shards=3).with_format("torch"),
    "workers": lambda d: DataLoader(d.to_iterable_dataset(3), batch_size=2, num_workers=2),
    "shuffled": lambda d: d.to_iterable_dataset(num_shards=3).shuffle(seed=0, buffer_size=5),
}


@pytest.mark.parametrize("build", [bert, bart])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("form", FORMS)
def test_data_sets_of_hugging_face(form: str, gradient: str, build: Any) -> None:
    model, head, name = build()
    data = FORMS[form](table_of(**NUMBERED))
    scope = {} if gradient == "last_layer" else {"scope": [name]}
    scorer = MoSoScorer(model, gradient=gradient, batch_size=4, progress=False, **scope)
    table, notices = told(scorer, data)
    expected = scores(
        model, head, lambda m, k: m(input_ids=IDS[k : k + 1], labels=LABELS[k : k + 1]).loss
    )
    got = table.scores.double()[table.index.argsort()]
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert table.index.sort().values.tolist() == NUMBERED["idx"]
    assert (table.index.tolist() == NUMBERED["idx"]) == (form not in ("workers", "shuffled"))
    assert len(notices) == (form != "some columns")
    assert all("'text' of a batch left out" in one for one in notices)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: hf.DatasetDict({"train": table_of()}), "DatasetDict of 'train'; give one of them"),
        (lambda: table_of().to_iterable_dataset(3).shuffle(seed=0), "the stream is shuffled"),
        (
            lambda: (
                table_of().to_iterable_dataset(3).shuffle(seed=0).map(dict).with_format("torch")
            ),
            "the stream is shuffled",
        ),
        (
            lambda: hf.Dataset.from_dict(
                {"input_ids": [[5] * (1 + k % 2) for k in range(N)], "label": LABELS.tolist()}
            ),
            "have different shapes and cannot be stacked; pad them",
        ),
        (
            lambda: hf.Dataset.from_dict({"input_ids": IDS.tolist(), "label": ["a", "b", "c"] * 3}),
            r"labels are text \('a'\)",
        ),
    ],
)
def test_data_sets_that_are_refused(data: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MoSoScorer(bert()[0], batch_size=4, progress=False).score(data())


def test_stream_with_workers_and_no_index_is_read_in_order() -> None:
    model = bert()[0]
    scorer = MoSoScorer(model, batch_size=4, progress=False)
    expected = scorer.score(table_of())
    stream = DataLoader(table_of().to_iterable_dataset(3), batch_size=2, num_workers=2)
    table, notices = told(scorer, stream)
    torch.testing.assert_close(table.scores, expected.scores, rtol=1e-5, atol=1e-7)
    assert len(notices) == 1 and "it is read without workers" in notices[0]


def test_padding_by_the_collator() -> None:
    """Ragged rows go through the collator of a loader."""
    model = bert()[0]
    short = [{"input_ids": IDS[k, : 2 + k % 3].tolist(), "label": int(LABELS[k])} for k in range(N)]

    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        size = max(len(s["input_ids"]) for s in samples)
        rows = [s["input_ids"] + [0] * (size - len(s["input_ids"])) for s in samples]
        mask = [[1] * len(s["input_ids"]) + [0] * (size - len(s["input_ids"])) for s in samples]
        return {
            "input_ids": torch.tensor(rows),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor([s["label"] for s in samples]),
        }

    scorer = MoSoScorer(model, batch_size=1, progress=False)
    expected = scorer.score(DataLoader(short, batch_size=1))  # type: ignore[arg-type]
    padded = scorer.score(DataLoader(short, batch_size=4, collate_fn=collate))  # type: ignore[arg-type]
    torch.testing.assert_close(padded.scores, expected.scores, rtol=1e-4, atol=1e-6)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=20,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    model = transformers.T5ForConditionalGeneration(config)
    # A head of its own whatever the configuration makes of it.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


class Wrapped(nn.Module):
    """A module of one's own around a model; takes anything."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, **batch: Any) -> Any:
        return self.inner(**batch)


class Named(Wrapped):
    """Takes what it names."""

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor | None = None) -> Any:  # type: ignore[override]
        return self.inner(input_ids=input_ids, decoder_input_ids=decoder_input_ids)


ENCODER_DECODERS: dict[str, Any] = {
    "t5": t5,
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**SMALL)),
    "mbart": lambda: transformers.MBartForConditionalGeneration(transformers.MBartConfig(**SMALL)),
    "m2m_100": lambda: transformers.M2M100ForConditionalGeneration(
        transformers.M2M100Config(**SMALL, decoder_start_token_id=2)
    ),
}
WRAPPERS: dict[str, Any] = {"itself": lambda m: m, "wrapped": Wrapped, "named": Named}
# M2M100 makes its decoder inputs itself, of labels that the last wrapper does not take.
PAIRS = [(n, w) for n in ENCODER_DECODERS for w in WRAPPERS if (n, w) != ("m2m_100", "named")]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(("name", "wrapper"), PAIRS)
def test_encoder_decoders_get_their_decoder_inputs(name: str, wrapper: str, gradient: str) -> None:
    torch.manual_seed(0)
    inner = ENCODER_DECODERS[name]()
    with torch.no_grad():
        for p in inner.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)

    def own_loss(model: Any, k: int) -> Tensor:
        return model(input_ids=IDS[k : k + 1], labels=TARGETS[k : k + 1]).loss

    expected = scores(inner, inner.get_output_embeddings(), own_loss)
    scope = {} if gradient == "last_layer" else {"scope": ["*lm_head.weight"]}
    for labels in (TARGETS, TARGETS.to(torch.int16)):
        data = [{"input_ids": x, "labels": y} for x, y in zip(IDS, labels, strict=True)]
        model = WRAPPERS[wrapper](inner)
        scorer = MoSoScorer(model, gradient=gradient, batch_size=4, progress=False, **scope)
        got, notices = told(scorer, data)
        assert (got.scores.double() - expected).abs().max() < 1e-5 * expected.abs().max()
        assert notices == []


def test_decoder_inputs_that_are_given_are_left_alone() -> None:
    torch.manual_seed(0)
    model = ENCODER_DECODERS["bart"]()
    given = TARGETS.clamp_min(1).flip(1)
    data = [
        {"input_ids": x, "labels": y, "decoder_input_ids": d}
        for x, y, d in zip(IDS, TARGETS, given, strict=True)
    ]

    def own_loss(double: Any, k: int) -> Tensor:
        logits = double(input_ids=IDS[k : k + 1], decoder_input_ids=given[k : k + 1]).logits[0]
        return F.cross_entropy(logits, TARGETS[k], ignore_index=-100)

    expected = scores(model, model.get_output_embeddings(), own_loss)
    got = MoSoScorer(model, batch_size=4, progress=False).score(data).scores.double()
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


LENGTHS = (5, 3, 7, 2, 1, 6, 4, 9, 3)


def decoder(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=64
        )
        config.tie_word_embeddings = False
        return transformers.GPT2LMHeadModel(config)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=30, **sizes, **heads, max_position_embeddings=64, tie_word_embeddings=False
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
    ],
    ids=["positions", "offsets", "numbers", "offsets alone"],
)
def test_flattened_batches(options: dict[str, bool], name: str, gradient: str) -> None:
    model = decoder(name)
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(1, 30, (n,), generator=generator).tolist() for n in LENGTHS]

    def own_loss(double: Any, k: int) -> Tensor:
        ids = torch.tensor([texts[k]])
        if len(texts[k]) == 1:  # nothing to predict
            return 0 * double.get_output_embeddings().weight.sum()
        return double(input_ids=ids, labels=ids).loss

    rows = torch.tensor([n > 1 for n in LENGTHS])
    double = copy.deepcopy(model).double().eval()
    weight = double.get_output_embeddings().weight
    gradients = torch.stack(
        [torch.autograd.grad(own_loss(double, k), weight)[0].flatten() for k in range(len(texts))]
    )
    expected = paper_score(gradients[rows])
    collate = transformers.DataCollatorWithFlattening(**options)
    loader = DataLoader([{"input_ids": t} for t in texts], batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    scope = {} if gradient == "last_layer" else {"scope": ["lm_head"]}
    scorer = MoSoScorer(model, gradient=gradient, progress=False, shift_labels=True, **scope)
    got = scorer.score(loader).scores.double()
    assert torch.equal(got.isnan(), ~rows)
    assert (got[rows] - expected).abs().max() < 1e-5 * expected.abs().max()
