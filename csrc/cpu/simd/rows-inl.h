// Which rows take part, where they lie, and where the sums over them go.
#pragma once

#include "vectors-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

// The smallest offending row of each kind, kept by every worker and merged at the end.
struct StatusWord {
  int64_t first[kStatusSlots];
  StatusWord() {
    for (int64_t& row : first) row = INT64_MAX;
  }
  void note(Status slot, int64_t row) { first[slot] = min(first[slot], row); }
  void merge_into(int64_t* status) const {
    for (int slot = 0; slot < kStatusSlots; ++slot) status[slot] = min(status[slot], first[slot]);
  }
};

// Whether a row of targets may be used (NaN never passes).
inline bool good_target(const Problem& p, const float* target) {
  double total = 0.0;
  for (int64_t c = 0; c < p.classes; ++c) {
    const float t = target[c];
    if (p.loss == Loss::kMse ? !finite(t) : !(t >= 0.0f && t <= 1.0f)) return false;
    total += t;
  }
  return p.loss != Loss::kCrossEntropy || absolute(total - 1.0) <= p.target_tolerance;
}

// Whether the label (or target) lets a row take part.
inline bool takes_part(const Problem& p, int64_t row, StatusWord* status) {
  if (p.targets) {
    if (good_target(p, p.targets + row * p.classes)) return true;
    status->note(kStatusTarget, p.first_row + row);
    return false;
  }
  const int64_t label = p.labels[row];
  if (label == p.ignore_index) return false;
  if (label >= 0 && label < p.classes) return true;
  status->note(kStatusLabel, p.first_row + row);
  return false;
}

template <class T>
inline bool all_finite(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d)
    if (!finite(widen(row[d]))) return false;
  return true;
}

// Whether a row whose squared norm is not finite must be left out (its norm may just overflow).
template <class T>
inline bool has_nonfinite(const Problem& p, int64_t row, const T* features, StatusWord* status) {
  if (all_finite(features, p.dim)) return false;
  if (!p.exclude_nonfinite) status->note(kStatusFeature, p.first_row + row);
  return true;
}

template <class T>
inline const T* feature_row(const Problem& p, int64_t row) {
  return static_cast<const T*>(p.features) + row * p.row_stride;
}

// Rows of one slab: enough slabs to share out, few enough that adding their partials is cheap,
// and never more rows than float32 sums stand. The same whatever the number of threads.
inline int64_t slab_rows(int64_t rows, int64_t tile) {
  const int64_t aim = clamp<int64_t>((rows + 63) / 64, 2 * tile, 4096);
  return (aim + tile - 1) / tile * tile;
}

// Adds a slab's float32 partial to the float64 total.
inline void add_to_total(double* total, const float* part, int64_t elements) {
  for (int64_t i = 0; i < elements; ++i) total[i] += double(part[i]);
}

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
