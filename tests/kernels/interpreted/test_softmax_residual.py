"""Softmax cross-entropy residuals and statistics against float64 PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from residual_support import FIELDS, Result, assert_close, launch, logits_and_ids, probabilities

from moso_fast.core.status import STATUS_LABEL, STATUS_LOGITS, STATUS_TARGET

# (n, K, C): around every tile edge, fewer and more items than a tile has rows, several programs.
SHAPES = [
    (1, 1, 1),
    (5, 3, 1),
    (7, 2, 2),
    (257, 1, 4),
    (300, 1, 3),
    (67, 1, 10),
    (23, 3, 10),
    (33, 1, 17),
    (9, 1, 33),
    (5, 2, 129),
    (3, 1, 1000),
    (2, 1, 1025),
    (2, 2, 4097),
    (1, 1, 8191),
    (2, 1, 8192),
    (3, 1, 8193),
    (2, 1, 12288),
    (2, 1, 50257),
]
SOFT_SHAPES = [(5, 2, 1), (7, 3, 2), (67, 2, 10), (9, 1, 33), (3, 1, 1000), (2, 2, 8193)]


def select(result: Result, keep: torch.Tensor) -> list[torch.Tensor]:
    return [result.residual[keep], *(getattr(result, name)[:, keep] for name in FIELDS[1:])]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, int, int], generator: torch.Generator) -> None:
    logits, labels = logits_and_ids(shape, generator)
    result = launch(logits, labels)
    assert_close(result, logits, labels)
    assert result.status == [shape[0]] * 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_smoothing_weights_ignored_and_uncounted_rows(
    shape: tuple[int, int, int], generator: torch.Generator
) -> None:
    rows = shape[0]
    logits, labels = logits_and_ids(shape, generator)
    labels[1::4] = -100
    options = {
        "label_smoothing": 0.1,
        "sample_weight": 2.0 * torch.rand(rows, generator=generator),
        "counted": torch.arange(rows) % 5 != 3,
    }
    result = launch(logits, labels, padding=7, offset=3, **options)
    assert_close(result, logits, labels, **options)
    assert result.status == [rows] * 4


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", SOFT_SHAPES, ids=str)
def test_soft_labels(
    shape: tuple[int, int, int], smoothing: float, generator: torch.Generator
) -> None:
    rows, _, classes = shape
    logits, _ = logits_and_ids(shape, generator)
    targets = probabilities(rows, classes, generator)
    options = {
        "label_smoothing": smoothing,
        "sample_weight": 2.0 * torch.rand(rows, generator=generator),
        "counted": torch.arange(rows) % 3 != 1,
    }
    result = launch(logits, targets, padding=5, **options)
    assert_close(result, logits, targets, **options)
    assert result.status == [rows] * 4


def test_soft_labels_of_any_dtype_and_row_stride(generator: torch.Generator) -> None:
    logits, _ = logits_and_ids((6, 1, 40), generator)
    wide = probabilities(6, 40, generator)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        strided = torch.full((6, 47), torch.nan, dtype=dtype)[:, :40]
        strided.copy_(wide)
        assert_close(launch(logits, strided), logits, strided)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("classes", [10, 9000])
def test_one_hot_targets_equal_ids(
    classes: int, smoothing: float, generator: torch.Generator
) -> None:
    logits, labels = logits_and_ids((4, 2, classes), generator)
    hard = launch(logits, labels, label_smoothing=smoothing)
    one_hot = torch.nn.functional.one_hot(labels, classes).float()
    soft = launch(logits, one_hot, label_smoothing=smoothing)
    for name in FIELDS:
        # Smoothing 1 / C rounds differently in t' and in the constant of the other path.
        torch.testing.assert_close(
            getattr(soft, name), getattr(hard, name), rtol=2e-5, atol=2e-8, msg=name
        )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_label_dtypes(dtype: torch.dtype, generator: torch.Generator) -> None:
    logits, labels = logits_and_ids((30, 2, 10), generator)
    expected, result = launch(logits, labels), launch(logits, labels.to(dtype))
    for name in FIELDS:
        assert torch.equal(getattr(result, name), getattr(expected, name)), name


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("classes", [2, 10, 1000, 9000])
def test_confident_model_keeps_its_digits(
    classes: int, soft: bool, generator: torch.Generator
) -> None:
    # Losses from 1e-9 to 1e-6: p - 1 and lse - z_y are exactly 0 in float32.
    rows = 16
    labels = torch.randint(0, classes, (rows,), generator=generator)
    logits = torch.rand(rows, 1, classes, generator=generator)
    gap = math.log(classes) + 14.0 + torch.linspace(0.0, 7.0, rows)
    logits[torch.arange(rows), 0, labels] = gap
    targets = torch.nn.functional.one_hot(labels, classes).float() if soft else labels
    result = launch(logits, targets)
    z = logits[:, 0].double()
    others = torch.where(torch.nn.functional.one_hot(labels, classes).bool(), -torch.inf, z)
    odds = (others - z.gather(1, labels[:, None])).exp().sum(1)
    assert odds.min() > 1e-10 and odds.max() < 1e-5
    p = torch.softmax(others, 1) * (odds / (1 + odds))[:, None]
    r_label = result.residual[torch.arange(rows), 0, labels].double()
    entropy = odds.log1p() - (p * (z - z.gather(1, labels[:, None]))).sum(1)
    for got, exact in (
        (result.loss[0], odds.log1p()),
        (r_label, -odds / (1 + odds)),
        (result.residual_sqnorm[0], (odds / (1 + odds)).square() + p.square().sum(1)),
        (result.entropy[0], entropy),
    ):
        assert ((got.double() - exact).abs() / exact.abs()).max() <= 1e-5


@pytest.mark.parametrize("classes", [2, 10, 9000])
def test_confidently_wrong(classes: int) -> None:
    logits = torch.full((2, 1, classes), -200.0)
    logits[0, 0, 0] = logits[1, 0, -1] = 0.0
    result = launch(logits, torch.tensor([classes - 1, 0]))
    assert result.loss.tolist() == [[200.0, 200.0]]
    assert result.margin.tolist() == [[-200.0, -200.0]]
    assert result.residual_sqnorm.tolist() == [[2.0, 2.0]]
    assert result.residual[0, 0, 0] == 1.0 and result.residual[0, 0, -1] == -1.0
    assert result.entropy.abs().max() < 1e-30


@pytest.mark.parametrize("classes", [3, 10, 9000])
def test_entropy_of_a_confidently_wrong_row_keeps_its_digits(classes: int) -> None:
    # log S must come from S without its largest term, whoever owns that term.
    logits = torch.full((1, 1, classes), -18.0)
    logits[0, 0, classes // 2] = 0.0
    result = launch(logits, torch.tensor([classes - 1]))
    rest = (classes - 1) * math.exp(-18.0)
    exact = math.log1p(rest) + rest / (1.0 + rest) * 18.0
    assert abs(float(result.entropy) - exact) <= 1e-5 * exact


@pytest.mark.parametrize("classes", [1, 2, 10, 1000, 8193])
@pytest.mark.parametrize("level", [0.0, 1e4, -1e4, 3e38, -3e38])
def test_all_logits_equal(classes: int, level: float) -> None:
    labels = torch.tensor([0, classes // 2, classes - 1])
    result = launch(torch.full((3, 2, classes), level), labels)
    p = 1.0 / classes
    expected = p - torch.nn.functional.one_hot(labels, classes).float()
    torch.testing.assert_close(result.residual, expected[:, None].expand(3, 2, classes))
    log_c = torch.full((2, 3), math.log(classes))
    torch.testing.assert_close(result.loss, log_c)
    torch.testing.assert_close(result.entropy, log_c)
    assert torch.equal(result.margin, torch.full((2, 3), 0.0 if classes > 1 else math.inf))
    assert result.status == [3] * 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [10, 9000])
def test_logits_of_ten_thousand(classes: int, smoothing: float, generator: torch.Generator) -> None:
    logits, labels = logits_and_ids((8, 1, classes), generator)
    logits = torch.where(torch.rand(logits.shape, generator=generator) < 0.5, -1e4, 1e4) + logits
    result = launch(logits, labels, label_smoothing=smoothing)
    assert_close(result, logits, labels, label_smoothing=smoothing)


@pytest.mark.parametrize("classes", [2, 8193])
def test_difference_of_logits_overflows(classes: int) -> None:
    # z - max is -inf: probability 0 and no contribution to the entropy, not NaN.
    logits = torch.full((1, 1, classes), -3e38)
    logits[0, 0, 0] = 3e38
    result = launch(logits, torch.tensor([0]))
    assert result.status == [1] * 4
    assert float(result.loss) == 0.0 and float(result.entropy) == 0.0
    assert not result.residual.any() and math.isinf(float(result.margin))


def test_ties_between_label_and_rival() -> None:
    logits = torch.tensor([[[5.0, 5.0, -30.0]], [[5.0, 5.0, 5.0]]])
    result = launch(logits, torch.tensor([0, 2]))
    assert_close(result, logits, torch.tensor([0, 2]))
    assert result.margin.tolist() == [[0.0, 0.0]]


def test_all_rows_ignored() -> None:
    result = launch(torch.randn(70, 2, 10), torch.full((70,), -100))
    assert not result.residual.any() and result.status == [70] * 4
    assert all(getattr(result, name).isnan().all() for name in FIELDS[1:])


@pytest.mark.parametrize("classes", [10, 9000])
def test_ignore_index_may_be_a_class(classes: int, generator: torch.Generator) -> None:
    logits, labels = logits_and_ids((12, 1, classes), generator)
    labels[::2] = 3
    result = launch(logits, labels, ignore_index=3)
    assert_close(result, logits, labels, ignore_index=3)
    assert bool(result.loss[0, ::2].isnan().all())


@pytest.mark.parametrize("classes", [10, 9000])
@pytest.mark.parametrize("bad", ["C", -1, 2**40, -(2**63)])
def test_label_out_of_range(bad: int | str, classes: int, generator: torch.Generator) -> None:
    logits, labels = logits_and_ids(
        (70, 2, classes) if classes < 100 else (4, 2, classes), generator
    )
    rows = len(labels)
    wrong = torch.arange(rows) % 3 == 1
    broken = torch.where(wrong, classes if bad == "C" else bad, labels)
    result, sound = launch(logits, broken), launch(logits, labels)
    expected = [rows] * 4
    expected[STATUS_LABEL] = 1
    assert result.status == expected
    for got, value in zip(select(result, ~wrong), select(sound, ~wrong), strict=True):
        assert torch.equal(got, value)
    assert not result.residual[wrong].any()
    assert all(bool(value.isnan().all()) for value in select(result, wrong)[1:])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("classes", [1, 10, 9000])
def test_non_finite_logit(
    value: float, soft: bool, classes: int, generator: torch.Generator
) -> None:
    logits, labels = logits_and_ids((9, 2, classes), generator)
    targets = probabilities(9, classes, generator) if soft else labels
    hard = targets.argmax(1) if soft else labels
    broken = logits.clone()
    broken[2, 0, hard[2]] = value  # at the label
    broken[4, 1, (hard[4] + 1) % classes] = value  # at a rival
    broken[7, :, -1] = value  # in the last, partial tile
    wrong = torch.zeros(2, 9, dtype=torch.bool)
    wrong[0, 2] = wrong[1, 4] = wrong[0, 7] = wrong[1, 7] = True
    result, sound = launch(broken, targets), launch(logits, targets)
    expected = [9] * 4
    expected[STATUS_LOGITS] = 2
    assert result.status == expected
    assert not result.residual[wrong.T].any()
    assert torch.equal(result.residual[~wrong.T], sound.residual[~wrong.T])
    for name in FIELDS[1:]:
        got = getattr(result, name)
        assert bool(got[wrong].isnan().all()), name
        assert torch.equal(got[~wrong], getattr(sound, name)[~wrong]), name


def test_rows_that_do_not_count_may_hold_anything(generator: torch.Generator) -> None:
    logits, labels = logits_and_ids((8, 1, 10), generator)
    logits[3], logits[5] = math.nan, math.inf
    labels[3], labels[6] = -100, 77
    counted = torch.tensor([True] * 5 + [False] * 2 + [True])
    result = launch(logits, labels, counted=counted)
    assert result.status == [8] * 4
    assert not result.residual[[3, 5, 6]].any()
    assert result.loss.isnan().tolist() == [[False] * 3 + [True, False, True, True, False]]


def test_overflowing_result_is_reported(generator: torch.Generator) -> None:
    logits, labels = logits_and_ids((4, 1, 10), generator)
    weights = torch.tensor([1.0, 1.0, 3e38, 1.0])
    logits[2, 0, labels[2]] = -1e3
    result = launch(logits, labels, sample_weight=weights)
    assert result.status[STATUS_LOGITS] == 2


@pytest.mark.parametrize("value", [-0.25, 1.5, math.nan])
def test_bad_probability(value: float, generator: torch.Generator) -> None:
    logits, _ = logits_and_ids((6, 1, 10), generator)
    targets = probabilities(6, 10, generator)
    targets[4, 7] = value
    targets[5] = math.nan
    assert launch(logits, targets).status[STATUS_TARGET] == 4
    targets = probabilities(6, 10, generator)
    targets[3] *= 0.9
    assert launch(logits, targets).status[STATUS_TARGET] == 3


def test_status_keeps_the_smallest_row_over_chunks(generator: torch.Generator) -> None:
    logits, labels = logits_and_ids((6, 1, 10), generator)
    labels[4], labels[5] = 10, 11
    logits[1, 0, 0] = math.nan
    status = torch.full((4,), 2**62)
    # Row numbers beyond 32 bits, later rows first.
    launch(logits, labels, status=status, first_row=2**40)
    assert status[STATUS_LABEL] == 2**40 + 4 and status[STATUS_LOGITS] == 2**40 + 1
    launch(logits, labels, status=status, first_row=100)
    launch(logits, labels, status=status, first_row=200)
    assert status[STATUS_LABEL] == 104 and status[STATUS_LOGITS] == 101


@pytest.mark.parametrize("classes", [10, 9000])
def test_rows_and_heads_do_not_touch_each_other(classes: int, generator: torch.Generator) -> None:
    # Bitwise: a row's result depends neither on its neighbours nor on where in a tile it lies.
    rows = 40 if classes == 10 else 3
    logits, labels = logits_and_ids((rows, 3, classes), generator)
    whole = launch(logits, labels)
    part = launch(logits[1:, 1:2].clone(), labels[1:])
    assert torch.equal(part.residual, whole.residual[1:, 1:2])
    for name in FIELDS[1:]:
        assert torch.equal(getattr(part, name), getattr(whole, name)[1:2, 1:]), name


@pytest.mark.parametrize("classes", [2, 8193])
def test_difference_of_logits_overflows_at_probabilities(classes: int) -> None:
    """Classes of probability 0 cost nothing, however far below the top they lie."""
    logits = torch.full((1, 1, classes), -3e38)
    logits[0, 0, 0] = 3e38
    result = launch(logits, torch.eye(1, classes))
    assert result.status == [1] * 4
    assert float(result.loss) == 0.0 and float(result.entropy) == 0.0
    assert not result.residual.any() and math.isinf(float(result.margin))
