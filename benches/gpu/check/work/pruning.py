"""Pruning and finding flipped labels, surrogates trained and scored on the GPU: the demo's study.

Accuracy of networks retrained on what each score keeps. Also the same surrogates' scores made on
the CPU, for a rank correlation between both devices.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from ..worker import Skipped, Wrong

LEAST_CORRELATION = 0.999


def run(unit: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Run the study, smaller without a GPU."""
    if importlib.util.find_spec("sklearn") is None:
        raise Skipped("scikit-learn, which carries the images, is not installed")
    from moso_fast.demo.experiment import DemoConfig, run_demo

    correlation = devices_agree()
    emit(spearman_with_cpu=correlation)
    if not correlation >= LEAST_CORRELATION:
        raise Wrong(f"scores of both devices have a rank correlation of {correlation:.4f}")
    config = DemoConfig() if unit["gpu"] else dataclasses.replace(DemoConfig.quick(), repeats=1)
    found = run_demo(config)
    for method, by_keep in found.pruning.items():
        emit(**{method: {f"{k:g}": statistics.mean(v) for k, v in by_keep.items()}})
    emit(auroc={name: statistics.mean(v) for name, v in found.auroc.items()})
    emit(seconds=found.seconds, repeats=config.repeats)


def devices_agree() -> float:
    """Rank correlation of the scores that this device and a CPU give the same networks."""
    import torch
    from torch.utils.data import TensorDataset

    from moso_fast.demo.data import load_digits
    from moso_fast.demo.model import SmallCNN
    from moso_fast.scorer import MoSoScorer

    digits = load_digits()
    data = TensorDataset(digits.train_images, digits.train_labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmallCNN()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    scores = [
        MoSoScorer(model, device=d, progress=False).score(data).scores.cpu() for d in ("cpu", where)
    ]
    ranks = torch.stack([s.argsort().argsort().double() for s in scores])
    return float(torch.corrcoef(ranks)[0, 1])
