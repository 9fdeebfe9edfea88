// Kernels with one mistake each: what the emulator must find. For tests of the emulator itself.
#pragma once

#include <string>

#include "device.cuh"

namespace moso_fast::emulator {

struct Fault {
  std::string name;
  const float* numbers;  // 64 registered numbers
};

// Two bulk copies of 128 bytes into bytes 0 .. 256, whose barrier is at 512.
inline void faulty_bulk(const Fault& fault) {
  const int me = device::thread_index();
  const auto is = [&](const char* name) { return fault.name == name; };
  constexpr uint32_t kBarrier = 512;
  device::shared_store(uint32_t(4 * me), 1.0f);
  if (me == 0) device::init_barrier(kBarrier);
  if (!is("bulk without a fence")) device::fence_bulk();
  if (!is("bulk barrier unknown")) device::sync_block();
  if (me == 1) {
    device::announce_bulk(kBarrier, is("bulk bytes missing") ? 272 : 256);
    device::copy_bulk(0, fault.numbers, 128, kBarrier);
    if (is("bulk touched under way")) device::shared_store(64, 1.0f);
    device::copy_bulk(128, fault.numbers, is("bulk beyond the array") ? 272 : 128, kBarrier);
  }
  device::sync_block();
  if (is("bulk not waited for")) device::shared_load<float>(uint32_t(4 * me));
  if (is("bulk left under way")) return;
  const bool half = is("bulk waited for by others") || is("bulk without fault, half waits");
  if (me < 32 || !half) device::wait_bulk(kBarrier, is("bulk wrong parity") ? 1 : 0);
  if (is("bulk without fault, half waits")) device::sync_block();
  device::shared_load<float>(uint32_t(4 * (me ^ 32)));
}

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
  } else if (fault.name.rfind("bulk", 0) == 0) {
    faulty_bulk(fault);
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
