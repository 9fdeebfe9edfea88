"""Times tiles of the kernels, shipped ones and others, beside products by cuBLAS.

    python -m benches.gpu variants [--part rows] [--part sums ..] [--out FILE]

What the tables of tiles and of regimes are chosen by. Every variant is compiled beforehand, by
processes side by side (Triton keeps what they compile), then timed in one process by device events
behind a pause, the median of five. One JSON line each, to --out (default: build/gpu-variants.jsonl)
as soon as it is known. Results are not checked here: `python -m benches.gpu check` does that.

With TRITON_INTERPRET=1 all variants run once on a few rows, without a GPU and without times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .build import ROOT

BF16 = torch.bfloat16
ROWS = 1_280_000
FEW_ROWS = 320  # a multiple of 16, as ROWS is: compiled for both
ROUNDS = 5
PAUSE_CYCLES = 400_000
COMPILERS = 12  # processes

Work = Callable[[], object]
# A variant: its name, and what makes its work on so many rows.
Variant = tuple[str, Callable[[int], Work]]


def device() -> torch.device:
    """Return the GPU, or the CPU for the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache(maxsize=1)
def features(rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Random features, the last ones kept."""
    h = torch.empty(rows, dim, dtype=dtype, device=device())
    for part in h.split(2**17):
        part.copy_(torch.randn(part.shape, device=device()))
    return h


def _tile(rows: int, classes: int, dim: int, warps: int, stages: int) -> Any:
    from moso_fast.kernels.tiles import Tile

    return Tile(rows, classes, dim, warps, stages, 255, 1, "HGMMA")


def _statistics(rows: int) -> tuple[Tensor, Tensor]:
    """Four rows of statistics, and a status word."""
    status = torch.full((4,), rows, dtype=torch.int64, device=device())
    return torch.empty(4, 1, rows, device=device()), status


def rows() -> Iterator[Variant]:
    """Logits, residuals and norms of a tile of rows (regime row_tiles)."""
    from moso_fast.kernels import row_tiles
    from moso_fast.kernels.row_arguments import RowOutputs

    def make(c: int, d: int, tile: Any, dtype: torch.dtype) -> Callable[[int], Work]:
        def build(n: int) -> Work:
            h, weight = features(n, d, dtype), torch.randn(1, c, d, device=device())
            labels = torch.randint(c, (n,), device=device())
            statistics, status = _statistics(n)
            counted = torch.empty(n, dtype=torch.bool, device=device())
            out = RowOutputs(*statistics, torch.empty(n, device=device()), counted)
            precision = "medium" if dtype == BF16 else "highest"
            return lambda: row_tiles.row_tiles(
                h, weight, None, labels, out=out, status=status, precision=precision, tile=tile
            )

        return build

    for c, d, tiles in (
        (10, 512, ((128, 16, 64, 4, 4), (64, 16, 64, 4, 4), (64, 16, 128, 4, 3))),
        (30, 512, ((64, 32, 64, 4, 4), (128, 32, 64, 4, 4), (128, 32, 64, 8, 4))),
        (60, 512, ((64, 64, 64, 4, 4), (128, 64, 64, 8, 4), (64, 64, 64, 8, 4))),
        (100, 512, ((64, 128, 64, 4, 4), (128, 128, 64, 8, 3), (64, 128, 64, 8, 4))),
        (10, 2048, ((128, 16, 64, 4, 4), (64, 16, 64, 4, 4))),
        (100, 2048, ((128, 128, 64, 8, 3), (64, 128, 64, 8, 4))),
    ):
        for t in tiles:
            yield f"C={c} D={d} bfloat16 {t}", make(c, d, _tile(*t), BF16)
    for t in ((64, 16, 32, 4, 3), (64, 16, 64, 4, 3)):
        yield f"C=10 D=512 float32 {t}", make(10, 512, _tile(*t), torch.float32)


def sums() -> Iterator[Variant]:
    """R^T H of narrow residuals, and of float32 ones."""
    from moso_fast.kernels.gradient_sum import gradient_sum

    def make(c: int, d: int, tile: Any, dtype: torch.dtype) -> Callable[[int], Work]:
        def build(n: int) -> Work:
            h = features(n, d, dtype)
            residual = (torch.randn(n, -(-c // 8) * 8, device=device()) * 0.1).to(dtype)
            counted = torch.ones(n, dtype=torch.bool, device=device())
            precision = "medium" if dtype == BF16 else "highest"
            return lambda: gradient_sum(
                residual, h, precision=precision, counted=counted, bias=False, tile=tile
            )

        return build

    for c, d, tiles in (
        (10, 512, ((64, 64, 128, 4, 3), (128, 16, 128, 4, 3), (64, 64, 256, 8, 3))),
        (100, 512, ((64, 128, 128, 8, 3), (64, 128, 128, 4, 3), (64, 128, 256, 8, 3))),
        (10, 2048, ((64, 64, 128, 4, 3), (64, 16, 128, 4, 4))),
        (100, 2048, ((64, 128, 128, 8, 3), (64, 128, 256, 8, 3))),
        (1000, 512, ((64, 128, 128, 8, 3), (64, 128, 256, 8, 4))),
    ):
        for t in tiles:
            yield f"C={c} D={d} bfloat16 {t}", make(c, d, _tile(*t), BF16)
    for c in (10, 100):
        yield f"C={c} D=512 float32, shipped tile", make(c, 512, None, torch.float32)


def alignments() -> Iterator[Variant]:
    """<g_i, G> from stored residuals, H G^T folded at once."""
    from moso_fast.kernels.stored_alignment import SelfTerm, stored_alignment

    def make(c: int, d: int, tile: Any, dtype: torch.dtype) -> Callable[[int], Work]:
        def build(n: int) -> Work:
            h, where = features(n, d, dtype), device()
            residual = (torch.randn(n, -(-c // 8) * 8, device=where) * 0.1).to(dtype)[:, :c]
            gradient = torch.randn(c, d, device=where).to(dtype)
            counted = torch.ones(n, dtype=torch.bool, device=where)
            out = torch.empty(1, n, device=where)
            ones, count = torch.ones(n, device=where), torch.tensor(n, device=where)
            own = SelfTerm(ones, count, ones) if dtype == BF16 else None
            return lambda: stored_alignment(
                h,
                residual,
                gradient,
                out,
                mean_bias_grad=torch.zeros(c, device=where),
                counted=counted,
                self_term=own,
                precision="medium" if dtype == BF16 else "highest",
                order="project",
                tile=tile,
            )

        return build

    for c, d, tiles in (
        (10, 512, ((128, 64, 64, 8, 3), (128, 16, 64, 4, 4), (64, 16, 128, 4, 3))),
        (100, 512, ((128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (128, 64, 64, 8, 3))),
        (10, 2048, ((128, 64, 64, 8, 3), (128, 16, 64, 4, 4))),
        (100, 2048, ((128, 128, 64, 8, 3), (64, 128, 64, 4, 4))),
        (1000, 512, ((128, 128, 64, 8, 3), (128, 256, 64, 8, 3))),
    ):
        for t in tiles:
            yield f"C={c} D={d} bfloat16 {t}", make(c, d, _tile(*t), BF16)
    for c in (10, 100):
        yield f"C={c} D=512 float32, shipped tile", make(c, 512, None, torch.float32)


def residuals() -> Iterator[Variant]:
    """Softmax of logits, residuals narrow or in place."""
    from moso_fast.kernels import residual as kernel

    def make(c: int, share: int, config: Any, narrow: bool) -> Callable[[int], Work]:
        def build(n: int) -> Work:
            n, where = max(1, n // share), device()
            logits, labels = torch.randn(n, c, device=where), torch.randint(c, (n,), device=where)
            statistics, status = _statistics(n)
            given = None
            if narrow:
                stored = torch.empty(n, -(-c // 8) * 8, dtype=BF16, device=where)
                given = kernel.NarrowResiduals(stored, torch.empty(n, device=where))
            return lambda: kernel.residual_rows(
                logits,
                labels,
                classes=c,
                out=kernel.RowOutputs(*statistics),
                status=status,
                bias=torch.zeros(c, device=where),
                narrow=given,
                config=config,
            )

        return build

    for c, share, shapes in (
        (100, 1, ((32, 128, 16), (16, 128, 8), (8, 128, 8), (8, 128, 4))),
        (1000, 4, ((1, 1024, 1), (1, 1024, 2), (1, 1024, 4), (2, 1024, 4))),
        (128_256, 320, ((1, 1024, 4), (1, 2048, 8), (1, 4096, 16), (1, 8192, 32))),
    ):
        for shape in shapes:
            config = kernel.RowConfig(None, *shape, 255, 1)
            yield f"C={c} rows/{share} narrow {shape}", make(c, share, config, True)
        yield f"C={c} rows/{share} in place, shipped tile", make(c, share, None, False)


def sweeps() -> Iterator[Variant]:
    """Norms of rows, sums of columns, dots of rows: nothing but reads."""
    from moso_fast.kernels import row_norms as kernel

    def norms(d: int, tile: tuple[int, int]) -> Callable[[int], Work]:
        def build(n: int) -> Work:
            h, where = features(n, d, BF16), device()
            counted = torch.ones(n, dtype=torch.bool, device=where)
            sqnorm, status = torch.empty(n, device=where), _statistics(n)[1]
            return lambda: kernel.row_norms(h, counted, sqnorm, status, tile=tile)

        return build

    def columns(c: int) -> Callable[[int], Work]:
        def build(n: int) -> Work:
            residual = torch.randn(n // 4, c, device=device()).to(BF16)
            return lambda: kernel.column_sums(residual)

        return build

    def dots(d: int) -> Callable[[int], Work]:
        def build(n: int) -> Work:
            n, where = n // 4, device()
            left, right = torch.randn(n, d, device=where), features(n, d, BF16)
            ones, count = torch.ones(n, device=where), torch.tensor(n, device=where)
            own = kernel.OwnTerm(ones, count, ones)
            out, counted = torch.empty(n, device=where), ones.bool()
            return lambda: kernel.row_dots(left, right, out, counted, own)

        return build

    for tile in ((16, 256), (8, 512), (32, 128), (64, 128)):
        yield f"norms D=512 {tile}", norms(512, tile)
    for tile in ((16, 256), (32, 128)):
        yield f"norms D=2048 {tile}", norms(2048, tile)
    for c in (104, 1000):
        yield f"column sums C={c} rows/4", columns(c)
    for d in (512, 1000):
        yield f"row dots of {d} columns rows/4", dots(d)


def products() -> Iterator[Variant]:
    """Multiply by cuBLAS: logits, R^T H in slabs, R G."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device()).to(BF16)

    def logits(c: int, d: int, share: int) -> Callable[[int], Work]:
        def build(n: int) -> Work:
            h, weight = features(n // share, d, BF16), draw(c, d)
            return lambda: torch.mm(h, weight.T, out_dtype=torch.float32)

        return build

    def slabs(c: int, d: int, share: int, slab: int) -> Callable[[int], Work]:
        def build(n: int) -> Work:
            rows = max(1, n // share // slab)
            h, residual = draw(rows, slab, d), draw(rows, slab, c)
            return lambda: torch.bmm(residual.transpose(1, 2), h, out_dtype=torch.float32)

        return build

    def pull(c: int, d: int, share: int) -> Callable[[int], Work]:
        def build(n: int) -> Work:
            residual, gradient = draw(n // share, c), draw(c, d)
            return lambda: torch.mm(residual, gradient, out_dtype=torch.float32)

        return build

    if device().type != "cuda":
        return  # PyTorch has these products on CUDA alone
    for c, d in ((10, 512), (16, 512), (100, 512), (104, 512), (1000, 512), (1000, 2048)):
        yield f"H W^T C={c} D={d} rows/2", logits(c, d, 2)
    for c in (104, 1000):
        for slab in (8192, 65_536):
            yield f"R^T H C={c} D=512 rows/2 slabs of {slab}", slabs(c, 512, 2, slab)
    yield "R G C=1000 D=512 rows/2", pull(1000, 512, 2)
    yield "H W^T C=128256 D=4096 rows/156", logits(128_256, 4096, 156)
    yield "R G C=128256 D=4096 rows/156", pull(128_256, 4096, 156)


PARTS: dict[str, Callable[[], Iterator[Variant]]] = {
    part.__name__: part for part in (rows, sums, alignments, residuals, sweeps, products)
}


def main(arguments: Sequence[str]) -> int:
    """Compile side by side, then time one after the other; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benches.gpu variants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; repeatable")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-variants.jsonl")
    parser.add_argument("--compile", metavar="K/N", help=argparse.SUPPRESS)  # one process' share
    options = parser.parse_args(arguments)
    chosen = options.part or list(PARTS)
    if options.compile:
        share, of = map(int, options.compile.split("/"))
        for number, (_, name, make) in enumerate(_variants(chosen)):
            if number % of == share:
                _attempt(name, make)
        return 0
    gpu = device().type == "cuda"
    if gpu:
        _compile(chosen)
    elif os.environ.get("TRITON_INTERPRET") != "1":
        print("no CUDA device, and TRITON_INTERPRET is not 1: nothing to time", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with options.out.open("w", encoding="utf-8") as file:
        for part, name, make in _variants(chosen):
            line: dict[str, Any] = {"part": part, "name": name}
            try:
                work = make(ROWS if gpu else FEW_ROWS)
                if gpu:
                    line["microseconds"] = round(_microseconds(work), 1)
                else:
                    work()
            except Exception as error:  # a tile that this GPU refuses must not end the rest
                line["why"] = f"{type(error).__name__}: {str(error)[:200]}"
                failed += 1
            print(json.dumps(line), flush=True)
            print(json.dumps(line), file=file, flush=True)
    return 1 if failed and not gpu else 0


def _variants(parts: Sequence[str]) -> Iterator[tuple[str, str, Callable[[int], Work]]]:
    for part in parts:
        for name, make in PARTS[part]():
            yield part, name, make


def _compile(parts: Sequence[str]) -> None:
    """Have processes compile all variants, a share each."""
    own = [sys.executable, "-m", "benches.gpu", "variants"]
    own += [word for part in parts for word in ("--part", part)]
    children = [
        subprocess.Popen(
            [*own, "--compile", f"{k}/{COMPILERS}"], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        for k in range(COMPILERS)
    ]
    for child in children:
        child.wait()


def _attempt(name: str, make: Callable[[int], Work]) -> None:
    try:
        make(FEW_ROWS)()
    except Exception as error:  # said again, with its line, when it is timed
        print(f"{name}: {error}", file=sys.stderr)


def _microseconds(work: Work) -> float:
    """Median device time of one call."""
    work()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(PAUSE_CYCLES)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times)
