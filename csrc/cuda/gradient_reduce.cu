// Ordered sum of the partial mean gradients.
#include "few_classes_launch.cuh"
#include "gradient_reduce.cuh"

namespace moso_fast::few_classes {
namespace {

__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const Reduce p) {
  reduce_partials(p);
}

}  // namespace

void launch_reduce(const Reduce& p, int device, uintptr_t stream) {
  use_device(device);
  reduce_kernel<<<unsigned(reduce_blocks(p)), kReduceThreads, kReduceBytes,
                  reinterpret_cast<cudaStream_t>(stream)>>>(p);
  require(cudaGetLastError(), "sum over slabs");
}

}  // namespace moso_fast::few_classes
