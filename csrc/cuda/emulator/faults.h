// Kernels with one mistake each: what the emulator must find. For tests of the emulator itself.
#pragma once

#include <string>

#include "../device.cuh"

namespace moso_fast::emulator {

struct Fault {
  std::string name;
  const float* numbers;  // 64 registered numbers
};

inline void faulty(void* argument) {
  const Fault& fault = *static_cast<Fault*>(argument);
  const int me = device::thread_index();
  const uint32_t mine = uint32_t(4 * me), other = uint32_t(4 * (me ^ 32));
  const auto is = [&](const char* name) { return fault.name == name; };
  if (is("race")) {
    device::shared_store(mine, 1.0f);
    device::sync_block();
    if (me < 32)
      device::shared_store(mine, 2.0f);
    else
      device::shared_load<float>(other);
  } else if (is("late write")) {
    device::shared_store(mine, 1.0f);
    device::sync_block();
    if (me < 32)
      device::shared_load<float>(other);
    else
      device::shared_store(mine, 2.0f);
  } else if (is("unwritten")) {
    device::shared_load<float>(mine);
  } else if (is("beyond shared memory")) {
    device::shared_store(uint32_t(1024 + mine), 1.0f);
  } else if (is("misaligned")) {
    device::shared_store(mine + 2, 1.0f);
  } else if (is("beyond the array")) {
    device::global_load(fault.numbers + 64);
  } else if (is("write to an input")) {
    device::global_store(const_cast<float*>(fault.numbers), 1.0f);
  } else if (is("copy not waited for")) {
    device::copy_async(uint32_t(16 * me), fault.numbers, 16);
    device::copy_commit();
    device::shared_load<float>(uint32_t(16 * me));
  } else if (is("copy left under way")) {
    device::copy_async(uint32_t(16 * me), fault.numbers, 16);
    device::copy_commit();
  } else if (is("copy not published")) {
    device::copy_async(uint32_t(16 * me), fault.numbers, 16);
    device::copy_commit();
    device::copy_wait(0);
    device::shared_load<float>(uint32_t(16 * (me ^ 32)));
  } else if (is("lanes part ways")) {
    if (me % 32 != 5) device::shuffle_xor(1.0f, 1);
  } else if (is("different instructions")) {
    float sums[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (me % 2)
      device::multiply_add(sums, a, b);
    else
      device::shuffle_xor(1.0f, 1);
  } else if (is("barrier missed")) {
    if (me != 7) device::sync_block();
  } else {  // no fault
    device::copy_async(uint32_t(16 * me), fault.numbers, 16);
    device::copy_commit();
    device::copy_wait(0);
    device::sync_block();
    device::shared_load<float>(uint32_t(16 * (me ^ 32)));
    device::shuffle_xor(1.0f, 16);
  }
}

}  // namespace moso_fast::emulator
