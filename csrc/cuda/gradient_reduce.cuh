// Sum of the partial mean gradients of all slabs, in float64 and in one order for every GPU.
//
//   grad_sum(c, d) = sum over slabs of partial(slab, c, d)     the bias sums likewise
//
// A block owns 32 neighbouring elements. Strand s of 16 adds slabs s, s + 16, .. and a tree over
// the strands ends it:
//
//   strand   0   1   2  ..  15       s += s + 8;  s += s + 4;  s += s + 2;  s += s + 1
//
// Bytes: slabs x C x D x 4, from the L2 cache where they fit; one addition each.
//
// Where a job has one chunk, the mean is written beside the sums (divided by all its rows: how many
// of them count is not known yet), and kCountBlocks more blocks count the rows that do.
#pragma once

#include "closing.h"
#include "device.cuh"
#include "few_classes.h"
#include "index.cuh"

namespace moso_fast::few_classes {

constexpr int kReduceThreads = kReduceColumns * kReduceStrands;
constexpr int kReduceBytes = kReduceThreads * 8;

// Blocks of the sums, which come before those that count.
MOSO_HD int64_t sum_blocks(const Reduce& p) {
  return ceil_div(int64_t(p.classes) * p.dim + p.classes, kReduceColumns);
}
MOSO_HD int64_t reduce_blocks(const Reduce& p) {
  return sum_blocks(p) + (p.mean ? closing::kCountBlocks : 0);
}

// Number of rows that count in the share of this block, four neighbours at a time.
MOSO_DEVICE void count_rows(const Reduce& p, int64_t block) {
  const int thread = device::thread_index();
  const int64_t share = ceil_div(ceil_div(p.rows, 4), closing::kCountBlocks) * 4;
  const int64_t begin = block * share, end = begin + share < p.rows ? begin + share : p.rows;
  uint32_t count = 0;
  for (int64_t row = begin + 4 * thread; row < end; row += 4 * kReduceThreads) {
    if (row + 4 <= end) {
      // One byte each, 0 or 1: their sum is the highest byte of this product.
      const auto* four = reinterpret_cast<const uint32_t*>(p.counted + row);
      count += (device::global_load(four) * 0x01010101u) >> 24;
    } else {
      for (int64_t i = row; i < end; ++i) count += device::global_load(p.counted + i);
    }
  }
  device::shared_store(uint32_t(4 * thread), count);
  for (int half = kReduceThreads / 2; half > 0; half /= 2) {
    device::sync_block();
    if (thread >= half) continue;
    count += device::shared_load<uint32_t>(uint32_t(4 * (thread + half)));
    device::shared_store(uint32_t(4 * thread), count);
  }
  if (thread == 0) device::global_store(p.counts + block, int64_t(count));
}

// Launch with reduce_blocks blocks of kReduceThreads threads and kReduceBytes.
MOSO_DEVICE void reduce_partials(const Reduce& p) {
  if (device::block_index() >= sum_blocks(p))
    return count_rows(p, device::block_index() - sum_blocks(p));
  const int column = device::thread_index() % kReduceColumns;
  const int strand = device::thread_index() / kReduceColumns;
  const int elements = p.classes * p.dim, columns = partial_columns(p.dim);
  const int element = int(device::block_index()) * kReduceColumns + column;
  const float* from = nullptr;
  int64_t stride = 0;
  if (element < elements) {
    from = p.partial + int64_t(element / p.dim) * columns + element % p.dim;
    stride = int64_t(p.classes) * columns;
  } else if (element < elements + p.classes) {
    from = p.bias_partial + (element - elements);
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
  const bool of_bias = element >= elements;
  device::global_store(of_bias ? p.bias_grad_sum + (element - elements) : p.grad_sum + element,
                       sum);
  if (p.mean)
    device::global_store(of_bias ? p.bias_mean + (element - elements) : p.mean + element,
                         float(sum / double(p.rows)));
}

}  // namespace moso_fast::few_classes
