"""``python benches/gpu COMMAND``: check, variants, predict, pack; each has ``--help``.

    check      tests and timings on this machine's GPU, five minutes a run, goes on where it ended
    variants   times tiles of the kernels, shipped ones and others, beside products by cuBLAS
    predict    write benches/results/gpu_predictions.md and .json anew
    pack       build the CUDA module for another machine and pack what that machine lacks

Run from a checkout; moso_fast is imported from there.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

BENCHES = Path(__file__).resolve().parents[1]
# Python puts this folder first, where the package's modules would be found under a second name.
sys.path[:1] = [str(BENCHES.parent), str(BENCHES)]

COMMANDS = {
    "check": "gpu.check.main",
    "predict": "gpu.model.predictions",
    "pack": "gpu.pack",
    "variants": "gpu.variants",
    "compile": "gpu.compile_times",
    # What the check starts:
    "worker": "gpu.check.worker",
    "profiled": "gpu.check.work.profile",
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
