"""The CUDA kernels in the emulator: which addresses they read, in which order and how often."""

from __future__ import annotations

import cuda_emulator
import pytest
import torch
from core_support import Case, assert_stats_match, generator, random_case
from cuda_cases import DTYPES, check, run, score
from cuda_emulator import WHOLE

from moso_fast.core.reference import closed_form_stats

pytestmark = [
    pytest.mark.skipif(cuda_emulator.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.quick(1),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_alignments(gpu, dtype) -> None:
    case = random_case("ids", n=40, c=5, d=48, dtype=dtype)
    exact = closed_form_stats(*case.args)
    wide = torch.full((40, 133), float("nan"), dtype=dtype)
    views = []
    for start in (0, 8, 1):  # aligned rows need a stride of whole 16 bytes, which 133 is not
        wide[:, start : start + 48] = case.features
        views.append(wide[:, start : start + 48].clone(memory_format=torch.preserve_format))
        padded = torch.full((40, 64 + start), float("nan"), dtype=dtype)
        padded[:, start : start + 48] = case.features
        views.append(padded[:, start : start + 48])
    every_second = torch.full((40, 96), float("nan"), dtype=dtype)
    every_second[:, ::2] = case.features
    views += [every_second[:, ::2], case.features.T.contiguous().T]
    aligned = set()
    for features in views:
        gpu.launches.clear()
        stats = score(features, *case.args[1:], precision="highest")
        assert_stats_match(stats, exact, 1e-5)
        aligned.add(gpu.launches[0][1]["aligned"])
    assert aligned == {0, 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [29, 31, 48])
def test_rows_that_end_inside_16_bytes(gpu, dtype, dim) -> None:
    """What lies behind the columns of an aligned row belongs to somebody else."""
    case = random_case("ids", n=40, c=5, d=dim, dtype=dtype)
    wide = torch.full((40, 64), float("nan"), dtype=dtype)
    wide[:, :dim] = case.features
    stats = score(wide[:, :dim], *case.args[1:], precision="highest")
    assert_stats_match(stats, closed_form_stats(*case.args), 1e-5)
    job = gpu.launches[0][1]
    assert (job["aligned"], job["bulk"]) == (1, int(dim == 48))


def test_equal_rows_behind_one_address(gpu) -> None:
    row = torch.randn(1, 40, generator=generator(5))
    case = Case(row.expand(200, 40), torch.randn(3, 40, generator=generator(6)),
                torch.arange(200) % 3, None)  # fmt: skip
    check(case, 1e-5)


@pytest.mark.raw_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_beyond_32_bits(gpu, dtype) -> None:
    """Three rows 2^30 numbers apart; the pages between them are never touched."""
    case = random_case("ids", n=3, c=3, d=8, dtype=dtype)
    memory = torch.empty(2 * 2**30 + 8, dtype=dtype)
    far = memory.as_strided((3, 8), (2**30, 1))
    far.copy_(case.features)
    stats = score(far, *case.args[1:], precision="highest")
    assert_stats_match(stats, closed_form_stats(*case.args), 1e-5)


@pytest.mark.parametrize("bulk", [True, False])
def test_features_are_read_once_a_pass(gpu, emulator, bulk) -> None:
    """By bulk copies or cp.async in the first pass, straight to registers in the second."""
    gpu.bulk = bulk
    case = random_case("ids", n=128, c=10, d=512, dtype=torch.bfloat16)
    emulator.take_counts()
    run(case)
    counts = emulator.take_counts()
    chunks = 128 * 512 * 2 // 16
    assert counts["bulk 16 bytes" if bulk else "cp.async"] == chunks
    assert counts["cp.async" if bulk else "bulk 16 bytes"] == 0
    assert counts["global 16 bytes"] == chunks
    assert [name for name, _ in gpu.launches] == [*WHOLE]


def test_second_pass_walks_from_the_last_rows_to_the_first(gpu) -> None:
    """What the first pass left in the L2 cache is used. Warp w of 16 takes tiles 31 - w, 15 - w."""
    gpu.multiprocessors = 1
    case = random_case("ids", n=512, c=10, d=64, dtype=torch.bfloat16)
    run(case)
    assert gpu.job("few_classes_second")["blocks"] == 2
    start = case.features.data_ptr()
    loads = gpu.wide_loads["few_classes_second"]
    tiles = [(address - start) // (16 * 64 * 2) for address in loads]
    order = list(dict.fromkeys(tiles))
    pairs = set(zip(order[::2], order[1::2], strict=True))
    assert pairs == {(31 - warp, 15 - warp) for warp in range(16)}
