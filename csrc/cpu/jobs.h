// The jobs that the CPU kernels take: raw pointers and sizes, no framework. read_jobs.h binds
// them to the names that Python uses.
//
// Notation as in DESIGN: features H (rows x dim), heads W (heads x classes x dim), residual R,
// mean gradient G. "width" is heads * classes: all heads share one sweep over H.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace moso_fast {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Loss : int { kCrossEntropy = 0, kBinaryCrossEntropy = 1, kMse = 2 };

// Slots of the status word: Python reads them in this order.
enum Status : int { kStatusLabel, kStatusFeature, kStatusLogits, kStatusTarget, kStatusSlots };

// What both passes read. Features have unit column stride; row_stride counts elements.
struct Problem {
  const void* features;
  DType dtype;
  int64_t row_stride;
  int64_t first_row;  // of this range, within the whole problem: only for the status word
  int64_t rows;
  int64_t dim;
  int64_t heads;
  int64_t classes;
  const float* weight;         // (heads * classes, dim)
  const float* bias;           // (heads * classes) or null
  const int64_t* labels;       // (rows) class ids, or null where targets are given
  const float* targets;        // (rows, classes) or null
  const float* sample_weight;  // (rows) or null
  Loss loss;
  float label_smoothing;
  float target_tolerance;  // allowed deviation of label probabilities from sum 1
  int64_t ignore_index;
  bool exclude_nonfinite;
  Threads threads;
  // How the work is cut; never depends on the number of threads.
  bool few_classes;    // tile kernels that keep all classes of a row in registers
  bool bf16_products;  // many classes: operands rounded to bfloat16, sums float32
  bool split_grad;     // mean gradient in blocks of classes x columns instead of slabs of rows
};

// Statistics are (heads, rows) with stat_stride between heads.
struct FirstPass {
  Problem problem;
  float* loss;
  float* residual_sqnorm;
  float* margin;
  float* entropy;
  int64_t stat_stride;
  float* feature_sqnorm;  // (rows)
  uint8_t* counted;       // (rows)
  int64_t* status;        // (kStatusSlots): smallest offending row so far
  float* residual;        // (rows, heads * classes), or null unless split_grad; with few_classes
                          // (heads * classes, rows)
  double* grad_sum;       // (heads * classes, dim), added to; or null, with split_grad alone and
                          // where these rows are all there are: the next two instead
  double* bias_grad_sum;  // (heads * classes), added to
  float* mean_grad;       // (heads * classes, dim) G
  double* mean_squares;   // (heads * classes, blocks of kSquareColumns columns) sums of the squares
                          // of G before it is rounded
};

constexpr int64_t kSquareColumns = 256;

struct SecondPass {
  Problem problem;
  const uint8_t* counted;       // (rows)
  const float* residual;        // as the first pass wrote it, or null: compute it again
  const float* mean_grad;       // (heads * classes, dim)
  const float* mean_bias_grad;  // (heads * classes) or null
  double self_term_scale;       // 1 / N: put right what rounding took from a row's own term; or 0
  float* alignment;             // (heads, rows) with alignment_stride between heads
  int64_t alignment_stride;
};

}  // namespace moso_fast
