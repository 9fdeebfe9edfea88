"""What every launch of the Triton backend must move, multiply and wait for, regime by regime.

Tiles, slabs and splits are asked of the kernels' own tables. What cuBLAS and PyTorch do around
the kernels is in library_steps.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moso_fast.backends import _triton_few_classes

from .library_steps import LibrarySteps
from .occupancy import Fit, aligned, barriers, case_of, fit, loop_phases
from .roofline import L2_SECONDS, MEMORY_SECONDS, Phase, Step, Sweep


@dataclass(frozen=True)
class TritonSteps(LibrarySteps):
    """Steps of each regime; the names of the methods are theirs."""

    @property
    def rate(self) -> tuple[str, int]:
        """What our kernels multiply, and how many of its products one float32 product takes."""
        from moso_fast.kernels.few_classes_tiles import products_of

        named = products_of(self.problem.features.dtype, self.problem.precision)
        return {"bf16": ("bfloat16", 1), "tf32": ("tf32", 1), "tf32x3": ("tf32", 3)}[named]

    def few_classes(self) -> list[Step]:
        """One kernel a pass."""
        from moso_fast.kernels.few_classes_tiles import slab_rows

        p = self.problem
        first, second = (_triton_few_classes._default(p, which) for which in ("first", "second"))
        slab = slab_rows(self.chunk_rows, first.tile.rows, p.precision)
        slabs = -(-self.chunk_rows // slab)
        partials = 4.0 * slabs * self.chunks * p.classes * (p.dim + 1)
        residual = self.logits if self.kept else 0.0
        ahead = first.tile.rows * p.dim * self.item
        found = self._fit(_few_classes_case("first", first, p), first.tile, slabs, ahead)
        phases, counted = self._first_phases(first, found, -(-slab // first.tile.rows))
        again = "; features fetched again from L1 or L2" if first.reload else ""
        return [
            Step(
                "few_classes_first",
                "first",
                (
                    Sweep(
                        self.features + residual + 29.0 * p.rows + partials,
                        phases,
                        found.in_flight,
                        found.blocks,
                        staged=first.prefetch,
                    ),
                ),
                1,
                found.note + again + ("" if counted else "; instructions not counted"),
                found.blocks,
            ),
            Step("sum of partials", "first", (Sweep(partials + 8.0 * p.weight.numel()),)),
            self._few_classes_second(second, residual),
        ]

    def _first_phases(self, choice: Any, found: Fit, tiles: int) -> tuple[tuple[Phase, ...], bool]:
        """Phases of a program's loop, and whether their instructions are counted."""
        p, tile, (rate, times) = self.problem, choice.tile, self.rate
        flops = 2.0 * p.rows * tile.classes * tile.dim * times
        turns = self.chunks * found.turns * tiles
        loop = loop_phases(_few_classes_case("first", choice, p), self.version)
        # Nobody asks for a tile's labels before they are wanted.
        waits = {"softmax": MEMORY_SECONDS, "gradient": L2_SECONDS if choice.reload else 0.0}
        phases = []
        for name in ("logits", "softmax", "gradient"):
            instructions, stops = (loop or {}).get(name, (0, 0))
            phases.append(
                Phase(
                    name,
                    0.0 if name == "softmax" else flops,
                    rate,
                    found.instruction,
                    turns * tile.num_warps * instructions / 4,
                    turns * (waits.get(name, 0.0) + barriers(stops, self.gpu)),
                )
            )
        return tuple(phases), loop is not None

    def _few_classes_second(self, choice: Any, residual: float) -> Step:
        p, tile, (rate, times) = self.problem, choice.tile, self.rate
        staged = (tile.num_stages - 1) * tile.rows * tile.dim * self.item
        case = _few_classes_case("second", choice, p)
        found = self._fit(case, tile, -(-self.chunk_rows // tile.rows), staged)
        flops = 2.0 * p.rows * tile.classes * p.dim * times * (1 if self.kept else 2)
        # The first columns; at the end whether rows count, then their residuals.
        work = self._work(found, flops, rate, 3 * MEMORY_SECONDS)
        size = self.features + residual + 9.0 * p.rows
        return _kernel("few_classes_second", "second", size, work, found)

    def _gradient(self) -> Step:
        from moso_fast.kernels import gradient_sum as kernel

        p = self.problem
        rate, times = self.rate
        tile = kernel.choose_tile(p.classes, p.dim, rate == "bfloat16", aligned(p))
        tiles = -(-p.classes // tile.classes) * -(-p.dim // tile.dim)
        slab = kernel.slab_rows(self.chunk_rows, tiles, tile.rows, p.precision)
        slabs = -(-self.chunk_rows // slab)
        numbers = float(p.classes) * (p.dim + 1)
        at_once = max(1, min(slabs, kernel.PARTIAL_BYTES // (4 * p.classes * p.dim)))
        rounds = -(-slabs // at_once)
        staged = (tile.num_stages - 1) * tile.rows * (4 * tile.classes + self.item * tile.dim)
        found = self._fit(
            case_of("gradient_sum", tile, p), tile, min(slabs, at_once) * tiles, staged
        )
        padded = tile.classes * -(-p.classes // tile.classes) / p.classes
        padded *= tile.dim * -(-p.dim // tile.dim) / p.dim
        # Which rows count, then the first of them.
        work = self._work(found, self.gemm(times * padded), rate, 2 * rounds * MEMORY_SECONDS)
        partials = 4.0 * numbers * slabs * self.chunks
        # Float64 totals are cleared, and read and written again by the sum of every launch.
        totals = numbers * self.calls * (8.0 + 32.0 * rounds)
        return _kernel(
            "gradient_sum",
            "first",
            self.features + self.logits + partials,
            work,
            found,
            Sweep(partials + totals),
            f"; {tiles} programs a slab share it through L2",
        )

    def _first(self) -> list[Step]:
        return [self.two_norms(), *self.logits_and_residuals(), self._gradient()]

    def stored(self) -> list[Step]:
        """CuBLAS logits, residuals in place, gradient sum, alignment."""
        from moso_fast.kernels import stored_alignment as kernel

        p, (rate, times) = self.problem, self.rate
        project = p.classes <= p.dim
        tile = kernel.choose_tile(p.classes, project, rate == "bfloat16", aligned(p), 9)
        if project:
            splits = kernel.class_splits(self.chunk_rows, 1, p.classes, p.dim * self.item, tile)
            tiles = -(-p.classes // tile.classes)
            padded, k, order = tile.classes * tiles / p.classes, tile.dim, "projected"
            # Which rows count; then for each class tile its first columns, and its residuals.
            each = -(-tiles // splits)
            waits = MEMORY_SECONDS * (2 + each) + L2_SECONDS * (each - 1)
        else:
            splits, padded, k, order = -(-p.dim // tile.dim), 1.0, tile.classes, "pulled"
            waits = 3 * MEMORY_SECONDS  # which rows count, their residuals, their features
        programs = -(-self.chunk_rows // tile.rows) * splits
        staged = (tile.num_stages - 1) * tile.rows * k * (self.item if project else 4)
        found = self._fit(case_of(order, tile, p), tile, programs, staged)
        step = _kernel(
            "stored_alignment, " + ("H G^T" if project else "R G"),
            "second",
            self.features + self.logits + 9.0 * p.rows + self._parts(splits),
            self._work(found, self.gemm(times * padded), rate, waits),
            found,
            self.operands_of_gradient(),
        )
        again = [] if self.kept else self.logits_and_residuals("second")
        return [*self._first(), *again, step]

    def recompute(self) -> list[Step]:
        """As stored; the second pass makes the residuals again."""
        from moso_fast.kernels import stacked_alignment as kernel
        from moso_fast.kernels.stored_alignment import class_splits

        p, (rate, times) = self.problem, self.rate
        tile = kernel.choose_tile(p.classes, rate == "bfloat16", aligned(p), 9)
        splits = class_splits(self.chunk_rows, 1, p.classes, p.dim * self.item, tile)
        tiles = -(-p.classes // tile.classes)
        programs = -(-self.chunk_rows // tile.rows) * splits
        staged = (tile.num_stages - 1) * tile.rows * tile.dim * self.item
        found = self._fit(case_of("stacked", tile, p), tile, programs, staged)
        waits = 2 * MEMORY_SECONDS + L2_SECONDS * (-(-tiles // splits) - 1)
        flops = self.gemm(2 * times * tile.classes * tiles / p.classes)
        step = _kernel(
            "stacked_alignment",
            "second",
            self.features + 29.0 * p.rows + self._parts(splits),
            self._work(found, flops, rate, waits),
            found,
            self.operands_of_gradient(2),
        )
        return [*self._first(), step]

    def _parts(self, splits: int) -> float:
        """Bytes of the parts of every row's alignment, written and added up."""
        return 8.0 * self.problem.rows * splits if splits > 1 else 4.0 * self.problem.rows

    def _fit(self, case: str, tile: Any, programs: float, staged: float | None = None) -> Fit:
        return fit(case, tile, programs, self.gpu, self.version, staged)

    def _work(self, found: Fit, flops: float, rate: str, waits: float) -> tuple[Phase, float]:
        """Product of a kernel, and the seconds that its programs are idle at their ends."""
        phase = Phase("product", flops, rate, found.instruction)
        return phase, self.chunks * found.turns * waits


def _kernel(
    name: str,
    part: str,
    size: float,
    work: tuple[Phase, float],
    found: Fit,
    around: Sweep | None = None,
    more: str = "",
) -> Step:
    """One of our kernels with a pipelined loop, whose programs ask for their own rows alone."""
    phase, idle = work
    sweep = Sweep(size, (phase,), found.in_flight, found.blocks, idle=idle)
    sweeps = (sweep,) if around is None else (sweep, around)
    return Step(name, part, sweeps, 1, found.note + more, found.blocks)


def _few_classes_case(which: str, choice: Any, problem: Any) -> str:
    tile, dtype = choice.tile, "bf16" if problem.features.dtype == torch.bfloat16 else "fp32"
    odd = "" if choice.aligned else "-unaligned"
    return f"{which}-{tile.rows}x{tile.classes}x{tile.dim}-{choice.products}-{dtype}-full{odd}"
