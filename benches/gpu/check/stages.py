"""The stages in the order in which five minutes on a GPU say the most."""

from __future__ import annotations

from dataclasses import dataclass

from .pool import Unit

RUN_SECONDS = 300.0
CLOSING_SECONDS = 5.0  # for the tables and the report
# Long: a bare machine reads torch from its disk for the first time.
PLAN: Unit = {"stage": "plan", "key": "plan", "work": "plan", "limit": 200.0}


@dataclass(frozen=True)
class Stage:
    """One stage; after its share of a run it begins nothing more until the others had theirs."""

    name: str
    title: str
    seconds: float = RUN_SECONDS
    workers: int = 1  # units at a time on a GPU
    reuse: bool = False  # whether a process takes the next unit when the last one was done


STAGES = (
    Stage("smoke", "every backend, regime, dtype and precision against float64", 40, 14, True),
    Stage("ceilings", "what this GPU reads, copies and multiplies", 20, 1, True),
    Stage("kernels", "both passes by events, each kernel by name, tiles swept", 60),
    Stage("profile", "why: counters of both passes by Nsight Compute", 30),
    Stage("calls", "whole calls beside eager PyTorch, and in graphs", 70, reuse=True),
    Stage("tests", "tests/gpu, file by file", 50),
    Stage("compile", "torch.compile of the closed form", 40),
    Stage("sanitizer", "compute-sanitizer over the small tests", workers=3),
    Stage("network", "all parameters of a ResNet-50 beside the authors' loop"),
    Stage("pruning", "the demo's study, trained and scored here"),
)
