"""Bytes and words of every regime of the Triton backend, and the helpers that they share. No GPU.

Tables of tiles stand apart from this: where a regime says its tiles, the table is asked for one
that has numbers of its own, and with what it is asked is looked at.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_support import random_case
from triton_cases import needs_triton, problem_of, shape

from moso_fast.backends.triton import regime as triton_regime
from moso_fast.backends.triton.choice import REGIMES
from moso_fast.backends.triton.regime import Limits, Regime
from moso_fast.backends.triton.regimes import blas as triton_blas
from moso_fast.core.passes import Plan
from moso_fast.core.problem import build_problem

pytestmark = needs_triton
BF16, F16 = torch.bfloat16, torch.float16
N, C, D = 100, 10, 64


def job(name: str, problem: Any, keep: bool = True) -> Regime:
    return REGIMES[name](problem, Plan(None, keep, 12_345_678, 0), ("the reason",))


def plain(
    classes: int, dim: int, heads: int = 1, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """Like ``shape``, of a hundred rows that lie as most do: one element after the other."""
    weight, labels = torch.zeros(heads, classes, dim), torch.zeros(N, dtype=torch.long)
    turned = options.pop("turned", False)
    features = torch.zeros(dim, N, dtype=dtype).T if turned else torch.zeros(N, dim, dtype=dtype)
    return build_problem(features, weight, labels, **options)


@pytest.mark.parametrize("dim, classes", [(64, 10), (6, 10), (6, 100)])
def test_bytes_that_a_row_takes(machine, dim, classes) -> None:
    """Logits, products, copies of what the products round, and what is stored rounded."""
    machine()
    one, three = plain(classes, dim), plain(classes, dim, 3)
    half, half3 = plain(classes, dim, 1, BF16), plain(classes, dim, 3, BF16)
    copied = plain(classes, dim, 3, F16)
    pulled = 4 * dim if classes > dim else 0  # R G, as wide as the features
    narrow = 4 * classes + max(4 * (min(classes, dim) + 16), 2 * classes)
    found = {
        "blas": [8 * classes + pulled, 24 * classes + 3 * pulled, narrow, 30 * classes + 3 * pulled,
                 24 * classes + 4 * dim + 3 * pulled],
        "stored": [4 * classes, 12 * classes, 6 * classes, 12 * classes, 12 * classes + 4 * dim],
        "recompute": [4 * classes, 12 * classes, 4 * classes, 12 * classes,
                      12 * classes + 4 * dim],
        "row_tiles": [16 + 4 * (classes + 8), None, 16 + 2 * (classes + 8), None, None],
    }  # fmt: skip
    for name, sizes in found.items():
        for problem, size in zip((one, three, half, half3, copied), sizes, strict=True):
            if size is not None:
                assert job(name, problem).row_bytes() == size, (name, problem.features.dtype)


def test_bytes_of_a_row_where_features_are_copied_and_sums_shared(machine) -> None:
    machine(interpret=True)
    for dtype, size, stored in ((torch.float32, 4, 4), (BF16, 2, 2), (F16, 2, 4)):
        for turned in (False, True):
            copy = size * 512 if turned else 0
            problem = plain(C, 512, dtype=dtype, turned=turned)
            assert job("row_tiles", problem).row_bytes() == 16 + stored * (C + 8) + copy
            # A partial sum of the first kernel serves 2048 rows, 8192 with rounded operands.
            problem = plain(C, 512, 4, dtype, turned=turned)
            share = 4 * 4 * C * 512 // (2048 if dtype == torch.float32 else 8192)
            assert job("few_classes", problem).row_bytes() == 16 + share + copy


def test_bytes_whatever_the_rows(machine) -> None:
    machine()
    from moso_fast.kernels.gradient_sum import PARTIAL_BYTES

    numbers = 3 * C * D
    large = shape(50_000, 4096)
    for name in ("stored", "recompute", "row_tiles"):
        problem = shape(C, D) if name == "row_tiles" else shape(C, D, 3)
        size = C * D if name == "row_tiles" else numbers
        assert job(name, problem).fixed_bytes() == 16 * size + PARTIAL_BYTES
    assert job("stored", large).fixed_bytes() == 20 * 50_000 * 4096  # above all partial sums
    assert job("few_classes", shape(C, D, 3)).fixed_bytes() == (8 + 4 * 264) * numbers


@pytest.mark.parametrize("precision, slab", [("highest", 512), ("high", 8192), ("medium", 8192)])
def test_bytes_of_products_by_cublas(machine, precision, slab, monkeypatch) -> None:
    """A float32 sum for every slab of a launch; with several heads, a block of lost self-terms."""
    machine()
    monkeypatch.setitem(triton_regime.CHUNK_BYTES, "cpu", 2**40)
    numbers = 3 * C * D
    assert triton_blas._BATCH_BYTES == 2**28
    monkeypatch.setattr(triton_blas, "_BATCH_BYTES", 4 * numbers * 3 + 1)
    for rows, slabs in ((10, 1), (slab, 1), (2 * slab + 5, 2), (3 * slab, 3), (5 * slab, 3)):
        problem = shape(C, D, 3, rows=rows, precision=precision)
        assert job("blas", problem).fixed_bytes() == (16 + 4 * slabs) * numbers
    monkeypatch.setattr(triton_blas, "_BATCH_BYTES", 2**28)
    half = shape(C, D, 3, rows=1000, dtype=BF16)
    assert job("blas", half).fixed_bytes() == 20 * numbers + 16 * 1000 * 3 * C
    many = shape(1000, D, 3, rows=100_000, dtype=BF16)
    slabs = 100_000 // 8192
    assert job("blas", many).fixed_bytes() == (16 + 4 * slabs) * 3000 * D + 16 * 2**24
    narrow = shape(C, D, rows=1000, dtype=BF16)
    assert job("blas", narrow).fixed_bytes() == 20 * C * D
    # A chunk has no more rows than fit.
    monkeypatch.setitem(triton_regime.CHUNK_BYTES, "cpu", 2**17)
    few = job("blas", shape(C, D, 3, rows=10**6, precision=precision))
    assert few.chunk_rows == 2**17 // (24 * C)
    assert few.fixed_bytes() == (16 + 4 * max(1, few.chunk_rows // slab)) * numbers


def test_bytes_from_the_first_pass_to_the_second(machine) -> None:
    machine()
    single, half = shape(C, D, rows=N), shape(C, D, rows=N, dtype=BF16)
    assert job("recompute", shape(C, D, 3, rows=N)).state_bytes() == 12 * 3 * N
    assert [job("row_tiles", problem).state_bytes() for problem in (single, half)] == [0, 4 * N]
    for name in ("blas", "stored", "few_classes"):
        assert job(name, single).state_bytes() == 0


def test_the_whole_explanation(machine, monkeypatch) -> None:
    """Peak: what stays, sums, the rows of a chunk, G twice; streamed, two chunks and what stays."""
    machine()
    for keep, name, stays in (
        (True, "stored", 12_345_678),
        (False, "stored", 0),
        (True, "recompute", 12 * N),  # has no use for residuals
    ):
        regime = job(name, shape(C, D, rows=N), keep)
        peak = stays + regime.fixed_bytes() + 7 * regime.row_bytes() + 12 * C * D
        assert regime.explain(7) == [
            f"triton: regime {name}, {regime.kernels()}",
            "the reason",
            f"features read 4 times in all; at most about {peak / 2**20:.1f} MiB beyond inputs and "
            "results",
        ]
        assert regime.explain(10**9)[2] == regime.explain(N)[2]
    monkeypatch.setattr(type(regime.problem), "streamed", True)
    for resident, kept in ((2**30, 4 * D * 10**6), (2**20, 2**20)):
        regime = job("stored", shape(C, D, rows=10**6), False)
        regime.plan = Plan(None, False, 0, 0, resident)
        peak = regime.fixed_bytes() + 10**5 * regime.row_bytes() + 12 * C * D
        peak += kept + 2 * 10**5 * 4 * D
        assert f" {peak / 2**20:.1f} MiB " in regime.explain(10**5)[2]
    assert {name: found.feature_reads for name, found in REGIMES.items()} == {
        "row_tiles": 3, "few_classes": 2, "recompute": 4, "stored": 4, "blas": 4,
    }  # fmt: skip


def tile(rows: int, classes: int, dim: int, warps: int) -> Any:
    return SimpleNamespace(rows=rows, classes=classes, dim=dim, num_warps=warps)


class Tables:
    """The kernels' tables of tiles, each with one tile of its own; notes what it is asked."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from moso_fast.kernels import (
            few_classes_tiles,
            gradient_sum,
            residual,
            row_tiles,
            stacked_alignment,
            stored_alignment,
        )

        self.asked: dict[str, Any] = {}
        first = SimpleNamespace(products="of the table", tile=tile(1, 2, 3, 4))
        config = SimpleNamespace(block_rows=9, block_classes=10, num_warps=11)
        for module, name, answer in (
            (few_classes_tiles, "choose_first_tile", first),
            (few_classes_tiles, "choose_second_tile", SimpleNamespace(tile=tile(5, 6, 7, 8))),
            (gradient_sum, "choose_tile", tile(12, 13, 14, 15)),
            (stored_alignment, "choose_tile", tile(16, 17, 18, 19)),
            (stacked_alignment, "choose_tile", tile(20, 21, 22, 23)),
            (row_tiles, "choose_tile", tile(24, 25, 26, 27)),
            (residual, "choose_config", config),
        ):
            key = f"{module.__name__.rpartition('.')[2]}.{name}"

            def table(*given: Any, key: str = key, answer: Any = answer, **more: Any) -> Any:
                self.asked[key] = (*given, more) if more else given
                return answer

            patch.setattr(module, name, table)


IN_PLACE = "residuals in place, tile 9 x 10, 11 warps"
BESIDE = "residuals rounded beside the logits, tile 9 x 10, 11 warps"
SUM, PROJECT, PULL = (
    "R^T H tile 12 x 13 x 14, 15 warps", "H G^T tile 16 x 17 x 18, 19 warps",
    "R G tile 16 x 17 x 18, 19 warps",
)  # fmt: skip


@pytest.mark.parametrize("capability, major", [((9, 0), 9), ((10, 3), 10), ((7, 5), 8)])
def test_tiles_are_asked_for_and_said(machine, monkeypatch, capability, major) -> None:
    machine(capability=capability)
    tables = Tables(monkeypatch)
    shared = 227 * 1024

    def said(name: str, problem: Any) -> str:
        tables.asked.clear()
        return job(name, problem).kernels()

    for dtype, precision, words, narrow in (
        (torch.float32, "highest", "float32", False),
        (torch.float32, "medium", "tf32", False),
        (F16, "high", "tf32", False),
        (BF16, "medium", "bfloat16", True),
    ):
        for dim, alignment in ((D, PROJECT), (C, PROJECT), (C - 1, PULL)):
            problem = shape(C, dim, dtype=dtype, precision=precision)
            place = BESIDE if narrow else IN_PLACE
            assert said("blas", problem) == f"{words} products by cuBLAS, {place}"
            settings = {"loss": "cross_entropy", "soft": False, "narrow": narrow}
            assert tables.asked == {"residual.choose_config": (C, settings)}
            expected = f"{words} logits by cuBLAS, {place}, {SUM}, {alignment}"
            assert said("stored", problem) == expected
            project = alignment is PROJECT
            assert tables.asked["gradient_sum.choose_tile"] == (C, dim, narrow)
            assert tables.asked["stored_alignment.choose_tile"] == (C, project, narrow, True, major)
            assert said("recompute", problem) == (
                f"{words} logits by cuBLAS, {place}, {SUM}, H [W; G]^T tile 20 x 21 x 22, 23 warps"
            )
            assert tables.asked["stacked_alignment.choose_tile"] == (C, narrow, True, major)
            products = {"float32": "tf32x3", "tf32": "tf32" if dtype != F16 else "tf32x3",
                        "bfloat16": "bf16"}[words]  # fmt: skip
            aligned = dim * problem.features.dtype.itemsize % 16 == 0
            assert said("row_tiles", problem) == (
                f"{products} products, rows tile 24 x 25 x 26, 27 warps, {SUM}, {alignment}"
            )
            assert tables.asked["row_tiles.choose_tile"] == (
                C, products, aligned, shared, major, "ids"
            )  # fmt: skip
            assert said("few_classes", problem) == (
                "of the table products, one kernel a pass, tiles 1 x 2 x 3, 4 warps and 5 x 6 x 7, "
                "8 warps"
            )
    several = shape(C, D, 3, dtype=BF16)
    assert said("stored", several).startswith(f"bfloat16 logits by cuBLAS, {IN_PLACE}, {SUM}")
    assert tables.asked["gradient_sum.choose_tile"] == (3 * C, D, True)


def test_of_several_heads_the_first_kernel_asks_for_all(machine, monkeypatch) -> None:
    machine()
    tables = Tables(monkeypatch)
    from moso_fast.backends.triton.regimes import few_classes

    monkeypatch.setattr(few_classes, "triton_version", lambda: (3, 7))
    problem, shared = shape(C, D, 3, dtype=BF16), 227 * 1024
    for interpret, version in ((False, (3, 7)), (True, (999,))):
        machine(interpret=interpret)
        job("few_classes", problem).kernels()
        assert tables.asked == {
            "few_classes_tiles.choose_first_tile": (C, 3, D, "bf16", True, shared, version),
            "few_classes_tiles.choose_second_tile": (C, 3, "bf16", True, shared, version),
        }
    few_classes._default(problem, "second", False, (3, 1))
    assert tables.asked["few_classes_tiles.choose_second_tile"][3:] == (False, shared, (3, 1))


def test_which_kinds_of_loss_rows_tiles_are_for(machine, monkeypatch) -> None:
    machine()
    tables = Tables(monkeypatch)
    for kind in ("ids", "soft", "binary", "mse"):
        job("row_tiles", problem_of(random_case(kind))).kernels()
        called = "squared" if kind == "mse" else kind
        assert tables.asked["row_tiles.choose_tile"][5] == called


def test_residuals_are_rounded_where_they_are_operands_of_one_head() -> None:
    offsets = torch.tensor([0, 4])
    for expected, problem in (
        (True, shape(5, D, dtype=BF16)),
        (False, shape(4, D, dtype=BF16)),
        (False, shape(5, D, 2, dtype=BF16)),
        (False, shape(5, D, dtype=BF16, precision="high")),
        (False, shape(5, D, dtype=F16)),
        (False, shape(5, D, dtype=BF16, cu_seqlens=offsets)),
        (False, problem_of(random_case("mse", dtype=BF16))),
        (True, problem_of(random_case("soft", dtype=BF16))),
    ):
        assert triton_blas.narrow_ones(problem) == expected


def test_whether_rows_begin_at_multiples_of_16_bytes(monkeypatch) -> None:
    """As kernels get them: a copy begins there if its rows are so long."""
    from moso_fast.backends.triton.products import aligned_rows

    wide = torch.zeros(6, 40)
    labels = torch.zeros(6, dtype=torch.long)

    def of(features: torch.Tensor) -> bool:
        return aligned_rows(build_problem(features, torch.zeros(3, features.shape[1]), labels))

    assert of(wide[:, :8]) and not of(wide[:, 1:9]) and of(wide[:, 4:12])
    assert not of(torch.zeros(6, 9)) and not of(torch.zeros(6, 39)[:, :8])
    assert of(torch.zeros(8, 6).T) and not of(torch.zeros(9, 6).T)
    assert of(torch.zeros(8, 6, dtype=BF16).T) and not of(torch.zeros(4, 6, dtype=BF16).T)
    monkeypatch.setattr(type(build_problem(wide, torch.zeros(3, 40), labels)), "streamed", True)
    assert of(wide[:, 1:9]) and not of(torch.zeros(6, 9))


def test_heads_get_rows_up_to_a_multiple_of_8() -> None:
    for classes, rows in ((1, 8), (7, 8), (8, 8), (9, 16), (100, 104)):
        heads = torch.arange(1.0, classes * 3 + 1).view(classes, 3)
        found = triton_regime.padded(heads)
        assert found.shape == (rows, 3) and torch.equal(found[:classes], heads)
        assert not found[classes:].any() and (found is heads) == (rows == classes)


def test_targets_and_weights_as_kernels_read_them() -> None:
    case = random_case("ids", n=9, sample_weight=torch.arange(18.0)[::2])
    problem = problem_of(case)
    assert triton_regime.kernel_targets(problem, slice(2, 5)).equal(problem.labels[2:5])
    weights = triton_regime.kernel_weights(problem, slice(2, 5))
    assert weights is not None and weights.tolist() == [4.0, 6.0, 8.0] and weights.is_contiguous()
    assert triton_regime.kernel_weights(problem_of(random_case("ids")), slice(0, 2)) is None
    for dtype in (torch.float64, BF16, torch.float32):
        soft = problem_of(random_case("binary", n=9))
        soft = build_problem(soft.features, soft.weight, soft.labels.to(dtype).T.contiguous().T,
                             loss="binary_cross_entropy")  # fmt: skip
        found = triton_regime.kernel_targets(soft, slice(1, 4))
        assert found.dtype == dtype and found.is_contiguous() and found.equal(soft.labels[1:4])
    whole = build_problem(soft.features, soft.weight, soft.labels.int(), loss="mse")
    assert triton_regime.kernel_targets(whole, slice(1, 4)).dtype == torch.float32


def test_limits_of_a_device(monkeypatch) -> None:
    assert triton_regime.limits_of.__wrapped__(torch.device("cpu")) == Limits(232_448, (9, 0))
    for capability, major in (((7, 5), 8), ((8, 9), 8), ((9, 0), 9), ((10, 3), 10), ((12, 0), 8)):
        assert Limits(1, capability).major == major
    from triton.runtime import driver

    properties = [{"max_shared_mem": 5}, {"max_shared_mem": 7}]
    utils = SimpleNamespace(get_device_properties=properties.__getitem__)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(utils=utils), raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    capabilities = {"cuda:0": (8, 6), "cuda": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capabilities[str(d)])
    if driver.active.utils is not utils:
        pytest.skip("this Triton keeps its driver elsewhere")
    assert triton_regime.limits_of.__wrapped__(torch.device("cuda:0")) == Limits(5, (8, 6))
    assert triton_regime.limits_of.__wrapped__(torch.device("cuda")) == Limits(7, (9, 0))


def test_heads_and_gradients_in_the_dtype_of_the_operands(machine) -> None:
    machine()
    case = random_case("ids", n=6, heads=2, dtype=BF16)
    for precision, operand in (("medium", BF16), ("highest", torch.float32)):
        problem = problem_of(case, precision=precision)
        found = job("blas", problem)
        weight, bias = found.heads
        assert weight.equal(problem.weight.reshape(10, 7).to(operand)) and weight.is_contiguous()
        assert bias is not None and bias.equal(problem.bias.flatten()) and bias.shape == (10,)
        assert found.float_heads[0].equal(problem.weight) and found.float_heads[1].equal(
            problem.bias
        )
        wide = found.narrow_heads[0]
        assert wide.shape == (16, 7) and wide[:10].equal(weight) and not wide[10:].any()
        assert found.narrow_heads[1] is bias
        gradient, shift = torch.randn(2, 7, 5).transpose(1, 2), torch.randn(5, 2).T
        found.begin_second(gradient, shift)
        assert found.mean_grad is gradient and found.mean_bias_grad is shift
        assert found.gradient[0].equal(gradient.reshape(10, 7).to(operand))
        assert found.gradient[1].equal(shift.reshape(10))
        assert all(one.is_contiguous() for one in found.gradient)
        found.begin_second(gradient, None)
        assert found.gradient[1] is None
        assert found.lost.shape == (6,) and found.lost.dtype == torch.float32
    bare = job("blas", problem_of(random_case("ids", bias=False)))
    assert (bare.heads[1], bare.float_heads[1], bare.narrow_heads[1]) == (None, None, None)


def test_a_tile_is_picked_once_for_a_job(machine) -> None:
    machine()
    found, picked = job("blas", shape(C, D)), iter("abc")
    assert [found.tile(name, lambda: next(picked)) for name in ("x", "y", "x", "y")] == list("abab")
