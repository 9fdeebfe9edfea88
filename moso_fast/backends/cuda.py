"""CUDA C++ (csrc/cuda): in this version a device query, and no kernel that scores."""

from __future__ import annotations

from .base import Availability

AVAILABILITY = Availability(
    False,
    "moso_fast._cuda answers device queries only; this version has no CUDA C++ scoring kernels",
    "on a GPU use backend='triton' or backend='torch' ('auto' chooses)",
)
