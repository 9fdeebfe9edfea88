"""Registers, shared memory, stack and matrix instruction of every shipped Triton tile.

    python benches/triton_resources.py                 compile all, with the installed Triton
    python benches/triton_resources.py --only TEXT     only cases whose name holds TEXT
    python benches/triton_resources.py --render        only write the table from the JSON file

Compiles ahead of time, for every architecture that the tests prove; no GPU is needed. Figures of
other Triton versions stay in benches/results/triton_aot.json, so run it once with each; the table
triton_aot.md beside it is made of that file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benches" / "results"
JSON = RESULTS / "triton_aot.json"
TABLE = RESULTS / "triton_aot.md"

# Where the ahead-of-time tests keep their cases: module in tests/, function.
PROVIDERS = (
    ("aot", "residual_cases"),
    ("aot_products", "product_cases"),
    ("aot_few_classes", "cases"),
    ("aot_few_classes", "widened_cases"),
    ("aot_row_tiles", "row_tiles_cases"),
    ("aot_row_tiles", "widened_cases"),
    ("aot_row_tiles", "column_cases"),
)
# What multiplies, quickest first; FFMA stands for the CUDA cores.
_INSTRUCTIONS = ("UTCHMMA", "HGMMA", "HMMA", "FFMA")

# Registers, stack, shared memory, instruction; by case and "sm_90".
Figures = dict[str, dict[str, list[Any]]]


def cases(version: str) -> Iterator[Any]:
    """Every case of the ahead-of-time tests for a Triton; tests/support must be on the path.

    A tile that names the oldest Triton it is for is no case of older ones.
    """
    numbers = tuple(int(part) for part in version.split(".")[:2])
    for module, function in PROVIDERS:
        for case in getattr(importlib.import_module(module), function)():
            if numbers >= getattr(case, "since", numbers):
                yield case


def architectures(case: Any) -> tuple[int, ...]:
    """Those that the case's tile is for."""
    return getattr(case, "architectures", importlib.import_module("aot").ARCHITECTURES)


def figures(case: Any, arch: int) -> list[Any]:
    """Return [registers, stack bytes, shared bytes, instruction] of one case on sm_``arch``."""
    used = case.compile(arch)
    found = importlib.import_module("aot_products").instructions(used.cubin)
    instruction = next((name for name in _INSTRUCTIONS if name in found), "none")
    return [used.registers, used.stack, used.shared, instruction]


def compile_all(version: str, only: str, before: Figures) -> Figures:
    """Figures of every case on its architectures; prints each as it is done.

    Those of cases whose name does not hold ``only`` are taken from ``before``.
    """
    result: Figures = {}
    for case in cases(version):
        if case.name in result:
            raise ValueError(f"two cases are called {case.name!r}")
        if only not in case.name and case.name in before:
            result[case.name] = before[case.name]
            continue
        result[case.name] = {f"sm_{a}": figures(case, a) for a in architectures(case)}
        print(case.name, result[case.name], flush=True)
    return result


def load() -> dict[str, Figures]:
    """Figures by Triton version; empty where there is no file."""
    return json.loads(JSON.read_text(encoding="utf-8")) if JSON.exists() else {}


def dump(versions: Mapping[str, Figures]) -> str:
    """JSON with one line a case."""
    parts = []
    for version, found in sorted(versions.items()):
        lines = (f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(found.items()))
        body = ",\n".join(lines)
        parts.append(f" {json.dumps(version)}: {{\n{body}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def render(versions: Mapping[str, Figures]) -> str:
    """Return the table in Markdown."""
    names = ", ".join(sorted(versions))
    columns = [(v, arch) for v in sorted(versions) for arch in _architectures(versions[v])]
    lines = [
        "# What the shipped Triton tiles need",
        "",
        f"Compiled ahead of time with Triton {names}; registers a thread / stack bytes (spills) / "
        "shared bytes a block / matrix instruction. No GPU was used, and nothing here is a time. "
        "Made by `python benches/triton_resources.py`, once with each Triton.",
        "",
        "| case | " + " | ".join(f"{v} {arch}" for v, arch in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in sorted({name for found in versions.values() for name in found}):
        cells = (versions[v].get(name, {}).get(arch) for v, arch in columns)
        shown = (" / ".join(map(str, cell)) if cell else "-" for cell in cells)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _architectures(found: Figures) -> list[str]:
    return sorted({arch for row in found.values() for arch in row}, key=lambda a: int(a[3:]))


def main() -> None:
    """Compile with this Triton and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true", help="compile nothing")
    parser.add_argument("--only", default="", help="text in the names of the cases to compile")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    versions = load()
    if not options.render:
        import triton

        version = triton.__version__
        versions[version] = compile_all(version, options.only, versions.get(version, {}))
        JSON.write_text(dump(versions), encoding="utf-8")
    TABLE.write_text(render(versions), encoding="utf-8")


if __name__ == "__main__":
    main()
