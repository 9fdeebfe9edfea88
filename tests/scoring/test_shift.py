"""Which label belongs to which token: decided by the model's own loss, its class, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moso_fast import MoSoScorer
from moso_fast.scoring.head.shift import LabelShift

VOCABULARY, LENGTH = 13, 7


class Body(nn.Module):
    """Tokens to logits, with no loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(input_ids)).cumsum(1))


class WithLoss(Body):
    """Logits and, with labels, a loss; ``shift`` says of which reading."""

    def __init__(self, shift: bool, extra: float = 0.0) -> None:
        super().__init__()
        self.shift, self.extra = shift, extra

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = super().forward(input_ids)
        if labels is None:
            return {"logits": logits}
        z, y = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
        return {
            "loss": F.cross_entropy(z.flatten(0, 1), y.flatten()) + self.extra,
            "logits": logits,
        }


class TinyForCausalLM(WithLoss):
    """By its name a causal language model."""


class Lightning(nn.Module):
    """Like a LightningModule: the network inside is called without labels."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        out = self.inside(x)
        return out["logits"] if isinstance(out, dict) else out


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens, and labels that are others."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (6, LENGTH), generator=generator)
    labels = torch.randint(VOCABULARY, (6, LENGTH), generator=generator)
    labels[:, 5:] = -100
    return ids, labels


def decided(model: nn.Module, labels: Tensor | None = None, **options: Any) -> LabelShift:
    ids, others = tokens()
    shift = LabelShift(model, "auto", **options)
    with torch.no_grad():
        shift.decide((ids,), {}, others if labels is None else labels)
    return shift


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", [WithLoss, TinyForCausalLM])
@pytest.mark.parametrize(
    "wrap", [lambda m: m, Lightning, nn.DataParallel, lambda m: Lightning(Lightning(m))]
)
def test_the_own_loss_decides_whatever_the_class_is_called(own, kind, wrap) -> None:
    torch.manual_seed(0)
    shift = decided(wrap(kind(own)))
    assert (shift.value, shift.reason) == (own, "as in the model's own loss")


def test_labels_that_do_not_count_are_those_of_the_caller() -> None:
    torch.manual_seed(0)
    ids, labels = tokens()
    labels[labels == -100] = 0
    shift = LabelShift(WithLoss(True), "auto", ignore_index=0)
    with torch.no_grad():
        shift.decide((ids,), {}, labels.to(torch.uint8))
    assert shift.value is True


def test_a_loss_with_other_parts_needs_the_class_to_agree() -> None:
    torch.manual_seed(0)
    z = WithLoss(True)
    ids, labels = tokens()
    with torch.no_grad():
        logits = z(ids)["logits"]
        plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    z.extra = 0.4 * float(plain - shifted)  # nearer to its own reading, and not near
    named = TinyForCausalLM(True, z.extra)
    named.load_state_dict(z.state_dict())
    assert decided(named).reason == "as its class and, roughly, the model's own loss have it"
    assert decided(z).reason == "the label at its place"  # what no name contradicts


def test_a_head_of_zeros_tells_nothing() -> None:
    named, other = TinyForCausalLM(True), WithLoss(True)
    for model in (named, other):
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
    assert decided(named).reason == "by the model's class"
    assert decided(other).reason == "the label at its place"


def test_a_batch_without_labels_leaves_it_to_a_later_one() -> None:
    torch.manual_seed(0)
    ids, labels = tokens()
    shift = LabelShift(Lightning(TinyForCausalLM(True)), "auto")
    with torch.no_grad():
        assert shift.decide((ids,), {}, torch.full_like(labels, -100)) is False
        assert shift.value is None
        assert shift.decide((ids,), {}, labels) is True


def test_lack_of_memory_is_not_taken_for_an_answer() -> None:
    class Large(WithLoss):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
            if labels is not None:
                raise torch.OutOfMemoryError("no memory")
            return super().forward(input_ids)

    with pytest.raises(torch.OutOfMemoryError):
        decided(Large(True))


def test_without_a_loss_the_class_decides() -> None:
    class QuietForCausalLM(Body):
        pass

    assert decided(QuietForCausalLM()).reason == "by the model's class"
    assert decided(Body()).value is False


def test_a_network_that_means_something_else_by_labels_says_nothing() -> None:
    class Boxes(Body):
        def forward(self, input_ids: Tensor, labels: Any = None) -> Tensor:
            if labels is not None:
                labels["boxes"]
            return super().forward(input_ids)

    assert decided(Boxes()).reason == "the label at its place"


def test_labels_that_are_the_input_are_refused() -> None:
    ids, labels = tokens()
    same = torch.where(labels == -100, labels, ids)
    message = r"^labels are the tokens that the model reads.*shift_labels=True.*shift_labels=False"
    with pytest.raises(ValueError, match=message):
        decided(Body(), same)
    with pytest.raises(ValueError, match=message):
        MoSoScorer(Body()).score(
            [{"input_ids": i, "labels": y} for i, y in zip(ids, same, strict=True)]
        )
    assert LabelShift(Body(), True).decide((ids,), {}, same) is True
    masked = ids.clone()
    masked[:, 2] = 0  # a masked language model: only what was masked counts
    only = torch.full_like(ids, -100)
    only[:, 2] = ids[:, 2].clamp_min(1)
    shift = LabelShift(Body(), "auto")
    assert shift.decide((masked,), {}, only) is False


def test_an_attention_mask_is_no_text() -> None:
    ids, _ = tokens()
    ones = torch.ones_like(ids)
    shift = LabelShift(Lightning(Body()), "auto")
    assert shift.decide((ids,), {"attention_mask": ones}, ones) is False


@pytest.mark.parametrize("gradient", ["last_layer", "full"])
@pytest.mark.parametrize("own", [True, False])
def test_scores_are_those_of_the_own_loss(gradient, own, tmp_path) -> None:
    torch.manual_seed(0)
    model = Lightning(WithLoss(own)).double()
    ids, labels = tokens()
    data = [{"x": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    scorer = MoSoScorer(model, gradient=gradient)
    table = scorer.score(data, resume=tmp_path)
    head = model.inside.head
    wanted = list(head.parameters()) if gradient == "last_layer" else list(model.parameters())
    rows = []
    for i, y in zip(ids, labels, strict=True):
        loss = model.inside(i[None], y[None])["loss"]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)]))
    g = torch.stack(rows)
    expected = (len(g) * g @ g.mean(0) - g.square().sum(1)) / (len(g) - 1)
    torch.testing.assert_close(table.scores, expected, rtol=1e-9, atol=1e-12)
    said = "True, as in the model's own loss" if own else False
    assert table.provenance["shift_labels"] == said
    # A run that finds everything done reads no data, and says the same.
    assert scorer.score(data, resume=tmp_path).provenance == table.provenance
