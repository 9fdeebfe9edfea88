// The end of a job: the results of rows, the numbers that the host judges by, and the scores.
//
//   finish   a = <g, sum of g> / N, q = |r|^2 (|h|^2 + 1), |r|; NaN where a row does not count;
//            sums of a and |g| over the rows of a block
//   judge    a block for each head: |G|^2 = sum of (gradient sum / N)^2, these sums over all
//            blocks, and sums over the head's weights, which are not finite where one is not
//   score    one of the score formulas, in double
//
// Every sum has an order that depends on nothing but the sizes. PyTorch would need some twenty
// launches for the same, which take a host longer than the GPU needs for a small job. Bytes: 34 a
// row and head in `finish`, 12 in `score`, once through a head and its gradient in `judge`.
#pragma once

#include "closing.h"
#include "device.cuh"

namespace moso_fast::closing {

constexpr int kFinishBytes = kThreads * 8;
constexpr int kJudgeBytes = kJudgeThreads * 8;

// Sum of `value` over all threads of the block, for all of them. A tree: thread t adds what thread
// t + half holds. Shared memory may be used again after it.
template <int Threads>
MOSO_DEVICE double block_sum(double value) {
  const int thread = device::thread_index();
  device::shared_store(uint32_t(8 * thread), value);
  for (int half = Threads / 2; half > 0; half /= 2) {
    device::sync_block();
    if (thread >= half) continue;
    value += device::shared_load<double>(uint32_t(8 * (thread + half)));
    device::shared_store(uint32_t(8 * thread), value);
  }
  device::sync_block();
  const double sum = device::shared_load<double>(0);
  device::sync_block();
  return sum;
}

// Rows that count, for all threads of the block.
template <int Threads>
MOSO_DEVICE double counted_rows(const int64_t* counts) {
  static_assert(Threads >= kCountBlocks, "a thread for each");
  const int thread = device::thread_index();
  return block_sum<Threads>(thread < kCountBlocks ? double(device::global_load(counts + thread))
                                                  : 0.0);
}

// Launch with heads * blocks_a_head blocks of kThreads threads and kFinishBytes.
MOSO_DEVICE void finish(const Finish& p) {
  const uint32_t blocks = uint32_t(p.blocks_a_head), number = uint32_t(device::block_index());
  const int head = int(number / blocks);
  const int64_t block = number % blocks;
  const float nan = device::bits_float(0x7fc00000u);
  const double count = counted_rows<kThreads>(p.counts);
  // Exactly 1 where all rows count; without one that does, nothing is scaled.
  const double factor = p.rescale && count > 0.0 ? double(p.rows) / count : 1.0;
  double alignments = 0.0, norms = 0.0, weights = 0.0;
  for (int64_t row = block * kThreads + device::thread_index(); row < p.rows;
       row += int64_t(p.blocks_a_head) * kThreads) {
    const int64_t at = head * p.rows + row;
    if (p.sample_weight) weights += double(device::global_load(p.sample_weight + row));
    if (!device::global_load(p.counted + row)) {
      device::global_store(p.alignment + at, nan);
      device::global_store(p.residual_sqnorm + at, nan);
      device::global_store(p.grad_sqnorm + at, nan);
      device::global_store(p.loss + at, nan);
      device::global_store(p.margin + at, nan);
      device::global_store(p.entropy + at, nan);
      continue;
    }
    const float squared = device::global_load(p.residual_sqnorm + at);
    const float norm = squared * (device::global_load(p.feature_sqnorm + row) + p.squared_one);
    float alignment = device::global_load(p.alignment + at);
    if (p.rescale) {
      alignment = float(double(alignment) * factor);
      device::global_store(p.alignment + at, alignment);
    }
    device::global_store(p.grad_sqnorm + at, norm);
    device::global_store(p.residual_sqnorm + at, device::square_root(squared));
    alignments += double(alignment);
    norms += double(device::square_root(norm));
  }
  const double sums[kRowSums] = {block_sum<kThreads>(alignments), block_sum<kThreads>(norms),
                                 block_sum<kThreads>(weights)};
  if (device::thread_index() != 0) return;
  double* to = p.sums + device::block_index() * kRowSums;
  MOSO_UNROLL
  for (int i = 0; i < kRowSums; ++i) device::global_store(to + i, sums[i]);
}

// Launch with `heads` blocks of kJudgeThreads threads and kJudgeBytes.
MOSO_DEVICE void judge(const Judge& p) {
  const int64_t head = device::block_index();
  const int thread = device::thread_index();
  const int64_t elements = int64_t(p.classes) * p.dim;
  const double count = counted_rows<kJudgeThreads>(p.counts);
  const double divisor = count > 0.0 ? count : 1.0;
  double squares = 0.0, weights = 0.0, biases = 0.0;
  for (int64_t i = thread; i < elements; i += kJudgeThreads) {
    const double mean = device::global_load(p.grad_sum + head * elements + i) / divisor;
    squares += mean * mean;
    weights += double(device::global_load(p.weight + head * elements + i));
  }
  if (p.bias) {
    for (int i = thread; i < p.classes; i += kJudgeThreads) {
      const double mean = device::global_load(p.bias_grad_sum + head * p.classes + i) / divisor;
      squares += mean * mean;
      biases += double(device::global_load(p.bias + head * p.classes + i));
    }
  }
  double rows[kRowSums] = {};
  for (int block = thread; block < p.blocks_a_head; block += kJudgeThreads) {
    const double* from = p.sums + (head * p.blocks_a_head + block) * kRowSums;
    MOSO_UNROLL
    for (int i = 0; i < kRowSums; ++i) rows[i] += device::global_load(from + i);
  }
  const double mean_grad_sqnorm = block_sum<kJudgeThreads>(squares);
  const double facts[kHeadFacts] = {mean_grad_sqnorm,
                                    block_sum<kJudgeThreads>(rows[0]),
                                    block_sum<kJudgeThreads>(rows[1]),
                                    block_sum<kJudgeThreads>(weights),
                                    block_sum<kJudgeThreads>(biases),
                                    block_sum<kJudgeThreads>(rows[2])};
  if (thread != 0) return;
  double* to = p.facts + kStatusSlots + 1 + head * kHeadFacts;
  MOSO_UNROLL
  for (int i = 0; i < kHeadFacts; ++i) device::global_store(to + i, facts[i]);
  device::global_store(p.mean_grad_sqnorm + head, mean_grad_sqnorm);
  if (head != 0) return;
  for (int slot = 0; slot < kStatusSlots; ++slot)
    device::global_store(p.facts + slot, double(device::global_load(p.status + slot)));
  device::global_store(p.facts + kStatusSlots, count);
  device::global_store(p.count, int64_t(count));
}

struct Root {
  MOSO_DEVICE double operator()(double x) const { return device::square_root(x); }
};

// Launch with ceil(heads * rows / kThreads) blocks of kThreads threads.
MOSO_DEVICE void score(const Score& p) {
  const int64_t at = device::block_index() * kThreads + device::thread_index();
  if (at >= p.heads * p.rows) return;
  const double value = score_of(p.formula, double(device::global_load(p.alignment + at)),
                                double(device::global_load(p.grad_sqnorm + at)),
                                device::global_load(p.mean_grad_sqnorm + at / p.rows),
                                double(device::global_load(p.count)), Root{});
  device::global_store(p.score + at, float(value * p.scale));
}

}  // namespace moso_fast::closing
