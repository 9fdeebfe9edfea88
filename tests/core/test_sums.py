"""Sums of results and gradients, in pieces: which numbers go where, and what comes out of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_support import generator, random_case
from torch import Tensor

from moso_fast.core import sums
from moso_fast.core.problem import build_problem

ONE_THREAD = 2**15 - 1


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Whole numbers, whose sums are exact in any order."""
    return torch.randint(-9, 10, shape, generator=generator(sum(shape))).to(dtype)


@pytest.mark.parametrize("heads, most, step", [(1, 5, 5), (2, 5, 2), (3, 11, 3), (4, 3, 1)])
def test_blocks_of_columns_cover_every_column_once(heads, most, step) -> None:
    values, others = numbers(heads, 12), (numbers(heads, 12), numbers(12))
    blocks = list(sums.column_blocks(most, values, *others))
    assert [block[0].shape[1] for block in blocks[:-1]] == [step] * (len(blocks) - 1)
    for whole, parts in zip((values, *others), zip(*blocks, strict=True), strict=True):
        assert torch.equal(torch.cat(parts, -1), whole)
        assert all(part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                   for part in parts)  # fmt: skip


def test_as_many_numbers_as_a_block_takes_stay_whole() -> None:
    values, mask = numbers(3, 4), numbers(4)
    (block,) = sums.column_blocks(12, values, mask)
    assert block[0] is values and block[1] is mask
    assert len(list(sums.column_blocks(11, values, mask))) == 2
    empty = torch.empty(3, 0)
    assert len(list(sums.column_blocks(0, empty))) == 1


def test_a_share_of_a_thread_on_a_cpu_and_all_elsewhere() -> None:
    assert sums._ONE_THREAD == ONE_THREAD
    for samples, blocks in ((ONE_THREAD, 1), (ONE_THREAD + 1, 2), (2 * ONE_THREAD + 1, 3)):
        values = torch.zeros(1, samples)
        assert len(list(sums.thread_blocks(values, values[0]))) == blocks
        assert len(list(sums.thread_blocks(values.to("meta")))) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "columns", [1, 4095, 4096, ONE_THREAD, ONE_THREAD + 1, 36_864, 262_144, 262_145, 600_001]
)
def test_squares_of_rows_of_any_length(columns, dtype) -> None:
    values = numbers(2, columns, dtype=dtype)
    expected = values.to(torch.int64).square().sum(1).to(dtype)
    found = sums.sqnorm(values)
    assert found.dtype == dtype and torch.equal(found, expected)


def test_long_sums_are_sums_of_short_ones() -> None:
    """What is added up by one thread is shorter than what PyTorch shares out."""
    asked = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is Tensor.sum:
                asked.append(args[0].shape[-1])
            return super().__torch_function__(func, types, args, kwargs or {})

    values = torch.ones(1, 600_001).as_subclass(Watched)
    assert float(sums.sqnorm(values)) == 600_001
    assert max(asked) == 4096


def results(alignment: Tensor, sqnorm: Tensor) -> Any:
    heads = len(alignment)
    mean = torch.arange(1.0, heads + 1, dtype=torch.float64)
    return SimpleNamespace(alignment=alignment, grad_sqnorm=sqnorm, mean_grad_sqnorm=mean)


@pytest.mark.parametrize("samples", [1, 7, 5461, 5462, 20_000])
@pytest.mark.parametrize("masked", [False, True])
def test_what_the_self_check_compares(samples, masked) -> None:
    """Three numbers a head: |G|^2, the sum of a_i, and that of |g_i|; of those that count."""
    alignment = numbers(3, samples, dtype=torch.float32)
    norms = numbers(3, samples, dtype=torch.float32).abs()
    counted = torch.arange(samples) % 3 != 1 if masked else None
    given = results(alignment.clone(), norms.square())
    kept = torch.ones(samples, dtype=torch.bool) if counted is None else counted
    if masked:  # what does not count may hold anything
        given.alignment[:, ~kept] = given.grad_sqnorm[:, ~kept] = float("nan")
    means, found = sums.result_sums(given, counted)
    assert means is given.mean_grad_sqnorm and found.dtype == torch.float64
    expected = torch.stack([alignment[:, kept].sum(1), norms[:, kept].sum(1)])
    assert torch.equal(found, expected.double())


def check(by_head: list[tuple[float, float, float]], count: int, problem: Any, shown: Any) -> None:
    """The self-check of heads given as |G|^2, sum of a_i, sum of |g_i|."""
    columns = [number for column in zip(*by_head, strict=True) for number in column]
    sums.self_check(problem, shown, None, count, columns)


@pytest.mark.parametrize(
    "precision, dtype, tolerance",
    [
        ("highest", torch.float32, 1e-4),
        ("high", torch.float32, 2e-3),
        ("medium", torch.float32, 2e-2),
        ("high", torch.float64, 1e-10),
    ],
)
def test_how_far_the_sums_may_differ(precision, dtype, tolerance) -> None:
    """By that part of |G| times the sum of |g_i|: 3 and 50 here, where N |G|^2 is 90."""
    problem = build_problem(*random_case("ids", dtype=dtype).args, precision=precision)
    good, room = (4.0, 40.0, 60.0), tolerance * 3 * 50
    for sign in (1, -1):
        check([good, (9.0, 90 + sign * 0.99 * room, 50.0)], 10, problem, None)
        found = 90 + sign * 1.01 * room
        with pytest.raises(RuntimeError) as caught:
            check([good, (9.0, found, 50.0)], 10, problem, None)
        assert str(caught.value) == (
            f"self-check failed for head 1: the alignments sum to {found:.9g} but N |G|^2 is 90 "
            f"(allowed difference {room:.3g}); please report this with the output of moso-fast "
            "doctor"
        )
    check([(0.0, 0.0, 0.0)], 10, problem, None)
    check([(0.0, 1e-30, 0.0)], 10, problem, None)
    with pytest.raises(RuntimeError, match="allowed difference 1e-30"):
        check([(0.0, 2e-30, 0.0)], 10, problem, None)


@pytest.mark.parametrize("spoilt", ["alignment", "grad_sqnorm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_missing_is_counted_by_head(spoilt, value) -> None:
    problem = build_problem(*random_case("ids", n=4).args)
    shown = results(torch.ones(3, 4), torch.ones(3, 4))
    getattr(shown, spoilt)[1, [0, 2]] = value
    getattr(shown, spoilt)[2, 3] = value
    with pytest.raises(RuntimeError) as caught:
        check([(1.0, 4.0, 4.0), (1.0, value, 4.0), (1.0, 4.0, value)], 4, problem, shown)
    assert str(caught.value) == (
        "self-check failed for head 1: 2 of the 4 samples that count have no finite result; "
        "please report this with the output of moso-fast doctor"
    )
    counted = torch.tensor([False, True, False, False])
    with pytest.raises(RuntimeError, match=r"^self-check failed for head 1: the alignments sum to"):
        sums.self_check(problem, shown, counted, 1, [1.0, 1.0, 1.0, 1.0, value, 1.0, 1.0, 1.0, 1.0])


def test_a_gpu_gets_more_numbers_at_a_time(monkeypatch) -> None:
    """Half of what one thread of a CPU takes: of both results there are twice as many."""
    asked = []
    blocks = sums.column_blocks

    def noted(most: int, *tensors: Tensor) -> Any:
        asked.append((most, len(tensors)))
        return blocks(most, *tensors)

    monkeypatch.setattr(sums, "column_blocks", noted)
    for device in ("cpu", "meta"):
        given = results(torch.ones(2, 5, device=device), torch.ones(2, 5, device=device))
        counted = torch.ones(5, dtype=torch.bool, device=device)
        for mask in (None, counted):
            found = sums.result_sums(given, mask)[1]
            assert (found.shape, found.device.type) == ((2, 2), device)
    assert asked == [(2**14 - 1, 2), (2**14 - 1, 3), (2**22, 2), (2**22, 3)]
