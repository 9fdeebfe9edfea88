"""Cases for the ahead-of-time tests of the kernels for few classes.

``python tests/support/aot_few_classes.py`` prints what each one uses on every architecture. A
case is a shipped tile with the variant of its kernel that needs most.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aot import ARCHITECTURES
from aot_products import ProductCase, instructions
from moso_fast.kernels.few_classes_first import few_classes_first_kernel
from moso_fast.kernels.few_classes_second import few_classes_second_kernel
from moso_fast.kernels.few_classes_tiles import FIRST_TILES, SECOND_TILES, Choice

_STATISTICS = ("loss", "residual_sqnorm", "margin", "entropy", "feature_sqnorm")
_HEAD = {"weight": "*fp32", "bias": "*fp32", "sample_weight": "*fp32"}


def first_case(choice: Choice, features: str, *, plain: bool = False) -> ProductCase:
    """Build the first pass under a tile.

    ``plain``: one head that fills its lanes, class ids, nothing optional. Otherwise everything at
    once: heads side by side, soft labels, bias, weights, smoothing, kept residuals.
    """
    tile, together = choice.tile, 1 if plain else 2
    odd = 0 if choice.aligned else 3
    types = dict.fromkeys((*_STATISTICS, "grad_partials", "bias_partials"), "*fp32") | {
        "features": f"*{features}",
        "weight": "*fp32",
        "labels": "*i64" if plain else "*fp32",
        "counted": "*i1",
        "status": "*i64",
        **dict.fromkeys(("rows", "first_row", "target_stride", "head_stride"), "i32"),
        **dict.fromkeys(("slab_rows", "residual_stride", "ignore_index"), "i32"),
        "smoothing": "fp32",
    }
    optional = {"bias": "*fp32", "sample_weight": "*fp32", "residual": "*fp32"}
    constants: dict[str, Any] = {
        "HEADS": 1 if plain else 3,
        "CLASSES": tile.classes // together - (0 if plain else 1),
        "DIM": tile.dim - odd,
        "FEATURE_STRIDE": tile.dim - odd,
        "BLOCK_ROWS": tile.rows,
        "HEADS_A_TILE": together,
        "LANES": tile.classes // together,
        "PARTS": tile.num_warps,
        "BLOCK_DIM": tile.dim // tile.num_warps,
        "LOSS": "ids" if plain else "soft",
        "SMOOTH": not plain,
        "EXCLUDE": not plain,
        "PREFETCH": choice.prefetch,
        "RELOAD": choice.reload,
        **_operands(choice),
    }
    if plain:
        constants |= dict.fromkeys(optional)
    else:
        types |= optional
    return _case("first", choice, features, few_classes_first_kernel, types, constants, plain)


def second_case(choice: Choice, features: str, *, plain: bool = False) -> ProductCase:
    """Build the second pass under a tile; ``plain``: kept residuals, else made again."""
    tile, together = choice.tile, 1 if plain else 2
    odd = 0 if choice.aligned else 3
    types = {
        "features": f"*{features}",
        "mean_grad": "*fp32",
        "mean_bias_grad": "*fp32",
        "counted": "*i1",
        "feature_sqnorm": "*fp32",
        "alignment": "*fp32",
        **dict.fromkeys(("rows", "target_stride", "residual_stride", "head_stride"), "i32"),
        "ignore_index": "i32",
        "smoothing": "fp32",
    }
    made, kept = {**_HEAD, "labels": "*fp32"}, {"residual": "*fp32"}
    constants: dict[str, Any] = {
        "HEADS": 1 if plain else 3,
        "CLASSES": tile.classes // together - (0 if plain else 1),
        "DIM": 512 - odd,
        "FEATURE_STRIDE": 512 - odd,
        "BLOCK_ROWS": tile.rows,
        "HEADS_A_TILE": together,
        "LANES": tile.classes // together,
        "BLOCK_DIM": tile.dim,
        "LOSS": "soft",
        "SMOOTH": not plain,
        **_operands(choice),
    }
    types |= kept if plain else made
    constants |= dict.fromkeys(made if plain else kept)
    if choice.products == "bf16":
        types["count"] = "*i64"
    else:
        constants["count"] = None
    return _case("second", choice, features, few_classes_second_kernel, types, constants, plain)


def _operands(choice: Choice) -> dict[str, Any]:
    rounded = choice.products == "bf16"
    precision = "tf32" if rounded else choice.products
    return {"ROUND": rounded, "PRECISION": precision, "UPCAST": False}


def _case(
    kind: str,
    choice: Choice,
    features: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    plain: bool,
) -> ProductCase:
    tile = choice.tile
    shape = f"{tile.rows}x{tile.classes}x{tile.dim}"
    words = [kind, shape, choice.products, features, "plain" if plain else "full"]
    if not choice.aligned:
        words.append("unaligned")
    pointers = tuple(name for name, given in types.items() if given[0] == "*")
    name = "-".join(words)
    return ProductCase(name, kernel, tile, types, constants, pointers, since=choice.since)


def cases(plain: bool = False) -> Iterator[ProductCase]:
    """Every tile with the features that it is meant for."""
    for choice in FIRST_TILES:
        yield first_case(choice, "bf16" if choice.products == "bf16" else "fp32", plain=plain)
    for choice in SECOND_TILES:
        yield second_case(choice, "bf16" if choice.products == "bf16" else "fp32", plain=plain)


def widened_cases() -> Iterator[ProductCase]:
    """Features of 16 bits under tiles for float32 products."""
    for choice in FIRST_TILES:
        if choice.products != "bf16":
            yield first_case(choice, "bf16" if choice.products == "tf32x3" else "fp16")
    for choice in SECOND_TILES:
        if choice.products != "bf16":
            yield second_case(choice, "bf16" if choice.products == "tf32x3" else "fp16")


def main() -> None:
    """Print registers, stack, shared memory and matrix instructions of every case."""
    for case in (*cases(), *cases(plain=True), *widened_cases()):
        cells = []
        for arch in ARCHITECTURES:
            used = case.compile(arch)
            names = "/".join(sorted(instructions(used.cubin) & {"HGMMA", "HMMA", "UTCHMMA"}))
            cells.append(f"sm_{arch} {used.registers}/{used.stack}/{used.shared} {names}")
        print(f"{case.name:<44}" + "  ".join(f"{cell:<28}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
