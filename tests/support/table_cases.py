"""Score tables for the tests of their files."""

from __future__ import annotations

import torch

from moso_fast.tables.table import ScoreTable


def table_of(rows=6, dtype=torch.float32, **options):
    draw = torch.Generator().manual_seed(4)
    return ScoreTable(
        torch.randn(rows, generator=draw, dtype=dtype),
        {"loss": torch.rand(rows, generator=draw, dtype=torch.float64)},
        {"score": torch.randn(2, rows, generator=draw, dtype=dtype)},
        index=3 * torch.arange(rows),
        **options,
    )
