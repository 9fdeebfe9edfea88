// What the kernels for few classes are given, and what they can take. Plain C++: no CUDA header.
#pragma once

#include <cstdint>

#include "index.cuh"

namespace moso_fast::few_classes {

enum class Feature : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// Slots of the status word: Python reads them in this order.
constexpr int kStatusLabel = 0, kStatusFeature = 1, kStatusLogits = 2;

// Registers a thread that ptxas may use, by tiles of 16 classes; 255 is the most there is.
// tests/native/cuda/test_cuda_report.py holds every architecture to them, without spills. 128 let
// two blocks of the second pass share a multiprocessor, which keeps more loads under way, and of
// narrow first passes too: one's products beside the other's exponentials.
constexpr int kFirstRegisters = 255, kNarrowRegisters = 128;
constexpr int second_registers(int tiles) { return tiles <= 2 ? 128 : 255; }

// First pass over rows [0, rows): row 0 is called first_row in status. "classes" are those of one
// head; head k, class c is line k * classes + c of weight.
struct FirstPass {
  const void* features;  // (rows, dim), row_stride elements apart
  int64_t row_stride;
  int64_t rows, first_row;
  const float* weight;         // (heads * classes, dim)
  const float* bias;           // (heads * classes) or null
  const int64_t* labels;       // (rows)
  const float* sample_weight;  // (rows) or null
  int64_t ignore_index;
  float smoothing;
  int dim, heads, classes;
  int exclude_nonfinite;
  int aligned;  // every row starts at a multiple of 16 bytes
  int bulk;     // and has a multiple of 16 bytes, on a GPU with bulk copies; two stages at least
  // Results of a row; all or none (loss == null).
  float *loss, *residual_sqnorm, *margin, *entropy;  // (heads, rows), stat_stride elements apart
  int64_t stat_stride;
  float* feature_sqnorm;  // (rows)
  uint8_t* counted;       // (rows)
  int64_t* status;
  float* residual;  // (rows, heads * classes) or null
  // Sums over the rows of each slab; both or none.
  float* partial;       // (slabs, heads * classes, partial_columns(dim))
  float* bias_partial;  // (slabs, heads * classes)
  TileWalk walk;
  FirstLayout layout;
};

// Sums of the partial sums, in float64 and in an order that depends on nothing but `slabs`.
struct Reduce {
  const float* partial;
  const float* bias_partial;
  int64_t slabs;
  int classes, dim;       // classes of all heads together
  double* grad_sum;       // (classes, dim)
  double* bias_grad_sum;  // (classes)
  // What a job of one chunk also wants, all or none (mean == null): these sums divided by `rows`,
  // and how many rows count, which closing.h puts right where it is fewer.
  float* mean;             // (classes, dim)
  float* bias_mean;        // (classes)
  const uint8_t* counted;  // (rows)
  int64_t rows;
  int64_t* counts;  // (closing::kCountBlocks)
};

struct SecondPass {
  const void* features;
  int64_t row_stride, rows;
  const float* residual;        // (rows, heads * classes)
  const float* mean_grad;       // (heads * classes, dim)
  const float* mean_bias_grad;  // (heads * classes) or null
  const float* feature_sqnorm;  // (rows)
  const uint8_t* counted;       // (rows)
  // Rows that mean_grad is the mean of: as the first pass counted them, or (null) as the host knows
  // them; 0: leave the self-term alone.
  const int64_t* count;
  int64_t mean_rows;
  float* alignment;  // (heads, rows), alignment_stride elements apart
  int64_t alignment_stride;
  int dim, heads, classes;
  int aligned;
};

// How a problem is cut, or ok == false with one reason.
struct Plan {
  bool ok;
  const char* reason;
  int tiles;     // of 16 classes: which instantiation
  bool narrow;   // the first pass for at most kNarrowColumns columns
  int parts;     // blocks for the same rows
  int together;  // blocks of the first pass that share a multiprocessor
  int tile_rows, stages;
  int64_t first_bytes, second_bytes;  // shared memory of a block
  int64_t slab_limit;                 // rows of a slab at most
};

// Terms of weights and residuals in the first pass, of the mean gradient in the second.
struct Terms {
  int first, second;
};
Terms terms_of(Feature feature, bool exact);

// `exact`: precision "highest", and "high" for 16-bit features. `classes`: of all heads.
Plan make_plan(Feature feature, bool exact, int classes, int dim, int64_t shared_limit);

}  // namespace moso_fast::few_classes
