// The end of a job whose rows lie on one GPU: what every row's results are, and the few facts by
// which the host judges them. Plain C++: no CUDA header.
#pragma once

#include <cstdint>

#include "../formulas.h"

namespace moso_fast::closing {

// Slots of the status word: Python reads them in this order.
constexpr int kStatusSlots = 4;

// What every byte of it is before the first pass: no row has so large an index.
constexpr int kUnset = 0x7f;

// Blocks that count rows, each a range of them: their counts are added up where they are needed.
constexpr int kCountBlocks = 64;

// Sums over the rows of one head that `finish` leaves for `judge`: of the alignments, of |g| and of
// the sample weights.
constexpr int kRowSums = 3;
// What `judge` says of a head: |G|^2, the first two of these sums, the sum of the head's weights,
// of its bias, and of the sample weights. Sums that are not finite say that a term is not.
constexpr int kHeadFacts = 6;
constexpr int kThreads = 256;
constexpr int kJudgeThreads = 512;

// All of (heads, rows), one head after the other, unless said otherwise.
struct Finish {
  float* alignment;        // <g, sum of g> / rows where `rescale`, else <g, G>; <g, G> then
  float* residual_sqnorm;  // |r|^2; |r| then
  float* grad_sqnorm;      // |r|^2 (|h|^2 + squared_one)
  float *loss, *margin, *entropy;
  const float* feature_sqnorm;  // (rows) |h|^2
  const uint8_t* counted;       // (rows); all results of other rows become NaN
  const float* sample_weight;   // (rows) or null
  const int64_t* counts;        // (kCountBlocks)
  int64_t rows;
  int heads, blocks_a_head;
  float squared_one;  // 1 with a bias, which belongs to a feature that is 1; else 0
  int rescale;
  double* sums;  // (heads, blocks_a_head, kRowSums)
};

struct Judge {
  const double* sums;  // of `finish`
  int heads, blocks_a_head, classes, dim;
  const double* grad_sum;       // (heads, classes, dim)
  const double* bias_grad_sum;  // (heads, classes), or null without a bias
  const float* weight;          // (heads, classes, dim)
  const float* bias;            // (heads, classes) or null
  const int64_t* counts;        // (kCountBlocks)
  const int64_t* status;        // (kStatusSlots)
  double* facts;                // kStatusSlots, the number of rows that count, kHeadFacts a head
  double* mean_grad_sqnorm;     // (heads)
  int64_t* count;
};

struct Score {
  const float *alignment, *grad_sqnorm;  // (heads, rows)
  const double* mean_grad_sqnorm;        // (heads)
  const int64_t* count;
  int64_t rows;
  int heads;
  Formula formula;
  double scale;
  float* score;  // (heads, rows)
};

// All throw std::runtime_error where CUDA refuses the launch.
void launch_finish(const Finish& p, int device, uintptr_t stream);
void launch_judge(const Judge& p, int device, uintptr_t stream);
void launch_score(const Score& p, int device, uintptr_t stream);
// Makes the status word what it is before a first pass.
void reset_status(int64_t* status, int device, uintptr_t stream);
// Returns when everything on the stream is done.
void wait_for(int device, uintptr_t stream);

}  // namespace moso_fast::closing
