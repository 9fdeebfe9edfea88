// The kernels as __global__ functions, and their launches on the caller's stream.
//
// A launch neither allocates nor waits, so it can be captured in a CUDA graph. Its error is checked
// and thrown as std::runtime_error.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "few_classes_first.cuh"
#include "few_classes_launch.h"
#include "few_classes_second.cuh"
#include "launch.cuh"

namespace moso_fast::few_classes {

// Lets a kernel of the current device have this much shared memory. Only ever more: a smaller job
// of another thread, or after this one in a graph, must not take it away again.
// `all`: of the memory that may be shared memory: several blocks need it, not the L1 cache.
inline void allow_shared(const void* kernel, const Launch& l, const char* name, bool all) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int64_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& most = allowed[{kernel, l.device}];
  if (l.shared_bytes <= most) return;
  require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(l.shared_bytes)),
          name);
  if (all)
    require(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared),
            name);
  most = l.shared_bytes;
}

template <Feature F, bool Exact, int ClassTiles>
__global__ void __launch_bounds__(kThreads, 65536 / kThreads / kFirstRegisters)
    first_pass_kernel(const FirstPass p) {
  first_pass<F, Exact, ClassTiles>(p);
}

template <Feature F, bool Exact, int ClassTiles>
__global__ void __launch_bounds__(kThreads, 65536 / kThreads / kNarrowRegisters)
    first_pass_narrow_kernel(const FirstPass p) {
  first_pass<F, Exact, ClassTiles, kNarrowColumns>(p);
}

template <Feature F, bool Exact, int ClassTiles>
__global__ void __launch_bounds__(kThreads, 65536 / kThreads / second_registers(ClassTiles))
    second_pass_kernel(const SecondPass p) {
  second_pass<F, Exact, 2 * ClassTiles>(p);
}

template <class P>
void launch_kernel(void (*kernel)(P), const P& p, const Launch& l, const char* name,
                   bool all_shared = false) {
  use_device(l.device);
  allow_shared(reinterpret_cast<const void*>(kernel), l, name, all_shared);
  kernel<<<unsigned(l.blocks), kThreads, size_t(l.shared_bytes),
           reinterpret_cast<cudaStream_t>(l.stream)>>>(p);
  require(cudaGetLastError(), name);
}

template <Feature F, bool Exact>
void launch_first_as(const FirstPass& p, const Launch& l) {
  if constexpr (has_narrow(F == Feature::kFloat32 ? 4 : 2, Exact, 1)) {
    if (l.narrow && l.tiles == 1)
      return launch_kernel(first_pass_narrow_kernel<F, Exact, 1>, p, l, "first pass", true);
  }
  if (l.tiles == 1) return launch_kernel(first_pass_kernel<F, Exact, 1>, p, l, "first pass");
  if (l.tiles == 2) return launch_kernel(first_pass_kernel<F, Exact, 2>, p, l, "first pass");
  if (l.tiles == 5) return launch_kernel(first_pass_kernel<F, Exact, 5>, p, l, "first pass");
  launch_kernel(first_pass_kernel<F, Exact, 7>, p, l, "first pass");
}
template <Feature F, bool Exact>
void launch_second_as(const SecondPass& p, const Launch& l) {
  if (l.tiles == 1) return launch_kernel(second_pass_kernel<F, Exact, 1>, p, l, "second pass");
  if (l.tiles == 2) return launch_kernel(second_pass_kernel<F, Exact, 2>, p, l, "second pass");
  if (l.tiles == 5) return launch_kernel(second_pass_kernel<F, Exact, 5>, p, l, "second pass");
  launch_kernel(second_pass_kernel<F, Exact, 7>, p, l, "second pass");
}

}  // namespace moso_fast::few_classes

// Defines the launches of one dtype, each in its own file: they compile side by side.
#define MOSO_FEW_CLASSES(FEATURE)                                              \
  namespace moso_fast::few_classes {                                           \
  template <>                                                                  \
  void launch_first<Feature::FEATURE>(const FirstPass& p, const Launch& l) {   \
    l.exact ? launch_first_as<Feature::FEATURE, true>(p, l)                    \
            : launch_first_as<Feature::FEATURE, false>(p, l);                  \
  }                                                                            \
  template <>                                                                  \
  void launch_second<Feature::FEATURE>(const SecondPass& p, const Launch& l) { \
    l.exact ? launch_second_as<Feature::FEATURE, true>(p, l)                   \
            : launch_second_as<Feature::FEATURE, false>(p, l);                 \
  }                                                                            \
  }
