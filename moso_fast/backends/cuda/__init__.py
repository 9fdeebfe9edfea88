"""CUDA C++ kernels for few classes (csrc/cuda)."""

from .backend import CudaBackend

__all__ = ["CudaBackend"]
