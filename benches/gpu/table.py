"""The jobs that are predicted and timed, how exact a result must be, and the floor of a job.

Imports nothing but the standard library: the process that runs the check must not load what may
fail on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

Shape = tuple[int, int, int]  # N, C, D

# The most important first: runs are cut short by the clock.
TABLE: tuple[Shape, ...] = (
    (1_280_000, 10, 512),
    (1_280_000, 10, 2048),
    (1_280_000, 100, 512),
    (50_000, 10, 512),
    (50_000, 100, 512),
    (1_280_000, 1000, 512),
    (1_280_000, 100, 2048),
    (1_280_000, 1000, 2048),
    (50_000, 1000, 512),
    (8192, 32_000, 4096),
    (8192, 128_256, 4096),
)
DRY_TABLE: tuple[Shape, ...] = ((300, 10, 16), (60, 100, 24))

# Features' dtype and precision of the products.
KINDS = (("bfloat16", "medium"), ("float32", "high"), ("float32", "highest"))
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}

# Largest relative error of alignment and norms that still gets a number: ours are held to the
# contract, plain PyTorch only to being the same computation (bfloat16 logits cost it two digits).
OURS = {"highest": 1e-5, "high": 5e-3, "medium": 1e-2}
PLAIN = {"highest": 1e-3, "high": 5e-2, "medium": 1e-1}


def floor_seconds(
    shape: Shape, item_bytes: int, precision: str, roof: Mapping[str, float]
) -> float:
    """Seconds that no two-pass algorithm of these operands beats.

    Each pass takes the longer of one read of the features, ``item_bytes`` a number, and its
    products: two in the first pass, one in the second. ``roof`` has bytes/s under "read" and
    "copy" and FLOP/s under each precision.
    """
    n, c, d = shape
    read = n * d * item_bytes / max(roof["read"], roof["copy"])
    product = 2 * n * c * d / roof[precision]
    return max(read, 2 * product) + max(read, product)
