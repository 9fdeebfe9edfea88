"""Alignments from residuals computed again, against float64; and the state of the first pass."""

from __future__ import annotations

import pytest
import torch
from alignment_support import BF16, SMALL, cut, dots, draw
from far_memory import STRIDE, Sparse, walled
from moso_fast.kernels import stacked_alignment as module
from moso_fast.kernels.residual import RowOutputs, SoftmaxState, residual_rows
from moso_fast.kernels.stacked_alignment import TILES, choose_tile, stacked_alignment
from moso_fast.kernels.stored_alignment import SelfTerm
from residual_support import reference
from stacked_support import Job
from torch import Tensor

# (n, K, C, D): around the edges of the small tile.
SHAPES = [(1, 1, 1, 1), (15, 1, 17, 15), (16, 2, 16, 16), (17, 3, 5, 33), (33, 1, 40, 31)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES), (SHAPES[3], torch.float16), (SHAPES[3], BF16)],
    ids=str,
)
def test_matches_float64(shape, dtype: torch.dtype, generator: torch.Generator) -> None:
    job = Job(shape, generator, dtype)
    residual, softmax = job.first_pass()
    got = job.second_pass(softmax)
    job.check(got)
    stored = job.exact(residual)
    torch.testing.assert_close(got.double(), stored, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_smoothing_weights_ignored_and_uncounted_rows(shape, generator) -> None:
    rows, _, classes, _ = shape
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[1::4] = -100
    options = {
        "label_smoothing": 0.1,
        "sample_weight": 2.0 * torch.rand(rows, generator=generator),
        "counted": torch.arange(rows) % 5 != 3,
    }
    job = Job(shape, generator, labels=labels.to(torch.int16), **options)
    _, softmax = job.first_pass()
    used = options["counted"] & (labels != -100)
    job.features[~used] = torch.nan
    got = job.second_pass(softmax)
    assert not got[:, ~used].any()
    job.features[~used] = 0.0
    job.check(torch.where(used, got, job.exact(torch.zeros_like(job.logits()))))


def test_ignored_rows_without_weights_are_zero(generator: torch.Generator) -> None:
    labels = torch.tensor([3, -100, 1, -100])
    job = Job((4, 2, 18, 9), generator, labels=labels)
    got = job.second_pass(job.first_pass()[1])
    assert got[:, ::2].all() and not got[:, 1::2].any()


def test_without_biases(generator: torch.Generator) -> None:
    job = Job((20, 2, 18, 19), generator)
    job.bias.zero_()
    job.bias_grad.zero_()
    _, softmax = job.first_pass()
    job.check(job.second_pass(softmax, bias=None, mean_bias_grad=None))


@pytest.mark.parametrize("choice", TILES, ids=lambda c: f"{c.rounded}-{c.aligned}-{c.majors[0]}")
def test_every_shipped_tile(choice, generator: torch.Generator) -> None:
    tile, dtype = choice.tile, BF16 if choice.rounded else torch.float32
    job = Job((tile.rows + 1, 1, tile.classes + 1, tile.dim + 1), generator, dtype, dtype)
    _, softmax = job.first_pass()
    job.check(job.second_pass(softmax, tile=tile))


@pytest.mark.parametrize("heads", [1, 3])
def test_self_term_is_what_rounding_took(heads: int, generator: torch.Generator) -> None:
    job = Job((35, heads, 18, 21), generator, BF16, BF16)
    residual, softmax = job.first_pass()
    sqnorm = job.features.double().square().sum(1)
    plain = job.second_pass(softmax)
    got = job.second_pass(softmax, self_term=SelfTerm(sqnorm.float(), torch.tensor(29)))
    rounded = cut(residual)
    lost = ((residual - rounded).double() * residual.double()).view(35, heads, -1).sum(-1).T
    expected = lost * sqnorm / 29
    assert expected.abs().max() > 1e-3
    # A residual computed again may lie on the other side of a rounding boundary.
    error = (got.double() - plain.double() - expected).abs()
    assert float(error.median()) < 1e-6 and float(error.max()) < 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("splits", [1, 2, 3, 4, 5])
def test_split_classes(splits: int, generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "class_splits", lambda *_: splits)
    job = Job((20, 2, 65, 18), generator)
    job.check(job.second_pass(job.first_pass()[1]))


@pytest.mark.parametrize("classes", [2, 10, 40])
def test_confident_model_keeps_its_digits(classes: int, generator: torch.Generator) -> None:
    # Losses from 1e-9 to 1e-6, where p - 1 is exactly 0 in float32.
    job = Job((16, 1, classes, 8), generator, labels=torch.zeros(16, dtype=torch.int64))
    job.weight.zero_()
    job.bias = torch.rand(classes, generator=generator)
    job.bias[0] = 22.0
    residual, softmax = job.first_pass()
    assert residual.abs().max() < 1e-6 and (residual[:, 0] < 0).all()
    got, exact_r = job.second_pass(softmax), reference(job.logits(), job.labels)["residual"]
    exact_r[:, 0, 0] = -exact_r[:, 0, 1:].sum(-1)
    exact = job.exact(exact_r)
    parts = (job.features, exact_r.flatten(1), job.grad, job.bias_grad)
    assert ((got - exact).abs() <= 1e-5 * dots(*(p.abs() for p in parts), 1)).all()


@pytest.mark.parametrize("level", [0.0, 1e4, -1e4])
def test_logits_far_from_zero_lose_nothing(level: float, generator: torch.Generator) -> None:
    # Exact in float32; a log-sum-exp of 1e4 in one float32 would be wrong by up to 5e-4.
    bias = level + torch.randint(-8, 9, (20,), generator=generator) / 4.0
    job = Job((17, 1, 20, 9), generator, bias=bias)
    job.weight.zero_()
    job.check(job.second_pass(job.first_pass()[1]))


def test_log_sum_exp_from_elsewhere(generator: torch.Generator) -> None:
    job = Job((17, 2, 9, 9), generator)
    _, softmax = job.first_pass()
    lse = torch.logsumexp(job.logits(), -1).T.float().contiguous()
    label_residual = softmax.label_residual.contiguous()
    given = SoftmaxState(lse, torch.zeros_like(lse), label_residual)
    job.check(job.second_pass(given))


@pytest.mark.parametrize("classes", [1, 10, 9000])
def test_state_of_the_first_pass(classes: int, generator: torch.Generator) -> None:
    labels = torch.randint(0, classes, (7,), generator=generator)
    labels[3] = -100
    options = {"label_smoothing": 0.2, "sample_weight": torch.rand(7, generator=generator)}
    job = Job((7, 2, classes, 3), generator, labels=labels, **options)
    residual, softmax = job.first_pass()
    counted = labels != -100
    for name, value in softmax._asdict().items():
        uncounted = value[:, ~counted]
        assert (uncounted == 0).all() if name == "label_residual" else uncounted.isnan().all()
        assert value[:, counted].isfinite().all()
    z, r = job.logits(), residual.view(7, 2, classes)
    lse = softmax.top.double() + softmax.log_sum.double()
    torch.testing.assert_close(lse[:, counted], z.logsumexp(-1).T[:, counted], rtol=1e-6, atol=1e-6)
    assert torch.equal(softmax.top[:, counted], z.float().amax(-1).T[:, counted])
    rows = counted.nonzero()[:, 0]
    assert torch.equal(softmax.label_residual[:, rows], r[rows, :, labels[rows]].T)


def test_no_rows_strides_and_expanded_rows(generator: torch.Generator) -> None:
    job = Job((50, 2, 9, 40), generator)
    job.features, job.weight, job.grad = (t[:, 3:20] for t in (job.features, job.weight, job.grad))
    job.check(job.second_pass(job.first_pass()[1]))
    job.features = job.features[:1].expand(50, 17)
    job.check(job.second_pass(job.first_pass()[1]))
    job.features, job.labels = job.features[:0], job.labels[:0]
    empty = SoftmaxState(*(torch.empty(2, 0) for _ in range(3)))
    assert job.second_pass(empty).shape == (2, 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reads_nothing_beyond_its_operands(shape, generator: torch.Generator) -> None:
    weights = torch.rand(shape[0], generator=generator)
    job = Job(shape, generator, BF16, BF16, sample_weight=weights)
    _, softmax = job.first_pass()
    term = SelfTerm(torch.zeros(shape[0]), torch.tensor(3))
    near = job.second_pass(softmax, self_term=term)
    for name in ("features", "weight", "grad", "bias", "bias_grad", "labels"):
        setattr(job, name, walled(getattr(job, name)))
    got = job.second_pass(
        SoftmaxState(*(walled(value) for value in softmax)),
        self_term=SelfTerm(*(walled(value) for value in term[:2])),
        sample_weight=walled(weights),
    )
    assert torch.equal(got, near)


@pytest.mark.parametrize("which", ["features", "weight", "grad", "state", "out"])
def test_offsets_are_64_bit(which: str, generator: torch.Generator) -> None:
    job = Job((3, 3, 1, 7), generator, bias=torch.zeros(3))
    job = Job((3, 1, 3, 7), generator) if which in ("features", "weight", "grad") else job
    _, softmax = job.first_pass()
    softmax = SoftmaxState(*(value.contiguous() for value in softmax))
    if which == "state":
        # With one class every residual is 0: put others in place of the label's.
        softmax = softmax._replace(label_residual=draw((3, 3), generator))
    near = job.second_pass(softmax)
    if which == "out":
        softmax = softmax._replace(label_residual=draw((3, 3), generator))
        near = job.second_pass(softmax)
        far = Sparse(3)
        stacked_alignment(job.features, job.weight, job.grad, job.labels, softmax, far.matrix(),
                          bias=job.bias, mean_bias_grad=job.bias_grad, tile=SMALL)  # fmt: skip
        assert torch.equal(far.stacked(), near) and near.any()
        return
    if which == "state":
        far = [Sparse(3) for _ in softmax]
        for memory, value in zip(far, softmax, strict=True):
            memory.fill(value)
        given = SoftmaxState(*(memory.matrix() for memory in far))
        assert given.top.stride(0) == STRIDE
    else:
        far = Sparse(7)
        far.fill(getattr(job, which))
        setattr(job, which, far.matrix())
        given = softmax
    assert torch.equal(job.second_pass(given), near) and near.any()


def test_choice_of_tiles() -> None:
    for choice in TILES:
        kind = (choice.rounded, choice.aligned, choice.majors[0])
        assert choose_tile(choice.tile.classes, *kind).classes == choice.tile.classes
    assert choose_tile(10**5, True, True, 8).classes == 64
    assert choose_tile(10**5, True, True, 10).classes == 128


def arguments() -> dict:
    return {
        "features": torch.zeros(4, 6),
        "weight": torch.zeros(6, 6),
        "mean_grad": torch.zeros(6, 6),
        "labels": torch.zeros(4, dtype=torch.int64),
        "softmax": SoftmaxState(*(torch.zeros(2, 4) for _ in range(3))),
        "out": torch.full((2, 4), 7.0),
    }


def state(**fields: Tensor) -> SoftmaxState:
    return arguments()["softmax"]._replace(**fields)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", torch.zeros(4, 6, dtype=torch.float64), "features must be"),
        ("weight", torch.zeros(5, 6), r"weight must be \(6, 6\)"),
        ("weight", torch.zeros(6, 6, dtype=BF16), "weight must be .* one of float32; got"),
        ("weight", torch.zeros(6, 6, device="meta"), "weight must be on cpu"),
        ("mean_grad", torch.zeros(5, 6), "mean_grad must be"),
        ("labels", torch.zeros(4), "labels must be"),
        ("labels", torch.zeros(4, 3), "labels must be"),
        ("labels", torch.zeros(8, dtype=torch.int64)[::2], "labels must be contiguous"),
        ("labels", torch.zeros(4, dtype=torch.int64, device="meta"), "labels must be on cpu"),
        ("softmax", state(top=torch.zeros(2, 5)), "softmax.top must be"),
        ("softmax", state(log_sum=torch.zeros(2, 4).double()), "softmax.log_sum must be"),
        ("softmax", state(log_sum=torch.zeros(4, 2).T), "softmax.log_sum must have unit"),
        ("softmax", state(label_residual=torch.zeros(2, 8)[:, :4]), "head stride of softmax.top"),
        ("softmax", state(top=torch.zeros(2, 4, device="meta")), "softmax.top must be on cpu"),
        ("out", torch.zeros(2, 5), "out must be"),
        ("bias", torch.zeros(3), "bias must be"),
        ("mean_bias_grad", torch.zeros(3), "mean_bias_grad must be"),
        ("sample_weight", torch.zeros(3), "sample_weight must be"),
        ("label_smoothing", 1.0, "label_smoothing must be"),
        ("precision", "low", "precision must be one of"),
    ],
)
def test_refused_arguments(name: str, value: object, message: str) -> None:
    given = arguments()
    out = given["out"]
    with pytest.raises(ValueError, match=message) as caught:
        stacked_alignment(**(given | {name: value}))
    assert "\n" not in str(caught.value)
    assert bool((out == 7.0).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": torch.full((4, 3), 1 / 3)}, "softmax goes with cross_entropy"),
        ({"labels": torch.zeros(4, 3), "loss": "mse"}, "softmax goes with cross_entropy"),
        ({"softmax": state(top=torch.zeros(2, 5))}, r"softmax.top must be \(2, 4\)"),
        ({"softmax": state(top=torch.zeros(4, 2).T)}, "softmax.top must have unit row stride"),
        ({"softmax": state(top=torch.zeros(2, 4, device="meta"))}, "softmax.top must be on cpu"),
    ],
)
def test_first_pass_refuses(options: dict, message: str) -> None:
    given = {
        "labels": torch.zeros(4, dtype=torch.int64),
        "classes": 3,
        "out": RowOutputs(*(torch.zeros(2, 4) for _ in RowOutputs._fields)),
        "status": torch.full((4,), 4),
        "softmax": state(),
    } | options
    with pytest.raises(ValueError, match=message):
        residual_rows(torch.zeros(4, 6), given.pop("labels"), **given)
