"""What every launch of the Triton backend must move, multiply and wait for, regime by regime.

Tiles, slabs and splits are asked of the kernels' own tables. What cuBLAS and PyTorch do around
the kernels is in library_steps.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from moso_fast.backends.triton import products as triton_products
from moso_fast.backends.triton.regimes import few_classes as triton_few_classes
from moso_fast.backends.triton.regimes import row_tiles as triton_row_tiles

from .library_steps import LibrarySteps
from .occupancy import Fit, aligned, barriers, case_of, fit, loop_phases
from .roofline import L2_SECONDS, MEMORY_SECONDS, Phase, Step, Sweep


@dataclass(frozen=True)
class TritonSteps(LibrarySteps):
    """Steps of each regime; the names of the methods are theirs."""

    @property
    def rate(self) -> tuple[str, int]:
        """What our kernels multiply, and how many of its products one float32 product takes."""
        from moso_fast.kernels.operands import products_of

        named = products_of(self.problem.features.dtype, self.problem.precision)
        return {"bf16": ("bfloat16", 1), "tf32": ("tf32", 1), "tf32x3": ("tf32", 3)}[named]

    def few_classes(self) -> list[Step]:
        """One kernel a pass."""
        from moso_fast.kernels.few_classes_tiles import slab_rows

        p = self.problem
        first, second = (triton_few_classes._default(p, which) for which in ("first", "second"))
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

    def row_tiles(self) -> list[Step]:
        """One kernel from features to residuals, gradient sum, alignment."""
        from moso_fast.kernels.row_tiles import TILES, stored_columns

        p, (rate, times) = self.problem, self.rate
        products = triton_row_tiles._products(p)
        aligned_rows = triton_products.aligned_rows(p)
        tile = triton_row_tiles._tile(p, aligned_rows)
        dtype = "bf16" if p.features.dtype == torch.bfloat16 else "fp32"
        odd = "" if aligned_rows else "-unaligned"
        # Of tiles for class ids alone the report has that variant.
        choices = [choice for choice in TILES if choice.tile == tile]
        ids = "" if any("soft" in choice.losses for choice in choices) else "-ids"
        case = f"rows-{tile.rows}x{tile.classes}x{tile.dim}-{products}-{dtype}-full{ids}{odd}"
        programs = -(-self.chunk_rows // tile.rows)
        staged = (tile.num_stages - 1) * tile.rows * tile.dim * self.item
        found = self._fit(case, tile, programs, staged)
        item = 2 if products == "bf16" else 4
        residual = float(item) * p.rows * stored_columns(p.classes, products)
        flops = 2.0 * p.rows * tile.classes * p.dim * times
        # The first columns, the labels; what the softmax takes is not counted.
        work = self._work(found, flops, rate, 2 * MEMORY_SECONDS)
        partials = 4.0 * programs * self.chunks * p.classes
        rows = _kernel(
            "row_tiles",
            "first",
            self.features + residual + 29.0 * p.rows + partials,
            work,
            found,
            Sweep(partials),
            "; softmax not counted",
        )
        again = [] if self.kept else [replace(rows, part="second")]
        narrow = products == "bf16"
        return [
            rows,
            self._gradient(residual, padded=True, narrow=narrow),
            *again,
            self._alignment_of_stored(residual, narrow),
        ]

    def _gradient(self, residual: float, *, padded: bool, narrow: bool) -> Step:
        """Sum of residuals times features; ``residual``: bytes, in padded rows or not."""
        from moso_fast.kernels import gradient_sum as kernel

        p = self.problem
        rate, times = self.rate
        aligned_rows = aligned(p, padded)
        tile = kernel.choose_tile(p.classes, p.dim, rate == "bfloat16", aligned_rows, narrow)
        tiles = -(-p.classes // tile.classes) * -(-p.dim // tile.dim)
        slab = kernel.slab_rows(self.chunk_rows, tiles, tile.rows, p.precision)
        slabs = -(-self.chunk_rows // slab)
        elements = float(p.classes) * (p.dim + 1)
        at_once = max(1, min(slabs, kernel.PARTIAL_BYTES // (4 * p.classes * p.dim)))
        rounds = -(-slabs // at_once)
        item = 2 if narrow else 4
        staged = (tile.num_stages - 1) * tile.rows * (item * tile.classes + self.item * tile.dim)
        case = case_of("gradient_sum", tile, p, aligned_rows=aligned_rows, narrow=narrow)
        found = self._fit(case, tile, min(slabs, at_once) * tiles, staged)
        filled = tile.classes * -(-p.classes // tile.classes) / p.classes
        filled *= tile.dim * -(-p.dim // tile.dim) / p.dim
        # Which rows count, then the first of them.
        work = self._work(found, self.gemm(times * filled), rate, 2 * rounds * MEMORY_SECONDS)
        partials = 4.0 * elements * slabs * self.chunks
        # The first launch's sum is the total; those of others are written, read and added to it.
        totals = elements * self.calls * (8.0 + 32.0 * (rounds - 1))
        return _kernel(
            "gradient_sum",
            "first",
            self.features + residual + partials,
            work,
            found,
            Sweep(partials + totals),
            f"; {tiles} programs a slab share it through L2",
        )

    def _first(self, narrow: bool) -> list[Step]:
        given = self.residuals if narrow else self.logits
        gradient = self._gradient(given, padded=narrow, narrow=narrow)
        return [self.norms(), *self.logits_and_residuals(narrow=narrow), gradient]

    def stored(self) -> list[Step]:
        """CuBLAS logits, residuals in place or rounded beside them, gradient sum, alignment."""
        again = [] if self.kept else self.logits_and_residuals("second", narrow=self.narrow)
        alignment = self._alignment_of_stored(self.residuals, self.narrow)
        return [*self._first(self.narrow), *self.column_sums(), *again, alignment]

    def _alignment_of_stored(self, residual: float, narrow: bool) -> Step:
        """Product with the mean gradient, folded with so many bytes of residuals."""
        from moso_fast.kernels import stored_alignment as kernel

        p, (rate, times) = self.problem, self.rate
        project, aligned_rows = p.classes <= p.dim, aligned(p, narrow)
        tile = kernel.choose_tile(p.classes, project, rate == "bfloat16", aligned_rows, 9)
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
        item = self.item if project else 2 if narrow else 4
        staged = (tile.num_stages - 1) * tile.rows * k * item
        case = case_of(order, tile, p, aligned_rows=aligned_rows, narrow=narrow)
        found = self._fit(case, tile, programs, staged)
        return _kernel(
            "stored_alignment, " + ("H G^T" if project else "R G"),
            "second",
            self.features + residual + (13.0 if narrow else 9.0) * p.rows + self._parts(splits),
            self._work(found, self.gemm(times * padded), rate, waits),
            found,
            self.operands_of_gradient(),
        )

    def recompute(self) -> list[Step]:
        """As stored, in float32; the second pass makes the residuals again."""
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
        return [*self._first(narrow=False), step]

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
