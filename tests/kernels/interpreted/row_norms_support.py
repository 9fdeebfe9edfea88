"""Dtypes and shapes to which norms and dots of rows are tested."""

from __future__ import annotations

import torch
from moso_fast.kernels import row_norms as module

BF16 = torch.bfloat16
DTYPES = (torch.float32, torch.float16, BF16)
ROWS, COLUMNS = module._NORM_TILE
# (n, D) around the edges of a tile.
SHAPES = [(1, 1), (ROWS - 1, COLUMNS + 1), (ROWS, COLUMNS), (ROWS + 1, COLUMNS - 1), (70, 300)]
