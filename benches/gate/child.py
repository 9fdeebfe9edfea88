"""Runs both passes of the C++ module some number of times, without PyTorch, to be counted.

    python -S child.py MODULE.so '{"classes": 10, ...}'

Started by :mod:`.counts` under an instruction counter: PyTorch would take a minute to load there.
Prints the instruction set that ran.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from array import array
from typing import Any


def main(path: str, job: dict) -> str:
    """Do the job ``repeats`` times; the first ``warm`` word aside, all in one thread."""
    loader = importlib.machinery.ExtensionFileLoader("moso_fast._cpu", path)
    spec = importlib.util.spec_from_file_location("moso_fast._cpu", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    variant = job.get("variant") or module.variants()[0]
    classes, dim, rows = job["classes"], job["dim"], job["rows"]
    few = job.get("few_classes")
    few = classes <= module.few_classes(variant, 0, False) if few is None else few

    def floats(count: int, scale: float = 0.0) -> array:
        """Numbers in [-scale / 2, scale / 2) that repeat after 997."""
        return array("f", [scale * ((37 * i % 997) / 997 - 0.5) for i in range(count)])

    def doubles(count: int) -> array:
        return array("d", bytes(8 * count))

    tensors = {
        "features": floats(rows * dim, 4.0),
        "weight": floats(classes * dim, 0.2),
        "bias": floats(classes, 0.1),
        "labels": array("q", [i % classes for i in range(rows)]),
        "loss_out": floats(rows),
        "residual_sqnorm": floats(rows),
        "margin": floats(rows),
        "entropy": floats(rows),
        "feature_sqnorm": floats(rows),
        "counted": array("B", bytes(rows)),
        "status": array("q", [rows] * 4),
        "residual": floats(rows * classes),
        "grad_sum": doubles(classes * dim),
        "bias_grad_sum": doubles(classes),
        "mean_grad": floats(classes * dim, 0.01),
        "mean_bias_grad": floats(classes, 0.01),
        "alignment": floats(rows),
    }
    fields: dict[str, Any] = {n: values.buffer_info()[0] for n, values in tensors.items()}
    fields.update(
        dtype=0, row_stride=dim, first_row=0, rows=rows, dim=dim, heads=1, classes=classes,
        targets=0, sample_weight=0, loss=0, label_smoothing=0.0, target_tolerance=1e-3,
        ignore_index=-100, exclude_nonfinite=False, threads=1, own_threads=True,
        few_classes=few, split_grad=False, stat_stride=rows, alignment_stride=rows,
        bf16_products=False, self_term_scale=0.0,
    )  # fmt: skip
    for _ in range(job["repeats"]):
        module.first_pass(variant, fields)
        module.second_pass(variant, fields)
    return str(variant)


if __name__ == "__main__":
    print(main(sys.argv[1], json.loads(sys.argv[2])))
