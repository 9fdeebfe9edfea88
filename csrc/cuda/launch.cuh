// What every launch of this module needs: the device, and errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace moso_fast {

inline void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not sticky for the next caller in this process
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

// This module's copy of the CUDA runtime keeps its own current device beside PyTorch's.
inline void use_device(int device) { require(cudaSetDevice(device), "cudaSetDevice"); }

}  // namespace moso_fast
