"""What every launch of the Triton backend must move and multiply, regime by regime.

Tiles, slabs and splits are asked of the kernels' own tables; registers and shared memory of the
compiler's report in results/triton_aot.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from gpu_roofline import RESULTS, Gpu, Step

from moso_fast.backends import _triton_few_classes
from moso_fast.backends._triton_regime import SLAB_ROWS, operand_name
from moso_fast.problem import Problem

# Bytes that must be under way on a multiprocessor for the full rate: rate x some 600 ns (Little).
_LATENCY_SECONDS = 600e-9
_THREADS_A_MULTIPROCESSOR = 2048
_REGISTERS = 65536


@dataclass(frozen=True)
class TritonSteps:
    """Steps of each regime; the names of the methods are theirs."""

    problem: Problem
    chunk_rows: int
    chunks: int
    kept: bool
    gpu: Gpu

    @property
    def item(self) -> int:
        """Bytes of a number of the features."""
        return self.problem.features.dtype.itemsize

    @property
    def features(self) -> float:
        """Bytes of one read of the features."""
        return float(self.problem.rows) * self.problem.dim * self.item

    @property
    def logits(self) -> float:
        """Bytes of one float32 number for every row and class."""
        return 4.0 * self.problem.rows * self.problem.classes

    def gemm(self, factor: float = 1.0) -> float:
        """Multiplications and additions of one product."""
        p = self.problem
        return 2.0 * p.rows * p.classes * p.dim * factor

    @property
    def rate(self) -> tuple[str, int]:
        """What our kernels multiply, and how many of its products one float32 product takes."""
        from moso_fast.kernels.few_classes_tiles import products_of

        named = products_of(self.problem.features.dtype, self.problem.precision)
        return {"bf16": ("bfloat16", 1), "tf32": ("tf32", 1), "tf32x3": ("tf32", 3)}[named]

    def few_classes(self) -> list[Step]:
        """One kernel a pass."""
        from moso_fast.kernels.few_classes_tiles import slab_rows

        p, gpu = self.problem, self.gpu
        rate, times = self.rate
        first, second = (_triton_few_classes._default(p, which) for which in ("first", "second"))
        slab = slab_rows(self.chunk_rows, first.tile.rows, p.precision)
        slabs = self.chunks * -(-self.chunk_rows // slab)
        partials = 4.0 * slabs * p.classes * (p.dim + 1)
        residual = self.logits if self.kept else 0.0
        name = "bf16" if p.features.dtype == torch.bfloat16 else "fp32"
        ahead = first.tile.rows * p.dim * self.item * first.prefetch
        then = (second.tile.num_stages - 1) * second.tile.rows * second.tile.dim * self.item
        again = "; features fetched again from L1 or L2" if first.reload else ""
        cases = [
            f"{which}-{c.tile.rows}x{c.tile.classes}x{c.tile.dim}-{c.products}-{name}-full"
            for which, c in (("first", first), ("second", second))
        ]
        return [
            Step(
                "few_classes_first",
                self.features + residual + 29.0 * p.rows + partials,
                4.0 * p.rows * first.tile.classes * first.tile.dim * times,
                rate,
                1,
                occupancy(cases[0], first.tile, slabs / self.chunks, gpu, ahead) + again,
            ),
            Step("sum of partials", partials + 8.0 * p.weight.numel()),
            Step(
                "few_classes_second",
                self.features + residual + 9.0 * p.rows,
                2.0 * p.rows * second.tile.classes * p.dim * times * (1 if self.kept else 2),
                rate,
                1,
                occupancy(cases[1], second.tile, self.chunk_rows / second.tile.rows, gpu, then),
            ),
        ]

    def _logits(self) -> list[Step]:
        """Operand copy where cuBLAS needs one, H W^T, the residual kernel."""
        from moso_fast.kernels.residual import choose_config

        p = self.problem
        operand, steps = operand_name(p), []
        wide = 2 if operand == "bfloat16" else 4
        if wide != self.item:
            steps.append(Step("features to float32", self.features + 4.0 * p.rows * p.dim))
        bias = 2 * self.logits if operand == "bfloat16" else 0.0
        config = choose_config(p.classes)
        touches = 2 if config.block_classes >= p.classes else 3
        case = f"softmax_residual_kernel-C{config.max_classes or 'any'}-IDS-plain"
        programs = self.chunk_rows / config.block_rows
        return [
            *steps,
            Step(
                "H W^T by cuBLAS",
                p.rows * p.dim * wide + self.logits + bias,
                self.gemm(),
                operand,
                1,
                "the bias is added in a sweep of its own" if bias else "bias in its epilogue",
            ),
            Step(
                "softmax_residual",
                touches * self.logits + 24.0 * p.rows,
                note=occupancy(case, config, programs, self.gpu)
                + ("" if touches == 2 else "; second walk from L2 where rows in flight fit"),
            ),
        ]

    def _gradient(self) -> Step:
        from moso_fast.kernels import gradient_sum as kernel

        p = self.problem
        rate, times = self.rate
        rounded = rate == "bfloat16"
        tile = kernel.choose_tile(p.classes, p.dim, rounded, _aligned(p))
        tiles = -(-p.classes // tile.classes) * -(-p.dim // tile.dim)
        slab = kernel.slab_rows(self.chunk_rows, tiles, tile.rows, p.precision)
        slabs = -(-self.chunk_rows // slab)
        numbers = float(p.classes) * (p.dim + 1)
        at_once = max(1, min(slabs, kernel.PARTIAL_BYTES // (4 * p.classes * p.dim)))
        # float32 partials written and read; float64 sums read and written by every launch.
        rounds = self.chunks * -(-slabs // at_once)
        partials = 8.0 * numbers * slabs * self.chunks + 32.0 * numbers * rounds
        bk = (tile.num_stages - 1) * tile.rows * (4 * tile.classes + self.item * tile.dim)
        padded = tile.classes * -(-p.classes // tile.classes) / p.classes
        padded *= tile.dim * -(-p.dim // tile.dim) / p.dim
        return Step(
            "gradient_sum",
            self.features + self.logits + partials,
            self.gemm(times * padded),
            rate,
            1,
            occupancy(
                _case("gradient_sum", tile, p), tile, min(slabs, at_once) * tiles, self.gpu, bk
            )
            + f"; {tiles} programs a slab share it through L2",
        )

    def _first(self) -> list[Step]:
        p = self.problem
        norms = Step(
            "two norms of every row", 2 * self.features + 40.0 * p.rows, 0.0, "bfloat16", 2,
            "two sweeps of PyTorch",
        )  # fmt: skip
        return [norms, *self._logits(), self._gradient()]

    def stored(self) -> list[Step]:
        """CuBLAS logits, residuals in place, gradient sum, alignment."""
        from moso_fast.kernels import stored_alignment as kernel

        p = self.problem
        rate, times = self.rate
        project = p.classes <= p.dim
        tile = kernel.choose_tile(p.classes, project, rate == "bfloat16", _aligned(p), 9)
        size = p.dim * self.item
        if project:
            splits = kernel.class_splits(self.chunk_rows, 1, p.classes, size, tile)
            padded = tile.classes * -(-p.classes // tile.classes) / p.classes
        else:
            splits, padded = -(-p.dim // tile.dim), 1.0
        again = [] if self.kept else self._logits()
        parts = 8.0 * p.rows * splits if splits > 1 else 4.0 * p.rows
        programs = -(-self.chunk_rows // tile.rows) * splits
        k, order = (tile.dim, "projected") if project else (tile.classes, "pulled")
        flight = (tile.num_stages - 1) * tile.rows * k * self.item
        step = Step(
            "stored_alignment, " + ("H G^T" if project else "R G"),
            self.features + self.logits + parts + 9.0 * p.rows,
            self.gemm(times * padded),
            rate,
            1,
            occupancy(_case(order, tile, p), tile, programs, self.gpu, flight),
        )
        return [*self._first(), *again, step]

    def recompute(self) -> list[Step]:
        """As stored; the second pass makes the residuals again."""
        from moso_fast.kernels import stacked_alignment as kernel
        from moso_fast.kernels.stored_alignment import class_splits

        p = self.problem
        rate, times = self.rate
        tile = kernel.choose_tile(p.classes, rate == "bfloat16", _aligned(p), 9)
        splits = class_splits(self.chunk_rows, 1, p.classes, p.dim * self.item, tile)
        padded = tile.classes * -(-p.classes // tile.classes) / p.classes
        programs = -(-self.chunk_rows // tile.rows) * splits
        flight = (tile.num_stages - 1) * tile.rows * tile.dim * self.item
        step = Step(
            "stacked_alignment",
            self.features + 29.0 * p.rows + (8.0 * p.rows * splits if splits > 1 else 0.0),
            self.gemm(2 * times * padded),
            rate,
            1,
            occupancy(_case("stacked", tile, p), tile, programs, self.gpu, flight),
        )
        return [*self._first(), step]

    def blas(self) -> list[Step]:
        """Every product by cuBLAS."""
        p = self.problem
        rounded = operand_name(p) == "bfloat16"
        wide, copied = (2, 1.5 * self.logits) if rounded else (4, 0.0)
        slabs = max(1, self.chunk_rows // SLAB_ROWS[p.precision]) * self.chunks
        numbers, rows = float(p.classes) * p.dim, float(p.rows)
        norm = Step("norm of every row", self.features + 24.0 * rows, feature_reads=1)
        # Where one look at the norms shows nothing bad, nothing is cleared.
        gradient = Step(
            "R^T H by cuBLAS",
            copied + wide * rows * (p.classes + p.dim) + 8.0 * numbers * slabs + 32.0 * numbers
            + self.logits,
            self.gemm(),
            operand_name(p),
            1,
            "residuals rounded in a sweep, their column sums in another" if rounded else "",
        )  # fmt: skip
        if p.classes <= p.dim:
            sweeps, name = 5 * self.logits, "H G^T by cuBLAS, folded by PyTorch"
        else:
            sweeps = copied + rows * p.dim * (16 + wide)
            name = "R G by cuBLAS, folded by PyTorch"
        bias = self.logits
        lost = (9 if p.classes > p.dim else 6) * self.logits if rounded else 0.0
        second = Step(
            name,
            wide * rows * p.dim + sweeps + bias + lost,
            self.gemm(),
            operand_name(p),
            1,
            "N x C sweeps for the self-term" if rounded else "",
        )
        again = [] if self.kept else self._logits()
        return [norm, *self._logits(), gradient, *again, second]


def _aligned(problem: Problem) -> bool:
    """Whether rows of features and residuals begin at multiples of 16 bytes."""
    return problem.dim * problem.features.dtype.itemsize % 16 == 0 and problem.classes % 4 == 0


def _case(kernel: str, tile: Any, problem: Problem) -> str:
    dtype = "bf16" if problem.features.dtype == torch.bfloat16 else "fp32"
    odd = "" if _aligned(problem) else "-unaligned"
    return f"{kernel}-{tile.rows}x{tile.classes}x{tile.dim}-{dtype}{odd}"


@cache
def _figures() -> dict[str, Any]:
    versions = json.loads((RESULTS / "triton_aot.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = versions[max(versions, key=lambda v: [int(x) for x in v.split(".")])]
    return found


def occupancy(case: str, tile: Any, programs: float, gpu: Gpu, staged: float | None = None) -> str:
    """Say how many blocks fit a multiprocessor, by the compiler's report, and in how many waves."""
    registers, _, shared, instruction = _figures()[case]["sm_90"]
    threads = 32 * tile.num_warps
    blocks = min(
        _REGISTERS // (8 * -(-registers // 8) * threads),
        (gpu.shared_bytes + 1024) // (shared + 1024),
        _THREADS_A_MULTIPROCESSOR // threads,
    )
    words = [
        f"{instruction}; {registers} registers x {threads} threads, {shared} B shared: {blocks} "
        f"block(s) a multiprocessor"
    ]
    if staged is not None:
        words.append(bytes_in_flight(blocks * staged, gpu))
    words.append(last_wave(programs / (blocks * gpu.multiprocessors)))
    return ", ".join(words)


def bytes_in_flight(staged: float, gpu: Gpu) -> str:
    """Bytes under way on a multiprocessor, beside what the memory's latency asks for."""
    wanted = gpu.read * _LATENCY_SECONDS / gpu.multiprocessors
    return f"{staged / 1024:.0f} of {wanted / 1024:.0f} KiB in flight"


def last_wave(waves: float) -> str:
    """How much of the last round of blocks is idle."""
    rounds = -(-waves // 1)
    idle = 0 if not rounds else 100 * (1 - waves / rounds)
    return f"{waves:.2f} waves, {idle:.0f}% idle"
