"""Triton kernels (kernels/) in several regimes."""

from .backend import TritonBackend

__all__ = ["TritonBackend"]
