"""Cases for the ahead-of-time tests of the product kernels.

``python tests/support/aot_products.py`` lists what each one uses. A case is a shipped tile with the
variant of its kernel that needs most.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aot import ARCHITECTURES, Resources, compile_kernel, cuobjdump
from moso_fast.kernels import gradient_sum, stacked_alignment, stored_alignment
from moso_fast.kernels.tiles import Tile


@dataclass(frozen=True)
class ProductCase:
    """One variant of a kernel under one tile."""

    name: str
    kernel: Any
    tile: Tile
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...]
    majors: tuple[int, ...] = (8, 9, 10)  # compute capabilities
    since: tuple[int, int] = (3, 6)  # the oldest Triton that the tile is for

    @property
    def architectures(self) -> tuple[int, ...]:
        """Those of ``ARCHITECTURES`` that the tile is for."""
        return tuple(arch for arch in ARCHITECTURES if arch // 10 in self.majors)

    @property
    def heaviest(self) -> bool:
        """Whether no other dtype of features needs more of this tile."""
        return self.constants["ROUND"] or self.types["features"] == "*fp32"

    def compile(self, arch: int) -> Resources:
        """Compile for sm_``arch``."""
        return compile_kernel(
            self.kernel,
            self.types,
            self.constants,
            arch=arch,
            num_warps=self.tile.num_warps,
            num_stages=self.tile.num_stages,
            divisible=self.divisible,
        )


def sass(cubin: bytes) -> str:
    """Disassemble a cubin with the tool that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = cuobjdump().with_name("nvdisasm")
        return subprocess.run(
            [tool, "-c", file.name], check=True, capture_output=True, text=True
        ).stdout


def instructions(cubin: bytes) -> set[str]:
    """Return the names of all instructions in the code."""
    return set(re.findall(r"\b(HGMMA|HMMA|FFMA|LDGSTS|UTCHMMA|STL|LDL)\b", sass(cubin)))


def spilled(used: Resources) -> bool:
    """Whether registers are written to local memory; a stack that nothing touches costs nothing."""
    return used.stack > 0 and bool({"STL", "LDL"} & instructions(used.cubin))


def sums_leave_tensor_cores(ttgir: str) -> bool:
    """Whether every third matrix product starts from 0: the three of a tf32x3 one are a sum.

    The accumulator is then added to them by a float32 instruction, which rounds. Were it what the
    first product starts from, tensor cores would cut it off at every step, and slabs of 2048 equal
    rows would cost 1.6e-5 (tests/kernels/interpreted/truncating.py).
    """
    start = (
        r"(?:tt\.dot|warp_group_dot) [^,]+, [^,]+, (%\w+)|tc_gen5_mma [^,]+, [^,]+, [^,]+, (%\w+)"
    )
    starts = ["".join(found) for found in re.findall(start, ttgir)]
    zeros = {"%false", *re.findall(r"(%\w+) = arith\.constant dense<0\.0+e\+00>", ttgir)}
    fresh = sum(name in zeros for name in starts)
    return bool(starts) and 3 * fresh == len(starts)


def gradient_sum_cases() -> Iterator[ProductCase]:
    """Every tile with a mask, a bias sum and each dtype of features it serves.

    Narrow residuals come in padded rows, to tiles of their own or, beside features whose rows are
    not aligned, to others; their column sums are made elsewhere.
    """
    for choice in gradient_sum.TILES:
        kinds = ("bf16",) if choice.rounded else ("fp32", "bf16", "fp16")
        if choice.narrow:
            kinds = ("narrow",)
        elif choice.rounded and not choice.aligned:
            kinds = ("bf16", "narrow")
        for kind in kinds:
            yield _gradient_sum_case(choice, kind)


def _gradient_sum_case(choice: gradient_sum.Choice, kind: str) -> ProductCase:
    tile, odd, narrow = choice.tile, 0 if choice.aligned else 1, kind == "narrow"
    features = "bf16" if narrow else kind
    types = {
        "residual": "*bf16" if narrow else "*fp32",
        "features": f"*{features}",
        "counted": "*i1",
        "partial": "*fp32",
        "bias_partial": "*fp32",
        "rows": "i64",
        "first_slab": "i32",
        "slab_rows": "i32",
    }
    columns = 1000 if narrow else 1000 + odd
    constants: dict[str, Any] = {
        "CLASSES": columns,
        "DIM": 512 + odd,
        "RESIDUAL_STRIDE": columns,
        "FEATURE_STRIDE": 512 + odd,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_CLASSES": tile.classes,
        "BLOCK_DIM": tile.dim,
        "ROUND": choice.rounded,
        "PRECISION": "tf32" if features == "fp16" else "tf32x3",  # "medium", "highest"
        "UPCAST": False,
    }
    if narrow:
        constants["bias_partial"] = None
        del types["bias_partial"]
    return ProductCase(
        f"gradient_sum-{_shape(tile)}-{features}{'-narrow' if narrow else ''}{_suffix(odd)}",
        gradient_sum.gradient_sum_kernel,
        tile,
        types,
        constants,
        (*(name for name, kind in types.items() if kind[0] == "*"), "slab_rows"),
        choice.majors,
    )


def stored_alignment_cases() -> Iterator[ProductCase]:
    """Every tile of both orders with bias, mask, several heads and, where rounded, self-term.

    Rounded ones once more with residuals that are stored rounded, of one head, in padded rows.
    """
    orders = (
        (stored_alignment.projected_alignment_kernel, stored_alignment.PROJECT_TILES),
        (stored_alignment.pulled_alignment_kernel, stored_alignment.PULL_TILES),
    )
    for kernel, choices in orders:
        for choice in choices:
            odd = 0 if choice.aligned else 1
            kinds = ("bf16", "narrow") if choice.rounded else ("fp32", "bf16", "fp16")
            for kind in kinds:
                narrow, features = kind == "narrow", "bf16" if kind == "narrow" else kind
                types, constants = _alignment_arguments(choice, features, odd)
                types |= {"residual": "*bf16" if narrow else "*fp32", "counted": "*i1"}
                constants |= {"RESIDUAL_STRIDE": 3 * (1000 + odd), "lost": None}
                if narrow:
                    constants |= {"HEADS": 1, "CLASSES": 1001, "RESIDUAL_STRIDE": 1008}
                    del constants["lost"]
                    types["lost"] = "*fp32"
                order = kernel.__name__.split("_")[0]
                name = f"{features}-narrow" if narrow else features
                yield ProductCase(
                    f"{order}-{_shape(choice.tile)}-{name}{_suffix(odd)}",
                    kernel,
                    choice.tile,
                    types,
                    constants,
                    tuple(name for name, kind in types.items() if kind[0] == "*"),
                    choice.majors,
                )


def stacked_alignment_cases() -> Iterator[ProductCase]:
    """Every tile with biases, weights, several heads and, where rounded, the self-term."""
    for choice in stacked_alignment.TILES:
        odd = 0 if choice.aligned else 1
        for features in ("bf16",) if choice.rounded else ("fp32", "bf16", "fp16"):
            types, constants = _alignment_arguments(choice, features, odd)
            pointers = ("bias", "top", "log_sum", "label_residual", "sample_weight")
            types |= dict.fromkeys(pointers, "*fp32") | {"labels": "*i64"}
            types |= {"weight": types["mean_grad"], "state_stride": "i64"}
            types["smoothing_share"] = "fp32"
            constants["WEIGHT_STRIDE"] = 512 + odd
            yield ProductCase(
                f"stacked-{_shape(choice.tile)}-{features}{_suffix(odd)}",
                stacked_alignment.stacked_alignment_kernel,
                choice.tile,
                types,
                constants,
                tuple(name for name, kind in types.items() if kind[0] == "*"),
                choice.majors,
            )


def _alignment_arguments(
    choice: stored_alignment.Choice, features: str, odd: int
) -> tuple[dict[str, str], dict[str, Any]]:
    """Types and constants that both second passes share."""
    tile = choice.tile
    types = {
        "features": f"*{features}",
        "mean_grad": "*bf16" if choice.rounded else "*fp32",
        "mean_bias_grad": "*fp32",
        "parts": "*fp32",
        "rows": "i64",
        "part_stride": "i64",
    }
    constants = {
        "HEADS": 3,
        "CLASSES": 1000 + odd,
        "DIM": 512 + odd,
        "FEATURE_STRIDE": 512 + odd,
        "GRAD_STRIDE": 512 + odd,
        "SPLITS": 2,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_CLASSES": tile.classes,
        "BLOCK_DIM": tile.dim,
        "ROUND": choice.rounded,
        "PRECISION": "tf32" if features == "fp16" else "tf32x3",  # "medium", "highest"
        "UPCAST": False,
    }
    if choice.rounded:
        types |= {"feature_sqnorm": "*fp32", "count": "*i64"}
    else:
        constants |= {"feature_sqnorm": None, "count": None}
    return types, constants


def _suffix(odd: int) -> str:
    return "-unaligned" if odd else ""


def _shape(tile: Tile) -> str:
    return f"{tile.rows}x{tile.classes}x{tile.dim}"


def product_cases() -> list[ProductCase]:
    """All of the cases."""
    return [*gradient_sum_cases(), *stored_alignment_cases(), *stacked_alignment_cases()]


def main() -> None:
    """Print registers, stack and shared memory of every case on every architecture."""
    heads = "".join(f"{f'sm_{arch} reg/stack/smem':>26}" for arch in ARCHITECTURES)
    print(f"{'case':<52} warps stages{heads}")
    for case in product_cases():
        cells = ""
        for arch in ARCHITECTURES:
            if arch not in case.architectures:
                cells += f"{'':>26}"
                continue
            used = case.compile(arch)
            cells += f"{f'{used.registers}/{used.stack}/{used.shared}':>26}"
        print(
            f"{case.name:<52}{case.tile.num_warps:>6}{case.tile.num_stages:>7}{cells}", flush=True
        )


if __name__ == "__main__":
    main()
