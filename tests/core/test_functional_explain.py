"""All that `explain` prints, line by line, with the numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moso_fast import functional
from moso_fast.core import memory
from moso_fast.functional import explain

MIB, GIB = 2**20, 2**30


@pytest.fixture(autouse=True)
def budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Residuals may take 700 MiB, on whatever machine this runs."""
    for module in (functional, memory):
        monkeypatch.setattr(module, "residual_budget", {torch.device("cpu"): 700 * MIB}.__getitem__)


def arguments(rows: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        "features": torch.zeros(rows, 3, dtype=dtype),
        "weight": torch.zeros(2, 4, 3, dtype=dtype),
        "labels": torch.zeros(rows, dtype=torch.long),
        "bias": torch.zeros(2, 4, dtype=dtype),
    }


def test_every_line() -> None:
    """65,536 rows of 2 x 4 residuals in float32 are 2 MiB."""
    assert explain(**arguments(65_536), backend="torch").splitlines() == [
        "problem   N=65536 rows=65536 D=3 C=4 K=2 float32 on cpu, loss=cross_entropy, "
        "precision=highest",
        "backend   torch",
        "          torch: asked for by backend='torch'",
        "plan      torch: chunked closed form",
        "passes    2 over the features, 8 chunk(s) of up to 8192 rows",
        "residuals kept between the passes (2.0 MiB); budget 700 MiB",
    ]


def test_every_line_of_sequences_in_chunks() -> None:
    text = explain(
        **arguments(1000, torch.float64),
        backend="torch",
        chunk_size=300,
        cu_seqlens=torch.tensor([0, 400, 1000]),
        sample_weight=torch.ones(1000),
        precision="high",
        label_smoothing=0.1,
    )
    assert text.splitlines() == [
        "problem   N=2 rows=1000 D=3 C=4 K=2 float64 on cpu, loss=cross_entropy, precision=high",
        "backend   torch",
        "          torch: asked for by backend='torch'",
        "plan      torch: chunked closed form",
        "passes    2 over the features, 4 chunk(s) of up to 300 rows",
        "residuals computed again in the second pass; budget 700 MiB",
    ]


def test_lines_of_no_rows_and_of_a_plan_in_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = explain(**arguments(0), backend="torch").splitlines()
    assert lines[4] == "passes    2 over the features, 0 chunk(s) of up to 8192 rows"
    monkeypatch.setattr(
        "moso_fast.core.passes.Passes.explain",
        lambda passes, rows: [f"tiles for {rows} rows", "and why so"],
    )
    lines = explain(**arguments(10), backend="torch", chunk_size=7).splitlines()
    assert lines[3:6] == [
        "plan      tiles for 7 rows",
        "          and why so",
        "passes    2 over the features, 2 chunk(s) of up to 7 rows",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formula": "x"}, "formula must be one of"),
        ({"scale": float("inf")}, "scale must be finite, got inf"),
        ({"chunk_size": 0}, "chunk_size must be a positive number of rows, got 0"),
        ({"loss": "x"}, "loss must be one of"),
        ({"sample_weight": torch.ones(3)}, r"sample_weight must have shape \(10,\), got \(3,\)"),
        ({"cu_seqlens": torch.ones(1, 1).long()}, r"cu_seqlens must have shape \(B \+ 1,\)"),
        ({"bias": torch.zeros(2, 3)}, r"bias must have shape \(2, 4\)"),
    ],
)
def test_what_scoring_would_refuse_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        explain(**{**arguments(10), **change})


@pytest.mark.parametrize(
    ("free", "stay"),
    [
        (5 * GIB, 3 * 262_144),  # 0.8 of that, less 3 GiB and residuals of 48 MB: 1,001,701 rows
        (8 * GIB, 3_000_001),  # all of them, the last chunk being shorter
    ],
)
def test_the_line_of_features_in_main_memory(
    free: int, stay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 1 KiB, in chunks of 256 MiB, of which whole ones stay on the GPU."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 2**34))
    for module in (functional, memory):
        monkeypatch.setattr(module, "residual_budget", lambda device: 700 * MIB)
    with FakeTensorMode():
        text = explain(
            torch.zeros(3_000_001, 256),
            torch.zeros(4, 256, device="cuda"),
            torch.zeros(3_000_001, dtype=torch.long),
        )
    assert "2 over the features, 12 chunk(s) of up to 262144 rows" in text
    assert text.splitlines()[-1] == (
        f"features  in main memory, sent in chunks; {stay} of 3000001 rows stay on cuda:0 between "
        "the passes"
    )
