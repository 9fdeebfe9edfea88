// Sum of the partial mean gradients of all slabs, in float64 and in one order for every GPU.
//
//   grad_sum(c, d) = sum over slabs of partial(slab, c, d)     the bias sums likewise
//
// A block owns 32 neighbouring numbers. Strand s of 16 adds slabs s, s + 16, .. and a tree over
// the strands ends it:
//
//   strand   0   1   2  ..  15       s += s + 8;  s += s + 4;  s += s + 2;  s += s + 1
//
// Bytes: slabs x C x D x 4, from the L2 cache where they fit; one addition each.
#pragma once

#include "device.cuh"
#include "few_classes.h"
#include "index.cuh"

namespace moso_fast::few_classes {

// Launch with ceil((classes * dim + classes) / 32) blocks of 512 threads and kReduceBytes.
constexpr int kReduceThreads = kReduceColumns * kReduceStrands;
constexpr int kReduceBytes = kReduceThreads * 8;

MOSO_DEVICE void reduce_partials(const Reduce& p) {
  const int column = device::thread_index() % kReduceColumns;
  const int strand = device::thread_index() / kReduceColumns;
  const int numbers = p.classes * p.dim, columns = partial_columns(p.dim);
  const int number = int(device::block_index()) * kReduceColumns + column;
  const float* from = nullptr;
  int64_t stride = 0;
  if (number < numbers) {
    from = p.partial + int64_t(number / p.dim) * columns + number % p.dim;
    stride = int64_t(p.classes) * columns;
  } else if (number < numbers + p.classes) {
    from = p.bias_partial + (number - numbers);
    stride = p.classes;
  }
  double sum = 0.0;
  if (from) {
    for (int64_t slab = strand; slab < p.slabs; slab += kReduceStrands)
      sum += double(device::global_load(from + slab * stride));
  }
  const auto place = [&](int s) { return uint32_t(8 * (s * kReduceColumns + column)); };
  device::shared_store(place(strand), sum);
  for (int width = kReduceStrands / 2; width > 0; width /= 2) {
    device::sync_block();
    const int partner = reduce_partner(strand, width);
    if (partner < 0) continue;
    sum += device::shared_load<double>(place(partner));
    device::shared_store(place(strand), sum);
  }
  if (strand != 0 || !from) return;
  device::global_store(
      number < numbers ? p.grad_sum + number : p.bias_grad_sum + (number - numbers), sum);
}

}  // namespace moso_fast::few_classes
