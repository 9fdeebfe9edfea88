"""Whole-network scores of batches that are cut with care: flat inputs, and batches of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from full_bags import CLOSE, WORDS, Bags, N, Texts, collate, one_by_one
from full_cases import CLASSES, data, gradients, scores
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from moso_fast.scorer import MoSoScorer
from moso_fast.scoring.partition import partition_ids


@pytest.mark.quick(3)
@pytest.mark.parametrize("kind", ["offsets", "dict", "ends", "lengths", "weights"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_with_offsets(kind: str, mode: str) -> None:
    mode = "sum" if kind == "weights" else mode
    torch.manual_seed(0)
    model = Bags(kind, mode=mode, sparse=mode != "max", padding_idx=2).double()
    texts = Texts()
    g = one_by_one(model, texts, kind)
    ids = partition_ids(N, 2, 0)
    for size, options in ((4, {}), (1, {}), (5, {"chunk_size": 2}), (6, {"partition": 2})):
        loader = DataLoader(texts, batch_size=size, collate_fn=collate(kind))
        partition = options.pop("partition", None)
        scorer = MoSoScorer(model, gradient="full", progress=False, **options)
        table = scorer.score(loader, partition=partition)
        parts = (
            [torch.arange(N)] if partition is None else [(ids == k).nonzero()[:, 0] for k in (0, 1)]
        )
        for part in parts:
            torch.testing.assert_close(table.scores[part], scores(g[part], "moso"), **CLOSE)
        torch.testing.assert_close(table.metrics["grad_sqnorm"], g.square().sum(1), **CLOSE)
        assert table.provenance["alignment"] == "forward mode"
        assert table.provenance["norms_explicit"] == []


def test_as_many_words_as_samples_in_a_batch() -> None:
    """By their number alone the words could be one a sample."""
    torch.manual_seed(0)
    model, texts = Bags("offsets").double(), Texts(1, 1)
    g = one_by_one(model, texts, "offsets")
    loader = DataLoader(texts, batch_size=5, collate_fn=collate("offsets"))
    table = MoSoScorer(model, gradient="full", progress=False).score(loader)
    torch.testing.assert_close(table.scores, scores(g, "moso"), **CLOSE)


def test_one_word_a_sample_in_bags_that_the_model_makes() -> None:
    """These are rows like any other, and no offsets are among the inputs."""

    class Single(Bags):
        def forward(self, words: Tensor, shift: Tensor) -> Tensor:
            return self.fc(self.embed(words, torch.arange(len(words))) + shift[:, None])

    torch.manual_seed(0)
    model, labels = Single("offsets").double(), torch.arange(N) % CLASSES
    words, shift = torch.randint(WORDS, (N,)), torch.randn(N).double()
    rows = []
    for k in range(N):
        loss = F.cross_entropy(model(words[k : k + 1], shift[k : k + 1]), labels[k : k + 1])
        found = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    items = [((words[k], shift[k]), int(labels[k])) for k in range(N)]
    scorer = MoSoScorer(model, gradient="full", batch_size=5, progress=False)
    torch.testing.assert_close(scorer.score(items).scores, scores(torch.stack(rows), "moso"))


def test_flat_inputs_of_a_layer_without_a_rule() -> None:
    """Its gradients cannot come from vmap, since the samples have different sizes."""

    class Sloped(Bags):
        def __init__(self) -> None:
            super().__init__("offsets")
            self.slope = nn.PReLU(6)

        def forward(self, words: Tensor, bounds: Tensor, weights: Tensor | None = None) -> Tensor:
            return self.fc(self.slope(self.embed(words, bounds)))

    torch.manual_seed(0)
    model, texts = Sloped().double(), Texts()
    g = one_by_one(model, texts, "offsets")
    loader = DataLoader(texts, batch_size=5, collate_fn=collate("offsets"))
    table = MoSoScorer(model, gradient="full", progress=False).score(loader)
    torch.testing.assert_close(table.scores, scores(g, "moso"), **CLOSE)
    assert table.provenance["norms_explicit_by"].startswith("one by one (no vmap: the samples")


def test_bags_that_cannot_be_told_apart() -> None:
    class Halves(Bags):
        def forward(self, words: Tensor, bounds: Tensor, weights: Tensor | None = None) -> Tensor:
            twice = torch.stack([bounds, bounds], 1).flatten()
            return self.fc(self.embed(words, twice).view(len(bounds), 2, 6).sum(1))

    class Others(Bags):
        def forward(self, words: Tensor, bounds: Tensor, weights: Tensor | None = None) -> Tensor:
            return self.fc(self.embed(words, (bounds + 1).clamp_max(len(words)) * (bounds > 0)))

    for kind, message in ((Halves, "makes 10 bags of an input for 5"), (Others, "neither offsets")):
        model = kind("offsets").double()
        loader = DataLoader(Texts(8, 3), batch_size=5, collate_fn=collate("offsets"))
        with pytest.raises(ValueError, match=f"{message}.*give the bags' offsets beside"):
            MoSoScorer(model, gradient="full", progress=False).score(loader)


@pytest.mark.parametrize("order", [[2, 1, 0], [0, 2, 1]])
def test_offsets_that_do_not_fit(order: list[int]) -> None:
    def wrong(items: list[tuple[Tensor, int]]) -> Any:
        (words, starts), labels = collate("offsets")(items)
        return (words, starts[order] if len(items) < 5 else starts), labels

    model, loader = Bags("offsets").double(), DataLoader(Texts(8, 3), 5, collate_fn=wrong)
    with pytest.raises(ValueError, match=r"data: offsets of 3 entries do not divide \d+ values"):
        MoSoScorer(model, gradient="full", progress=False, chunk_size=2).score(loader)


class Squeezes(nn.Module):
    """A bare ``.squeeze()``, which takes the samples away from a batch of one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.mix, self.one = nn.Conv2d(3, 6, 3), nn.Linear(6, 6), nn.Linear(6, 1)
        self.slope, self.fc, self.kind = nn.PReLU(6), nn.Linear(6, CLASSES), kind

    def forward(self, x: Tensor) -> Tensor:
        h = F.adaptive_avg_pool2d(self.conv(x).tanh(), 1)
        if self.kind == "features":
            return self.fc(self.slope(h.squeeze()))
        h = h.flatten(1)
        if self.kind == "logits":
            return self.fc(h).squeeze()
        tokens = torch.stack([h, h.sin(), h.cos(), h**2, h**3, h.tanh()], 1)
        if self.kind == "weights":
            weights = self.one(tokens).squeeze().softmax(1)
            return self.fc((weights[:, :, None] * tokens).sum(1))
        # The mean over the features instead of the tokens, without an error.
        return self.fc(self.mix(tokens.squeeze()).tanh().mean(1).view(-1, 6))


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["features", "logits", "weights", "silent"])
def test_models_that_fail_in_a_batch_of_one(kind: str) -> None:
    torch.manual_seed(0)
    model, (inputs, labels) = Squeezes(kind).double(), data("cnn", 16)
    labels[6:9] = -100  # one sample of a batch is left
    kept = labels >= 0
    g = gradients(model, inputs[kept], labels[kept], copies=2)
    # A model that never sees more than one sample is what it is in a batch of one.
    ways: list[dict[str, Any]] = [{"batch_size": 5}, {"batch_size": 3}]
    ways += [] if kind == "silent" else [{"batch_size": 1}, {"batch_size": 5, "chunk_size": 1}]
    for options in ways:
        scorer = MoSoScorer(model, gradient="full", progress=False, **options)
        table = scorer.score(TensorDataset(inputs, labels))
        torch.testing.assert_close(table.scores[kept], scores(g, "moso"), **CLOSE)
        found = table.metrics["grad_sqnorm"][kept]
        torch.testing.assert_close(found, g.square().sum(1), **CLOSE)
        assert "in a batch of one" in table.provenance["rows_in_pairs"]


def test_another_loss_in_a_batch_of_one_than_among_others() -> None:
    """Known only after the first sample was scored alone: refused, not mixed."""
    torch.manual_seed(0)
    model, (inputs, labels) = Squeezes("silent").double(), data("cnn", 16)
    labels[1:5] = -100
    scorer = MoSoScorer(model, gradient="full", progress=False, batch_size=5)
    with pytest.raises(ValueError, match=r"changes with the other samples .* in a batch of one"):
        scorer.score(TensorDataset(inputs, labels))


def test_errors_of_the_model_are_its_own() -> None:
    class Broken(Squeezes):
        def forward(self, x: Tensor) -> Tensor:
            raise AttributeError("of the model")

    scorer = MoSoScorer(Broken("logits"), gradient="full", progress=False)
    with pytest.raises(AttributeError, match="of the model"):
        scorer.score(TensorDataset(*data("cnn", 4)))


def test_last_sample_that_another_influences() -> None:
    """The first one is not changed by the others."""

    class Chained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(108, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)).cumsum(0)

    scorer = MoSoScorer(Chained().double(), gradient="full", progress=False)
    with pytest.raises(ValueError, match="the loss of a sample changes with the other samples"):
        scorer.score(TensorDataset(*data("cnn", 6)))
