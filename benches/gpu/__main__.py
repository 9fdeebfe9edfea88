"""``python -m benches.gpu COMMAND``: check, variants, predict, pack; each has ``--help``.

    check      tests and timings on this machine's GPU, five minutes a run, goes on where it ended
    variants   times tiles of the kernels, shipped ones and others, beside products by cuBLAS
    predict    write benches/results/gpu_predictions.md and .json anew
    compile    compile every case of the check's first stage, without a GPU
    pack       build the CUDA module for another machine and pack what that machine lacks

Run at the root of the source tree; moso_fast is imported from there.
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "check": "benches.gpu.check.main",
    "predict": "benches.gpu.model.predictions",
    "pack": "benches.gpu.pack",
    "variants": "benches.gpu.variants",
    "compile": "benches.gpu.compile_times",
    # What the check starts:
    "worker": "benches.gpu.check.worker",
    "profiled": "benches.gpu.check.work.profile",
}


def main() -> int:
    """Hand the arguments to the command; return its exit code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        print(__doc__)
        return 0 if name in ("-h", "--help") else 2
    return int(importlib.import_module(COMMANDS[name]).main(arguments))


if __name__ == "__main__":
    sys.exit(main())
