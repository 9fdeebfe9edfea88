"""The shift of labels: how near a loss must be, and what says nothing about it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moso_fast.scoring.head.shift import LabelShift

WORDS = 13
BY_LOSS, BY_CLASS = "as in the model's own loss", "by the model's class"
AT_ITS_PLACE = "the label at its place"


class Network(nn.Module):
    """Logits of tokens; with labels also a loss, of tokens that are the next ones."""

    def __init__(self, extra: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)
        self.extra = extra

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)).cumsum(1))

    def made(self, loss: Tensor, logits: Tensor) -> Any:
        return {"loss": loss, "logits": logits}

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        z = self.logits(ids)
        if labels is None:
            return z
        loss = F.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return self.made(loss + self.extra, z)


class NamedForCausalLM(Network):
    """By its name a language model."""


def batch(length: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(WORDS, (5, length), generator=generator) for _ in range(2))


def decided(model: nn.Module, *, named: bool = False) -> tuple[bool | None, str]:
    """The decision and its reason, of a batch given by place or by name."""
    ids, labels = batch()
    shift = LabelShift(model, "auto")
    with torch.no_grad():
        found = shift.decide(() if named else (ids,), {"ids": ids} if named else {}, labels)
    assert found is shift.value
    return shift.value, shift.reason


@pytest.mark.parametrize("named", [False, True])
def test_outputs_by_name_or_attribute(named: bool) -> None:
    class Attributes(Network):
        def made(self, loss: Tensor, logits: Tensor) -> Any:
            return SimpleNamespace(loss=loss, logits=logits)

    for model in (Network(), Attributes(), nn.DataParallel(Network())):
        assert decided(model, named=named) == (True, BY_LOSS)


def readings() -> tuple[float, float]:
    """The loss of the token at its place and of the next one, by hand."""
    ids, labels = batch()
    with torch.no_grad():
        p = Network()(ids).log_softmax(-1)
    taken = p.gather(-1, labels[..., None])[..., 0]
    nxt = p[:, :-1].gather(-1, labels[:, 1:, None])[..., 0]
    return -float(taken.mean()), -float(nxt.mean())


def test_how_near_the_loss_must_be() -> None:
    """A fifth as far from one reading as from the other: a sixth of the way between them."""
    here, following = readings()
    apart = here - following
    for share, reason in ((0.160, BY_LOSS), (0.172, AT_ITS_PLACE)):
        value, why = decided(Network(share * apart))
        assert (value, why) == (reason == BY_LOSS, reason)
    # On the far side of a reading, a fifth as far: a quarter of the way.
    for share, reason in ((-0.24, BY_LOSS), (-0.26, AT_ITS_PLACE)):
        assert decided(Network(share * apart))[1] == reason
    # The class counts where it says what the nearer one says.
    roughly = "as its class and, roughly, the model's own loss have it"
    assert decided(NamedForCausalLM(0.45 * apart)) == (True, roughly)
    assert decided(NamedForCausalLM(0.55 * apart)) == (True, BY_CLASS)
    assert decided(Network(0.55 * apart)) == (False, roughly)
    assert decided(Network(apart)) == (False, BY_LOSS)


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_readings_that_differ_by_rounding_say_nothing(size: float) -> None:
    """By less than 1e-5 of the loss, or of 1."""

    class Nearly(Network):
        """All tokens alike but for one number, at the first place."""

        def logits(self, ids: Tensor) -> Tensor:
            z = torch.zeros(*ids.shape, WORDS, dtype=torch.float64)
            z[..., -1] = size - 1  # a label that never comes: the loss is about ``size`` or more
            z[:, 0] += self.step * F.one_hot(batch()[1][:, 0], WORDS)
            return z

    for step, told in ((3e-6, False), (3e-3, True)):
        model = Nearly()
        model.step = step
        _, labels = batch()
        shift = LabelShift(model, "auto")
        shift.decide((batch()[0],), {}, labels.clamp_max(WORDS - 2))
        assert shift.reason == (BY_LOSS if told else AT_ITS_PLACE)


class NoLoss(Network):
    def made(self, loss: Tensor, logits: Tensor) -> Any:
        return {"logits": logits}


class SeveralLosses(Network):
    def made(self, loss: Tensor, logits: Tensor) -> Any:
        return {"loss": loss.repeat(2), "logits": logits}


class LossAsNumber(Network):
    def made(self, loss: Tensor, logits: Tensor) -> Any:
        return {"loss": float(loss), "logits": logits}


class NoLogits(Network):
    def made(self, loss: Tensor, logits: Tensor) -> Any:
        return {"loss": loss, "logits": None}


class FlatLogits(Network):
    def made(self, loss: Tensor, logits: Tensor) -> Any:
        return {"loss": loss, "logits": logits.flatten(0, 1)}


class FewerLogits(Network):
    def made(self, loss: Tensor, logits: Tensor) -> Any:
        return {"loss": loss, "logits": logits[:, 1:]}


class Twice(nn.Module):
    """Calls the network inside twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Network()

    def forward(self, ids: Tensor) -> Tensor:
        return self.inside(ids) + self.inside(ids)


class Never(Twice):
    def forward(self, ids: Tensor) -> Tensor:
        return self.inside.logits(ids)


@pytest.mark.parametrize(
    "model", [NoLoss, SeveralLosses, LossAsNumber, NoLogits, FlatLogits, FewerLogits, Twice, Never]
)
def test_what_tells_nothing(model: type[nn.Module]) -> None:
    assert decided(model()) == (False, AT_ITS_PLACE)


class Around(nn.Module):
    """Calls the network inside by names, after a module whose forward has no signature."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.odd = nn.Identity()
        self.odd.forward = {}.update
        self.inside = inside

    def forward(self, ids: Tensor, more: Any = None) -> Tensor:
        return self.inside(ids=ids.clone())


@pytest.mark.parametrize("named", [False, True])
def test_a_network_within_is_asked_with_what_it_gets(named: bool) -> None:
    assert decided(Around(Network()), named=named) == (True, BY_LOSS)
    assert decided(Around(NamedForCausalLM(100.0)), named=named)[0] is not None
    inside = Around(Network()).inside
    assert not inside._forward_pre_hooks


@pytest.mark.parametrize(
    ("length", "counted", "decides"),
    [(1, [0], False), (2, [1], True), (2, [0], False), (3, [2], True), (3, [], False)],
)
def test_which_labels_decide(length: int, counted: list[int], decides: bool) -> None:
    """Those behind the first place that count."""
    ids, labels = batch(length)
    only = torch.full_like(labels, -100)
    only[:, counted] = labels[:, counted]
    shift = LabelShift(Network(), "auto")
    with torch.no_grad():
        assert shift.decide((ids,), {}, only) is decides
    assert (shift.value, shift.reason) == ((True, BY_LOSS) if decides else (None, ""))
    assert shift.stored() == (f"True: {BY_LOSS}" if decides else "")


@pytest.mark.parametrize("labels", [torch.zeros(4).long(), torch.rand(4, 3), torch.rand(4)])
def test_labels_of_samples_leave_it_open(labels: Tensor) -> None:
    shift = LabelShift(Network(), "auto")
    assert shift.decide((), {}, labels) is False
    assert (shift.value, shift.describe()) == (None, False)


def test_decisions_in_words() -> None:
    for given in (True, False):
        shift = LabelShift(Network(), given)
        assert (shift.value, shift.reason) == (given, "given")
        assert shift.describe() is given
        assert shift.decide((), {}, batch()[1]) is given
        assert shift.stored() == f"{given}: given"
        shift.restore(f"{not given}: of another run")  # what is given stays
        assert (shift.value, shift.reason) == (given, "given")
    for word, value in (("True", True), ("False", False)):
        shift = LabelShift(Network(), "auto")
        shift.restore("")
        assert (shift.value, shift.reason, shift.stored()) == (None, "", "")
        shift.restore(f"{word}: told: by hand")
        assert (shift.value, shift.reason) == (value, "told: by hand")
        assert shift.stored() == f"{word}: told: by hand"
        assert shift.describe() == ("True, told: by hand" if value else False)


QUESTION = (
    "labels are the tokens that the model reads, and it gives no loss that tells whether its "
    "logits at t predict the token at t or the next one; say so by shift_labels=True (the next "
    "one: language models) or shift_labels=False"
)


@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("ignored", [-100, 0])
def test_labels_that_are_what_the_model_reads(kinds: int, ignored: int) -> None:
    """A mask of ones is no text; two kinds of tokens are."""
    tokens = 1 + torch.arange(12).view(3, 4) % kinds
    labels = tokens.clone()
    labels[:, 0] = ignored
    shift = LabelShift(NoLoss(), "auto", ignore_index=ignored)
    # Beside a mask in floating point and tokens of another length, which are not compared.
    given = {"mask": tokens.double(), "short": tokens[:, :3], "kind": 3, "words": tokens}
    if kinds == 1:
        assert shift.decide((), given, labels) is False
        assert shift.reason == AT_ITS_PLACE
        return
    with pytest.raises(ValueError) as caught:
        shift.decide((), given, labels)
    assert str(caught.value) == QUESTION
    with pytest.raises(ValueError) as caught:
        shift.decide((tokens.int(),), {}, labels.int())
    assert str(caught.value) == QUESTION
    labels[1, 2] += 5  # one that is another
    assert shift.decide((), given, labels) is False
