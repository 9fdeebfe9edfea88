// Prefetching: memory is on its way to the caches while the arithmetic goes on.
#pragma once

#include "rows-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

constexpr bool kPrefetches = VL == 16;

// `count` rows of `width` bytes, `stride` bytes apart.
struct RowBytes {
  const void* first = nullptr;
  int64_t count = 0, width = 0, stride = 0;
};

// Prefetches rows of one or two matrices that are needed soon, spread evenly over the steps of a
// product's sums: all at once they would wait for each other. Past the end it names the same line
// again and again, which costs nothing.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(int64_t steps, const RowBytes& one, const RowBytes& two = {}) : then_(two) {
    if (one.count <= 0) return;
    const int64_t bytes = one.count * one.width + two.count * two.width;
    step_ = min<int64_t>((bytes + steps - 1) / steps, 64);
    start(one);
  }

  MOSO_INLINE void take_step() {
    __builtin_prefetch(at_, 0, 2);
    at_ += step_;
    left_ -= step_;
    if (__builtin_expect(left_ <= 0, 0)) next_row();
  }

 private:
  MOSO_INLINE void start(const RowBytes& rows) {
    row_ = at_ = static_cast<const char*>(rows.first);
    rows_ = rows.count;
    width_ = left_ = rows.width;
    stride_ = rows.stride;
  }
  MOSO_INLINE void next_row() {
    left_ = width_;
    if (--rows_ > 0) {
      at_ = row_ += stride_;
    } else if (then_.count > 0) {
      start(then_);
      then_.count = 0;
    } else {
      at_ = kNothing;
      step_ = 0;
    }
  }

  static constexpr char kNothing[64] = {};
  const char* row_ = kNothing;
  const char* at_ = kNothing;
  int64_t rows_ = 0, width_ = 1, stride_ = 0, step_ = 0, left_ = 1;
  RowBytes then_;
};

// Features of `count` rows from `first` on, all columns or some, as far as there are rows.
template <class T>
inline RowBytes features_of(const Problem& p, int64_t first, int64_t count, int64_t column,
                            int64_t columns) {
  constexpr int64_t kSize = sizeof(T);
  if (first >= p.rows) return {};
  return {feature_row<T>(p, first) + column, min(count, p.rows - first), columns * kSize,
          p.row_stride * kSize};
}
// The same of residuals that lie row by row, where there are any.
inline RowBytes residuals_of(const Problem& p, const float* residual, int64_t first, int64_t count,
                             int64_t c, int64_t classes) {
  const int64_t width = p.heads * p.classes;
  if (!residual || first >= p.rows) return {};
  return {residual + first * width + c, min(count, p.rows - first), classes * 4, width * 4};
}

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
