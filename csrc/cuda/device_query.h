// What the CUDA runtime says about this machine. Plain C++: the bindings need no CUDA header.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace moso_fast {

struct DeviceInfo {
  int index = 0;
  std::string name;
  int major = 0;  // compute capability, e.g. 9.0 for H100 and H200
  int minor = 0;
  std::int64_t total_memory = 0;  // bytes
  int multiprocessors = 0;
};

struct DeviceReport {
  int driver_version = 0;   // newest CUDA the driver serves, e.g. 13000 for 13.0; 0 = no driver
  int runtime_version = 0;  // CUDA runtime linked into this module
  std::string error;        // empty, or why no device can be used
  std::vector<DeviceInfo> devices;
};

// Never throws for a machine without a driver or a device: that is `error` with no devices.
// Throws std::runtime_error when a device exists but cannot be asked.
DeviceReport query_devices();

struct DeviceLimits {
  std::int64_t shared_memory = 0;  // bytes that a block may have when it asks for them
  int multiprocessors = 0;
};

// Throws std::runtime_error where there is no such device. Creates no CUDA context.
DeviceLimits device_limits(int device);

// Runs a one-thread kernel on the device and reads its result back. Returns "" when that works,
// else the CUDA error, e.g. "no kernel image is available" on a device older than every
// architecture this module was compiled for. Restores the current device. Creates a CUDA context.
std::string check_launch(int device);

}  // namespace moso_fast
