"""PyTorch's warnings about its own forward mode: kept from users, and no others with them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from interpreter import run_python

# In a process of its own: PyTorch loads its forward mode once.
STRICT = """
import sys, warnings
import torch
warnings.filterwarnings("error", message=".*torch.jit.script")
from torch import nn
x, y = torch.randn(8, 3), torch.randint(0, 4, (8,))
"""
CALLS = {
    "whole network": """
from torch.utils.data import TensorDataset
from moso_fast.scorer import MoSoScorer
model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
scorer = MoSoScorer(model, gradient="full", batch_size=5, progress=False)
facts = scorer.score(TensorDataset(x, y)).provenance
assert facts["alignment"] == "forward mode", facts["alignment"]
""",
    "benchmark": """
from moso_fast.bench.providers.plain import jvp
jvp(x, torch.randn(4, 3), y, torch.zeros(4))
""",
}
LOADED = "\nassert 'torch._decomp.decompositions_for_jvp' in sys.modules\n"


@pytest.mark.exhaustive
@pytest.mark.parametrize("call", CALLS)
def test_no_warning_about_what_pytorch_compiles_for_itself(call: str, tmp_path: Path) -> None:
    run_python(STRICT + CALLS[call] + LOADED, tmp_path)


def test_warnings_of_others_about_the_same_are_shown() -> None:
    from moso_fast.util.forward_mode import load_forward_mode

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load_forward_mode()
        warnings.warn("`torch.jit.script` is deprecated.", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["`torch.jit.script` is deprecated."]
