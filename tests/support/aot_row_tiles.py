"""Cases for the ahead-of-time tests of the rows kernel, of row norms and of column sums.

``python tests/support/aot_row_tiles.py`` prints what each one uses on every architecture, with
every loss. A case is a shipped tile with the variant of its kernel that needs most.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aot_products import ProductCase, instructions
from moso_fast.kernels import row_norms
from moso_fast.kernels.row_tiles import TILES, Choice, stored_columns
from moso_fast.kernels.row_tiles_kernel import row_tiles_kernel
from moso_fast.kernels.tiles import Tile

_STATISTICS = ("loss", "residual_sqnorm", "margin", "entropy", "feature_sqnorm")
LOSSES = ("ids", "soft", "binary", "squared")


def row_tiles_case(
    choice: Choice, features: str, *, loss: str = "soft", plain: bool = False
) -> ProductCase:
    """Build the rows kernel under a tile.

    ``plain``: classes fill the lanes, nothing optional. Otherwise everything at once: padded
    classes, bias, weights, smoothing, rows left out.
    """
    tile, rounded = choice.tile, choice.products == "bf16"
    operand = "*bf16" if rounded else "*fp32"
    classes = tile.classes - (0 if plain else 1)
    dim = 512 if choice.aligned else 509
    types = dict.fromkeys((*_STATISTICS, "bias_partials"), "*fp32") | {
        "features": f"*{features}",
        "weight": operand,
        "labels": "*i64" if loss == "ids" else "*fp32",
        "counted": "*i1",
        "residual": operand,
        "status": "*i64",
        **dict.fromkeys(("rows", "first_row", "target_stride", "ignore_index"), "i32"),
        "smoothing": "fp32",
    }
    constants: dict[str, Any] = {
        "CLASSES": classes,
        "COLUMNS": stored_columns(classes, choice.products),
        "DIM": dim,
        "FEATURE_STRIDE": dim,
        "BLOCK_ROWS": tile.rows,
        "LANES": tile.classes,
        "BLOCK_DIM": tile.dim,
        "LOSS": loss,
        "SMOOTH": not plain and loss in ("ids", "soft"),
        "EXCLUDE": not plain,
        "ROUND": rounded,
        "PRECISION": "tf32" if rounded else choice.products,
        "UPCAST": False,
    }
    optional = {"bias": "*fp32", "sample_weight": "*fp32"}
    if plain:
        constants |= dict.fromkeys(optional)
    else:
        types |= optional
    if rounded:
        types["lost"] = "*fp32"
    else:
        constants["lost"] = None
    shape = f"{tile.rows}x{tile.classes}x{tile.dim}"
    words = ["rows", shape, choice.products, features, "plain" if plain else "full"]
    if loss != ("ids" if plain else "soft"):
        words.append(loss)
    if not choice.aligned:
        words.append("unaligned")
    pointers = tuple(name for name, given in types.items() if given[0] == "*")
    return ProductCase(
        "-".join(words), row_tiles_kernel, tile, types, constants, pointers, choice.majors
    )


def row_tiles_cases() -> Iterator[ProductCase]:
    """Every tile with the features that it is meant for, everything at once.

    With the loss that needs most of those that the tile is for.
    """
    for choice in TILES:
        loss = "soft" if "soft" in choice.losses else choice.losses[0]
        yield row_tiles_case(choice, "bf16" if choice.products == "bf16" else "fp32", loss=loss)


def plain_cases() -> Iterator[ProductCase]:
    """Class ids and nothing optional: fewer masks, other code."""
    for choice in TILES:
        features = "bf16" if choice.products == "bf16" else "fp32"
        yield row_tiles_case(choice, features, loss="ids", plain=True)


def widened_cases() -> Iterator[ProductCase]:
    """Features of 16 bits under tiles for float32 products."""
    for choice in TILES:
        if choice.products != "bf16":
            yield row_tiles_case(choice, "bf16" if choice.products == "tf32x3" else "fp16")


def column_cases() -> Iterator[ProductCase]:
    """Row norms, row dots and column sums of every dtype, rows of an odd and of an even length.

    Row norms with a flag for rows that are not finite; row dots with all that may be added, or
    with nothing.
    """
    for features in ("fp32", "bf16", "fp16"):
        for odd in (0, 3):
            rows, columns = row_norms._NORM_TILE
            yield _bare(
                f"row_norms-{features}",
                odd,
                row_norms.row_norms_kernel,
                Tile(rows, 0, columns, 4, 4, 128, 1024, "none"),
                {"features": f"*{features}", "counted": "*i1", "sqnorm": "*fp32",
                 "status": "*i64", "dirty": "*i32", "rows": "i32", "first_row": "i32"},
                {"DIM": 512 - odd, "FEATURE_STRIDE": 512 - odd, "EXCLUDE": False,
                 "BLOCK_ROWS": rows, "BLOCK_DIM": columns},
            )  # fmt: skip
            yield _row_dots_case(features, odd)
            rows, columns = row_norms._SUM_TILE
            yield _bare(
                f"column_sums-{features}",
                odd,
                row_norms.column_sums_kernel,
                Tile(rows, columns, 0, 4, 4, 80, 2048, "none"),
                {"matrix": f"*{features}", "partials": "*fp32", "rows": "i32", "slab_rows": "i32"},
                {"COLUMNS": 1000 - odd, "STRIDE": 1000 - odd,
                 "BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns},
            )  # fmt: skip


def _row_dots_case(features: str, odd: int) -> ProductCase:
    """Row dots as they come behind H G^T (a shift) or, of an odd length, behind R G (columns)."""
    rows, columns = row_norms._NORM_TILE
    types = {name: "*fp32" for name in ("left", "lost", "feature_sqnorm", "out")}
    types |= {"right": f"*{features}", "counted": "*i1", "count": "*i64", "rows": "i32"}
    added = "extra" if odd else "shift"
    types[added] = "*fp32"
    # Behind R G two more columns lie in the rows of the product, which are eight longer.
    constants = {
        "shift" if odd else "extra": None,
        "COLUMNS": 512 - odd,
        "LEFT_STRIDE": 512 - odd + 8 * bool(odd),
        "RIGHT_STRIDE": 512 - odd,
        "EXTRA": 2 if odd else 0,
        "BLOCK_ROWS": rows,
        "BLOCK_COLUMNS": columns,
    }
    tile = Tile(rows, 0, columns, 4, 4, 168, 1024, "none")
    return _bare(f"row_dots-{features}", odd, row_norms.row_dots_kernel, tile, types, constants)


def _bare(
    name: str,
    odd: int,
    kernel: Any,
    tile: Tile,
    types: dict[str, str],
    constants: dict[str, Any],
) -> ProductCase:
    """Build a case of a kernel without products."""
    pointers = tuple(name for name, given in types.items() if given[0] == "*")
    divisible = (*pointers, "slab_rows") if "slab_rows" in types else pointers
    suffix = "-unaligned" if odd else ""
    return ProductCase(f"{name}{suffix}", kernel, tile, types, constants, divisible)


def main() -> None:
    """Print registers, stack, shared memory and matrix instructions of every case."""
    losses = (
        row_tiles_case(choice, "bf16" if choice.products == "bf16" else "fp32", loss=loss)
        for choice in TILES
        for loss in choice.losses
        if loss != "soft" and len(choice.losses) > 1
    )
    for case in (*column_cases(), *row_tiles_cases(), *plain_cases(), *widened_cases(), *losses):
        cells = []
        for arch in case.architectures:
            used = case.compile(arch)
            names = "/".join(sorted(instructions(used.cubin) & {"HGMMA", "HMMA", "UTCHMMA"}))
            cells.append(f"sm_{arch} {used.registers}/{used.stack}/{used.shared} {names}")
        bound = f"{case.tile.registers}/0/{case.tile.shared_bytes} {case.tile.instruction}"
        row = "  ".join(f"{cell:<28}" for cell in cells)
        print(f"{case.name:<44}{bound:<26}{row}", flush=True)


if __name__ == "__main__":
    main()
