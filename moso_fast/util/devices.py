"""Devices by name."""

from __future__ import annotations

import torch


def usable_device(name: str, option: str) -> torch.device:
    """Return the device of this name, once it has held a tensor.

    Raises
    ------
    ValueError
        torch knows no such device or has none here; ``option`` says where the name is from.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{option} {name} cannot be used here: {reason}") from error
    return torch.device(name)
