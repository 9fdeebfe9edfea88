"""Tiny problems for the tests of the benchmarks, and settings that measure them in no time."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import ModuleType

import torch

from moso_fast.bench import runner
from moso_fast.bench.cases import Case

HEAD = Case("head", "", "head", 5, 7, 64, 64)
HEADS = replace(HEAD, name="heads", kind="heads", heads=3)
NARROW_HEAD = replace(HEAD, name="narrow", dtype=torch.bfloat16)
SEQUENCES = Case("sequences", "", "sequences", 5, 7, 24, 24, tokens=4)
NETWORK = Case("network", "", "network", 3, 784, 6, 6, network="cnn")
PERCEPTRON = replace(NETWORK, name="perceptron", network="mlp")
QUICK = runner.Settings(least=2, most=2, budget=0.0, memory_limit=0.0)
ROOF = {"read_bytes": 1e9, "flops": 1e9, "mm_flops": 1e9, "bf16_flops": 1e9}


def made_anew(name: str) -> ModuleType:
    """Run a module of the package once more; what it makes on import is then made by the test."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
