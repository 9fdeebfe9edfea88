"""All layouts of plain PyTorch, in the order of the page docs/layouts.md."""

from __future__ import annotations

import layouts_torch_heads as heads
import layouts_torch_labels as labels
import layouts_torch_maps as maps
import layouts_torch_outputs as outputs
import layouts_torch_rows as rows

LAYOUTS = [
    *heads.LAYOUTS,
    *maps.LAYOUTS,
    *outputs.LAYOUTS,
    *rows.LAYOUTS,
    *labels.LAYOUTS,
]
