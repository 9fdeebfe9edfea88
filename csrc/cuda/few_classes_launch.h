// Launches of the few-classes kernels. Plain C++: the bindings need no CUDA header.
#pragma once

#include "few_classes.h"

namespace moso_fast::few_classes {

struct Launch {
  Feature feature;
  bool exact;
  int tiles;    // of Plan
  bool narrow;  // of Plan
  int64_t blocks, shared_bytes;
  int device;        // index
  uintptr_t stream;  // a cudaStream_t of that device
};

// All throw std::runtime_error where CUDA refuses the launch.
template <Feature F>
void launch_first(const FirstPass& p, const Launch& l);
template <Feature F>
void launch_second(const SecondPass& p, const Launch& l);
void launch_reduce(const Reduce& p, int device, uintptr_t stream);

}  // namespace moso_fast::few_classes
