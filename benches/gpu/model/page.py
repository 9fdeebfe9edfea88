"""The predictions as a page in Markdown: all jobs, and the kernels of the most important ones."""

from __future__ import annotations

from typing import Any

from ..table import TABLE
from .roofline import (
    BARRIER_CYCLES,
    GPUS,
    H200,
    HOST_SECONDS,
    LAUNCH_SECONDS,
    MEMORY_SECONDS,
    SHARE,
)

# Rows of the table whose kernels are timed one by one.
DETAILED = TABLE[:5]

_HEAD = """# What every job should take on an H200 and on an H100

Predicted, not measured. Made by `python -m benches.gpu predict`, which asks the backends for
regime, tiles, slabs and splits.

| ceiling | {names} |
|---|{dashes}
| large copies, TB/s (measured) | {read} |
| bfloat16 products, TFLOP/s (measured) | {bfloat16} |
| tf32, float32 products, TFLOP/s (assumed) | {other} |

What a job runs one after the other adds up: kernels, products by cuBLAS, operations of PyTorch,
and {launch:.0f} us for each launch. That is for CUDA graphs; a call from Python takes no less than
{host:.0f} us a launch. One kernel takes the longest of

- **memory**: its bytes, from and to device memory, counted in full where the L2 cache may have
  them; slower where too few are in flight to cover a latency of {latency:.0f} ns.
- **products**: FLOPs as executed (classes padded to the tile, three tf32 products for a float32
  one). mma.sync, which the compiler's report calls HMMA, has {share:g} of the rate of wgmma.
- **issue**: instructions, or loads of shared memory, of the loops that are counted: the first pass
  of Triton's few classes, both passes of CUDA C++.
- **phases**: what one block does one after the other, divided by the blocks that share a
  multiprocessor. Where that is one block, nothing hides its barriers ({barrier} cycles each), loads
  that are issued only when they are needed (labels), or the first and last loads of a program.

Not counted: dependent instructions, bank conflicts, operands shared by several programs that miss
the L2 cache. Not taken off either: what the pass before left there (all features at 50,000 rows of
512 bfloat16 elements, 51 MB).

## Jobs

ms, and percent of the floor: each pass reads the features once, or multiplies at the rate of its
precision. More than 100%: our float32 products are three tf32 ones, which the floor does not know.

| N; C; D | operands | way | kernels | launches | {columns} |
|---|---|---|---|---|{dashes}
"""

_KERNELS = """
## Kernels of the first {count} shapes

"blocks" share a multiprocessor. More in gpu_predictions.json: every step of every job.

| N; C; D | operands | way | kernel | GB | GFLOP | {columns} | waits for | blocks |
|---|---|---|---|---|---|{dashes}---|---|
"""


def render(found: dict[str, Any]) -> str:
    """Return the page of what predictions.record found."""
    names, roof = [gpu.name for gpu in GPUS], found["ceilings"]

    def each(text: str, *keys: str, unit: float = 1e12) -> str:
        """One cell a GPU."""
        return " | ".join(text.format(*(roof[name][key] / unit for key in keys)) for name in names)

    dashes = "---|" * len(names)
    head = _HEAD.format(
        names=" | ".join(names),
        dashes=dashes,
        read=each("{:g}", "read_bytes"),
        bfloat16=each("{:g}", "bfloat16"),
        other=each("{:g}, {:g}", "tf32", "float32"),
        launch=1e6 * LAUNCH_SECONDS,
        host=1e6 * HOST_SECONDS,
        latency=1e9 * MEMORY_SECONDS,
        share=SHARE["HMMA"],
        barrier=BARRIER_CYCLES,
        columns=" | ".join(names),
    )
    rows = [row for row in found["rows"] if "why_not" not in row]
    head += "".join(_job(row) for row in rows)
    head += _KERNELS.format(count=len(DETAILED), columns=" | ".join(names), dashes=dashes)
    head += "".join(
        _kernels(row)
        for row in rows
        if (row["n"], row["classes"], row["dim"]) in DETAILED and row["contender"] in _IN_DETAIL
    )
    return head + _missing(found["rows"])


_IN_DETAIL = ("triton", "cuda")


def _job(row: dict[str, Any]) -> str:
    first = row[H200.name]
    times = " | ".join(
        f"{row[gpu.name]['milliseconds']:.3g} ({row[gpu.name]['percent_of_floor']:.0f}%)"
        for gpu in GPUS
    )
    kernels = first["what"].split(":")[0].split(",")[0]
    return (
        f"| {_operands(row)} | {row['contender']} | {kernels} | {first['launches']} | {times} |\n"
    )


def _kernels(row: dict[str, Any]) -> str:
    """Lines of the kernels; what PyTorch adds up between them is too short to show."""
    text = ""
    for steps in zip(*(row[gpu.name]["steps"] for gpu in GPUS), strict=True):
        step = steps[0]
        if step["part"] == "around" or step["kernel"].startswith("sum "):
            continue
        bounds = list(dict.fromkeys(one["bound"] for one in steps))
        cells = [
            _operands(row),
            row["contender"],
            step["kernel"],
            f"{step['gigabytes']:.3g}",
            f"{step['gigaflops']:.3g}",
            *(f"{one['milliseconds']:.3g}" for one in steps),
            ", ".join(bounds),
            str(step["blocks"] or ""),
        ]
        text += f"| {' | '.join(cells)} |\n"
    return text


def _missing(rows: list[dict[str, Any]]) -> str:
    """Say which shapes the CUDA C++ kernels do not take, and why."""
    why: dict[str, list[str]] = {}
    for row in rows:
        if "why_not" in row:
            why.setdefault(row["why_not"], []).append(_operands(row).replace(" | ", ", "))
    lines = [
        f"- {reason}: {len(shapes)} rows, first {shapes[0]}\n" for reason, shapes in why.items()
    ]
    return "\nNot taken by CUDA C++:\n\n" + "".join(lines) if lines else ""


def _operands(row: dict[str, Any]) -> str:
    size = f"{row['n']:,}; {row['classes']:,}; {row['dim']:,}"
    return f"{size} | {row['dtype']} {row['precision']}"
