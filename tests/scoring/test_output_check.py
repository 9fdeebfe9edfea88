"""What lies between a head's output and the logits, with the models replaced by functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moso_fast.scoring.head import output_check
from moso_fast.scoring.head.output_check import OutputCheck
from moso_fast.scoring.head.weights import HeadCall
from moso_fast.sources.find_head import FULL_GRADIENT

C, D = 8, 5
Behind = Callable[[Tensor], Any]


def refusal(why: str) -> str:
    return (
        f"the model's logits are not the output of head 'fc' (Linear): {why}; choose another head= "
        f"if this is not the last layer, else {FULL_GRADIENT}"
    )


class Case:
    """A head's input and output, random, and a check of what is made of them."""

    def __init__(
        self, *lead: int, classes: int = C, dtype: torch.dtype = torch.float32, conv: bool = False
    ) -> None:
        g = torch.Generator().manual_seed(3)
        self.value = torch.randn(*lead, D, generator=g)
        self.z = torch.randn(*lead, classes, generator=g).to(dtype)
        self.conv = conv
        head = nn.Conv1d(D, classes, 1) if conv else nn.Linear(D, classes)
        self.check = OutputCheck("fc", head)
        self.probes: list[Tensor] = []

    def features(self, behind: Behind, probed: Behind | None = None) -> Tensor:
        """Features of a batch whose logits are ``behind(z)``; of other numbers, ``probed`` ones."""
        value, z = self.value, self.z
        if self.conv:
            value, z = value.movedim(-1, 1), z.movedim(-1, 1)

        def probe(numbers: Tensor) -> Any:
            self.probes.append(numbers)
            return (probed or behind)(numbers)

        call = HeadCall(value, z, z, (value._version, z._version), None)
        return self.check.features(call, behind(z), probe)


def refused(case: Case, behind: Behind, probed: Behind | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        case.features(behind, probed)
    return str(caught.value)


ORDER = torch.tensor([3, 0, 11, 5, 1, 2, 4, 6, 7, 8, 9, 10])
SOME = "the logits are some rows of the head's output"


@pytest.mark.parametrize(
    ("lead", "behind", "wanted", "notes"),
    [
        ((12,), lambda z: z, lambda h: h, {}),
        ((12,), lambda z: z.clone(), lambda h: h, {}),
        ((12,), lambda z: z.bfloat16(), lambda h: h, {}),
        ((12,), lambda z: z.half().float(), lambda h: h, {}),
        ((12,), lambda z: z.double(), lambda h: h, {}),
        ((3, 4), lambda z: z.view(12, C), lambda h: h.view(12, D), {}),
        ((3, 4), lambda z: z.reshape(12, C).clone(), lambda h: h.view(12, D), {}),
        ((3, 4), lambda z: z.movedim(-1, 1).clone(), lambda h: h, {}),
        (
            (12,),
            lambda z: z[ORDER],
            lambda h: h[ORDER],
            {"rows": "the logits are the head's rows in another order"},
        ),
        ((12,), lambda z: z[2:], lambda h: h[2:], {"rows": SOME}),
        ((3, 4), lambda z: z[:, -1].clone(), lambda h: h[:, -1], {"rows": SOME}),
        ((3, 4), lambda z: z[:, 1:3].bfloat16(), lambda h: h[:, 1:3], {"rows": SOME}),
        (
            (3, 4),
            lambda z: z.mean(1),
            lambda h: h.mean(1),
            {"rows": "the logits are the mean of the head's output over the positions"},
        ),
        (
            (3, 2, 2),
            lambda z: z.mean((1, 2)),
            lambda h: h.flatten(1, 2).mean(1),
            {"rows": "the logits are the mean of the head's output over the positions"},
        ),
        ((12,), lambda z: 2 * z, lambda h: h, {"logits": "a factor of 2 of the head's output z"}),
        (
            (3, 4),
            lambda z: (3 * torch.tanh(z / 3)).view(12, C),
            lambda h: h.view(12, D),
            {"logits": "3 * tanh(0.333333 * z), a soft cap of the head's output z"},
        ),
    ],
)
def test_rows_and_maps_with_what_is_noted_of_them(
    lead: tuple[int, ...], behind: Behind, wanted: Behind, notes: dict[str, str]
) -> None:
    case = Case(*lead)
    features = case.features(behind)
    assert torch.equal(features, wanted(case.value))
    assert case.check.notes == notes
    assert (case.check.map is None) == ("logits" not in notes)
    # A later batch of the same checkpoint needs no other numbers; one of another starts anew.
    count = len(case.probes)
    assert torch.equal(case.features(behind), features)
    assert len(case.probes) == count
    case.check.begin()
    assert (case.check.notes, case.check.map) == ({}, None)
    assert torch.equal(case.features(behind), features)
    assert case.check.notes == notes


def test_nothing_is_asked_of_a_batch_without_numbers() -> None:
    case = Case(0, 4)
    assert case.features(lambda z: None) is case.value
    assert case.check.notes == {} and not case.probes


def fails(_: Tensor) -> Any:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("lead", "behind", "probed", "why"),
    [
        (
            (12,),
            lambda z: z.clone(),
            fails,
            "with other numbers in its place the model fails (ZeroDivisionError)",
        ),
        (
            (12,),
            lambda z: z.clone(),
            lambda z: "nothing",
            "with other numbers in its place they are no more there",
        ),
        (
            (12,),
            lambda z: z + 1,
            lambda z: z.clone(),
            "they depend on it in a way that differs from input to input",
        ),
        (
            (3, 4),
            lambda z: z.sum(1),
            None,
            "they have 3 rows, the head's output has 12, and they are none of these",
        ),
        (
            (3, 4),
            lambda z: z.sum(1),
            lambda z: z.mean(1),
            "they have 3 rows, the head's output has 12, and they are none of these",
        ),
        ((12,), lambda z: z.masked_fill(z > 1, -torch.inf), None, "some of them are masked (not "
         "finite)"),
        ((12,), lambda z: torch.ones_like(z), None, "they hardly depend on it"),
        ((12,), lambda z: z.square(), None, "they hardly depend on it"),
        (
            (12,),
            lambda z: 3 * z,
            lambda z: 2 * z,
            "with random numbers in its place they are a factor of 2 of it, with the real ones "
            "they are not",
        ),
        ((12,), lambda z: z[:, :3].clone(), None, "the model returned a tensor (12, 3), the head "
         "(12, 8)"),
        ((12,), lambda z: torch.cat([z, z]), None, "the model returned a tensor (24, 8), the head "
         "(12, 8)"),
        ((12,), lambda z: [z.softmax(1), z.tanh()], None, "the model returned list with (12, 8), "
         "(12, 8), and which of these are the logits cannot be told"),
    ],
)  # fmt: skip
def test_what_is_refused_in_whole_words(
    lead: tuple[int, ...], behind: Behind, probed: Behind | None, why: str
) -> None:
    assert refused(Case(*lead), behind, probed) == refusal(why)


def test_how_much_the_logits_go_with_the_output() -> None:
    """The correlation of numbers put in the head's place with what the model makes of them."""
    case, noise = Case(40), torch.randn(40, C, generator=torch.Generator().manual_seed(8))
    text = refused(case, lambda z: 3 * z + 60 * noise)
    (z,) = (p.double() for p in case.probes)
    alike = float(torch.corrcoef(torch.stack([z.flatten(), (3 * z + 60 * noise).flatten()]))[0, 1])
    assert 0.3 < alike < 1
    assert text == refusal(
        f"they go with it (correlation {alike:.2f}), but through no map that is known: something "
        "is added to it (a skip, a second head, an adapter), or it is normalised"
    )
    assert refused(Case(40), lambda z: z + 500 * noise) == refusal("they hardly depend on it")


def test_rows_that_are_made_of_several() -> None:
    case = Case(6, classes=1)
    assert refused(case, lambda z: z.view(2, 3)) == refusal(
        "each row of the logits (2, 3) is made of several rows of the head's output (6, 1), as in "
        "multiple choice"
    )
    assert refused(case, lambda z: z.view(2, 3)[:, :2]) == refusal(
        "the model returned a tensor (2, 2), the head (6, 1)"
    )


def test_the_logits_among_several_tensors_are_the_very_numbers() -> None:
    case = Case(12)
    features = case.features(lambda z: (z.softmax(1), z.clone(), z.tanh()))
    assert features is not None and case.check.notes == {}
    assert torch.equal(features, case.value)


EARLIER = "in this batch they are not, although in an earlier one they were"


@pytest.mark.parametrize(
    ("lead", "first", "later", "why"),
    [
        ((12,), lambda z: z.clone(), lambda z: 2 * z, EARLIER),
        ((12,), lambda z: z.clone(), lambda z: z.flip(1), EARLIER),
        ((3, 4), lambda z: z[:, 0].clone(), lambda z: z.mean(1), EARLIER),
        (
            (3, 4),
            lambda z: z.mean(1),
            lambda z: z[:, 0].clone(),
            "in this batch they are not its mean over the positions",
        ),
        (
            (12,),
            lambda z: z / 2,
            lambda z: z / 3,
            "with random numbers in its place they are a factor of 0.5 of it, with the real ones "
            "they are not",
        ),
    ],
)
def test_a_later_batch_is_held_against_the_first(
    lead: tuple[int, ...], first: Behind, later: Behind, why: str
) -> None:
    case = Case(*lead)
    case.features(first)
    assert refused(case, later) == refusal(why)


def test_a_later_batch_may_take_other_rows() -> None:
    case = Case(3, 4)
    case.features(lambda z: z[:, 0].clone())
    assert torch.equal(case.features(lambda z: z[:, 2].clone()), case.value[:, 2])
    # Rows that two samples share are those of the sample's own.
    case.z[1, 2] = case.z[0, 1]
    logits = torch.stack([case.z[0, 1], case.z[1, 2], case.z[2, 0]])
    wanted = torch.stack([case.value[0, 1], case.value[1, 2], case.value[2, 0]])
    assert torch.equal(case.features(lambda z: logits), wanted)
    # Rows of one sample that look alike are told apart by other numbers, unless their inputs
    # look alike, too: then any of them will do.
    count = len(case.probes)
    case.z[2, 3], case.value[2, 3] = case.z[2, 0], case.value[2, 0]
    assert torch.equal(case.features(lambda z: logits), wanted)
    assert len(case.probes) == count
    case.z[0, 3] = case.z[0, 1]
    picked = [(0, 3), (1, 2), (2, 0)]
    chosen = case.features(lambda z: torch.stack([z[at] for at in picked]))
    assert torch.equal(chosen, torch.stack([case.value[at] for at in picked]))
    assert len(case.probes) == count + 1


@pytest.mark.parametrize(
    ("lead", "classes", "dtype", "probes"),
    [
        ((12,), 8, torch.float32, 1),  # 96 numbers
        ((19,), 5, torch.float32, 2),
        ((2,), 3, torch.float32, 16),
        ((1,), 5, torch.float32, 16),  # no more than that
        ((96,), 1, torch.float32, 3),  # 40 bits, of which each row of one float32 has 16
        ((96,), 3, torch.float32, 1),
        ((96,), 2, torch.float64, 2),
        ((96,), 4, torch.bfloat16, 2),
        ((96,), 5, torch.bfloat16, 1),
    ],
)
def test_how_often_other_numbers_are_put_in(
    lead: tuple[int, ...], classes: int, dtype: torch.dtype, probes: int
) -> None:
    case = Case(*lead, classes=classes, dtype=dtype)
    case.features(lambda z: z.clone())
    assert len(case.probes) == probes
    for numbers in case.probes:
        assert (numbers.shape, numbers.dtype) == (case.z.shape, dtype)
        assert numbers.is_contiguous()
    again = Case(*lead, classes=classes, dtype=dtype)
    again.features(lambda z: z.clone())
    assert all(map(torch.equal, case.probes, again.probes))


def test_other_numbers_are_of_three_sizes_row_by_row() -> None:
    case = Case(600, classes=40)
    case.features(lambda z: z.clone())
    (numbers,) = case.probes
    spread = numbers.std(1)
    sizes = [float(spread[(spread > low) & (spread < 3 * low)].mean()) for low in (0.5, 4, 32)]
    assert sizes == pytest.approx([1, 8, 64], rel=0.05)
    counts = [int(((spread > low) & (spread < 3 * low)).sum()) for low in (0.5, 4, 32)]
    assert sum(counts) == 600 and min(counts) > 150


def test_a_convolution_gets_its_classes_second() -> None:
    case = Case(3, 40, conv=True)
    features = case.features(lambda z: z.clone())
    assert torch.equal(features, case.value)
    (numbers,) = case.probes
    assert numbers.shape == (3, C, 40) and numbers.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_up_to_rounding(dtype: torch.dtype) -> None:
    """By 8 eps of the mean size of the numbers, whatever their signs."""
    case = Case(2, 4, dtype=dtype)
    case.features(lambda z: z.float().mean(1))
    case.z = torch.ones(2, 4, C).to(dtype)
    case.z[:, :2] = -1  # whose mean is 0, and the mean size 1
    allowed, near = 8 * torch.finfo(dtype).eps, torch.zeros(2, C)
    for sign in (1, -1):
        near[1, 3] = sign * 0.95 * allowed
        assert torch.equal(case.features(lambda z: near), case.value.mean(1))
        near[1, 3] = sign * 1.05 * allowed
        refused(case, lambda z: near)


def test_features_of_16_bits_are_averaged_in_float32() -> None:
    case = Case(2, 4)
    case.value = case.value.bfloat16()
    features = case.features(lambda z: z.mean(1))
    assert features.dtype == torch.float32
    assert torch.equal(features, case.value.float().mean(1))


def test_a_map_is_held_on_all_rows_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_check, "_NUMBERS", 12 * C)
    factor = torch.full((40, 1), 2.0)
    assert Case(40).features(lambda z: factor * z) is not None
    for row in (12, 23, 24, 39):
        factor[row] = 3.0
        text = refused(Case(40), lambda z: factor * z)
        assert text.startswith(refusal("they go with it (correlation 1.00)")[:80])
        factor[row] = 2.0
    case = Case(40)
    case.features(lambda z: factor * z)
    factor[39] = 3.0
    assert "with the real ones they are not" in refused(case, lambda z: factor * z)
    case.z = case.z[:39]
    case.value = case.value[:39]
    with pytest.raises(ValueError, match="with the real ones they are not"):
        case.features(lambda z: 2 * z[:38])


@pytest.mark.parametrize(("alike", "asked"), [(19, False), (20, True)])
def test_rows_in_their_place_are_believed_where_most_are_one_of_a_kind(
    alike: int, asked: bool
) -> None:
    case = Case(40)
    case.features(lambda z: z.clone())
    count = len(case.probes)
    case.z[:alike] = 1.0
    assert torch.equal(case.features(lambda z: z.clone()), case.value)
    assert (len(case.probes) > count) == asked
