"""The environment of the GPU check with fake_gpu_layer.py in place of its work."""

from __future__ import annotations

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"


def environment(folder: Path, faults: dict[str, str], **more: str) -> dict[str, str]:
    given = {
        "FAKE_GPU_FAULTS": json.dumps(faults),
        "FAKE_GPU_NAME": "Fake GPU",
        "FAKE_GPU_TAG": str(folder),
        **more,
    }
    return {**os.environ, "PYTHONPATH": str(SUPPORT), **given}
