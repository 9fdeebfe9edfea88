"""Count the instructions of a turn of the few-classes kernels' loops; prints JSON, needs no GPU.

The first pass of Triton's regime is compiled for sm_90 under every tile that the predicted jobs
may take, and its loop disassembled: what stands up to the end of the first product makes the
logits, what stands from the second product on the gradient, the rest is the softmax and what it
writes. A path that a branch jumps over where nothing is wrong (the look at the numbers of rows
whose norm is not finite) is not counted. Run from the repository with tests/ on the path, whose
cases for the ahead-of-time compiler these are.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from typing import Any, NamedTuple

# A branch that jumps further forward than this skips what is rarely wanted.
_RARE = 50
_MULTIPLY = "HG?MMA"


class Code(NamedTuple):
    """Instructions of a kernel, and for each branch the place it goes to."""

    lines: list[str]
    branches: dict[int, int]

    def find(self, name: str, begin: int, end: int) -> list[int]:
        """Places of an instruction, a regular expression, in a part of the code."""
        return [i for i in range(begin, end) if re.search(rf"\b{name}\b", self.lines[i])]

    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of every loop, in the order of the code."""
        return sorted((to, at) for at, to in self.branches.items() if to < at)


def read_code(sass: str) -> Code:
    """Read one function as nvdisasm prints it."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if found := re.match(r"\s*\.(L_x_\d+):", line):
            labels[found[1]] = len(lines)
        if found := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", line):
            lines.append(found[1].strip())
    branches = {}
    for at, line in enumerate(lines):
        found = re.search(r"\bBRA\b.*`\(\.(L_x_\d+)\)", line)
        if found and found[1] in labels:
            branches[at] = labels[found[1]]
    return Code(lines, branches)


def loop_of_two_products(code: Code) -> dict[str, list[int]]:
    """Instructions and barriers of a turn of the longest loop, by phase."""
    begin, end = max(code.loops(), key=lambda loop: loop[1] - loop[0])
    rare = {
        i
        for at, to in code.branches.items()
        if begin <= at and at + _RARE < to <= end and not code.find(_MULTIPLY, at, to)
        for i in range(at + 1, to)
    }
    products = code.find(_MULTIPLY, begin, end)
    gap = max(range(len(products) - 1), key=lambda i: products[i + 1] - products[i])
    bounds = (begin, products[gap] + 1, products[gap + 1], end + 1)
    found = {}
    for phase, low, high in zip(
        ("logits", "softmax", "gradient"), bounds, bounds[1:], strict=False
    ):
        usual = [i for i in range(low, high) if i not in rare]
        found[phase] = [len(usual), len(set(code.find("BAR", low, high)) & set(usual))]
    return found


def innermost_products(code: Code) -> list[tuple[int, int]]:
    """Instructions and matrix instructions of every innermost loop that multiplies."""
    loops = code.loops()
    inner = [
        (a, b)
        for a, b in loops
        if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in loops)
    ]
    counts = [(b - a + 1, len(code.find(_MULTIPLY, a, b + 1))) for a, b in inner]
    return [(length, products) for length, products in counts if products]


def _case(choice: Any) -> Any:
    """Return a case of the ahead-of-time tests as jobs run it: one head, bias, kept residuals."""
    cases = importlib.import_module("aot_few_classes")
    features = "bf16" if choice.products == "bf16" else "fp32"
    full = cases.first_case(choice, features)
    plain = cases.first_case(choice, features, plain=True)
    added = {"bias": "*fp32", "residual": "*fp32"}
    constants = {name: v for name, v in plain.constants.items() if name not in added}
    constants["CLASSES"] = choice.tile.classes - 6  # as 10 of 16: some lanes are masked
    return dataclasses.replace(
        plain,
        name=full.name,
        types={**plain.types, **added},
        constants=constants,
        divisible=(*plain.divisible, *added),
    )


def count(only: str = "") -> dict[str, dict[str, list[int]]]:
    """Count for every first tile of bfloat16 products and of three tf32 ones, rows aligned.

    Tiles that this Triton spills registers for are left out; so are those whose case's name does
    not hold ``only``.
    """
    from moso_fast.kernels.few_classes_tiles import FIRST_TILES

    from moso_fast.backends.triton.regime import triton_version

    sass = importlib.import_module("aot_products").sass
    found = {}
    for choice in FIRST_TILES:
        wanted = choice.aligned and choice.products in ("bf16", "tf32x3")
        if not wanted or triton_version() < choice.since:
            continue
        case = _case(choice)
        if only in case.name:
            found[case.name] = loop_of_two_products(read_code(sass(case.compile(90).cubin)))
    return found


def installed() -> str:
    """Version of the Triton that compiles."""
    return str(importlib.import_module("triton").__version__)


if __name__ == "__main__":
    print(json.dumps({installed(): count()}))
