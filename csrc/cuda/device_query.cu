#include <cuda_runtime.h>

#include <stdexcept>

#include "device_query.h"

namespace moso_fast {
namespace {

constexpr int kProbeValue = 20231210;  // any value that fresh memory is unlikely to hold

__global__ void write_probe(int* out) { *out = kProbeValue; }

std::string describe(cudaError_t status, const char* call) {
  return std::string(call) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
         ")";
}

void require(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not sticky for the next caller in this process
  throw std::runtime_error(describe(status, call));
}

#define MOSO_FAST_CUDA(call) require((call), #call)

// Puts the caller's device back however the scope is left.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    MOSO_FAST_CUDA(cudaGetDevice(&previous_));
    MOSO_FAST_CUDA(cudaSetDevice(device));
  }
  ~DeviceGuard() {
    // A destructor cannot report; a failure here resurfaces in the next CUDA call of the caller.
    if (cudaSetDevice(previous_) != cudaSuccess) cudaGetLastError();
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

class DeviceInt {
 public:
  DeviceInt() { MOSO_FAST_CUDA(cudaMalloc(&pointer_, sizeof(int))); }
  ~DeviceInt() {
    if (cudaFree(pointer_) != cudaSuccess) cudaGetLastError();
  }
  DeviceInt(const DeviceInt&) = delete;
  DeviceInt& operator=(const DeviceInt&) = delete;
  int* get() const { return pointer_; }

 private:
  int* pointer_ = nullptr;
};

DeviceInfo device_info(int index) {
  cudaDeviceProp properties{};
  MOSO_FAST_CUDA(cudaGetDeviceProperties(&properties, index));
  DeviceInfo info;
  info.index = index;
  info.name = properties.name;
  info.major = properties.major;
  info.minor = properties.minor;
  info.total_memory = static_cast<std::int64_t>(properties.totalGlobalMem);
  info.multiprocessors = properties.multiProcessorCount;
  return info;
}

}  // namespace

DeviceReport query_devices() {
  DeviceReport report;
  MOSO_FAST_CUDA(cudaRuntimeGetVersion(&report.runtime_version));
  MOSO_FAST_CUDA(
      cudaDriverGetVersion(&report.driver_version));  // 0, not an error, without a driver
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    report.error = describe(status, "cudaGetDeviceCount");
    return report;
  }
  if (count == 0) report.error = "cudaGetDeviceCount: the driver reports no device";
  for (int index = 0; index < count; ++index) report.devices.push_back(device_info(index));
  return report;
}

DeviceLimits device_limits(int device) {
  int shared = 0;
  DeviceLimits limits;
  MOSO_FAST_CUDA(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  MOSO_FAST_CUDA(
      cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  limits.shared_memory = shared;
  return limits;
}

std::string check_launch(int device) {
  try {
    const DeviceGuard guard(device);
    const DeviceInt out;
    MOSO_FAST_CUDA(cudaMemset(out.get(), 0, sizeof(int)));
    write_probe<<<1, 1>>>(out.get());
    MOSO_FAST_CUDA(cudaGetLastError());
    int value = 0;
    // A blocking copy on the same stream: it waits for the kernel and reports its failure.
    MOSO_FAST_CUDA(cudaMemcpy(&value, out.get(), sizeof(int), cudaMemcpyDeviceToHost));
    if (value != kProbeValue) return "the probe kernel ran but its result was not written";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace moso_fast
