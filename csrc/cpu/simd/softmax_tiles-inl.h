// Residuals and statistics of a tile of rows whose logits lie row by row: many classes.
#pragma once

#include "buffers-inl.h"
#include "softmax-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

// Class ids among so few take their softmax VL rows at a time: no lane sums, no lanes unused.
constexpr int64_t kLaneClasses = 128;

// Rows [first, first + count) of a problem: which of them count, |h|^2, and where to report.
struct ChosenRows {
  const Problem& p;
  int64_t first, count;
  const uint8_t* counted;
  const float* norms;
  StatusWord* status;
};

// VL rows at a time: see tile_residuals. Inlined, like that, so that the second pass, which has no
// `out`, leaves out what only the statistics need.
MOSO_INLINE void tile_residuals_by_lanes(const ChosenRows& rows, float* residual,
                                         const FirstPass* out) {
  const Problem& p = rows.p;
  const int64_t width = p.heads * p.classes;
  for (int64_t i = 0; i < rows.count; i += VL) {
    const int used = int(min<int64_t>(VL, rows.count - i));
    alignas(64) int32_t label[VL] = {};
    alignas(64) float row_weight[VL] = {};  // 0: such rows leave no residual
    for (int r = 0; r < used; ++r) {
      if (!rows.counted[i + r]) continue;
      label[r] = int32_t(p.labels[rows.first + i + r]);
      row_weight[r] = p.sample_weight ? p.sample_weight[rows.first + i + r] : 1.0f;
    }
    vi labels;
    std::memcpy(&labels, label, sizeof labels);
    for (int64_t head = 0; head < p.heads; ++head) {
      float* z = residual + i * width + head * p.classes;
      vf block[kLaneClasses];  // class, lanes along rows
      const auto each_square = [&](const auto& visit) {
        for (int64_t c = 0; c < p.classes; c += VL)
          visit(z + c, block + c, int(min<int64_t>(VL, p.classes - c)));
      };
      each_square([&](const float* from, vf* square, int classes) {
        for (int r = 0; r < VL; ++r)
          square[r] = r < used ? load_n(from + r * width, classes) : vf{};
        transpose(square);
      });
      const LaneStats stats = cross_entropy_lanes(reinterpret_cast<float*>(block), VL, p.classes,
                                                  labels, p.label_smoothing, load(row_weight));
      each_square([&](float* to, vf* square, int classes) {
        transpose(square);
        for (int r = 0; r < used; ++r) store_n(to + r * width, square[r], classes);
      });
      if (out) store_lanes(*out, head, rows.first + i, used, stats, rows.norms + i, rows.status);
    }
  }
}

// Residuals in place of the logits z (count, heads * classes), zeros for rows that do not count;
// statistics to out where it is given.
MOSO_INLINE void tile_residuals(const ChosenRows& rows, float* z, const FirstPass* out) {
  const Problem& p = rows.p;
  const int64_t width = p.heads * p.classes;
  if (p.labels && p.classes <= kLaneClasses) return tile_residuals_by_lanes(rows, z, out);
  for (int64_t i = 0; i < rows.count; ++i) {
    for (int64_t head = 0; head < p.heads; ++head) {
      float* row = z + i * width + head * p.classes;
      if (!rows.counted[i]) {
        clear(row, p.classes);
        continue;
      }
      const RowStats stats = row_stats(p, rows.first + i, row);
      if (!out) continue;
      const int64_t at = head * out->stat_stride + rows.first + i;
      out->loss[at] = stats.loss;
      out->residual_sqnorm[at] = stats.residual_sqnorm;
      out->margin[at] = stats.margin;
      out->entropy[at] = stats.entropy;
      const float ones = p.bias ? 1.0f : 0.0f;
      if (!finite(stats.residual_sqnorm * (rows.norms[i] + ones) + stats.loss))
        rows.status->note(kStatusLogits, p.first_row + rows.first + i);
    }
  }
}

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
