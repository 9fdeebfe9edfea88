"""A demonstration that never ran: small numbers whose means and spreads are exact."""

from __future__ import annotations

import torch

from moso_fast.demo.data import Digits
from moso_fast.demo.experiment import DemoConfig, DemoResult
from moso_fast.demo.timing import Timing
from moso_fast.tables.table import ScoreTable

CONFIG = DemoConfig(
    seed=3, repeats=3, keeps=(0.1, 0.5, 1.0), parts=2, epochs=7, samples=4, retrain_steps=20,
    flipped=0.25, dropped=0.5,
)  # fmt: skip
PRUNING = {  # method -> accuracies of three repeats on a tenth, on half, on all
    "MoSo": ([0.25, 0.5, 1.0], [0.75, 1.0, 1.0]),
    "MoSo (zscore)": ([0.25, 0.25, 0.25], [0.5, 0.5, 0.5]),
    "random": ([0.25, 0.25, 0.25], [0.25, 0.25, 0.25]),
    "EL2N": ([0.25, 0.25, 0.25], [0.0, 0.25, 0.5]),
    "GraNd": ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
}
ALL = [0.5, 0.75, 1.0]
SUSPICION = {  # score -> AUROC, share found in the worst, accuracy without the worst
    "MoSo": ([0.5, 0.625, 0.75], [0.25, 0.5, 0.75], [0.5, 0.5, 0.5]),
    "MoSo (zscore)": ([0.5] * 3, [0.5] * 3, [0.25] * 3),
    "self_influence": ([0.75] * 3, [0.5] * 3, [0.25] * 3),
    "EL2N": ([0.75, 0.75, 0.875], [0.5] * 3, [0.25] * 3),
    "loss": ([0.875] * 3, [1.0, 0.5, 0.75], [0.75, 0.75, 1.0]),
    "margin": ([0.25] * 3, [0.0] * 3, [0.0] * 3),
}
CLEANED = {
    "nothing dropped": [0.5, 0.5, 0.5],
    "random": [0.25, 0.5, 0.75],
    "the flipped ones": [1.0, 1.0, 1.0],
    **{name: accuracy for name, (_, _, accuracy) in SUSPICION.items()},
}


def made_up() -> DemoResult:
    """Twelve images to train on, four held out, a quarter of the labels flipped."""
    generator = torch.Generator().manual_seed(0)
    digits = Digits(
        torch.rand(12, 1, 8, 8, generator=generator), torch.arange(12) % 10,
        torch.rand(4, 1, 8, 8, generator=generator), torch.arange(4),
    )  # fmt: skip
    result = DemoResult(
        CONFIG,
        digits,
        ScoreTable(torch.arange(12.0)),
        Timing(12, 4, 6, autograd_loop=8.0, closed_form=1.0, difference=2e-6, moso_fast=0.5),
    )
    result.flipped_scores = {name: torch.arange(12.0) + k for k, name in enumerate(SUSPICION)}
    result.flipped_mask = torch.arange(12) % 4 == 0
    result.pruning = {
        name: dict(zip(CONFIG.keeps, (*values, ALL), strict=True))
        for name, values in PRUNING.items()
    }
    result.auroc = {name: auroc for name, (auroc, _, _) in SUSPICION.items()}
    result.found = {name: found for name, (_, found, _) in SUSPICION.items()}
    result.cleaned = CLEANED
    result.seconds = 61.5
    return result
