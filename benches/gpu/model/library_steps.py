"""What cuBLAS and PyTorch do in the regimes of the Triton backend: operation by operation.

An operation of PyTorch reads its operands from memory and writes its result there: what stays in
the L2 cache between two of them is not taken off, and that is little where a chunk's logits are
2 GB. Each is a sweep of its own; only a product moves its operands while it multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

from moso_fast.backends.triton.regime import SLAB_ROWS, operand_name
from moso_fast.backends.triton.regimes.blas import _BATCH_BYTES, narrow_ones
from moso_fast.core.problem import Problem

from .occupancy import fit
from .roofline import L2_SECONDS, MEMORY_SECONDS, Gpu, Step, Sweep, product


@dataclass(frozen=True)
class LibrarySteps:
    """One job of the Triton backend; bytes and products are those of all chunks together."""

    problem: Problem
    chunk_rows: int
    kept: bool
    gpu: Gpu
    version: tuple[int, ...]  # of Triton

    @property
    def chunks(self) -> float:
        """Chunks of the job, the last and shorter one by its share of the rows."""
        return self.problem.rows / self.chunk_rows

    @property
    def calls(self) -> int:
        """Chunks of the job, whatever their length."""
        return -(-self.problem.rows // self.chunk_rows)

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

    @property
    def narrow(self) -> bool:
        """Whether residuals are written rounded to bfloat16, in rows of a multiple of 16 bytes."""
        return narrow_ones(self.problem)

    @property
    def residuals(self) -> float:
        """Bytes of one read of the residuals as cuBLAS's regimes store them."""
        if not self.narrow:
            return self.logits
        return 2.0 * self.problem.rows * 8 * -(-self.problem.classes // 8)

    @property
    def products(self) -> float:
        """Bytes of one float32 number for every row and column of a product with the head.

        Behind narrow residuals the head has rows of zeros up to a multiple of 8.
        """
        return 2 * self.residuals if self.narrow else self.logits

    @property
    def elements(self) -> float:
        """Elements of the head, and of its gradient."""
        return float(self.problem.weight.numel())

    @property
    def rounded(self) -> bool:
        """Whether cuBLAS multiplies bfloat16 elements."""
        return operand_name(self.problem) == "bfloat16"

    def gemm(self, factor: float = 1.0) -> float:
        """Multiplications and additions of one product."""
        p = self.problem
        return 2.0 * p.rows * p.classes * p.dim * factor

    def operands_of_gradient(self, matrices: int = 1) -> Sweep:
        """Sweep that rounds so many matrices of the head's size for every chunk."""
        return Sweep(6.0 * self.elements * self.calls * matrices if self.rounded else 0.0)

    def norms(self) -> Step:
        """Norm of every row, and which of them are finite."""
        sweep = Sweep(self.features + 5.0 * self.problem.rows)
        return Step("norm of every row", "first", (sweep,), 1, "a kernel of its own")

    def column_sums(self) -> list[Step]:
        """Sum of narrow residuals over the rows; others are summed along with the gradient."""
        if not self.narrow:
            return []
        return [Step("column sums of the residuals", "first", (Sweep(self.residuals),))]

    def logits_and_residuals(self, part: str = "first", *, narrow: bool) -> list[Step]:
        """Operand copy where cuBLAS needs one, H W^T, the residual kernel."""
        from moso_fast.kernels.residual import choose_config

        p = self.problem
        wide, steps = 2 if self.rounded else 4, []
        if wide != self.item:
            copied = Sweep(self.features + 4.0 * p.rows * p.dim)
            steps.append(Step("features to float32", part, (copied,)))
        sweeps = [
            self.operands_of_gradient(),  # of the weights here
            product(
                p.rows * p.dim * wide + (self.products if narrow else self.logits),
                self.gemm(self.products / self.logits if narrow else 1.0),
                operand_name(p),
            ),
        ]
        note = "bias in its epilogue"
        if narrow:
            note = "in rows of a multiple of 32 bytes; the residual kernel adds the bias"
        elif self.rounded:
            sweeps.append(Sweep(2 * self.logits))
            note = "the bias is added in a sweep of its own"
        config = choose_config(p.classes, narrow=narrow)
        walks = 1 if config.block_classes >= p.classes else 2
        variant = "SMOOTH-narrow" if narrow else "IDS-plain"
        case = f"softmax_residual_kernel-C{config.max_classes or 'any'}-{variant}"
        programs = -(-self.chunk_rows // config.block_rows)
        found = fit(case, config, programs, self.gpu, self.version)
        # The label, then the logits; a longer row tile by tile, and again from the L2 cache.
        waits = 2 * MEMORY_SECONDS
        if walks == 2:
            tiles = -(-p.classes // config.block_classes)
            waits = (1 + tiles) * MEMORY_SECONDS + tiles * L2_SECONDS
        idle = found.turns * self.chunks * waits
        written = self.residuals if narrow else self.logits
        given = self.products if narrow else self.logits
        size = walks * given + written + 24.0 * p.rows
        sweep = Sweep(size, blocks=found.blocks, staged=False, idle=idle)
        again = "" if walks == 1 else "; second walk from L2 where rows in flight fit"
        return [
            *steps,
            Step("H W^T by cuBLAS", part, tuple(sweeps), 1, note),
            Step("softmax_residual", part, (sweep,), 0, found.note + again, found.blocks),
        ]

    def blas(self) -> list[Step]:
        """Every product by cuBLAS, of rows that are all finite, as one look has shown."""
        again = [] if self.kept else self.logits_and_residuals("second", narrow=self.narrow)
        first = [self.norms(), *self.logits_and_residuals(narrow=self.narrow), self._sum()]
        second = self._narrow_alignment() if self.narrow else [self._alignment()]
        return [*first, *self.column_sums(), *again, *second]

    def _sum(self) -> Step:
        """R^T H: residuals rounded, the product, slabs added up, column sums of the residuals."""
        p = self.problem
        wide, copied = (2, 1.5 * self.logits) if self.rounded else (4, 0.0)
        operand = wide / 4 * self.logits
        if self.narrow:
            copied, operand = 0.0, self.residuals
        written, added = self._slabs()
        sweeps = (
            Sweep(copied),
            product(
                operand + wide * float(p.rows) * p.dim + written,
                self.gemm(4 / wide * operand / self.logits),
                operand_name(p),
            ),
            Sweep(added),
            Sweep(0.0 if self.narrow else self.logits),
        )
        note = "residuals rounded in a sweep, " if self.rounded else ""
        note += "their column sums in another"
        if self.narrow:
            note = "under graph capture by our kernel, which leaves out rows that are not finite"
        return Step("R^T H by cuBLAS", "first", sweeps, 1, note)

    def _slabs(self) -> tuple[float, float]:
        """Bytes of partial sums that the product writes, and of adding them up in float64."""
        rows = SLAB_ROWS[self.problem.precision]
        whole, tail = divmod(self.chunk_rows, rows)
        columns = self.products / self.logits  # behind the classes of narrow residuals are more
        if self.chunk_rows <= rows:  # taken as it is
            return 4 * self.elements * self.calls * columns, 0.0
        elements = self.elements * self.chunks * columns
        together = max(1, int(_BATCH_BYTES / (4 * self.elements * columns)))
        groups, left = divmod(whole, together)
        # The total is cleared. Slabs of a group are read and their sum is written; that, or a slab
        # on its own, is read, and the total with it, which is written again.
        added = 8.0
        for slabs in (*[together] * groups, *[left] * bool(left), *[1] * bool(tail)):
            added += 20.0 if slabs == 1 else 4 * slabs + 8 + 24
        return 4 * elements * (whole + bool(tail)), elements * added

    def _narrow_alignment(self) -> list[Step]:
        """H G^T or R [G | gb] by cuBLAS, and the kernel behind it."""
        p, rows = self.problem, float(self.problem.rows)
        a_row = 17.0 * rows  # which count, |h|^2, what rounding took; the alignment
        padded = self.products / self.logits
        made = [self.operands_of_gradient()]
        if p.classes <= p.dim:
            made.append(product(self.features + self.products, self.gemm(padded), operand_name(p)))
            fold = Sweep(self.products + self.residuals + a_row)
            name, reads, note = "H G^T by cuBLAS", (1, 0), "<row, residual>, <gb, residual>"
        else:
            columns = p.dim + 8 * (p.bias is not None)
            pulled = 4.0 * rows * columns
            flops = self.gemm(padded * columns / p.dim)
            made.append(product(self.residuals + pulled, flops, operand_name(p)))
            fold = Sweep(pulled + self.features + a_row)
            name, reads, note = "R [G | gb] by cuBLAS", (0, 1), "<row, features>, and its gb part"
        return [
            Step(name, "second", tuple(made), reads[0]),
            Step("row_dots", "second", (fold,), reads[1], f"{note}; the self-term"),
        ]

    def _alignment(self) -> Step:
        """H G^T or R G, multiplied with the other operand, added up; what rounding took."""
        p = self.problem
        wide, rows = (2 if self.rounded else 4), float(p.rows)
        sweeps = [self.operands_of_gradient()]
        if p.classes <= p.dim:
            name = "H G^T by cuBLAS, folded by PyTorch"
            made = product(wide * rows * p.dim + self.logits, self.gemm(), operand_name(p))
            sweeps += [made, Sweep(3 * self.logits), Sweep(self.logits)]
        else:
            name = "R G by cuBLAS, folded by PyTorch"
            pulled = 4.0 * rows * p.dim
            size = wide * rows * p.classes + pulled
            sweeps += [
                Sweep(1.5 * self.logits if self.rounded else 0.0),
                product(size, self.gemm(), operand_name(p)),
                Sweep(2 * pulled + wide * rows * p.dim),
                Sweep(pulled),
            ]
        sweeps.append(Sweep(self.logits))  # the bias
        note = ""
        if self.rounded:
            # To bfloat16 and back, subtracted, (added,) multiplied, added up.
            sweeps.append(Sweep((13 if p.classes > p.dim else 10) * self.logits))
            note = "five or six sweeps over N x C for the self-term"
        return Step(name, "second", tuple(sweeps), 1, note)
