"""What a shipped configuration of a kernel is: a block shape and the resources it must keep to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One shipped configuration: block shape, launch parameters, and the resources it keeps to."""

    rows: int
    classes: int
    dim: int  # K block of a product, or padded D where a whole row is held
    num_warps: int
    num_stages: int
    registers: int  # a thread: upper bound that the ahead-of-time tests hold it to
    shared_bytes: int  # a block: the same
    instruction: str  # "HGMMA", "HMMA" or "FFMA": must be in the code compiled for sm_90
