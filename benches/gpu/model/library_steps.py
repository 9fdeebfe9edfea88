"""What cuBLAS and PyTorch do in the regimes of the Triton backend: operation by operation.

An operation of PyTorch reads its operands from memory and writes its result there: what stays in
the L2 cache between two of them is not taken off, and that is little where a chunk's logits are
2 GB. Each is a sweep of its own; only a product moves its operands while it multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

from moso_fast.backends._triton_blas import _BATCH_BYTES
from moso_fast.backends._triton_regime import SLAB_ROWS, operand_name
from moso_fast.problem import Problem

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
    def numbers(self) -> float:
        """Numbers of the head, and of its gradient."""
        return float(self.problem.weight.numel())

    @property
    def rounded(self) -> bool:
        """Whether cuBLAS multiplies bfloat16 numbers."""
        return operand_name(self.problem) == "bfloat16"

    def gemm(self, factor: float = 1.0) -> float:
        """Multiplications and additions of one product."""
        p = self.problem
        return 2.0 * p.rows * p.classes * p.dim * factor

    def operands_of_gradient(self, matrices: int = 1) -> Sweep:
        """Sweep that rounds so many matrices of the head's size for every chunk."""
        return Sweep(6.0 * self.numbers * self.calls * matrices if self.rounded else 0.0)

    def two_norms(self) -> Step:
        """Largest number and norm of every row."""
        rows = 40.0 * self.problem.rows
        sweeps = (Sweep(self.features), Sweep(self.features + rows))
        return Step("two norms of every row", "first", sweeps, 2, "two sweeps of PyTorch")

    def logits_and_residuals(self, part: str = "first") -> list[Step]:
        """Operand copy where cuBLAS needs one, H W^T, the residual kernel."""
        from moso_fast.kernels.residual import choose_config

        p = self.problem
        wide, steps = 2 if self.rounded else 4, []
        if wide != self.item:
            copied = Sweep(self.features + 4.0 * p.rows * p.dim)
            steps.append(Step("features to float32", part, (copied,)))
        sweeps = [
            self.operands_of_gradient(),  # of the weights here
            product(p.rows * p.dim * wide + self.logits, self.gemm(), operand_name(p)),
        ]
        if self.rounded:
            sweeps.append(Sweep(2 * self.logits))
        note = "the bias is added in a sweep of its own" if self.rounded else "bias in its epilogue"
        config = choose_config(p.classes)
        walks = 1 if config.block_classes >= p.classes else 2
        case = f"softmax_residual_kernel-C{config.max_classes or 'any'}-IDS-plain"
        programs = -(-self.chunk_rows // config.block_rows)
        found = fit(case, config, programs, self.gpu, self.version)
        # The label, then the logits; a longer row tile by tile, and again from the L2 cache.
        waits = 2 * MEMORY_SECONDS
        if walks == 2:
            tiles = -(-p.classes // config.block_classes)
            waits = (1 + tiles) * MEMORY_SECONDS + tiles * L2_SECONDS
        idle = found.turns * self.chunks * waits
        size = (walks + 1) * self.logits + 24.0 * p.rows
        sweep = Sweep(size, blocks=found.blocks, staged=False, idle=idle)
        again = "" if walks == 1 else "; second walk from L2 where rows in flight fit"
        return [
            *steps,
            Step("H W^T by cuBLAS", part, tuple(sweeps), 1, note),
            Step("softmax_residual", part, (sweep,), 0, found.note + again, found.blocks),
        ]

    def blas(self) -> list[Step]:
        """Every product by cuBLAS."""
        rows = 24.0 * self.problem.rows
        norm = Step("norm of every row", "first", (Sweep(self.features + rows),), 1)
        # Where one look at the norms shows nothing bad, nothing is cleared.
        again = [] if self.kept else self.logits_and_residuals("second")
        return [norm, *self.logits_and_residuals(), self._sum(), *again, self._alignment()]

    def _sum(self) -> Step:
        """R^T H: residuals rounded, the product, slabs added up, column sums of the residuals."""
        p = self.problem
        wide, copied = (2, 1.5 * self.logits) if self.rounded else (4, 0.0)
        written, added = self._slabs()
        sweeps = (
            Sweep(copied),
            product(
                wide * float(p.rows) * (p.classes + p.dim) + written,
                self.gemm(),
                operand_name(p),
            ),
            Sweep(added),
            Sweep(self.logits),
        )
        note = "residuals rounded in a sweep, " if self.rounded else ""
        return Step("R^T H by cuBLAS", "first", sweeps, 1, note + "their column sums in another")

    def _slabs(self) -> tuple[float, float]:
        """Bytes of partial sums that the product writes, and of adding them up in float64."""
        rows = SLAB_ROWS[self.problem.precision]
        whole, rest = divmod(self.chunk_rows, rows)
        if self.chunk_rows <= rows:  # taken as it is
            return 4 * self.numbers * self.calls, 0.0
        numbers = self.numbers * self.chunks
        if 4 * whole * self.numbers <= _BATCH_BYTES:
            # Cleared; whole slabs added up, and that sum to the total; then the shorter slab.
            together = 8 + (4 * whole + 8) + 24 + 20 * bool(rest)
            return 4 * numbers * (whole + bool(rest)), numbers * together
        slabs = self.chunk_rows / rows
        return 4 * numbers * slabs, numbers * (8 + 20 * slabs)

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
